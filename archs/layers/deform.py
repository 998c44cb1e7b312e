"""Deformable sampling and the modulated deformable convolution (DCNv2, Zhu et al., CVPR 2019).

One function, `deform_sample`, reads features at displaced positions for everything that does so: DCNv2, the
deformable attention of STDAN and plain warping; `deform_sum` and `deform_dot` are its sum over taps and its product
with a query, which need not hold every sample. There are two backends with equal results: PyTorch's `grid_sample`
(any device, exportable) and, on a CPU with a C compiler, the kernel of `deform_kernel.c` (several times faster).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import zero
from archs.layers.deform_kernel import DOT, MAX_CHANNELS, SUM, TAPS, attend, convolve, deform_kernel, has_kernel


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
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, displacement, weight))
    if not learns and _uses_kernel(key, weight.shape[1]):
        return Attended(*attend(query, key, value, displacement, weight, top_k))
    best, taps = deform_dot(key, query, displacement, weight).topk(top_k, dim=1)
    gain = pick(weight, taps) * best.softmax(1)[:, None]
    return Attended(deform_sum(value, pick(displacement, taps), gain), best, taps)


def pick(x: Float[Tensor, "b g k *rest"], taps: Int[Tensor, "b n h w"]) -> Float[Tensor, "b g n *rest"]:
    """The chosen taps of every group."""
    index = taps[:, None] if x.ndim == 5 else taps[:, None, :, None]
    return x.gather(2, index.expand(*x.shape[:2], taps.shape[1], *x.shape[3:]))


def _sample(mode: int, x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        weight = displacement.new_ones(()).expand(x.shape[0], *displacement.shape[1:3], *x.shape[2:])
    with torch.autocast(x.device.type, enabled=False):
        use_kernel = x.device.type == "cpu" and not torch.compiler.is_exporting() and has_kernel()
        if use_kernel and x.shape[1] // weight.shape[1] <= MAX_CHANNELS:
            return _sample_kernel(mode, x, query, displacement.float(), weight.float())
        return _sample_torch(mode, x, query, displacement.float(), weight.float())


def _sample_kernel(mode: int, x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor) -> Tensor:
    storage = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    y = deform_kernel(
        x.to(storage).permute(0, 2, 3, 1),
        query.to(storage).permute(0, 2, 3, 1),
        displacement.permute(0, 4, 5, 1, 2, 3),
        weight.permute(0, 3, 4, 1, 2),
        mode,
    )
    if mode == TAPS:
        return y.permute(0, 4, 3, 1, 2).to(x.dtype)  # (B, H, W, K, C) -> (B, C, K, H, W)
    return y.permute(0, 3, 1, 2).to(torch.float32 if mode == DOT else x.dtype)


def _sample_torch(mode: int, x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor) -> Tensor:
    """`grid_sample` with the groups folded into the batch and the taps stacked along the height."""
    b, c, h, w = x.shape
    groups, taps = displacement.shape[1:3]
    rows = torch.arange(h, device=x.device, dtype=torch.float32)[:, None]
    columns = torch.arange(w, device=x.device, dtype=torch.float32)
    # grid_sample wants (x, y) with -1 and 1 at the image's edges (align_corners=False, which works for one row, too)
    grid_y = (displacement[:, :, :, 0] + rows) * (2 / h) + (1 / h - 1)
    grid_x = (displacement[:, :, :, 1] + columns) * (2 / w) + (1 / w - 1)
    grid = torch.stack([grid_x, grid_y], dim=-1).reshape(b * groups, taps * h, w, 2)
    folded = x.float().reshape(b * groups, c // groups, h, w)
    sampled = F.grid_sample(folded, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    sampled = sampled.view(b, groups, c // groups, taps, h, w) * weight.unsqueeze(2)
    sampled = sampled.flatten(1, 2)  # (B, C, K, H, W)
    if mode == DOT:
        return (sampled * query.float().unsqueeze(2)).sum(1)
    return (sampled.sum(2) if mode == SUM else sampled).to(x.dtype)


def warp(x: Float[Tensor, "b c h w"], flow: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b c h w"]:
    """Backward warping: the value of ``x`` at every pixel plus ``flow`` (dy, dx); beyond the border its edge pixel."""
    h, w = x.shape[2:]
    rows = torch.arange(h, device=x.device, dtype=torch.float32)[:, None]
    columns = torch.arange(w, device=x.device, dtype=torch.float32)
    dy = (flow[:, 0] + rows).clamp(0, h - 1) - rows
    dx = (flow[:, 1] + columns).clamp(0, w - 1) - columns
    return deform_sum(x, torch.stack([dy, dx], dim=1)[:, None, None])


def tap_grid(kernel_size: int, like: Tensor) -> Float[Tensor, "k 2"]:
    """Displacements (dy, dx) of a square kernel's taps from its centre, row by row."""
    steps = torch.arange(kernel_size, device=like.device, dtype=torch.float32) - kernel_size // 2
    return torch.cartesian_prod(steps, steps)


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
        self.conv = nn.Conv2d(channels, 3 * groups * 9, 3, padding=1)
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
        if _uses_kernel(x, displacement.shape[1]):
            with torch.autocast(x.device.type, enabled=False):
                return convolve(x, displacement, modulation, self.weight, self.bias).to(_mixing_type(x))
        samples = deform_sample(x, displacement, modulation)  # (B, C, 9, H, W)
        columns = samples.permute(0, 3, 4, 2, 1).flatten(3)  # (B, H, W, 9C)
        mixed = F.linear(columns, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return mixed.permute(0, 3, 1, 2)


def _uses_kernel(x: Tensor, groups: int) -> bool:
    here = x.device.type == "cpu" and not torch.compiler.is_exporting() and has_kernel()
    return here and x.shape[1] // groups <= MAX_CHANNELS


def _mixing_type(x: Tensor) -> torch.dtype:
    """Of a convolution's result: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
