"""Training samples: augmented crops of random stretches of clips, input and truth of the same place and time.

A sample depends on the seed and its number alone (`restore.samples`).
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, TypedDict, get_type_hints

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from restore.clip_sources import SampleError, TrainingClip, reduced
from restore.degrade_exposure import MARGIN, Exposure
from restore.degrade_video import DEGRADATIONS, Bicubic, BlurDown, Degradation, degraded
from restore.samples import Samples
from restore.schema import Component, OptionError, check_arguments, construct, parse

log = logging.getLogger("restore")

REACH = 2  # input pixels around a crop that its low resolution depends on: half the width of the bicubic kernel
BLOCK = 8  # side of the blocks of JPEG, MPEG-4 and H.264, in pixels

Room = tuple[tuple[int, int], tuple[int, int]]  # input pixels above and below a crop, to the left and to the right


class Sample(TypedDict):
    """One training pair: input (T, 3, h, w) and truth (U, 3, H, W), float RGB in [0, 1], and where it is from."""

    lq: Tensor
    gt: Tensor
    name: str


class Turn(NamedTuple):
    """Augmentation of one sample: which of these happen, in this order."""

    reverse: bool
    flip_x: bool
    flip_y: bool
    transpose: bool

    def __call__(self, frames: Tensor) -> Tensor:
        """Turn frames (T, 3, h, w)."""
        dims = [dim for dim, happens in ((0, self.reverse), (3, self.flip_x), (2, self.flip_y)) if happens]
        frames = frames.flip(dims) if dims else frames
        return frames.transpose(2, 3) if self.transpose else frames

    def corner(self, top: int, left: int, height: int, width: int) -> tuple[int, int]:
        """Where the corner of a square goes that lies at (top, left) and could lie from (0, 0) to (height, width)."""
        top, left = height - top if self.flip_y else top, width - left if self.flip_x else left
        return (left, top) if self.transpose else (top, left)


@dataclass(eq=False)
class ClipCrops(Samples):
    """Augmented crops of clips; the keywords are those of every training set.

    ``num_frame`` frames are the truth, ``interval_list`` (one is drawn for each sample) apart; every
    ``time_scale``-th of them is the input. Crops of ``gt_size`` are uniform in position, aligned to ``scale``, and the
    same for all frames. ``use_hflip`` flips left-right, ``use_rot`` flips up-down and transposes, ``random_reverse``
    runs time backwards, each with probability 1/2 (the published STDAN recipe).

    ``degradation`` makes the input from the true frames: a section ``{type: bd | exposure | ..., ...}`` with the keys
    of that entry of `restore.degrade_video.DEGRADATIONS` but ``scale``, or such an object. The truth is augmented
    before it is degraded, so that phases, blocks and noise are never turned. "bicubic" and "bd" are those of the whole
    (turned) frame everywhere; for others see `room`. Without it the input is what the clips have, or bicubic.

    ValueError where sizes do not fit each other or no clip is long and large enough.
    """

    clips: Sequence[TrainingClip] = field(repr=False)
    _: KW_ONLY
    scale: int = 4
    time_scale: int = 2
    num_frame: int = 7
    gt_size: int = 128
    interval_list: tuple[int, ...] = (1,)
    use_hflip: bool = True
    use_rot: bool = True
    random_reverse: bool = True
    degradation: Mapping[str, Any] | Degradation | None = None

    def __post_init__(self) -> None:
        if self.gt_size % self.scale:
            raise ValueError(f"gt_size={self.gt_size} is not a multiple of scale={self.scale}")
        if (self.num_frame - 1) % self.time_scale:
            raise ValueError(f"num_frame={self.num_frame} is not a multiple of time_scale={self.time_scale} plus 1")
        if not self.interval_list or min(self.interval_list) < 1:
            raise ValueError(f"interval_list={list(self.interval_list)} needs whole numbers from 1 on, e.g. [1]")
        super().__post_init__()
        self._degrade: Degradation | None = None
        if self.degradation is not None:
            self._degrade = make_degradation(self.degradation, self.scale, "datasets.train.degradation")
        self.clips = self.find()
        self.prepare()

    def find(self) -> Sequence[TrainingClip]:
        """The clips to cut from; the data sets on disk look for theirs here."""
        return self.clips

    def prepare(self) -> None:
        """Leave out what is too short or too small, and number the stretches of frames that are left."""
        shortest = (self.num_frame - 1) * min(self.interval_list) + 1
        fit = [c for c in self.clips if c.count >= shortest and (c.size is None or min(c.size) >= self.gt_size)]
        what = f"{shortest} frames of at least {self.gt_size}x{self.gt_size} pixels"
        if not fit:
            raise ValueError(f"no clip has {what}")
        if len(fit) < len(self.clips):
            left_out = len(self.clips) - len(fit)
            log.warning("%d of %d clips have less than %s and are left out", left_out, len(self.clips), what)
        self.clips = fit
        # every stretch of frames is as likely as every other, whatever clip it is from
        counts = np.array([clip.count for clip in fit])
        self._stretches = {
            interval: np.cumsum(np.maximum(counts - (self.num_frame - 1) * interval, 0))
            for interval in self.interval_list
        }
        for interval, ends in self._stretches.items():
            if not ends[-1]:
                raise ValueError(f"no clip has {self.num_frame} frames at an interval of {interval} (interval_list)")
        self._check_first()

    def __len__(self) -> int:
        """The number of different stretches of frames."""
        return int(sum(ends[-1] for ends in self._stretches.values()))

    @property
    def text(self) -> str:
        """How many stretches of frames of how many clips."""
        return f"{len(self):,} stretches of {len(self.clips):,} clips"

    def draw(self, rng: np.random.Generator) -> Sample:
        """A sample by these random numbers. Raises SampleError where a file cannot be read."""
        intervals = self.interval_list
        interval = intervals[int(rng.integers(len(intervals)))] if len(intervals) > 1 else intervals[0]
        ends = self._stretches[interval]
        stretch = int(rng.integers(int(ends[-1])))
        which = int(np.searchsorted(ends, stretch, side="right"))
        clip, start = self.clips[which], stretch - (int(ends[which - 1]) if which else 0)
        frames = range(start, start + (self.num_frame - 1) * interval + 1, interval)
        gt, lq = clip.truth(frames), self._inputs(clip, frames[:: self.time_scale])
        grid = self._grid(clip, gt[0], None if lq is None else lq[0])
        size = self.gt_size // self.scale
        top, left = (int(rng.integers(extent - size + 1)) for extent in grid)
        turn = self._turn(rng)
        if lq is not None:
            small = turn(cut(lq, top, left, size)).float() / 255
        elif self._degrade is None:
            small = turn(self._reduce(gt[:: self.time_scale], top, left)).float() / 255
        else:
            small = self._degraded(self._degrade, gt, (top, left), turn, rng)
        large = turn(cut(gt, self.scale * top, self.scale * left, self.gt_size)).float() / 255
        return {"lq": small, "gt": large, "name": f"{clip.name}:{start}:{top},{left}"}

    def _inputs(self, clip: TrainingClip, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 h w"]] | None:
        """The clip's own input frames; None where they are made here."""
        return clip.inputs(frames) if self._degrade is None else None

    def _grid(self, clip: TrainingClip, gt: Tensor, lq: Tensor | None) -> tuple[int, int]:
        """(height, width) of the input frames, whose pixels are the places where a crop can begin."""
        height, width = gt.shape[1:]
        if min(height, width) < self.gt_size:
            raise SampleError(clip.name, f"{width}x{height}, smaller than gt_size={self.gt_size}")
        if lq is not None and tuple(lq.shape[1:]) != (height // self.scale, width // self.scale):
            sizes = f"input frames of {lq.shape[2]}x{lq.shape[1]} for true frames of {width}x{height}"
            raise SampleError(clip.name, f"{sizes}, but scale={self.scale}")
        return height // self.scale, width // self.scale

    def _reduce(self, gt: Sequence[Tensor], top: int, left: int) -> UInt8[Tensor, "t 3 h w"]:
        """A crop of the low resolution of whole frames, from no more of the frames than it depends on."""
        window, corner = self._window(gt, top, left, ((REACH, REACH), (REACH, REACH)))
        return self._within(reduced(window, self.scale), corner)

    def _degraded(
        self, degrade: Degradation, gt: Sequence[Tensor], place: tuple[int, int], turn: Turn, rng: np.random.Generator
    ) -> Float[Tensor, "t 3 h w"]:
        """A crop of true frames, turned and degraded. Raises SampleError where an encoder fails."""
        window, corner = self._window(gt, *place, room(degrade, rng))
        try:
            with one_thread():
                small = degraded(degrade, turn(window).float() / 255, self.time_scale, rng)
        except (av.FFmpegError, RuntimeError) as error:
            # one name for all of them: told once, and one of skip_limit, however often it happens
            raise SampleError("degradation", " ".join(str(error).split())) from error
        size = self.gt_size // self.scale
        height, width = (extent // self.scale - size for extent in window.shape[2:])
        return self._within(small, turn.corner(*corner, height, width))

    def _window(
        self, gt: Sequence[Tensor], top: int, left: int, around: Room
    ) -> tuple[UInt8[Tensor, "t 3 H W"], tuple[int, int]]:
        """A crop of the true frames and what is around it, as far as they go; its corner in this, in input pixels."""
        size, spans = self.gt_size // self.scale, []
        for start, (before, after), extent in zip((top, left), around, gt[0].shape[1:], strict=True):
            spans.append((max(start - before, 0), min(start + size + after, extent // self.scale)))
        rows, columns = (slice(first * self.scale, end * self.scale) for first, end in spans)
        return torch.stack([frame[:, rows, columns] for frame in gt]), (top - spans[0][0], left - spans[1][0])

    def _within(self, small: Tensor, corner: tuple[int, int]) -> Tensor:
        (y, x), size = corner, self.gt_size // self.scale
        return small[..., y : y + size, x : x + size]

    def _turn(self, rng: np.random.Generator) -> Turn:
        allowed = np.array([self.random_reverse, self.use_hflip, self.use_rot, self.use_rot])
        return Turn(*map(bool, (rng.random(4) < 0.5) & allowed))

    def _check_first(self) -> None:
        """Sizes that do not fit are told before training where the first clip shows them."""
        clip = self.clips[0]
        try:
            gt, lq = clip.truth([0]), self._inputs(clip, [0])
        except SampleError:
            return  # one damaged file is passed over when its turn comes
        self._grid(clip, gt[0], None if lq is None else lq[0])


def cut(frames: Sequence[UInt8[Tensor, "3 _ _"]], top: int, left: int, size: int) -> UInt8[Tensor, "t 3 {size} {size}"]:
    """The same square of all frames."""
    return torch.stack([frame[:, top : top + size, left : left + size] for frame in frames])


def room(degrade: Degradation, rng: np.random.Generator) -> Room:
    """How far around a crop true frames are degraded with it, before its input is cut out.

    "bicubic" and "bd": as far as their kernels reach, so that the result is that of whole frames. What a codec makes of
    a pixel depends on all of the frame, so for "real" no margin is exact: there the degraded square is 8 input pixels
    larger than the crop, which lies anywhere in it. So the blocks of codecs begin anywhere in the crop, as within a
    frame, and fewer crops have borders that a blur has reflected. (Real-ESRGAN cuts 256 of 400 pixels out in the same
    way, RealBasicVSR has no margin.) Measured at gt_size 128: a third more time than without. For "exposure" see
    `restore.degrade_exposure.MARGIN`.
    """
    if isinstance(degrade, Exposure):
        reach = -(-MARGIN // degrade.scale)
        return (reach, reach), (reach, reach)
    if isinstance(degrade, Bicubic | BlurDown):
        reach = REACH if isinstance(degrade, Bicubic) else -(-(degrade.taps // 2) // degrade.scale)
        return (reach, reach), (reach, reach)
    above, left = (int(x) for x in rng.integers(BLOCK, size=2))
    return (above, BLOCK - above), (left, BLOCK - left)


def one_source(samples: object) -> None:
    """ValueError for a set whose input would be both read and made."""
    for key in ("dataroot_lq", "lq_folder"):
        if getattr(samples, "degradation", None) is not None and getattr(samples, key, None) is not None:
            raise ValueError(f"{key} and degradation exclude each other: set one of them to null")


def make_degradation(section: Mapping[str, Any] | Degradation, scale: int, where: str) -> Degradation:
    """The degradation that a section describes, with the set's scale. `OptionError` names the place ``where``."""
    if isinstance(section, Degradation):
        if section.scale != scale:
            raise OptionError(f"{where}: it has scale={section.scale}, but its set scale={scale}")
        return section
    component = parse(Component, section, where)
    if "scale" in component.arguments:
        raise OptionError(f"{where}: 'scale' is that of the set: leave it out here")
    check_arguments(DEGRADATIONS, component, where)
    kinds = get_type_hints(DEGRADATIONS[component.type])
    values = {key: parse(kinds[key], section[key], f"{where}.{key}") for key in component.arguments}
    return construct(DEGRADATIONS, Component(component.type, {**values, "scale": scale}), where)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch has one thread, as in a worker: several may round the last bit of a sum otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
