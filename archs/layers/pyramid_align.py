"""PCD: pyramid, cascading and deformable alignment of two frames (EDVR, Wang et al., CVPRW 2019), as STDAN uses it.

`PyramidAlign` samples the first frame's features where the pair, seen coarse to fine, says that they belong;
`DualPyramidAlign` does so for both frames of a pair with its own weights for each. An optional flow per frame
(`motion`) is where sampling starts, and optional `guidance` per frame and level is what else is known about the
offsets; without them offsets grow from the convolutions alone, as published.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import conv1x1, conv3x3, lrelu, upsample2x
from archs.layers.deform import ModulatedDeformConv, OffsetGuidance, guided, warp
from archs.layers.motion_distillation import MotionDistillation

Pyramid = list[Tensor]  # level l: (B, C, h/2^l, w/2^l)
Guidance = Sequence[OffsetGuidance]  # level by level


class AlignLevel(nn.Module):
    """One level: offset features from the pair and the coarser level, then a deformable convolution of the first."""

    def __init__(self, channels: int, groups: int, *, coarsest: bool) -> None:
        super().__init__()
        self.pair = conv3x3(2 * channels, channels)
        self.offset = conv3x3(channels, channels) if coarsest else conv3x3(2 * channels, channels)
        self.refine = None if coarsest else conv3x3(channels, channels)
        self.deform = ModulatedDeformConv(channels, groups)
        self.fuse = None if coarsest else conv3x3(2 * channels, channels)
        self.motion: MotionDistillation | None = None  # what the spectra of the pair add to the offset features

    def forward(
        self,
        first: Tensor,
        seen: Tensor,
        second: Tensor,
        coarser: tuple[Tensor, Tensor] | None,
        flow: Tensor | None,
        guidance: OffsetGuidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(offset features, aligned features), both (B, C, h, w) before the last activation of the aligned ones.

        ``first`` is sampled; ``seen`` and ``second`` are what the offsets are read from. The guidance's addition is
        part of the offset features that the finer level receives.
        """
        guide = lrelu(self.pair(torch.cat([seen, second], dim=1)))
        if coarser is None:
            guide = self._moved(guided(lrelu(self.offset(guide)), guidance), seen, second)
            return guide, self.deform(first, guide, flow, guidance)
        assert self.refine is not None and self.fuse is not None
        coarser_guide, coarser_aligned = (upsample2x(x) for x in coarser)
        # an offset of one coarse pixel is two fine ones: the guide's features double with the size
        guide = lrelu(self.offset(torch.cat([guide, 2 * coarser_guide], dim=1)))
        guide = self._moved(guided(lrelu(self.refine(guide)), guidance), seen, second)
        return guide, self.fuse(torch.cat([self.deform(first, guide, flow, guidance), coarser_aligned], dim=1))

    def _moved(self, guide: Tensor, seen: Tensor, second: Tensor) -> Tensor:
        return guide if self.motion is None else guide + self.motion(seen, second, guide)


class PyramidAlign(nn.Module):
    """Align the first pyramid of a pair using the second."""

    def __init__(self, channels: int, levels: int, groups: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            AlignLevel(channels, groups, coarsest=level == levels - 1) for level in range(levels)
        )

    def forward(
        self,
        first: Pyramid,
        seen: Pyramid,
        second: Pyramid,
        flows: list[Tensor] | list[None],
        guidance: Guidance | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Aligned features of level 0; every level but the finest ends in lrelu."""
        coarser = None
        for level in reversed(range(len(first))):
            known = None if guidance is None else guidance[level]
            guide, aligned = self.levels[level](first[level], seen[level], second[level], coarser, flows[level], known)
            coarser = (guide, lrelu(aligned) if level else aligned)
        assert coarser is not None
        return coarser[1]


class DualPyramidAlign(nn.Module):
    """Both frames of a pair aligned to where they meet, each with the other's help: cat[P1(a, b), P2(b, a)] -> C."""

    def __init__(self, channels: int, levels: int, groups: int) -> None:
        super().__init__()
        self.align_first = PyramidAlign(channels, levels, groups)
        self.align_second = PyramidAlign(channels, levels, groups)
        self.fuse = conv1x1(2 * channels, channels)

    def forward(
        self,
        first: Pyramid,
        second: Pyramid,
        motion: tuple[Tensor | None, Tensor | None] = (None, None),
        guidance: tuple[Guidance | None, Guidance | None] = (None, None),
    ) -> Float[Tensor, "b c h w"]:
        """Features where the two frames meet.

        ``motion``: flows (B, 2, h, w) from the meeting place to each frame; ``guidance``: for sampling each frame, of
        the pair as seen through the flows. None where nothing is known.
        """
        flows_a, seen_a = seen_through(first, motion[0])
        flows_b, seen_b = seen_through(second, motion[1])
        aligned_a = self.align_first(first, seen_a, seen_b, flows_a, guidance[0])
        aligned_b = self.align_second(second, seen_b, seen_a, flows_b, guidance[1])
        return self.fuse(torch.cat([aligned_a, aligned_b], dim=1))


def seen_through(pyramid: Pyramid, flow: Tensor | None) -> tuple[list[Tensor] | list[None], Pyramid]:
    """The flow at every level and the pyramid warped by it; a pyramid without a flow is seen as it is."""
    if flow is None:
        return [None] * len(pyramid), pyramid
    flows = [flow]
    for _ in pyramid[1:]:
        flows.append(F.avg_pool2d(flows[-1], 2) / 2)
    return flows, [warp(features, level) for features, level in zip(pyramid, flows, strict=True)]
