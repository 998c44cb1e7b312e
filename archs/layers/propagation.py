"""Recurrent propagation: what a compact network does in the place of attention, at a fraction of its cost.

Every frame hands what it has seen on to its neighbour, moved by the flow between them: once backward and once forward
in time (BasicVSR, Chan et al., CVPR 2021). Nothing of this is in the published STDAN: it is our choice for networks of
about a million parameters, which window attention would make too slow, over input and middle frames alike.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from archs.layers.blocks import conv3x3, lrelu, stack_frames, zero
from archs.layers.deform import warp
from archs.layers.motion_prior import FrameMotion, MiddleMotion


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))); the second convolution starts small, so that a deep stack starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv3x3(channels, channels)
        self.second = conv3x3(channels, channels)
        nn.init.normal_(self.second.weight, std=1e-3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape out."""
        return x + self.second(torch.relu(self.first(x)))


class ResidualTrunk(nn.Module):
    """A convolution to ``channels``, then residual blocks: the plain alternative to `SwinTrunk`."""

    def __init__(self, channels_in: int, channels: int, depth: int) -> None:
        super().__init__()
        self.enter = conv3x3(channels_in, channels)
        self.groups = nn.ModuleList(ResidualBlock(channels) for _ in range(depth))

    def forward(self, x: Float[Tensor, "b cin h w"]) -> Float[Tensor, "b c h w"]:
        """Frames are independent of each other."""
        x = lrelu(self.enter(x))
        for block in self.groups:
            x = block(x)
        return x


class WarpedMiddle(nn.Module):
    """Features of the frames in between: both neighbours moved to the middle, then mixed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = conv3x3(2 * channels, channels)

    def forward(self, features: Float[Tensor, "b t c h w"], motion: MiddleMotion) -> Float[Tensor, "b gaps c h w"]:
        """Features of T frames -> of the T-1 frames half-way between them."""
        earlier = warp(features[:, :-1].flatten(0, 1), motion.to_earlier.flatten(0, 1))
        later = warp(features[:, 1:].flatten(0, 1), motion.to_later.flatten(0, 1))
        share = motion.mix.flatten(0, 1).to(earlier.dtype)
        mean = share * earlier + (1 - share) * later
        between = mean + self.mix(torch.cat([earlier, later], dim=1))
        return between.unflatten(0, motion.to_earlier.shape[:2])


class Propagation(nn.Module):
    """Aggregate over time: (B, U, C, h, w) -> (B, U, C, h, w), the residual included.

    Backward first, then forward with what came backward; ``depth`` residual blocks a step.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.backward_step = ResidualTrunk(2 * channels, channels, depth)
        self.forward_step = ResidualTrunk(3 * channels, channels, depth)
        self.project = zero(conv3x3(2 * channels, channels))

    def forward(self, sequence: Float[Tensor, "b u c h w"], motion: FrameMotion) -> Float[Tensor, "b u c h w"]:
        """``motion`` leads from every frame to its neighbours."""
        frames = sequence.unbind(1)
        behind: list[Tensor] = []  # of frames u-1, u-2, ...
        state = torch.zeros_like(frames[0])
        for j in reversed(range(len(frames))):
            if behind:
                state = warp(state, motion.following[:, j])
            state = self.backward_step(torch.cat([frames[j], state], dim=1))
            behind.append(state)
        ahead: list[Tensor] = []
        state = torch.zeros_like(frames[0])
        for j, frame in enumerate(frames):
            if ahead:
                state = warp(state, motion.preceding[:, j - 1])
            state = self.forward_step(torch.cat([frame, behind[-1 - j], state], dim=1))
            ahead.append(state)
        seen = torch.cat([stack_frames(states).flatten(0, 1) for states in (ahead, behind[::-1])], dim=1)
        return sequence + self.project(seen).unflatten(0, sequence.shape[:2])
