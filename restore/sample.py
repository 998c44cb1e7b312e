"""A short clip with real texture, real motion and a real occlusion, made from photographs: no download, no licence.

A camera pans, zooms and turns over a large photograph at sub-pixel speed while a cut-out of another photograph moves
across it, with a soft edge and a shadow. Demos, tests and benchmarks get footage with a known truth from it on any
machine; it says nothing about figures on published test sets.

The photographs ship inside the scikit-image wheel. Their licences as scikit-image's documentation states them:
astronaut (NASA), public domain; rocket (SpaceX), public domain; coffee (Rachel Michetti), chelsea (Stefan van der
Walt), brick and gravel (CC0Textures), grass (linolafett), CC0. The last three are grey and get a tint here.
"""

import math
import random
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import grid_sample

from restore.degrade import imresize, quantize

_REFERENCE_SIZE = (256, 448)  # speeds and distances below are in pixels of a frame of this size
_SUPERSAMPLING = 2
_MAX_STEP = 2.0  # photo pixels a frame pixel; small frames are a detail of the photo, not a thumbnail
_REACH = 0.82  # share of the photo that the camera sees at once, the rest is room to pan
_CAMERA_ZOOM, _CAMERA_TURN = 0.04, math.radians(2)
_OBJECT_ZOOM, _OBJECT_TURN = 0.08, math.radians(10)


class _Ellipse(NamedTuple):
    """In pixels of its photo."""

    x: float
    y: float
    radius_x: float
    radius_y: float


class _Object(NamedTuple):
    """A cut-out: the union of ellipses, in a photo."""

    photo: str
    outline: tuple[_Ellipse, ...]


class _Wave(NamedTuple):
    """A sine over the frame number; rate in radians a frame."""

    amplitude: float
    rate: float
    phase: float

    def at(self, t: int) -> float:
        return self.amplitude * math.sin(self.rate * t + self.phase)


class _Path(NamedTuple):
    """Where something is in frame t: position in frame pixels, relative size, angle in radians."""

    start: tuple[float, float]
    x: tuple[_Wave, ...]
    y: tuple[_Wave, ...]
    zoom: _Wave
    angle: _Wave

    def at(self, t: int) -> tuple[float, float, float, float]:
        x = self.start[0] + sum(wave.at(t) for wave in self.x)
        y = self.start[1] + sum(wave.at(t) for wave in self.y)
        return x, y, 1 + self.zoom.at(t), self.angle.at(t)


_BACKGROUNDS = ("gravel", "astronaut", "grass", "rocket", "brick", "coffee")
PHOTOGRAPHS = ("astronaut", "rocket", "coffee", "chelsea", "brick", "gravel", "grass")
_TINTS = {"gravel": (1.04, 0.98, 0.88), "grass": (0.88, 1.0, 0.58), "brick": (1.2, 0.94, 0.84)}
_OBJECTS = (
    _Object("coffee", (_Ellipse(284, 209, 201, 171), _Ellipse(287, 113, 120, 97))),
    _Object("chelsea", (_Ellipse(222, 150, 155, 146),)),
    _Object(
        "astronaut",
        (
            _Ellipse(226, 82, 70, 72),
            _Ellipse(222, 160, 50, 60),
            _Ellipse(208, 224, 96, 74),
            _Ellipse(186, 382, 150, 128),
        ),
    ),
)


def sample_clip(
    frames: int = 15, height: int = 256, width: int = 448, *, seed: int = 0
) -> Float32[Tensor, "{frames} 3 {height} {width}"]:
    """Render a clip: the background moves 0.5 to 3 px a frame, the object up to 6, in a frame of 256x448.

    The same arguments give the same clip, and a longer clip begins with the shorter one. Motion grows with the
    frame. Seeds differ in photos, crop and motion. A frame larger than its photo (512x512 or thereabouts) is softer
    than real footage of that size.

    Args:
        frames: number of frames, at least 1.
        height: rows, at least 1.
        width: columns, at least 1.
        seed: any integer.

    Returns:
        (frames, 3, height, width) float32 RGB on the 256 levels k / 255, as if read from image files.

    Raises:
        ValueError: a size below 1.
        ImportError: scikit-image is not installed.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"frames={frames}, height={height} and width={width} must be at least 1")
    rng = random.Random(f"sample_clip {seed}")
    size = (height, width)
    background = _BACKGROUNDS[seed % len(_BACKGROUNDS)]
    choice = [item for item in _OBJECTS if item.photo != background]
    item = choice[(seed + seed // len(_BACKGROUNDS)) % len(choice)]
    paint_background = _Background(photograph(background), size, rng)
    paint_object = _MovingObject(item, size, rng)
    return torch.stack([_develop(paint_object.over(paint_background.at(t), t)) for t in range(frames)])


def low_resolution(
    clip: Float[Tensor, "*b t 3 h w"], *, scale: int = 4, time_scale: int = 2
) -> Float[Tensor, "*b u 3 H W"]:
    """Make a network's input of a clip as the published protocol does.

    Every time_scale-th frame from the first on, each shrunk by MATLAB-equivalent bicubic and rounded to 8 bit.

    Args:
        clip: (..., T, 3, H, W) RGB in [0, 1]. For a network's output to match it, H and W are multiples of scale
            and T - 1 is one of time_scale; otherwise the result's sides are rounded up.
        scale: factor in space.
        time_scale: factor in time; 1 keeps every frame.
    """
    return quantize(imresize(clip[..., ::time_scale, :, :, :], 1 / scale))


class _Background:
    """A camera that moves over a photograph and never sees its border."""

    def __init__(self, photo: Tensor, size: tuple[int, int], rng: random.Random) -> None:
        (height, width), (rows, columns) = size, photo.shape[-2:]
        turn, zoom = _CAMERA_TURN, 1 + _CAMERA_ZOOM
        # Half sides of the upright box around a frame turned and zoomed to the limit, in frame pixels.
        seen_x = zoom * (width * math.cos(turn) + height * math.sin(turn)) / 2
        seen_y = zoom * (height * math.cos(turn) + width * math.sin(turn)) / 2
        self.step = min(_REACH * columns / 2 / seen_x, _REACH * rows / 2 / seen_y, _MAX_STEP)
        self.size, self.photo_size = size, (rows, columns)
        self.photo = _without_aliasing(photo, self.step * zoom)
        self.path = self._path(rng, columns / 2 / self.step - seen_x, rows / 2 / self.step - seen_y)

    def _path(self, rng: random.Random, room_x: float, room_y: float) -> _Path:
        """room: how far the camera may go from the photo's centre, in frame pixels."""
        unit = _unit(self.size)
        speed, heading = rng.uniform(1.2, 2.2) * unit, rng.uniform(0.25, 1.2)
        shake_x, shake_y = (_Wave(0.4 * unit, rng.uniform(0.25, 0.35), rng.uniform(0, 6)) for _ in "xy")
        pan_x = _pan(rng, min(room_x - shake_x.amplitude, 90 * unit), speed * math.cos(heading))
        pan_y = _pan(rng, min(room_y - shake_y.amplitude, 60 * unit), speed * math.sin(heading))
        free_x = room_x - shake_x.amplitude - pan_x.amplitude
        free_y = room_y - shake_y.amplitude - pan_y.amplitude
        return _Path(
            start=(rng.uniform(-free_x, free_x), rng.uniform(-free_y, free_y)),
            x=(pan_x, shake_x),
            y=(pan_y, shake_y),
            zoom=_Wave(_CAMERA_ZOOM, rng.uniform(0.02, 0.04), rng.uniform(0, 6)),
            angle=_Wave(_CAMERA_TURN, rng.uniform(0.02, 0.04), rng.uniform(0, 6)),
        )

    def at(self, t: int) -> Tensor:
        """Frame t, supersampled."""
        x, y, zoom, angle = self.path.at(t)
        rows, columns = self.photo_size
        centre = (columns / 2 + self.step * x, rows / 2 + self.step * y)
        return _look_up(self.photo, self.photo_size, _positions(self.size, centre, self.step * zoom, angle))


class _MovingObject:
    """A cut-out that moves across the frame, darkens what lies beneath and hides it."""

    def __init__(self, item: _Object, size: tuple[int, int], rng: random.Random) -> None:
        photo = photograph(item.photo)
        left, top = min(e.x - e.radius_x for e in item.outline), min(e.y - e.radius_y for e in item.outline)
        right, bottom = max(e.x + e.radius_x for e in item.outline), max(e.y + e.radius_y for e in item.outline)
        self.centre = ((left + right) / 2, (top + bottom) / 2)
        self.radius = math.hypot(right - left, bottom - top) / 2
        self.step = (bottom - top) / (rng.uniform(0.42, 0.55) * min(size[0], 0.75 * size[1]))
        self.outline, self.size, self.photo_size = item.outline, size, (photo.shape[-2], photo.shape[-1])
        self.photo = _without_aliasing(photo, self.step * (1 + _OBJECT_ZOOM))
        self.path = self._path(rng)

    def _path(self, rng: random.Random) -> _Path:
        (height, width), unit = self.size, _unit(self.size)
        speed, heading = rng.uniform(3.5, 5) * unit, rng.uniform(0.1, 0.5)
        return _Path(
            start=(rng.uniform(-0.08, 0.08) * width, rng.uniform(-0.08, 0.08) * height),
            x=(_pan(rng, 0.36 * width, speed * math.cos(heading)),),
            y=(_pan(rng, 0.28 * height, speed * math.sin(heading)),),
            zoom=_Wave(_OBJECT_ZOOM, rng.uniform(0.03, 0.06), rng.uniform(0, 6)),
            angle=_Wave(_OBJECT_TURN, rng.uniform(0.03, 0.06), rng.uniform(0, 6)),
        )

    def over(self, below: Tensor, t: int) -> Tensor:
        """Paint the object onto the supersampled frame t and return that frame."""
        x, y, zoom, angle = self.path.at(t)
        step, drop = self.step / zoom, 7 * _unit(self.size)
        window = self._window(x, y, self.radius / step + 3 * drop)
        place = _positions(self.size, self.centre, step, angle, (x, y), window)
        shade = _positions(self.size, self.centre, step, angle, (x + drop, y + drop), window)
        part = below[:, window[0], window[1]]
        part *= 1 - 0.5 * self._coverage(shade, 3 * drop * step)
        part += self._coverage(place, 1.5 * step) * (_look_up(self.photo, self.photo_size, place) - part)
        return below

    def _window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """Rows and columns of the supersampled frame within reach of a point, so that no others are worked on."""
        ends = []
        for position, length in zip((y, x), self.size, strict=True):
            first, last = (math.floor(_SUPERSAMPLING * (position + length / 2 + side)) for side in (-reach, reach))
            ends.append(slice(max(first, 0), max(last, 0)))
        return ends[0], ends[1]

    def _coverage(self, position: Tensor, edge: float) -> Tensor:
        """0 outside the outline to 1 inside, rising over `edge` photo pixels."""
        inside = []
        for x, y, radius_x, radius_y in self.outline:
            distance = torch.hypot((position[..., 0] - x) / radius_x, (position[..., 1] - y) / radius_y)
            inside.append((1 - distance) * min(radius_x, radius_y) / edge + 0.5)
        ramp = torch.stack(inside).amax(0).clamp(0, 1)
        return ramp * ramp * (3 - 2 * ramp)


def _unit(size: tuple[int, int]) -> float:
    """Pixels of this frame size that one pixel of the reference size becomes; small frames keep half."""
    return max(math.sqrt(size[0] * size[1] / math.prod(_REFERENCE_SIZE)), 0.5)


def _pan(rng: random.Random, amplitude: float, speed: float) -> _Wave:
    """Make a wave that starts near the middle of its way, where it has its greatest speed in pixels a frame."""
    sign = 1 if rng.random() < 0.5 else -1
    return _Wave(amplitude, sign * speed / amplitude, rng.uniform(-0.6, 0.6))


def photograph(name: str) -> Float32[Tensor, "3 h w"]:
    """One of `PHOTOGRAPHS`, RGB in [0, 1], the grey ones tinted; ImportError without scikit-image."""
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("the sample clip needs photographs: pip install scikit-image") from error
    pixels = torch.tensor(getattr(data, name)(), dtype=torch.float32) / 255
    if name in _TINTS:
        pixels = (pixels.unsqueeze(-1) * torch.tensor(_TINTS[name])).clamp(0, 1)
    return pixels.permute(2, 0, 1).contiguous()


def _without_aliasing(photo: Tensor, step: float) -> Tensor:
    """Shrink a photo of which a frame shows only every step-th pixel, down to the supersampled density."""
    return photo if step <= _SUPERSAMPLING else imresize(photo, _SUPERSAMPLING / step)


def _positions(
    size: tuple[int, int],
    centre: tuple[float, float],
    step: float,
    angle: float,
    origin: tuple[float, float] = (0.0, 0.0),
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> Float32[Tensor, "rows columns 2"]:
    """Photo position (x, y) in pixels of the supersampled frame pixels in a window of rows and columns.

    The frame point `origin`, in pixels from the frame's centre, shows the photo's `centre`.
    """
    height, width = size
    y = (torch.arange(height * _SUPERSAMPLING)[window[0], None] + 0.5) / _SUPERSAMPLING - height / 2 - origin[1]
    x = (torch.arange(width * _SUPERSAMPLING)[window[1]] + 0.5) / _SUPERSAMPLING - width / 2 - origin[0]
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    return torch.stack([centre[0] + cos * x - sin * y, centre[1] + sin * x + cos * y], -1)


def _look_up(photo: Tensor, photo_size: tuple[int, int], position: Tensor) -> Float32[Tensor, "3 rows columns"]:
    """Bicubic samples of a photo, which may be stored smaller than the photo_size that positions refer to."""
    grid = 2 * position / position.new_tensor([photo_size[1], photo_size[0]]) - 1
    return grid_sample(photo[None], grid[None], "bicubic", "reflection", align_corners=False)[0]


def _develop(supersampled: Tensor) -> Tensor:
    return quantize(imresize(supersampled, 1 / _SUPERSAMPLING))
