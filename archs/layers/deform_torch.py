"""Deformable sampling in plain PyTorch: on any device, exportable, the oracle of every other backend."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from archs.layers.deform_kernel import DOT, SUM

Sampler = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]  # of `sample`'s arguments and result


def sample(mode: int, x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor) -> Tensor:
    """`grid_sample` with the groups folded into the batch and the taps stacked along the height.

    x, query: (B, C, H, W); displacement (B, G, K, 2, H, W) and weight (B, G, K, H, W) float32. By mode TAPS:
    (B, C, K, H, W), SUM: (B, C, H, W), both of x's type, DOT: (B, K, H, W) float32.
    """
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


def attend(
    sample: Sampler, query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention out of samples: relevance of all taps, the best of them, values at those.

    query, key, value: (B, C, H, W). The answer (B, C, H, W), of value's type; the relevances (B, top_k, H, W) of the
    best taps, falling, float32; whose taps they are, int64.
    """
    best, taps = sample(DOT, key, query, displacement, weight).topk(top_k, dim=1)
    gain = pick(weight, taps) * best.softmax(1)[:, None]
    return sample(SUM, value, value, pick(displacement, taps), gain), best, taps


def pick(x: Float[Tensor, "b g k *rest"], taps: Int[Tensor, "b n h w"]) -> Float[Tensor, "b g n *rest"]:
    """The chosen taps of every group, of displacements (B, G, K, 2, H, W) or weights (B, G, K, H, W)."""
    index = taps[:, None] if x.ndim == 5 else taps[:, None, :, None]
    return x.gather(2, index.expand(*x.shape[:2], taps.shape[1], *x.shape[3:]))


def tap_grid(kernel_size: int, like: Tensor) -> Float[Tensor, "k 2"]:
    """Displacements (dy, dx) of a square kernel's taps from its centre, row by row."""
    steps = torch.arange(kernel_size, device=like.device, dtype=torch.float32) - kernel_size // 2
    return torch.cartesian_prod(steps, steps)
