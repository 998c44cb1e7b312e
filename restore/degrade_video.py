"""How input clips are made from true ones, by name: bicubic, blur-downsampling, motion blur, and real-world video.

`DEGRADATIONS` is the table from a name in an options file to a class; each instance is called as
`degrade(clip, rng)`. The result depends on the clip and on `rng` alone, in any process.

`RealWorldDegradation` is second order: blur, resizing, noise, JPEG and video compression, twice, and a last resizing
with ringing. The order and the figures marked [1] are those of Wang et al., "Real-ESRGAN", ICCVW 2021 and its published
options; video compression and parameters that wander from frame to frame, [2], are those of Chan et al., "Investigating
tradeoffs in real-world video super-resolution" (RealBasicVSR), CVPR 2022, as configured in mmagic. What has no mark is
our choice. Left out are the sharpening of the truth [1, 2] and sizes that wander from frame to frame [2].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from restore.degrade import bd, bd_shift, imresize, quantize
from restore.degrade_codec import WORST_CRF, check_codec, compress_video, jpeg
from restore.degrade_exposure import Exposure
from restore.degrade_steps import (
    KERNELS,
    RESIZE_MODES,
    blur,
    gaussian_noise,
    motion_blur,
    poisson_noise,
    resize,
    sinc,
)

Range = tuple[float, float]

# What a record may hold, by the name of the step.
STEPS: dict[str, Callable[..., Tensor]] = {
    "blur": blur,
    "sinc": sinc,
    "resize": resize,
    "gaussian_noise": gaussian_noise,
    "poisson_noise": poisson_noise,
    "jpeg": jpeg,
    "video": compress_video,
}
_LARGEST_MOVE = 0.03  # of its range that a parameter moves from frame to frame at drift 1; [2] has 0.003 to 0.05
_KERNEL_SIZES = (7, 21)  # odd ones between [1]
_LEAST_SIDE = 2  # of a frame between two steps


@runtime_checkable
class Degradation(Protocol):
    """Makes the low-resolution input of a clip; `scale` is the factor between their sides."""

    @property
    def scale(self) -> int:
        """Side of the result: ceil(side / scale)."""

    def __call__(self, clip: Float[Tensor, "t 3 h w"], rng: np.random.Generator) -> Float[Tensor, "t 3 H W"]:
        """Degrade a clip of RGB in [0, 1], float32, T >= 1; the result lies on the 256 levels of 8 bits."""


@dataclass(frozen=True)
class Bicubic:
    """MATLAB's bicubic (BI); not random."""

    scale: int = 4

    def __post_init__(self) -> None:
        _check(self.scale >= 1, "scale", self.scale, "at least 1")

    def __call__(self, clip: Float[Tensor, "t 3 h w"], rng: np.random.Generator) -> Float[Tensor, "t 3 H W"]:
        """Degrade a clip."""
        return quantize(imresize(clip, 1 / self.scale))


@dataclass(frozen=True)
class BlurDown:
    """Blur-downsampling (BD) as `restore.degrade.bd` explains it, phases included; not random."""

    scale: int = 4
    sigma: float = 1.6
    taps: int = 13
    phase: str = "first"
    border: str = "reflect"

    def __post_init__(self) -> None:
        self(torch.zeros(1, 3, 1, 1), np.random.default_rng(0))  # bd itself knows what is wrong with the settings

    def __call__(self, clip: Float[Tensor, "t 3 h w"], rng: np.random.Generator) -> Float[Tensor, "t 3 H W"]:
        """Degrade a clip."""
        low = bd(clip, self.scale, sigma=self.sigma, taps=self.taps, phase=self.phase, border=self.border)
        return quantize(low)

    @property
    def shift(self) -> float:
        """Where it samples, in pixels of the truth after where bicubic does."""
        return bd_shift(self.scale, taps=self.taps, phase=self.phase)


@dataclass(frozen=True)
class MotionBlur:
    """Every frame blurred along a straight line of its own direction and length, then MATLAB's bicubic.

    Lengths are uniform in ``length_range`` (pixels of the truth) and independent from frame to frame, so neighbours
    differ in sharpness and direction: what energy-weighted fusion is made for. Ours; real motion is neither straight
    nor the same for the whole frame.
    """

    scale: int = 4
    length_range: Range = (0.0, 16.0)

    def __post_init__(self) -> None:
        low, high = self.length_range
        _check(0 <= low <= high <= 64, "length_range", list(self.length_range), "two rising lengths within 0..64")

    def __call__(self, clip: Float[Tensor, "t 3 h w"], rng: np.random.Generator) -> Float[Tensor, "t 3 H W"]:
        """Degrade a clip."""
        length = rng.uniform(*self.length_range, len(clip)).tolist()
        angle = rng.uniform(0, math.pi, len(clip)).tolist()
        return quantize(imresize(motion_blur(clip.float(), length=length, angle=angle), 1 / self.scale))


class _Round(NamedTuple):
    """What the two rounds have differently; fields as in `RealWorldDegradation`."""

    blur_prob: float
    blur_sigma: Range
    resize_prob: tuple[float, float, float]
    resize_range: Range
    noise_range: Range
    poisson_scale_range: Range
    jpeg_prob: float
    jpeg_range: Range


@dataclass(frozen=True)
class RealWorldDegradation:
    """Random degradations as of real video, drawn anew for each clip; a range is (low, high), drawn uniformly.

    A name that ends in 2 is for the second round. Sizes of the first round are relative to the true frames, those of
    the second to the result. A figure after a mark is the published one: the defaults are milder, so that a result
    still looks like a video that someone would want restored.

    Raises ValueError for a value outside its range or a codec that cannot be encoded here.
    """

    scale: int = 4
    drift: float = 0.5  # 0: parameters are equal for all frames; 1: they move by up to 3 % of their range a frame
    blur_prob: float = 0.9  # [1] 1
    blur_sigma: Range = (0.2, 2.5)  # pixels; [1] 0.2 to 3
    kernel_list: tuple[str, ...] = KERNELS
    kernel_prob: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # of kernel_list [1]
    sinc_prob: float = 0.1  # a sinc kernel instead of those [1]
    betag_range: Range = (0.5, 4.0)  # shape of generalised Gaussians [1]
    betap_range: Range = (1.0, 2.0)  # shape of plateaus [1]
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep [1]
    resize_range: Range = (0.3, 1.5)  # [1] 0.15 to 1.5
    noise_prob: float = 0.7  # that a round has noise; [1] 1
    gaussian_noise_prob: float = 0.5  # that this noise is Gaussian, else Poisson [1]
    noise_range: Range = (1.0, 15.0)  # sigma of Gaussian noise, grey levels; [1] 1 to 30
    poisson_scale_range: Range = (0.05, 1.5)  # [1] 0.05 to 3
    gray_noise_prob: float = 0.4  # [1]
    jpeg_prob: float = 0.4  # [1] 1
    jpeg_range: Range = (50, 95)  # quality; [1] 30 to 95
    video_prob: float = 0.4  # of video compression after the first round; [2] 1
    blur_prob2: float = 0.6  # [1] 0.8
    blur_sigma2: Range = (0.2, 1.2)  # [1] 0.2 to 1.5
    resize_prob2: tuple[float, float, float] = (0.3, 0.4, 0.3)  # [1]
    resize_range2: Range = (0.5, 1.5)  # [1] 0.3 to 1.2
    noise_range2: Range = (1.0, 12.0)  # [1] 1 to 25
    poisson_scale_range2: Range = (0.05, 1.2)  # [1] 0.05 to 2.5
    jpeg_prob2: float = 0.4  # [1] 1
    jpeg_range2: Range = (50, 95)  # [1] 30 to 95
    video_prob2: float = 1.0  # of video compression at the end [2]
    final_sinc_prob: float = 0.8  # [1]
    video_codecs: tuple[str, ...] = ("libx264", "mpeg4", "libvpx-vp9")  # "libx265" is slow where frames are small
    crf_range: Range = (16, 30)  # see `restore.degrade_codec.compress_video`
    bitrate_prob: float = 0.3  # of a constant rate instead of a constant quality; [2] 1
    bits_per_pixel_range: Range = (0.2, 1.0)  # [2] 0.1 to 1 at its frames of 64x64; small frames need more a pixel
    gop_range: tuple[int, int] = (4, 60)  # frames

    def __post_init__(self) -> None:
        _check(self.scale >= 1, "scale", self.scale, "at least 1")
        limits = {"jpeg_range": (1, 100), "jpeg_range2": (1, 100), "crf_range": (0, WORST_CRF), "gop_range": (1, 9999)}
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "scale"):
            if "range" in name or "sigma" in name:
                least, most = limits.get(name, (1e-3, 1e3))
                rule = f"(low, high) within {least:g}..{most:g}"
                _check(len(value) == 2 and least <= value[0] <= value[1] <= most, name, value, rule)
            elif name in ("resize_prob", "resize_prob2", "kernel_prob"):
                _check(min(value) >= 0 and math.isclose(sum(value), 1), name, value, "probabilities of sum 1")
            elif name not in ("kernel_list", "video_codecs"):
                _check(0 <= value <= 1, name, value, "within 0..1")
        _check(set(self.kernel_list) <= set(KERNELS), "kernel_list", self.kernel_list, f"of {KERNELS}")
        _check(len(self.kernel_prob) == len(self.kernel_list), "kernel_prob", self.kernel_prob, "one for each kernel")
        _check(len(self.video_codecs) > 0, "video_codecs", self.video_codecs, "at least one codec")
        for codec in self.video_codecs:
            check_codec(codec)

    def __call__(self, clip: Float[Tensor, "t 3 h w"], rng: np.random.Generator) -> Float[Tensor, "t 3 H W"]:
        """Degrade a clip, float32 on the CPU: `replay` what `draw` draws."""
        frames, _, height, width = clip.shape
        return replay(clip, self.draw(frames, height, width, rng))

    def draw(self, frames: int, height: int, width: int, rng: np.random.Generator) -> dict[str, Any]:
        """Draw all parameters for a clip of this size.

        Returns a record of plain values (JSON holds it) for `replay`: {"frames", "height", "width", "steps"}, each
        step {"step": a name of `STEPS`, ...its arguments}.
        """
        if min(frames, height, width) < 1:
            raise ValueError(f"a clip of {frames} frames of {height}x{width}: each must be at least 1")
        draw = _Draw(rng, frames, self.drift)
        target = (math.ceil(height / self.scale), math.ceil(width / self.scale))
        first = _Round(self.blur_prob, self.blur_sigma, self.resize_prob, self.resize_range, self.noise_range,
                       self.poisson_scale_range, self.jpeg_prob, self.jpeg_range)  # fmt: skip
        second = _Round(self.blur_prob2, self.blur_sigma2, self.resize_prob2, self.resize_range2, self.noise_range2,
                        self.poisson_scale_range2, self.jpeg_prob2, self.jpeg_range2)  # fmt: skip
        steps = self._round(draw, first, (height, width)) + self._video(draw, self.video_prob)
        steps += self._round(draw, second, target)
        last = [_resizing(draw, target)]
        if draw.happens(self.final_sinc_prob):
            last.append(_ringing(draw, math.pi / 3))
        compression = self._video(draw, self.video_prob2)
        steps += last + compression if draw.happens(0.5) else compression + last
        return {"frames": frames, "height": height, "width": width, "steps": steps}

    def _round(self, draw: "_Draw", this: _Round, base: tuple[int, int]) -> list[dict[str, Any]]:
        """Blur, resizing relative to `base`, noise and JPEG."""
        steps = [self._blur(draw, this.blur_sigma)] if draw.happens(this.blur_prob) else []
        low, high = this.resize_range
        way = draw.choice(("up", "down", "keep"), this.resize_prob)
        factor = {"up": draw.uniform(1, max(high, 1)), "down": draw.uniform(min(low, 1), 1), "keep": 1.0}[way]
        steps.append(_resizing(draw, tuple(max(round(factor * side), _LEAST_SIDE) for side in base)))
        if draw.happens(self.noise_prob):
            if draw.happens(self.gaussian_noise_prob):
                noise = {"step": "gaussian_noise", "sigma": draw.track(this.noise_range)}
            else:
                noise = {"step": "poisson_noise", "scale": draw.track(this.poisson_scale_range)}
            steps.append({**noise, "gray": draw.happens(self.gray_noise_prob), "seed": draw.integer(0, 2**31 - 1)})
        if draw.happens(this.jpeg_prob):
            steps.append({"step": "jpeg", "quality": [round(q) for q in draw.track(this.jpeg_range)]})
        return steps

    def _blur(self, draw: "_Draw", sigma: Range) -> dict[str, Any]:
        if draw.happens(self.sinc_prob):
            return _ringing(draw, math.pi / 3)
        kernel = draw.choice(self.kernel_list, self.kernel_prob)
        return {
            "step": "blur",
            "kernel": kernel,
            "size": draw.odd(_KERNEL_SIZES),
            "sigma_x": draw.track(sigma),
            "sigma_y": draw.track(sigma),
            "angle": draw.track((-math.pi, math.pi)),
            "beta": draw.track(self.betap_range if kernel.startswith("plateau") else self.betag_range),
        }

    def _video(self, draw: "_Draw", prob: float) -> list[dict[str, Any]]:
        if not draw.happens(prob):
            return []
        by_rate = draw.happens(self.bitrate_prob)
        span = self.bits_per_pixel_range if by_rate else self.crf_range
        quality = {"bits_per_pixel" if by_rate else "crf": draw.uniform(*span)}
        codec = draw.choice(self.video_codecs, None)
        return [{"step": "video", "codec": codec, **quality, "gop": draw.integer(*self.gop_range)}]


DEGRADATIONS: dict[str, Callable[..., Degradation]] = {
    "bicubic": Bicubic,
    "bd": BlurDown,
    "motion_blur": MotionBlur,
    "exposure": Exposure,
    "real": RealWorldDegradation,
}


def degraded(
    degrade: Degradation, truth: Float[Tensor, "t 3 h w"], time_scale: int, rng: np.random.Generator
) -> Float[Tensor, "n 3 H W"]:
    """The input of a stretch of truth: every ``time_scale``-th frame. `Exposure` looks at those in between, too."""
    if isinstance(degrade, Exposure):
        return degrade(truth, rng, step=time_scale)
    return degrade(truth[::time_scale], rng)


def replay(clip: Float[Tensor, "t 3 h w"], record: Mapping[str, Any]) -> Float[Tensor, "t 3 H W"]:
    """Apply the steps of a record of `RealWorldDegradation.draw`; the same clip and record give the same result.

    clip: RGB in [0, 1], on the CPU. The result is float32, rounded to 8 bits. ValueError if the record is for a clip
    of another size or names an unknown step.
    """
    size = (len(clip), *clip.shape[2:])
    planned = (record["frames"], record["height"], record["width"])
    if size != planned:
        raise ValueError(f"the record is for a clip of (frames, height, width) = {planned}, not {size}")
    clip = clip.float()
    for step in record["steps"]:
        if step["step"] not in STEPS:
            raise ValueError(f"unknown step {step['step']!r}; known: {', '.join(STEPS)}")
        clip = STEPS[step["step"]](clip, **{key: value for key, value in step.items() if key != "step"})
    return quantize(clip)


class _Draw:
    """Random choices as plain Python values, so that a record of them can be logged."""

    def __init__(self, rng: np.random.Generator, frames: int, drift: float) -> None:
        self._rng, self._frames, self._drift = rng, frames, drift

    def happens(self, prob: float) -> bool:
        return bool(self._rng.random() < prob)

    def uniform(self, low: float, high: float) -> float:
        return float(self._rng.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """Draw from low to high, both included."""
        return int(self._rng.integers(low, high + 1))

    def odd(self, span: tuple[int, int]) -> int:
        return 2 * self.integer(span[0] // 2, span[1] // 2) + 1

    def choice(self, items: Sequence[str], prob: Sequence[float] | None) -> str:
        return items[int(self._rng.choice(len(items), p=prob))]

    def track(self, span: Range) -> list[float]:
        """Draw a parameter for each frame: a straight line or a random walk, as likely, stopped by the range's ends."""
        low, high = span
        largest = self._drift * _LARGEST_MOVE * (high - low)
        line = self.happens(0.5)
        moves = self._rng.uniform(-largest, largest, 1 if line else self._frames)
        path = np.cumsum(np.broadcast_to(moves, self._frames)) - moves[0]
        return [float(value) for value in np.clip(self.uniform(low, high) + path, low, high)]


def _resizing(draw: _Draw, size: Sequence[int]) -> dict[str, Any]:
    return {"step": "resize", "size": list(size), "mode": draw.choice(RESIZE_MODES, None)}


def _ringing(draw: _Draw, least: float) -> dict[str, Any]:
    return {"step": "sinc", "size": draw.odd(_KERNEL_SIZES), "omega": draw.track((least, math.pi))}


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value} must be {rule}")
