"""PSNR and SSIM of frames under the published protocol of video super-resolution, its choices as arguments.

The protocol (evaluation code of STDAN and of the BasicSR family, which agree): results are rounded to 8 bit first
(`restore.degrade.quantize`; not done here), scored on the unrounded luma of BT.601 with no border cropped, and
averaged over the frames of a clip, then over clips. Rounding luma as well would lower PSNR by about 0.04 dB, another
SSIM window changes the second decimal: state protocol beside figure.

Frames are RGB in [0, 1], (..., 3, H, W). `psnr` and `ssim` return one float64 value per frame, shape (...). `Metric`
is what every figure of a clip offers, `PSNR` and `SSIM` are these two as such; for the others and the table of names
see `restore.metric_table`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

LUMA = "unrounded BT.601 luma (16..235)"
_PEAK = 255.0
_WINDOW = 11
_SIGMA = 1.5
_C1 = (0.01 * _PEAK) ** 2
_C2 = (0.03 * _PEAK) ** 2


def rgb_to_y(x: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 1 h w"]:
    """Luma of ITU-R BT.601: Y = 65.481 R + 128.553 G + 24.966 B + 16 for R, G, B in [0, 1].

    Black gives 16, white 235; the result is not rounded (the published protocol scores unrounded luma, as MATLAB's
    `rgb2ycbcr` gives for floating-point images, times 255). Dtype and device are kept.

    Raises:
        ValueError: x has not three channels.
    """
    _check_rgb(x)
    red, green, blue = x.unbind(-3)
    return (65.481 * red + 128.553 * green + 24.966 * blue + 16).unsqueeze(-3)


def psnr(
    restored: Float[Tensor, "*b 3 h w"], truth: Float[Tensor, "..."], *, y_channel: bool = True, crop_border: int = 0
) -> Float64[Tensor, "*b"]:
    """Peak signal-to-noise ratio in dB per frame: 20 log10(255 / sqrt(mean squared error)).

    The published protocol is the default: on the luma of `rgb_to_y`, whole frame. Identical frames give inf, which
    poisons a mean: all-black clips are left out of published test lists for that reason.

    Args:
        restored: (..., 3, H, W) RGB in [0, 1]; the published protocol has it quantised to 8 bit.
        truth: the same shape and range.
        y_channel: score luma; False takes the error over all three channels together.
        crop_border: pixels left out at each of the four sides.

    Raises:
        ValueError: shapes differ, there are not three channels, or crop_border leaves nothing.
    """
    a, b = planes(restored, truth, y_channel=y_channel, crop_border=crop_border)
    mse = (a - b).square_().mean((-3, -2, -1))
    return 10 * torch.log10(_PEAK**2 / mse)


def ssim(
    restored: Float[Tensor, "*b 3 h w"], truth: Float[Tensor, "..."], *, y_channel: bool = True, crop_border: int = 0
) -> Float64[Tensor, "*b"]:
    """Structural similarity per frame (Wang et al., "Image quality assessment", 2004); identical frames give 1.

    As in the published protocol: Gaussian window 11x11 with sigma 1.5, only where it lies wholly inside the frame,
    C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2, biased moments, float64, on the luma of `rgb_to_y`.

    Args:
        restored: (..., 3, H, W) RGB in [0, 1]; the published protocol has it quantised to 8 bit.
        truth: the same shape and range.
        y_channel: score luma; False gives the mean of the three channels' values, each computed alone. (Older
            BasicSR releases, and evaluation scripts copied from them, filter RGB jointly with a 3-D window instead
            and give other figures.)
        crop_border: pixels left out at each of the four sides.

    Raises:
        ValueError: shapes differ, there are not three channels, or fewer than 11 rows or columns remain.
    """
    a, b = planes(restored, truth, y_channel=y_channel, crop_border=crop_border)
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"ssim needs frames of at least {_WINDOW}x{_WINDOW} px, got {a.shape[-2]}x{a.shape[-1]}")
    # One plane at a time: five moment maps in float64 of a whole clip would take ten times the clip's own memory.
    pairs = zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)
    values = [_ssim_plane(x, y) for x, y in pairs]
    return torch.stack(values).view(a.shape[:-2]).mean(-1) if values else a.new_zeros(a.shape[:-3])


@runtime_checkable
class Metric(Protocol):
    """A figure of a restored clip against the true one, with what has to stand beside it.

    Constructors take the keys of their section in an options file, keyword-only, and raise ValueError at once, in one
    line, for bad values and for packages or weights that are missing. Frames of a clip are consecutive.
    """

    @property
    def label(self) -> str:
        """Short name for the head of a column, with channel, network or scale: PSNR-Y, LPIPS (alex), tLP x100."""

    @property
    def unit(self) -> str:
        """dB, px, or "" for a number without one."""

    @property
    def higher_is_better(self) -> bool:
        """The direction of better."""

    @property
    def digits(self) -> int:
        """Decimals worth printing."""

    @property
    def frames(self) -> int:
        """Consecutive frames that one value needs: 1, or 2 for what looks at changes in time."""

    def describe(self) -> str:
        """The protocol in a phrase: every choice that changes the number."""

    def __call__(
        self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]
    ) -> Float64[Tensor, " t-{self.frames}+1"]:
        """Value i belongs to frame i + frames - 1 of clips in RGB, [0, 1], rounded to 8 bit."""


@dataclass(frozen=True, kw_only=True)
class PSNR:
    """`psnr` as a `Metric`: dB, inf for identical frames."""

    y_channel: bool = True
    crop_border: int = 0

    unit, higher_is_better, digits, frames = "dB", True, 3, 1

    def __post_init__(self) -> None:
        check_crop(self.crop_border)

    @property
    def label(self) -> str:
        """PSNR-Y or PSNR-RGB."""
        return "PSNR-Y" if self.y_channel else "PSNR-RGB"

    def describe(self) -> str:
        """Channel, peak and crop."""
        channel = LUMA if self.y_channel else "R, G and B together"
        return f"PSNR of 8-bit frames on {channel}, peak 255, border crop {self.crop_border}"

    def __call__(self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]) -> Float64[Tensor, " t"]:
        """A value a frame."""
        return psnr(restored, truth, y_channel=self.y_channel, crop_border=self.crop_border)


@dataclass(frozen=True, kw_only=True)
class SSIM:
    """`ssim` as a `Metric`: 1 for identical frames."""

    y_channel: bool = True
    crop_border: int = 0

    unit, higher_is_better, digits, frames = "", True, 4, 1

    def __post_init__(self) -> None:
        check_crop(self.crop_border)

    @property
    def label(self) -> str:
        """SSIM-Y or SSIM-RGB."""
        return "SSIM-Y" if self.y_channel else "SSIM-RGB"

    def describe(self) -> str:
        """Channel, window, moments and crop."""
        channel = LUMA if self.y_channel else "R, G and B, each alone, then their mean"
        return (
            f"SSIM of 8-bit frames on {channel}, Gaussian window {_WINDOW}x{_WINDOW} with sigma {_SIGMA} inside the "
            f"frame, biased moments, K1 0.01, K2 0.03, peak 255, border crop {self.crop_border}"
        )

    def __call__(self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]) -> Float64[Tensor, " t"]:
        """A value a frame."""
        return ssim(restored, truth, y_channel=self.y_channel, crop_border=self.crop_border)


def planes(
    restored: Float[Tensor, "*b 3 h w"], truth: Float[Tensor, "..."], *, y_channel: bool, crop_border: int
) -> tuple[Float64[Tensor, "*b c rows columns"], Float64[Tensor, "*b c rows columns"]]:
    """Both clips as float64 planes (..., channels, H, W) on the scale 0..255, cropped: luma, or R, G and B.

    ValueError: shapes differ, there are not three channels, or crop_border leaves nothing.
    """
    check_pair(restored, truth)
    check_crop(crop_border)
    height, width = restored.shape[-2:]
    if 2 * crop_border >= min(height, width):
        raise ValueError(f"crop_border={crop_border} leaves no pixels of a {height}x{width} frame")
    rows, columns = slice(crop_border, height - crop_border), slice(crop_border, width - crop_border)
    pair = (x[..., rows, columns].to(_device_for_double(x), torch.float64) for x in (restored, truth))
    a, b = (rgb_to_y(x) if y_channel else x * _PEAK for x in pair)
    return a, b


def check_pair(restored: Tensor, truth: Tensor) -> None:
    """Raise ValueError unless both have the same shape, (..., 3, H, W)."""
    if restored.shape != truth.shape:
        raise ValueError(f"restored {tuple(restored.shape)} and truth {tuple(truth.shape)} differ in shape")
    _check_rgb(restored)


def check_crop(crop_border: int) -> None:
    """Raise ValueError for a negative border."""
    if crop_border < 0:
        raise ValueError(f"crop_border={crop_border} must be at least 0")


def as_values(values: Iterable[Tensor], like: Tensor) -> Float64[Tensor, " n"]:
    """Scalars as a metric returns them, on the device of ``like`` if that has float64."""
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device=_device_for_double(like))


def _device_for_double(x: Tensor) -> torch.device:
    """The device of x, or the CPU where that has no float64 (Apple's mps)."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _check_rgb(x: Tensor) -> None:
    if x.ndim < 3 or x.shape[-3] != 3:
        raise ValueError(f"expected RGB frames (..., 3, height, width), got {tuple(x.shape)}")


def _ssim_plane(a: Float64[Tensor, "h w"], b: Float64[Tensor, "h w"]) -> Float64[Tensor, ""]:
    """Mean structural similarity of two planes on the scale 0..255."""
    mean_a, mean_b, square_a, square_b, product = _blur(torch.stack([a, b, a * a, b * b, a * b]))
    variances = square_a + square_b - mean_a**2 - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return (luminance * (2 * covariance + _C2) / (variances + _C2)).mean()


def _blur(x: Float64[Tensor, "n h w"]) -> Float64[Tensor, "n h-10 w-10"]:
    """Gaussian mean over every 11x11 window that lies wholly inside: rows, then columns.

    Weighted shifts instead of conv2d: in float64 the latter unfolds the image into eleven copies on the CPU.
    """
    taps = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    taps = torch.exp(-(taps**2) / (2 * _SIGMA**2))
    weights = (taps / taps.sum()).tolist()
    for dim in (-2, -1):
        length = x.shape[dim] - _WINDOW + 1
        blurred = x.narrow(dim, 0, length) * weights[0]
        for k, weight in enumerate(weights[1:], start=1):
            blurred.add_(x.narrow(dim, k, length), alpha=weight)
        x = blurred
    return x
