"""Motion blur as a camera makes it, of a sharp clip: a frame is the mean of the light while the shutter was open.

Averaging the sharp frames of a fast camera in light, which a response (x^(1/2.2)) turns into the signal, is that of
GoPro [published]: Nah et al., "Deep multi-scale convolutional neural network for dynamic scene deblurring", CVPR 2017,
eq. 1 and 2, 7 to 13 frames at 240 Hz. Interpolating frames before, so that blur has no gaps, is that of REDS
[published]: Nah et al., "NTIRE 2019 challenge on video deblurring and super-resolution", CVPRW 2019, by a network and
with a measured response. Here optical flow interpolates [reconstructed]: Jiang et al., "Super SloMo", CVPR 2018, eq. 1
and 4, without its networks and its masks; the flow is DIS (Kroeger et al., "Fast optical flow using dense inverse
search", ECCV 2016) as OpenCV has it, at a quarter of the resolution ("fast"). Exposures that differ along a clip and
shot noise are ours.

Against the mean of frames that a camera has really taken (8 real clips, every 4th frame is given, the mean is of 5
successive frames): 36.4 dB PSNR, 28.7 for the sharp frames [measured]. A thing that moves farther than it is large
leaves a faint copy instead of a trail, and what a moving outline uncovers is smeared.

Frames are float RGB in [0, 1], (T, 3, h, w), float32 on the CPU.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn.functional import pad

from restore.degrade import imresize, quantize
from restore.optical_flow import grey_levels

Response = Literal["gamma", "srgb", "linear"]

# Pixels of truth around a crop that are degraded with it: flow needs surroundings, and what moves in comes from there.
# With 16 a crop of 128 pixels is 54 dB from the same place of the whole frame, 45 without [measured].
MARGIN = 16
_LONGEST = 4.0  # exposure, in intervals between input frames
_GAMMA = 2.2
_PERIODS = (4.0, 16.0)  # of a smooth exposure, in input frames
_LEAST_SIDE = 32  # OpenCV crashes where a level of its pyramid is smaller than a patch


@dataclass(frozen=True)
class Exposure:
    """Frames exposed for a while around their time, each for its own, then MATLAB's bicubic.

    Exposures are uniform in ``exposure_range``, in intervals between input frames: 1 is a shutter that never closes,
    more is a faster motion than the clip's. ``vary`` draws one for every frame, so that neighbours differ in sharpness
    (frame), a wave between two of them (smooth), or one for all (clip). ``subframes`` frames at a high rate are
    averaged. ``response`` is the camera's, from light to signal: gamma is x^(1/2.2), as in GoPro's blur_gamma, srgb
    that of IEC 61966-2-1, linear none, as in GoPro's blur. ``noise_range`` is the shot noise, in linear light at the
    size of the truth: its deviation at white, in grey levels, which falls with the root of the light.

    An exposure is centred on its frame, so that nothing is shifted; of length 0 it is the sharp frame. Before the first
    and after the last frame motion goes on as it was. ValueError for a value outside its range.
    """

    scale: int = 4
    exposure_range: tuple[float, float] = (0.0, 1.0)
    vary: Literal["frame", "smooth", "clip"] = "frame"
    subframes: int = 15
    response: Response = "gamma"
    noise_range: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name, most in (("exposure_range", _LONGEST), ("noise_range", 255.0)):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= most:
                raise ValueError(f"{name}={[low, high]} must be (low, high) within 0..{most:g}")
        for name in ("scale", "subframes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, known in (("vary", ("frame", "smooth", "clip")), ("response", ("gamma", "srgb", "linear"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")

    def __call__(
        self, clip: Float[Tensor, "t 3 h w"], rng: np.random.Generator, step: int = 1
    ) -> Float[Tensor, "n 3 H W"]:
        """Expose every ``step``-th frame, from the first on; those in between show how things move.

        The sides of the result are ceil(side / scale), its values the 256 levels of 8 bits.
        """
        kept = range(0, len(clip), step)
        film = HighRate(clip.float(), self.response)
        lengths = self.lengths(len(kept), rng)
        light = torch.stack([film.mean(t, step * e, self.subframes) for t, e in zip(kept, lengths, strict=True)])
        if self.noise_range[1] > 0:
            light = _shot_noise(light, rng.uniform(*self.noise_range) / 255, rng)
        return quantize(imresize(to_signal(light, self.response), 1 / self.scale))

    def lengths(self, frames: int, rng: np.random.Generator) -> list[float]:
        """Draw the exposures of so many input frames, in intervals between them."""
        if self.vary == "frame":
            return rng.uniform(*self.exposure_range, frames).tolist()
        one, other = rng.uniform(*self.exposure_range, 2).tolist()
        if self.vary == "clip":
            return [one] * frames
        rate, phase = 2 * math.pi / rng.uniform(*_PERIODS), rng.uniform(0, 2 * math.pi)
        return [one + (other - one) * (1 - math.cos(rate * t + phase)) / 2 for t in range(frames)]


class HighRate:
    """The light of a clip at any time, in intervals between its frames, from the first."""

    def __init__(self, clip: Float32[Tensor, "t 3 h w"], response: Response) -> None:
        light = to_light(clip, response).permute(0, 2, 3, 1)
        self._light = pad(light, (0, 1)).numpy()  # (T, h, w, 4): OpenCV moves four planes in half the time of three
        grey = grey_levels(clip)
        pairs = ((_flow(one, two), _flow(two, one)) for one, two in itertools.pairwise(grey))
        self._flows = [(there, back, there + back) for there, back in pairs]  # the sum is zero where both agree
        height, width = clip.shape[2:]
        rows, columns = np.mgrid[:height, :width].astype(np.float32)
        self._grid = np.stack([columns, rows], -1)  # (h, w, 2), x before y as OpenCV has it

    def mean(self, centre: float, length: float, subframes: int) -> Float32[Tensor, "3 h w"]:
        """The mean over times from centre - length / 2 to centre + length / 2, in the middles of equal parts."""
        count = subframes if length > 0 else 1
        total = np.zeros_like(self._light[0])
        for k in range(count):
            for weight, frame in self._at(centre + length * ((k + 0.5) / count - 0.5)):
                total = cv2.scaleAdd(frame, weight / count, total)
        return torch.from_numpy(total)[..., :3].permute(2, 0, 1)

    def _at(self, time: float) -> Iterator[tuple[float, Float32[np.ndarray, "h w 4"]]]:
        """The frames before and after, moved to this time, and their weights.

        A flow is taken where it leads, not where it starts; from both flows the shift is that of eq. 4. Outside the
        clip only the nearest frame is left, moved by its own flow.
        """
        if not self._flows:
            yield 1.0, self._light[0]
            return
        before = min(max(math.floor(time), 0), len(self._flows) - 1)
        forward, backward, unlike = self._flows[before]
        late, early = time - before, before + 1 - time
        share = min(max(late, 0.0), 1.0)
        if share < 1:
            yield 1 - share, self._read(before, (-late, forward), (late * share, unlike))
        if share > 0:
            yield share, self._read(before + 1, (-early, backward), (early * (1 - share), unlike))

    def _read(self, frame: int, *shifts: tuple[float, Float32[np.ndarray, "h w 2"]]) -> Float32[np.ndarray, "h w 4"]:
        """A frame at p + the weighted sum of shifts for every pixel p; beyond the border, the border."""
        places = self._grid
        for weight, shift in shifts:
            places = cv2.scaleAdd(shift, weight, places)  # one pass where NumPy takes two
        border = cv2.BORDER_REPLICATE
        return cv2.remap(self._light[frame], places, None, cv2.INTER_LINEAR, borderMode=border)  # type: ignore[call-overload]


def to_light(signal: Float[Tensor, "*shape"], response: Response) -> Float[Tensor, "*shape"]:
    """The light, linear and in [0, 1], that a camera of this response turns into a signal in [0, 1]."""
    if response == "linear":
        return signal
    if response == "srgb":
        return torch.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return signal**_GAMMA


def to_signal(light: Float[Tensor, "*shape"], response: Response) -> Float[Tensor, "*shape"]:
    """The inverse of `to_light`; light outside [0, 1] is clamped."""
    light = light.clamp(0, 1)
    if response == "linear":
        return light
    if response == "srgb":
        return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return light ** (1 / _GAMMA)


def _shot_noise(light: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """Noise whose variance is that of counted light: sigma^2 at white, proportional to the light."""
    noise = torch.from_numpy(rng.standard_normal(light.shape, dtype=np.float32))
    return light + sigma * light.clamp(min=0).sqrt() * noise


def _flow(first: UInt8[np.ndarray, "h w"], second: UInt8[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w 2"]:
    """Flow from the first frame to the second, (x, y) in pixels; small and very long frames are continued before."""
    height, width = first.shape
    below = max(_LEAST_SIDE, (width + 1) // 2) - height
    right = max(_LEAST_SIDE, (height + 1) // 2) - width
    if max(below, right) > 0:
        around = (0, max(below, 0), 0, max(right, 0), cv2.BORDER_REPLICATE)
        first, second = (cv2.copyMakeBorder(frame, *around) for frame in (first, second))
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    return method.calc(first, second, None)[:height, :width]  # type: ignore[call-overload]  # None: no first guess
