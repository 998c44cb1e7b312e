"""How a restored clip changes in time: tOF, tLP, warping error, flicker.

Each value needs two consecutive frames. None replaces a figure of single frames: a blurred clip can be very steady.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Float64
from torch import Tensor

from archs.layers.deform import warp
from restore.metrics import LUMA, as_values, check_crop, check_pair, planes
from restore.optical_flow import VISIBILITY, Farneback, grey_levels, visible
from restore.perceptual import LPIPS

_CENTRE = "centre of the frame (sides multiples of 32, at least 8 px left out at each border)"


@dataclass(frozen=True, kw_only=True)
class TOF:
    """tOF: how far the motion in the restored clip is from the true motion, in pixels; 0 is best.

    Chu et al., "Learning temporal coherence via self-supervision for GAN-based video generation" (TecoGAN), 2020: the
    flow between consecutive restored frames less the flow between the true ones. It is often called an L1 distance, as
    in a comment of their evaluation program (thunil/TecoGAN, metrics.py); what that program computes, and this too, is
    the Euclidean length of the difference at each pixel, averaged over pixels. The program also drops two frames at
    both ends of a clip; this does not.

    Args:
        central_crop: score what the program scores: flows are estimated on whole frames, then cut to the centre, whose
            sides are the largest multiples of 32 that leave at least 8 pixels at each border; False scores every pixel.
        levels: of the flow's pyramid.
        winsize: of the flow, in pixels.
    """

    central_crop: bool = True
    levels: int = 3
    winsize: int = 15

    label, unit, higher_is_better, digits, frames = "tOF", "px", False, 3, 2

    def __post_init__(self) -> None:
        self._flow()

    def describe(self) -> str:
        """Flow estimator, norm and crop."""
        return f"tOF: mean Euclidean difference of {self._flow().describe()}, {_where(self.central_crop)}"

    def __call__(self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]) -> Float64[Tensor, " t-1"]:
        """Value i is that of frames i and i + 1."""
        check_pair(restored, truth)
        region, flow = _region(restored, self.central_crop), self._flow()
        result, true = grey_levels(restored), grey_levels(truth)
        values = []
        for t in range(1, len(true)):
            difference = flow(result[t - 1], result[t]) - flow(true[t - 1], true[t])
            values.append(difference[region].double().norm(dim=0).mean())
        return as_values(values, restored)

    def _flow(self) -> Farneback:
        return Farneback(levels=self.levels, winsize=self.winsize)


class TLP:
    """tLP: how far the perceived change from frame to frame is from the true change; 0 is best.

    Chu et al. (TecoGAN), 2020: |LPIPS(x_{t-1}, x_t) - LPIPS(y_{t-1}, y_t)| of restored x and true y, times 100.

    Args:
        net: trunk of LPIPS; published figures use alex.
        weights: file of the trunk, see `LPIPS`.
        central_crop: score the centre of the frame only, as TecoGAN's evaluation program does (see `TOF`).
    """

    label, unit, higher_is_better, digits, frames = "tLP x100", "", False, 3, 2

    def __init__(
        self,
        *,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        weights: str | None = None,
        central_crop: bool = True,
    ) -> None:
        self._lpips = LPIPS(net=net, weights=weights)
        self._central_crop = central_crop

    def describe(self) -> str:
        """The distance and the crop."""
        return (
            f"tLP x100: difference of {self._lpips.protocol} between consecutive frames, {_where(self._central_crop)}"
        )

    def __call__(self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]) -> Float64[Tensor, " t-1"]:
        """Value i is that of frames i and i + 1."""
        check_pair(restored, truth)
        region = (..., *_region(restored, self._central_crop)[1:])
        result, true = (self._lpips(x[region][:-1], x[region][1:]) for x in (restored, truth))
        return 100 * (result - true).abs()


@dataclass(frozen=True, kw_only=True)
class WarpingError:
    """Warping error, times 1000: what changes along the true motion in the restored clip; lower is steadier.

    Lai et al., "Learning blind video temporal consistency", ECCV 2018: the mean squared difference, RGB in [0, 1],
    between a restored frame and its neighbour warped to it by the flow of the true frames, over the pixels that both
    show. Reconstructed: the paper has flow from FlowNet2 and warps frame t to t - 1, this has Farneback's flow and
    warps frame t - 1 to t, so compare only figures of the same `describe()`. nan where no pixel is visible, as may
    happen at a cut.

    The true clip has an error of its own, ``metric(truth, truth)``, for real pictures change and flow is inexact; a
    restored clip below it is too smooth. Measured on ten frames of each Vid4 clip: 0.5 to 2.8 for the truth, 0.2 to 0.4
    for bicubic x4.

    Args:
        levels: of the flow's pyramid.
        winsize: of the flow, in pixels.
    """

    levels: int = 3
    winsize: int = 15

    label, unit, higher_is_better, digits, frames = "E_warp x1000", "", False, 3, 2

    def __post_init__(self) -> None:
        self._flow()

    def describe(self) -> str:
        """Flow estimator, range of values and occlusion test."""
        return (
            f"warping error x1000: mean squared RGB difference, values in 0..1, along {self._flow().describe()} "
            f"of the truth; {VISIBILITY}"
        )

    def __call__(self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]) -> Float64[Tensor, " t-1"]:
        """Value i is that of frames i and i + 1."""
        check_pair(restored, truth)
        flow, true = self._flow(), grey_levels(truth)
        values = []
        for t in range(1, len(true)):
            back, forth = (x.to(restored.device) for x in (flow(true[t], true[t - 1]), flow(true[t - 1], true[t])))
            difference = (restored[t] - warp(restored[t - 1 : t], back[None])[0]).float()
            # the mean of nothing is nan
            values.append(1000 * difference.square().mean(0)[visible(back, forth)].mean())
        return as_values(values, restored)

    def _flow(self) -> Farneback:
        return Farneback(levels=self.levels, winsize=self.winsize)


@dataclass(frozen=True, kw_only=True)
class Flicker:
    """Flicker: how much the error of the restored clip changes from frame to frame; 0 is best.

    A measure of ours, not a published one: the mean of |e_t - e_{t-1}| over pixels, e = restored - true luma in grey
    levels. An error that stays, such as a wrong brightness, does not count; noise that is new in each frame does, and
    so does an error that moves with the picture, such as lost detail in motion.
    """

    crop_border: int = 0

    label, unit, higher_is_better, digits, frames = "flicker", "", False, 3, 2

    def __post_init__(self) -> None:
        check_crop(self.crop_border)

    def describe(self) -> str:
        """Formula, channel and crop."""
        return (
            "flicker (ours): mean |e_t - e_{t-1}| in grey levels of 0..255, e = restored - true on "
            f"{LUMA}, border crop {self.crop_border}"
        )

    def __call__(self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]) -> Float64[Tensor, " t-1"]:
        """Value i is that of frames i and i + 1."""
        result, true = planes(restored, truth, y_channel=True, crop_border=self.crop_border)
        return (result - true).diff(dim=0).abs().mean((1, 2, 3))


def _where(central_crop: bool) -> str:
    return _CENTRE if central_crop else "whole frame"


def _region(frames: Tensor, central_crop: bool) -> tuple[slice, slice, slice]:
    """What is scored of (channels, height, width)."""
    height, width = frames.shape[-2:]
    if not central_crop:
        return slice(None), slice(None), slice(None)
    rows, columns = ((extent - 16) // 32 * 32 for extent in (height, width))
    if min(rows, columns) < 32:
        raise ValueError(f"central_crop needs frames of at least 48x48 px, got {height}x{width}: set it to false")
    top, left = (height - rows) // 2, (width - columns) // 2
    return slice(None), slice(top, top + rows), slice(left, left + columns)
