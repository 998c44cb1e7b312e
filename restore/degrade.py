"""Degradations that turn clean frames into a network's input: MATLAB-equivalent bicubic resizing, 8-bit rounding.

The published protocols of video super-resolution make low-resolution frames with MATLAB's `imresize` (bicubic,
antialiased). Resizers that only share its name differ by whole grey levels, which costs tenths of a dB, so the
sampling rule is written out here. Source: `imresize`'s documented behaviour; Keys, "Cubic convolution interpolation
for digital image processing", 1981 (the kernel, a = -0.5).

Frames are float, channels before rows before columns; grey levels lie in [0, 1].
"""

import math
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

_KERNEL_WIDTH = 4.0  # the cubic kernel is zero from 2 samples off its centre on
_CEIL_SLACK = 1e-9  # 30 * 0.1 is a hair above 3 in floating point and must not give 4 samples


def imresize(x: Float[Tensor, "*b h w"], scale: int | float | Fraction) -> Float[Tensor, "*b H W"]:
    """Resize the last two dimensions as MATLAB's `imresize(x, scale)` does: bicubic, antialiased when shrinking.

    Args:
        x: (..., h, w) floating point, any device and value range; the result keeps dtype and device. Values are
            computed in float64 for float64 input and in float32 otherwise.
        scale: factor for both sides, e.g. 0.25 or `Fraction(1, 3)` to shrink and 4 to enlarge; greater than zero.

    Returns:
        (..., ceil(h * scale), ceil(w * scale)). Nothing is rounded or clamped, so values may overshoot the input's
        range; `quantize` is what writing an image file does.

    Raises:
        ValueError: scale is not a positive finite number, or x has no pixels.
    """
    factor = float(scale)
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"scale={scale} must be a positive finite number")
    if x.ndim < 2 or x.shape[-2] * x.shape[-1] == 0:
        raise ValueError(f"imresize needs (..., height, width) with at least one pixel, got {tuple(x.shape)}")
    out = x if x.dtype == torch.float64 else x.float()
    for dim in (-2, -1):
        out = _resize_dim(out, dim, factor)
    return out.to(x.dtype)


def quantize(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamp to [0, 1] and round to the 256 levels of an 8-bit image, halves to even, still as float in [0, 1].

    This is what happens to a frame that is written to an image file and read again; the published protocol applies
    it to low-resolution inputs and to results before they are scored. x: float32 or float64 (half precision cannot
    hold the levels).
    """
    return x.clamp(0, 1).mul(255).round().div(255)


def _resize_dim(x: Tensor, dim: int, factor: float) -> Tensor:
    """Resample dimension -2 or -1 of x as a weighted sum of shifted copies.

    Indexing stays in fp32 or fp64 whatever autocast or TF32 settings are active, which a matrix product would not.
    """
    index, weight = _taps(x.shape[dim], factor)
    index, weight = index.to(x.device), weight.to(x)
    if dim == -2:
        weight = weight.unsqueeze(-1)  # (taps, out, 1): the same for every column
    out = x.index_select(dim, index[0]) * weight[0]
    for k in range(1, len(index)):
        out = out.addcmul_(x.index_select(dim, index[k]), weight[k])
    return out


def _taps(size: int, factor: float) -> tuple[Tensor, Tensor]:
    """Source indices and float64 weights, both (taps, out), that make every output sample of one dimension.

    When shrinking, the kernel is stretched by 1 / factor and so becomes the low-pass filter against aliasing.
    """
    length = math.ceil(size * factor - _CEIL_SLACK)
    stretch = max(1.0, 1.0 / factor)
    width = _KERNEL_WIDTH * stretch
    # Output sample i covers [i, i + 1) / factor of the input: the edges of both images coincide, not the centres.
    centre = (torch.arange(length, dtype=torch.float64) + 0.5) / factor - 0.5
    first = torch.floor(centre - width / 2)
    index = first + torch.arange(math.ceil(width) + 2, dtype=torch.float64).unsqueeze(1)
    weight = _cubic((centre - index) / stretch)
    weight = weight / weight.sum(0)
    used = weight.ne(0).any(1)
    # Symmetric border, the edge sample repeated (c b a | a b c | c b a), as often as a small image needs.
    index = index[used].long().remainder(2 * size)
    return torch.minimum(index, 2 * size - 1 - index), weight[used]


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, at distances x in samples."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
