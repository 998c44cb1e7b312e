"""Spectrum-guided alignment: what two frames' spectra tell the offsets of a deformable convolution.

Inspired by SPA, the spectrum prior-guided alignment of Zhu et al. (ICCV 2023), of which neither code nor formulas are
public: this is our reconstruction of its intent and reproduces nothing. For every pyramid level of a pair of frames,
`SpectrumGuidance` yields

- an *addition* to the offset features: maps made of the cross spectrum's phases (motion) and of the ratio of the
  amplitudes (how blur changes), mixed bin by bin with the same weights at every frequency;
- a *gain* of the offsets and a *shift* of the modulation logits, from a descriptor of 20 numbers: shift and
  confidence of phase correlation, log amplitude ratio and coherence in 8 radial bands;
- a *base*: the phase correlation's shift as the place where sampling starts, weighed by its confidence.

All end in zeros: fresh guidance changes nothing. Everything is measured once per pair and used by both branches with
the roles swapped; Fourier transforms and projections are computed once per frame (`ClipSpectra`). Only the addition is
learnt per bin; sizes enter nowhere, so crops may train what runs on frames.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import conv1x1, conv3x3, per_frame, zero
from archs.layers.deform import OffsetGuidance
from archs.layers.phase_correlation import spectral_shift, spread, whiten, window_side, window_spectra
from archs.layers.spectral import HIGHEST, band_energies, frequencies, irfft2, radial_bands, rfft2

BANDS = 8
DESCRIPTORS = 4 + 2 * BANDS
TYPICAL_SHIFT = 8.0  # px; brings shifts to the range of the other descriptors


class ClipSpectra(NamedTuple):
    """What guidance needs of the frames of a clip, once for all pairs of them."""

    bins: list[Complex[Tensor, "b t k h wf"]]  # half spectra of the projected features, level by level
    sizes: list[tuple[int, int]]  # (h, w) of the levels
    windows: Complex[Tensor, "b t nh nw k s wf"]  # tapered windows of level 0, for phase correlation

    def frames(self, which: slice | list[int]) -> "ClipSpectra":
        """Some of the frames, in the given order."""
        return ClipSpectra([x[:, which] for x in self.bins], self.sizes, self.windows[:, which])


class PairMotion(NamedTuple):
    """The shift between two frames at every pixel, ``second(p) = first(p - vector)``, and its confidence in 0..1."""

    vector: Float[Tensor, "b 2 h w"]
    confidence: Float[Tensor, "b 1 h w"]

    def reversed(self) -> "PairMotion":
        """The same motion seen from the second frame."""
        return PairMotion(-self.vector, self.confidence)

    def at(self, size: tuple[int, int], level: int) -> "PairMotion":
        """The motion on the grid of a pyramid level, in its pixels of 2^level."""
        if not level:
            return self
        vector, confidence = (F.interpolate(x, size, mode="bilinear", align_corners=False) for x in self)
        return PairMotion(vector / 2**level, confidence)


class SpectrumGuidance(nn.Module):
    """Guidance for the offsets of both branches of a pair, at every level of a pyramid of features.

    ``guide`` switches addition, gain and shift, ``prior`` the base; ``motion`` chooses how the addition is made:
    "filter" or "surface" (`SpectralMotion` carried or not), or "fcvsr". Spectra are those of ``projected`` channels,
    and without ``guide`` of all; phase correlation works on windows of ``window`` px of level 0. The parts fit
    deformable sampling of ``channels`` and ``groups``, as of `DualPyramidAlign` or, with one level, of
    `DeformableAttention`. Raises ValueError for choices that do not exist and if both parts are off.

        spectra = guidance.spectra(pyramid)                                       # once a clip
        first, second = guidance(spectra.frames(slice(-1)), spectra.frames(slice(1, None)))  # neighbours, to half-way
        at_target = guidance.toward(spectra.frames(sources), spectra.frames([target] * len(sources)))
    """

    def __init__(
        self, channels: int, groups: int, levels: int = 3, *, guide: bool = True, prior: bool = True,
        motion: Literal["filter", "surface", "fcvsr"] = "filter", projected: int = 16, window: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        if not (guide or prior):
            raise ValueError("spectrum guidance with guide=False and prior=False guides nothing: leave it out")
        if motion not in MOTIONS:
            raise ValueError(f"motion={motion!r} is none of {', '.join(MOTIONS)}")
        window_side((window, window), window)  # refuses what is no multiple of 4
        self.window = window
        # means are removed: a bias would be dead
        self.project = nn.ModuleList(
            nn.Conv2d(channels, projected, 1, bias=False) if guide else nn.Identity() for _ in range(levels)
        )
        self.levels = nn.ModuleList(
            LevelGuidance(channels, groups, projected, motion if guide else None, prior) for _ in range(levels)
        )

    def spectra(self, pyramid: Sequence[Float[Tensor, "b t c _ _"]]) -> ClipSpectra:
        """Spectra of a clip's features; level l of the pyramid is (B, T, C, h/2^l, w/2^l)."""
        projected = [per_frame(project, x).float() for project, x in zip(self.project, pyramid, strict=True)]
        bins = [rfft2(x - x.mean((-2, -1), keepdim=True)) for x in projected]
        sizes = [(x.shape[-2], x.shape[-1]) for x in pyramid]
        return ClipSpectra(bins, sizes, window_spectra(projected[0], self.window))

    def forward(
        self, first: ClipSpectra, second: ClipSpectra, tau: float = 0.5
    ) -> tuple[list[OffsetGuidance], list[OffsetGuidance]]:
        """For aligning ``first`` and ``second`` to the time ``tau`` (0..1) between them: guidance of both, by level.

        Frames t of both form the pairs; the batch of what comes out is B*T.
        """
        motion = self.pair_motion(first, second)
        return self.toward(first, second, tau, motion), self.toward(second, first, 1 - tau, motion.reversed())

    def toward(
        self, sampled: ClipSpectra, other: ClipSpectra, share: float = 1.0, motion: PairMotion | None = None
    ) -> list[OffsetGuidance]:
        """For sampling one frame on its way to another, ``share`` of the way: 1 aligns it to the other frame itself."""
        motion = self.pair_motion(sampled, other) if motion is None else motion
        return [
            guidance(a.flatten(0, 1), b.flatten(0, 1), motion.at(size, level), share)
            for level, (guidance, a, b, size) in enumerate(
                zip(self.levels, sampled.bins, other.bins, sampled.sizes, strict=True)
            )
        ]

    def pair_motion(self, first: ClipSpectra, second: ClipSpectra) -> PairMotion:
        """Phase correlation of level 0 for the B*T pairs; detached, as a peak's place has no useful gradient."""
        side = window_side(first.sizes[0], self.window)
        shift = spectral_shift(first.windows.flatten(0, 1), second.windows.flatten(0, 1), side)
        return PairMotion(*spread(shift, first.sizes[0], self.window))


class LevelGuidance(nn.Module):
    """The guidance of one level; without ``motion`` only the base."""

    def __init__(
        self, channels: int, groups: int, projected: int, motion: str | None, prior: bool, hidden: int = 64
    ) -> None:
        super().__init__()
        self.guides = motion is not None
        self.prior = nn.Parameter(torch.zeros(1)) if prior else None
        if motion is not None:
            self.motion = MOTIONS[motion](projected)
            self.addition = zero(conv3x3(self.motion.maps, channels))
            self.describe = nn.Linear(DESCRIPTORS, hidden)
            self.gain = _silent(nn.Linear(hidden, groups * 9 * 2))
            self.shift = _silent(nn.Linear(hidden, groups * 9))

    def forward(
        self, sampled: Complex[Tensor, "b k h wf"], other: Complex[Tensor, "b k h wf"], motion: PairMotion, share: float
    ) -> OffsetGuidance:
        """Guidance for sampling one frame, ``share`` of the way to the other."""
        base = None if self.prior is None else self.prior * motion.confidence * (-share * motion.vector)
        if not self.guides:
            return OffsetGuidance(base=base)
        size = (motion.vector.shape[-2], motion.vector.shape[-1])
        maps = self.motion(sampled, other, size)
        # whatever the frames' contrast: as InstanceNorm, but defined for a single pixel, too
        maps = F.layer_norm(maps, size, eps=1e-8).to(self.addition.weight.dtype)
        words = describe_pair(sampled, other, size[1], motion).to(self.describe.weight.dtype)
        hidden = F.gelu(self.describe(words))
        return OffsetGuidance(self.addition(maps), self.gain(hidden), self.shift(hidden), base)


class SpectralMotion(nn.Module):
    """Phases, amplitude ratios and radius -> a complex response per channel and bin, mixed by 1x1 convolutions.

    With ``carried`` the response filters the sampled frame, so that the maps lie where its content lies and move with
    it. Without, the response itself is transformed: a correlation surface, addressed by displacement and the same
    wherever in the image the content is (the letter of the project's first design, kept for comparison).
    Measured with a small head that regresses the motion of translated textures (2 px on average) from offset features
    plus these maps: error 0.95 px carried, 1.08 px not carried, 1.24 px without maps.
    """

    def __init__(self, channels: int, hidden: int = 32, *, carried: bool = True) -> None:
        super().__init__()
        self.maps, self.carried = channels, carried
        self.read = conv1x1(3 * channels + 1, hidden)
        self.write = conv1x1(hidden, 2 * channels)
        self.radial = nn.Parameter(torch.ones(channels, BANDS))  # gain per band

    def forward(
        self, sampled: Complex[Tensor, "b k h wf"], other: Complex[Tensor, "b k h wf"], size: tuple[int, int]
    ) -> Float[Tensor, "b k h w"]:
        """Maps of ``size``, float32."""
        phases = whiten(sampled.conj() * other)
        radius = frequencies(*size, sampled.device).radius.expand_as(phases[:, :1].real) / HIGHEST
        seen = torch.cat([phases.real, phases.imag, log_amplitude_ratio(sampled, other), radius], dim=1)
        response = self.write(F.gelu(self.read(seen.to(self.read.weight.dtype)))).float()
        response = _complex(response) * torch.einsum(
            "ck,khw->chw", self.radial.float(), radial_bands(*size, BANDS, sampled.device)
        )
        return irfft2(response * sampled if self.carried else response, size)


class FCVSRMotion(nn.Module):
    """The motion estimator of FCVSR (MGAA of its public code, 2025), as an ablation of `SpectralMotion`.

    With X = real and imaginary parts, q = X1 - X2 + conv(X1, X2), and each of 6 branches of q times a projection of X2
    gives two maps. Departs from FCVSR: orthonormal transforms, branches of one 1x1 convolution, and the maps guide
    offsets instead of an adaptive separable convolution.
    """

    def __init__(self, channels: int, branches: int = 6) -> None:
        super().__init__()
        self.maps = 2 * branches
        width = 2 * channels
        self.mix = nn.Sequential(conv1x1(2 * width, width), nn.ReLU(), conv1x1(width, width))
        self.branches = conv1x1(width, 4 * branches)
        self.reference = nn.Sequential(conv1x1(width, channels), nn.ReLU(), conv1x1(channels, 4))

    def forward(
        self, sampled: Complex[Tensor, "b k h wf"], other: Complex[Tensor, "b k h wf"], size: tuple[int, int]
    ) -> Float[Tensor, "b n h w"]:
        """Maps of ``size``, float32."""
        dtype = self.branches.weight.dtype
        x1, x2 = (torch.cat([x.imag, x.real], dim=1).to(dtype) for x in (sampled, other))
        difference = x1 - x2 + self.mix(torch.cat([x1, x2], dim=1))
        motion = self.branches(difference).unflatten(1, (-1, 4)) * self.reference(x2)[:, None]
        return irfft2(_complex(motion.flatten(1, 2).float()), size)


MOTIONS: dict[str, Callable[[int], SpectralMotion | FCVSRMotion]] = {
    "filter": SpectralMotion,
    "surface": lambda channels: SpectralMotion(channels, carried=False),
    "fcvsr": FCVSRMotion,
}


def log_amplitude_ratio(
    a: Complex[Tensor, "b k h wf"], b: Complex[Tensor, "b k h wf"], floor: float = 1e-3
) -> Float[Tensor, "b k h wf"]:
    """log |b| / |a| per bin: below 0 where b is the more blurred; both are raised by ``floor`` of the mean energy."""
    energies = [torch.view_as_real(x).square().sum(-1) for x in (a, b)]
    least = floor * sum(x.detach().mean((-2, -1), keepdim=True) for x in energies) / 2 + 1e-12
    return 0.5 * ((energies[1] + least) / (energies[0] + least)).log()


def describe_pair(
    a: Complex[Tensor, "b k h wf"], b: Complex[Tensor, "b k h wf"], width: int, motion: PairMotion
) -> Float[Tensor, "b 20"]:
    """What is known of a pair as a whole: shift (2), confidence, mean |shift|; log amplitude ratios and coherences.

    Shifts are means over the image by confidence, in units of 8 px. A band's coherence is |sum over channels of
    conj(a) b| per bin against the energies of both: 1 for a shifted frame whatever the shift, about 1/sqrt(K) for an
    unrelated one.
    """
    confidence = motion.confidence.mean((-2, -1))  # (B, 1)
    weights = motion.confidence / (TYPICAL_SHIFT * confidence[..., None, None]).clamp_min(1e-6)
    shift = (motion.vector * weights).mean((-2, -1))
    distance = (motion.vector.norm(dim=1, keepdim=True) * weights).mean((-2, -1))

    bands = radial_bands(a.shape[-2], width, BANDS, a.device)
    energy_a, energy_b = (band_energies(x, bands, width).mean(1) for x in (a, b))
    least = 1e-4 * (energy_a + energy_b).detach().mean(1, keepdim=True) + 1e-12
    ratio = 0.5 * ((energy_b + least) / (energy_a + least)).log()
    # the energy of the root of |cross spectrum| is |cross spectrum|, averaged over bands as the energies are
    root = (a.conj() * b).mean(1).abs().clamp_min(1e-12).sqrt()
    coherence = band_energies(torch.complex(root, torch.zeros_like(root)), bands, width)
    coherence = coherence / (energy_a * energy_b).clamp_min(1e-24).sqrt().clamp_min(1e-9)
    return torch.cat([shift, confidence, distance, ratio, coherence], dim=1)


def _complex(parts: Float[Tensor, "b n h wf"]) -> Complex[Tensor, "b n//2 h wf"]:
    return torch.view_as_complex(parts.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())


def _silent(linear: nn.Linear) -> nn.Linear:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear
