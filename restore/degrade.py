"""Published degradations of single frames: bicubic exactly as MATLAB has it, blur-downsampling (BD), 8-bit rounding.

Published low-resolution inputs and figures of this field are made with MATLAB's `imresize` (bicubic,
antialiased). Resizers that only share its name differ by whole grey levels, which costs tenths of a dB, so the
sampling rule is written out here. Source: `imresize`'s documented behaviour; Keys, "Cubic convolution interpolation
for digital image processing", 1981 (the kernel, a = -0.5).

BD inputs are blurred by a Gaussian, of which every s-th pixel is kept. Which one differs between published programs:
see `bd`.

Frames are float, channels before rows before columns; grey levels lie in [0, 1].
"""

import math
from fractions import Fraction

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_KERNEL_WIDTH = 4.0  # the cubic kernel is zero from 2 samples off its centre on
_CEIL_SLACK = 1e-9  # 30 * 0.1 is a hair above 3 in floating point and must not give 4 samples
_BORDERS = ("reflect", "replicate", "symmetric")


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
        out = _weighted_sum(out, dim, *_taps(x.shape[dim], factor))
    return out.to(x.dtype)


def quantize(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamp to [0, 1] and round to the 256 levels of an 8-bit image, halves to even, still as float in [0, 1].

    This is what happens to a frame that is written to an image file and read again; the published protocol applies
    it to low-resolution inputs and to results before they are scored. x: float32 or float64 (half precision cannot
    hold the levels).
    """
    return x.clamp(0, 1).mul(255).round().div(255)


def bd(
    frames: Float[Tensor, "*b h w"],
    scale: int = 4,
    *,
    sigma: float = 1.6,
    taps: int = 13,
    phase: str = "first",
    border: str = "reflect",
) -> Float[Tensor, "*b H W"]:
    """Blur-downsample (BD): a Gaussian blur, of which one pixel of every scale x scale block is kept.

    The phase names this pixel: "first" is pixel 0 of each side, "centre" the one whose blur lies nearest to the
    middle of the block, the later of two. A blur of even `taps` lies half a pixel after its pixel, as with MATLAB's
    `imfilter`. So the published programs differ by up to two pixels in what they call the same degradation (in
    pixels of `frames`; 0 is where `imresize(frames, 1 / scale)` samples, see `bd_shift`):

    | program | taps | phase | border | shift at 4 |
    |---|---|---|---|---|
    | strided convolution of the torch ports (DUF, EDVR): the defaults here | 13 | "first" | "reflect" | -1.5 |
    | MATLAB, BasicVSR's `BD_degradation.m`: the usual BDx4 test sets | 12 | "centre" | "replicate" | 0 |
    | MATLAB, `fspecial` 7x7 and nearest `imresize` (RCAN, STDAN) | 7 | "centre" | "replicate" | +0.5 |

    A network must be fed the phase that it was trained with: taking the first for the second costs 8 dB on Vid4
    (20.2 dB instead of 28.0, reported by users of mmagic: open-mmlab/mmagic#318, #948).

    Args:
        frames: (..., h, w) floating point, any device and value range; dtype and device are kept, as in `imresize`.
        scale: block side, 1 or more.
        sigma: standard deviation of the blur in pixels, greater than zero.
        taps: width of the blur in pixels, 1 or more.
        phase: "first" or "centre".
        border: what lies outside, "reflect" (c b | a b c), "replicate" (a a | a b c) or "symmetric" (b a | a b c).

    Returns:
        (..., ceil(h / scale), ceil(w / scale)), not rounded; nothing overshoots the input's range.

    Raises:
        ValueError: a setting outside the above, or frames without pixels.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma={sigma} must be a positive finite number")
    if border not in _BORDERS:
        raise ValueError(f"border={border!r} is none of {', '.join(_BORDERS)}")
    if frames.ndim < 2 or frames.shape[-2] * frames.shape[-1] == 0:
        raise ValueError(f"bd needs (..., height, width) with at least one pixel, got {tuple(frames.shape)}")
    kept = _kept_pixel(scale, taps, phase)
    offset = torch.arange(taps).unsqueeze(1) - (taps - 1) // 2  # imfilter's origin: before the middle if even
    bell = torch.exp(-0.5 * ((offset - (taps + 1) % 2 / 2) / sigma).double().square())
    out = frames if frames.dtype == torch.float64 else frames.float()
    for dim in (-2, -1):
        size = frames.shape[dim]
        index = border_index(torch.arange(math.ceil(size / scale)) * scale + kept + offset, size, border)
        out = _weighted_sum(out, dim, index, (bell / bell.sum()).expand(index.shape))
    return out.to(frames.dtype)


def bd_shift(scale: int = 4, *, taps: int = 13, phase: str = "first") -> float:
    """Where `bd` samples, in pixels of its input after (right of, below) where `imresize(frames, 1 / scale)` does.

    That is the middle of each block, (scale - 1) / 2 after its first pixel. Raises ValueError as `bd` does.
    """
    return _kept_pixel(scale, taps, phase) + (taps + 1) % 2 / 2 - (scale - 1) / 2


def border_index(index: Int64[Tensor, "*n"], size: int, border: str) -> Int64[Tensor, "*n"]:
    """Pixel numbers of any value -> the pixels 0 .. size - 1 that a border shows there, however far outside.

    border: "reflect" (c b | a b c), "replicate" (a a | a b c) or "symmetric" (b a | a b c).
    """
    if border == "replicate":
        return index.clamp(0, size - 1)
    if border == "symmetric":
        index = index.remainder(2 * size)
        return torch.minimum(index, 2 * size - 1 - index)
    index = index.remainder(max(2 * size - 2, 1))
    return torch.minimum(index, 2 * size - 2 - index)


def _kept_pixel(scale: int, taps: int, phase: str) -> int:
    """Number within its block, from 0, of the pixel that `bd` keeps."""
    if scale < 1 or taps < 1:
        raise ValueError(f"scale={scale} and taps={taps} must be at least 1")
    if phase == "first":
        return 0
    if phase == "centre":
        return max(math.ceil((scale - 1) / 2 - (taps + 1) % 2 / 2), 0)
    raise ValueError(f"phase={phase!r} is neither 'first' nor 'centre'")


def _weighted_sum(x: Tensor, dim: int, index: Tensor, weight: Tensor) -> Tensor:
    """Resample dimension -2 or -1 of x as a weighted sum of shifted copies; index and weight are (taps, out).

    Indexing stays in fp32 or fp64 whatever autocast or TF32 settings are active, which a matrix product would not.
    """
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
    return border_index(index[used].long(), size, "symmetric"), weight[used]


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, at distances x in samples."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
