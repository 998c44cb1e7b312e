"""LSTFI: long short-term feature interpolation (STDAN, Wang et al., 2022), the features of the frames in between.

Short term: the two neighbours of a gap are aligned to its middle. Long term: a hidden state carries what earlier gaps
have seen, forward and backward in time with the same weights. Both directions run as one batch, and everything that
does not depend on the hidden state is computed for all gaps at once: exact, and faster than the published order.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from archs.layers.blocks import FeaturePyramid, conv1x1, conv3x3, lrelu, stack_frames
from archs.layers.deform import OffsetGuidance
from archs.layers.frequency_align import ClipSpectra, SpectrumGuidance
from archs.layers.motion_prior import MiddleMotion
from archs.layers.pyramid_align import DualPyramidAlign, seen_through


class RecurrentStep(nn.Module):
    """One step of the recurrence: align the hidden state to the gap's features, merge, and make the next state."""

    def __init__(self, channels: int, levels: int, groups: int) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(channels, levels)
        self.align = DualPyramidAlign(channels, levels, groups)
        self.merge = conv1x1(2 * channels, channels)
        self.next1 = conv3x3(channels, channels)
        self.next2 = conv3x3(channels, channels)

    def forward(
        self, gap: Float[Tensor, "b c h w"], hidden: Float[Tensor, "b c h w"], flow: Tensor | None
    ) -> Float[Tensor, "b c h w"]:
        """The gap's features with the past merged in; ``flow`` leads from this gap to the hidden state's."""
        here, there = (list(level) for level in zip(*self._pyramids(gap, hidden), strict=True))
        aligned = self.align(here, there, (None, flow))
        return self.merge(torch.cat([aligned, gap], dim=1))

    def next_hidden(self, merged: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The state that the next gap receives."""
        return self.next2(lrelu(self.next1(merged)))

    def _pyramids(self, gap: Tensor, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Level by level (gap, hidden), computed as one batch."""
        both = self.pyramid(torch.cat([gap, hidden]))
        return [tuple(level.chunk(2)) for level in both]


class FeatureInterpolation(nn.Module):
    """Features of T frames -> features of the T-1 frames half-way between them.

    ``guidance`` of the same channels, levels and groups tells the short-term alignment what the frames' spectra know;
    it may also be assigned later. The hidden state, which starts without a spectrum, is aligned without it.
    """

    def __init__(
        self, channels: int, levels: int, groups: int, *, guidance: SpectrumGuidance | None = None
    ) -> None:
        super().__init__()
        self.levels, self.groups = levels, groups
        self.pyramid = FeaturePyramid(channels, levels)
        self.align = DualPyramidAlign(channels, levels, groups)
        self.step = RecurrentStep(channels, levels, groups)
        self.fuse_directions = conv1x1(2 * channels, channels)
        self.guidance = guidance

    def forward(
        self, features: Float[Tensor, "b t c h w"], motion: MiddleMotion | None = None
    ) -> Float[Tensor, "b t-1 c h w"]:
        """``motion``, if known, is where alignment starts; None lets it start from no motion, as published."""
        gaps = self._short_term(features, motion)
        forward, backward = self._long_term(gaps, motion)
        both = torch.cat([forward.flatten(0, 1), backward.flatten(0, 1)], dim=1)
        return self.fuse_directions(both).unflatten(0, forward.shape[:2])

    def _short_term(
        self, features: Float[Tensor, "b t c h w"], motion: MiddleMotion | None
    ) -> Float[Tensor, "2 b t-1 c h w"]:
        """Every gap seen in both directions of time: its earlier frame first, or its later one."""
        b, t = features.shape[:2]
        pyramid = [level.unflatten(0, (b, t)) for level in self.pyramid(features.flatten(0, 1))]
        earlier = [level[:, :-1] for level in pyramid]
        later = [level[:, 1:] for level in pyramid]
        first = [stack_frames(pair, dim=0).flatten(0, 2) for pair in zip(earlier, later, strict=True)]
        second = [stack_frames(pair, dim=0).flatten(0, 2) for pair in zip(later, earlier, strict=True)]
        flows: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if motion is not None:
            to_first = torch.stack([motion.to_earlier, motion.to_later]).flatten(0, 2)
            to_second = torch.stack([motion.to_later, motion.to_earlier]).flatten(0, 2)
            flows = (to_first, to_second)
        aligned = self.align(first, second, flows, self._guidance(pyramid, motion))
        return aligned.unflatten(0, (2, b, t - 1))

    def _guidance(
        self, pyramid: list[Tensor], motion: MiddleMotion | None
    ) -> tuple[list[OffsetGuidance] | None, list[OffsetGuidance] | None]:
        """For sampling the first and the second frame of the pairs of both directions; flows leave it what remains."""
        if self.guidance is None:
            return None, None
        if motion is None:
            spectra = self.guidance.spectra(pyramid)
            earlier, later = spectra.frames(slice(-1)), spectra.frames(slice(1, None))
        else:
            earlier = _seen_spectra(self.guidance, [level[:, :-1] for level in pyramid], motion.to_earlier)
            later = _seen_spectra(self.guidance, [level[:, 1:] for level in pyramid], motion.to_later)
        of_earlier, of_later = self.guidance(earlier, later)
        pairs = list(zip(of_earlier, of_later, strict=True))
        return [a.joined(b) for a, b in pairs], [b.joined(a) for a, b in pairs]

    def _long_term(self, gaps: Tensor, motion: MiddleMotion | None) -> tuple[Tensor, Tensor]:
        """Run the recurrence over the gaps, forward and backward in time as one batch of 2B."""
        _, b, count = gaps.shape[:3]
        hidden = torch.zeros_like(gaps[:, :, 0].flatten(0, 1))
        merged: list[Tensor] = []
        for i in range(count):
            here = torch.cat([gaps[0, :, i], gaps[1, :, count - 1 - i]])
            if i:
                hidden = self.step.next_hidden(merged[-1])
            flow = None if motion is None or i == 0 else motion.to_previous_gap(i)
            merged.append(self.step(here, hidden, flow))
        forward = stack_frames([x[:b] for x in merged])
        backward = stack_frames([x[b:] for x in reversed(merged)])
        return forward, backward


def _seen_spectra(
    guidance: SpectrumGuidance, pyramid: list[Tensor], flow: Float[Tensor, "b t 2 h w"]
) -> ClipSpectra:
    """Spectra of frames moved by the flow, as the alignment sees them."""
    _, seen = seen_through([level.flatten(0, 1) for level in pyramid], flow.flatten(0, 1))
    return guidance.spectra([level.unflatten(0, flow.shape[:2]) for level in seen])
