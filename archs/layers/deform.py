"""Deformable sampling and the modulated deformable convolution (DCNv2, Zhu et al., CVPR 2019).

One function, `deform_sample`, reads features at displaced positions for everything that does so: DCNv2, the
deformable attention of STDAN and plain warping; `deform_sum`, `deform_dot` and `deform_attend` are its sum over taps,
its product with a query and the attention made of both, which need not hold every sample. Which program does the work
is the matter of `deform_backends`; all give the same numbers to rounding.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import conv3x3, zero
from archs.layers.deform_backends import attender, convolver, sampler
from archs.layers.deform_kernel import DOT, SUM, TAPS
from archs.layers.deform_torch import tap_grid


def deform_sample(
    x: Float[Tensor, "b c h w"],
    displacement: Float[Tensor, "b g k 2 h w"],
    weight: Float[Tensor, "b g k h w"] | None = None,
) -> Float[Tensor, "b c k h w"]:
    """Bilinear samples of ``x`` at every pixel plus ``displacement``, each times its ``weight``.

    The channels fall into g equal groups; group i is sampled k times a pixel at its own k displacements (dy, dx), in
    pixels. Beyond the image every corner counts as zero, so a sample fades out over one pixel at the border, as in
    `torchvision.ops.deform_conv2d`. Positions and weights are float32 whatever autocast says: bf16 has three digits.
    """
    return _sample(TAPS, x, x, displacement, weight)


def deform_sum(
    x: Float[Tensor, "b c h w"],
    displacement: Float[Tensor, "b g k 2 h w"],
    weight: Float[Tensor, "b g k h w"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """``deform_sample(...).sum(2)`` without ever holding the samples where a kernel can do so."""
    return _sample(SUM, x, x, displacement, weight)


def deform_dot(
    x: Float[Tensor, "b c h w"],
    query: Float[Tensor, "b c h w"],
    displacement: Float[Tensor, "b g k 2 h w"],
    weight: Float[Tensor, "b g k h w"] | None = None,
) -> Float[Tensor, "b k h w"]:
    """Every sample's scalar product with ``query``, float32: ``(deform_sample(...) * query.unsqueeze(2)).sum(1)``."""
    return _sample(DOT, x, query, displacement, weight)


def _sample(mode: int, x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        weight = displacement.new_ones(()).expand(x.shape[0], *displacement.shape[1:3], *x.shape[2:])
    sample = sampler(x, weight.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        return sample(mode, x, query, displacement.float(), weight.float())


class Attended(NamedTuple):
    """What `deform_attend` found at every pixel."""

    answer: Float[Tensor, "b c h w"]  # values of the best taps, weighed by the softmax of their relevances
    best: Float[Tensor, "b n h w"]  # relevances of the n best taps, falling, float32
    taps: Int[Tensor, "b n h w"]  # which ones these are, int64


def deform_attend(
    query: Float[Tensor, "b c h w"],
    key: Float[Tensor, "b c h w"],
    value: Float[Tensor, "b c h w"],
    displacement: Float[Tensor, "b g k 2 h w"],
    weight: Float[Tensor, "b g k h w"],
    top_k: int,
) -> Attended:
    """Attention of every pixel to the k places of ``key`` that `deform_dot` compares with ``query``, sparse: `top_k`.

    ``weight`` multiplies keys and values. Where a kernel can do so, no sample is ever held.
    """
    attend = attender(query, weight.shape[1])
    with torch.autocast(query.device.type, enabled=False):
        return Attended(*attend(query, key, value, displacement.float(), weight.float(), top_k))


def warp(x: Float[Tensor, "b c h w"], flow: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b c h w"]:
    """Backward warping: the value of ``x`` at every pixel plus ``flow`` (dy, dx); beyond the border its edge pixel."""
    h, w = x.shape[2:]
    rows = torch.arange(h, device=x.device, dtype=torch.float32)[:, None]
    columns = torch.arange(w, device=x.device, dtype=torch.float32)
    dy = (flow[:, 0] + rows).clamp(0, h - 1) - rows
    dx = (flow[:, 1] + columns).clamp(0, w - 1) - columns
    return deform_sum(x, torch.stack([dy, dx], dim=1)[:, None, None])


class OffsetGuidance(NamedTuple):
    """What is known about where to sample besides the offset features; None is nothing."""

    addition: Float[Tensor, "b c h w"] | None = None  # to the offset features; whoever makes those adds it (`guided`)
    gain: Float[Tensor, "b g*9*2"] | None = None  # offsets become (1 + gain) times as large
    shift: Float[Tensor, "b g*9"] | None = None  # is added to the modulation logits
    base: Float[Tensor, "b 2 h w"] | None = None  # (dy, dx) in pixels: is added to all displacements

    def joined(self, other: "OffsetGuidance") -> "OffsetGuidance":
        """Two batches of guidance of the same kind as one."""
        pairs = zip(self, other, strict=True)
        return OffsetGuidance(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))


def guided(features: Float[Tensor, "b c h w"], guidance: OffsetGuidance | None) -> Float[Tensor, "b c h w"]:
    """Offset features with the guidance's addition, if there is one."""
    return features if guidance is None or guidance.addition is None else features + guidance.addition


class DeformOffsets(nn.Module):
    """The convolution that predicts where to sample: features -> displacements and modulation of 3x3 taps.

    Channel layout (shared by DCNv2 and STDAN's attention, so that published weights fit): of 3*g*9 channels the first
    two thirds are offsets, (dy, dx) interleaved for group and tap, the last third modulation logits. Zero at the
    start: regular taps with modulation 0.5.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv = conv3x3(channels, 3 * groups * 9)
        zero(self.conv)

    def forward(
        self,
        features: Float[Tensor, "b c h w"],
        base: Float[Tensor, "b 2 h w"] | None = None,
        guidance: OffsetGuidance | None = None,
    ) -> tuple[Float[Tensor, "b g 9 2 h w"], Float[Tensor, "b g 9 h w"]]:
        """Displacements from the pixel (taps included, around ``base`` if given) and modulation in 0..1.

        ``features`` are `guided` already: of ``guidance``, gain, shift and base are used here.
        """
        raw = self.conv(features).float()
        offset, modulation = raw.split([2 * self.groups * 9, self.groups * 9], dim=1)
        _, gain, shift, prior = OffsetGuidance() if guidance is None else guidance
        if gain is not None:
            offset = offset * (1 + gain.float())[:, :, None, None]
        if shift is not None:
            modulation = modulation + shift.float()[:, :, None, None]
        displacement = offset.unflatten(1, (self.groups, 9, 2)) + tap_grid(3, offset)[:, :, None, None]
        for start in (base, prior):
            if start is not None:
                displacement = displacement + start[:, None, None]
        return displacement, modulation.sigmoid().unflatten(1, (self.groups, 9))


class ModulatedDeformConv(nn.Module):
    """DCNv2, 3x3: a convolution whose taps are moved and modulated by offsets predicted from ``guide`` features."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.offsets = DeformOffsets(channels, groups)
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        guide: Float[Tensor, "b c h w"],
        base: Float[Tensor, "b 2 h w"] | None = None,
        guidance: OffsetGuidance | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Sample ``x`` where ``guide`` says (around the flow ``base``, if given) and mix taps and channels.

        ``guidance`` as in `DeformOffsets`.
        """
        displacement, modulation = self.offsets(guide, base, guidance)
        convolve = convolver(x, modulation.shape[1])
        if convolve is not None:
            with torch.autocast(x.device.type, enabled=False):
                mixed = convolve(x, displacement, modulation, self.weight, self.bias)
            return mixed.to(_mixing_type(x))
        samples = deform_sample(x, displacement, modulation)  # (B, C, 9, H, W)
        columns = samples.permute(0, 3, 4, 2, 1).flatten(3)  # (B, H, W, 9C)
        mixed = F.linear(columns, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return mixed.permute(0, 3, 1, 2)


def _mixing_type(x: Tensor) -> torch.dtype:
    """Of a convolution's result: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
