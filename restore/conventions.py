"""PSNR of the same results by every convention in use, so that a claimed figure can be told to be one of them."""

import math
from collections.abc import Mapping
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from restore.metrics import check_pair, rgb_to_y

PROTOCOL = "PSNR-Y"
_MATCH = 0.05  # dB


def figures_by_convention(
    restored: Float[Tensor, "t 3 H W"], truth: Float[Tensor, "_ 3 _ _"], *, crop_border: int = 4
) -> dict[str, float]:
    """PSNR in dB by each convention, the published protocol's first; mean over the frames of finite PSNR, else nan.

    "rounded" luma is what 8-bit images of it hold; "full-range" luma, 0..255, is what most libraries' grey images hold.

    Args:
        restored: RGB in [0, 1], rounded to 8 bits.
        truth: the same shape and range.
        crop_border: pixels at each side for the conventions that leave them out.

    Raises:
        ValueError: shapes differ, there are no frames or not three channels, or crop_border leaves nothing.
    """
    check_pair(restored, truth)
    if len(truth) == 0:
        raise ValueError("there are no frames to compare")
    height, width = truth.shape[-2:]
    if not 0 <= 2 * crop_border < min(height, width):
        raise ValueError(f"crop_border={crop_border} must be at least 0 and leave pixels of a {height}x{width} frame")
    frames = [_figures(*pair, crop_border) for pair in zip(restored, truth, strict=True)]
    values = {name: [frame[name] for frame in frames if math.isfinite(frame[name])] for name in frames[0]}
    return {name: fmean(finite) if finite else math.nan for name, finite in values.items()}


def matching_conventions(figures: Mapping[str, float], claimed_psnr: float) -> list[str]:
    """Which figures meet a claimed one within 0.05 dB, the nearest first.

    figures: of `figures_by_convention`; for a claim about a data set, their means over its clips.
    """
    distances = {name: abs(figure - claimed_psnr) for name, figure in figures.items()}
    return sorted((name for name in figures if distances[name] <= _MATCH), key=lambda name: distances[name])


def _figures(restored: Tensor, truth: Tensor, crop_border: int) -> dict[str, float]:
    """All conventions' figures of one frame (3, H, W)."""
    inner = (..., slice(crop_border, -crop_border or None), slice(crop_border, -crop_border or None))
    restored, truth = restored.cpu().double(), truth.cpu().double()
    luma, true_luma = rgb_to_y(restored), rgb_to_y(truth)
    luma_error, error = luma - true_luma, (restored - truth) * 255
    cropped = f" with {crop_border} px of border cropped"
    errors = {
        PROTOCOL: luma_error,
        PROTOCOL + cropped: luma_error[inner],
        "PSNR of rounded Y": luma.round() - true_luma.round(),
        "PSNR of full-range Y": luma_error * (255 / 219),
        "PSNR of RGB": error,
        "PSNR of RGB" + cropped: error[inner],
    }
    return {name: float(10 * torch.log10(255**2 / part.square().mean())) for name, part in errors.items()}
