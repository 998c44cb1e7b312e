"""`METRICS`, the one table from a name in an options file to its class; each is a `restore.metrics.Metric`."""

from collections.abc import Callable

from restore.action_distance import ActionDistance
from restore.metrics import PSNR, SSIM, Metric
from restore.perceptual import LPIPS, PyIQA
from restore.temporal import TLP, TOF, Flicker, WarpingError

METRICS: dict[str, Callable[..., Metric]] = {
    "psnr": PSNR,
    "ssim": SSIM,
    "lpips": LPIPS,
    "tof": TOF,
    "tlp": TLP,
    "warping_error": WarpingError,
    "flicker": Flicker,
    "action_distance": ActionDistance,
    "pyiqa": PyIQA,
}
