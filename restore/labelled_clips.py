"""Clips with a label: which of their frames and squares a classifier sees, in training and in scoring.

Frames are chosen as the literature does: "segments" takes one of each of ``num_frame`` equal parts of the clip (TSN,
Wang et al., ECCV 2016), "dense" takes ``num_frame`` frames that are ``interval`` apart (I3D, SlowFast). Clips that are
too short for that repeat frames: segments by rounding, dense the last one.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from restore.clip_sources import SampleError, TrainingClip, lazy_clip
from restore.frames import ClipError, open_clips
from restore.samples import Samples

Sampling = Literal["segments", "dense"]
Average = Literal["softmax", "logits"]


class LabelledClip(NamedTuple):
    """A clip on disk, or one that is made, and the number of its class."""

    name: str
    label: int
    source: Path | TrainingClip

    def open(self) -> TrainingClip:
        """Its frames. Raises SampleError where there is no clip that can be read."""
        if not isinstance(self.source, Path):
            return self.source
        try:
            clips = open_clips(self.source)
            if len(clips) > 1:
                raise SampleError(str(self.source), f"{len(clips)} clips instead of the frames of one")
            return lazy_clip(clips[0], None)
        except ClipError as error:
            raise SampleError(str(self.source), str(error).removeprefix(f"{self.source}: ")) from error


class Labelled(NamedTuple):
    """What a data set holds: clips, and the names of their classes, None where lists have numbers alone."""

    clips: Sequence[LabelledClip]
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip are seen."""

    num_frame: int
    sampling: Sampling
    interval: int

    def __post_init__(self) -> None:
        if self.sampling not in ("segments", "dense"):
            raise ValueError(f"sampling={self.sampling!r} is neither 'segments' nor 'dense'")
        if min(self.num_frame, self.interval) < 1:
            raise ValueError(f"num_frame={self.num_frame} and interval={self.interval} must be at least 1")

    def drawn(self, count: int, rng: np.random.Generator) -> list[int]:
        """Numbers of frames for training, of a clip of ``count``: anywhere in the segments, or anywhere in the clip."""
        if self.sampling == "segments":
            return self._in_segments(count, rng.random(self.num_frame))
        return self._from(int(rng.integers(max(count - self._span, 0) + 1)), count)

    def spread(self, count: int, clips: int) -> list[list[int]]:
        """Numbers of frames of each of ``clips`` views over a clip of ``count``: one view is in the middle."""
        if self.sampling == "segments":
            return [self._in_segments(count, np.full(self.num_frame, (i + 0.5) / clips)) for i in range(clips)]
        last = max(count - self._span, 0)
        starts = [round(last * i / (clips - 1)) for i in range(clips)] if clips > 1 else [last // 2]
        return [self._from(start, count) for start in starts]

    @property
    def text(self) -> str:
        """As it is told beside a figure."""
        if self.sampling == "segments":
            return f"{self.num_frame} frames, one of each equal segment of the clip"
        return f"{self.num_frame} neighbouring frames, {self.interval} apart"

    @property
    def _span(self) -> int:
        return (self.num_frame - 1) * self.interval + 1

    def _in_segments(self, count: int, places: np.ndarray) -> list[int]:
        times = (np.arange(self.num_frame) + places) * count / self.num_frame
        return [min(int(time), count - 1) for time in times]

    def _from(self, start: int, count: int) -> list[int]:
        return [min(start + i * self.interval, count - 1) for i in range(self.num_frame)]


@dataclass(eq=False)
class ActionSamples(Samples):
    """Random squares of clips and their labels; the keywords are those of every training set of classifiers.

    ``num_frame`` frames are seen, chosen by ``sampling`` ("segments", or "dense" with frames ``interval`` apart). The
    short side is resized to a whole number of pixels drawn from ``short_side`` (null: not resized), then a square of
    ``size`` pixels is cut out anywhere, the same for all frames. ``use_hflip`` mirrors every second clip left-right,
    which classes such as "pushing left" do not bear.
    ValueError where the sizes do not fit each other or the clips are not there.
    """

    _: KW_ONLY
    num_frame: int = 16
    size: int = 224
    sampling: Sampling = "segments"
    interval: int = 4
    short_side: tuple[int, int] | None = (256, 320)
    use_hflip: bool = False

    clips: Sequence[LabelledClip] = field(init=False, repr=False)
    names: tuple[str, ...] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.frames = FrameChoice(self.num_frame, self.sampling, self.interval)
        if self.short_side is not None and not self.size <= self.short_side[0] <= self.short_side[1]:
            raise ValueError(f"short_side={list(self.short_side)} must rise, from size={self.size} at least")
        self.clips, self.names = self.find()

    def find(self) -> Labelled:
        """The clips; data sets look for theirs here."""
        raise NotImplementedError

    @property
    def text(self) -> str:
        """How many clips of how many classes."""
        return f"{len(self.clips):,} clips of {len({clip.label for clip in self.clips}):,} classes"

    def __len__(self) -> int:
        """The number of clips."""
        return len(self.clips)

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """``clip`` (T, 3, size, size) in [0, 1], ``label`` and ``name``. Raises SampleError."""
        chosen = self.clips[int(rng.integers(len(self.clips)))]
        clip = chosen.open()
        frames = _read(clip, self.frames.drawn(clip.count, rng))
        if self.short_side is not None:
            low, high = self.short_side
            frames = resized(frames, int(rng.integers(low, high + 1)))
        top, left = (int(rng.integers(room + 1)) for room in _room(chosen, frames, self.size))
        square = frames[..., top : top + self.size, left : left + self.size]
        square = square.flip(-1) if self.use_hflip and rng.random() < 0.5 else square
        return {"clip": square.contiguous(), "label": chosen.label, "name": chosen.name}


@dataclass(eq=False, kw_only=True)
class ActionViews:
    """Clips to score, each by several views; the keywords are those of every test set of classifiers.

    ``clips`` stretches of time, each of ``num_frame`` frames chosen by ``sampling`` ("segments", or "dense" with frames
    ``interval`` apart), in ``crops`` squares of ``size`` pixels: 3 at both ends and the middle of the long side, 1 in
    the middle. Before, the short side is resized to ``short_side`` (null: not). The mean over views is of softmax or of
    logits, as ``average`` says. ValueError where the sizes do not fit each other or the clips are not there.
    """

    num_frame: int = 16
    size: int = 224
    sampling: Sampling = "segments"
    interval: int = 4
    short_side: int | None = 224
    clips: int = 1
    crops: int = 3
    average: Average = "softmax"

    def __post_init__(self) -> None:
        self.frames = FrameChoice(self.num_frame, self.sampling, self.interval)
        if self.clips < 1 or self.crops not in (1, 3):
            raise ValueError(f"clips={self.clips} must be at least 1, crops={self.crops} 1 or 3")
        if self.average not in ("softmax", "logits"):
            raise ValueError(f"average={self.average!r} is neither 'softmax' nor 'logits'")
        if self.short_side is not None and self.short_side < self.size:
            raise ValueError(f"short_side={self.short_side} is less than size={self.size}")
        self.found, self.names = self.find()

    def find(self) -> Labelled:
        """The clips; data sets look for theirs here."""
        raise NotImplementedError

    def __len__(self) -> int:
        """The number of clips."""
        return len(self.found)

    @property
    def protocol(self) -> str:
        """All that changes a figure, as it stands beside it."""
        side = "not resized" if self.short_side is None else f"short side {self.short_side}"
        clips = f"{self.clips} clip{'s' * (self.clips > 1)}"
        crops = f"{self.crops} crop{'s' * (self.crops > 1)} of {self.size}x{self.size} ({side})"
        spread = "" if self.clips == 1 else ", clips evenly over time"
        return (
            f"{clips} x {crops} of {self.frames.text}{spread}; {self.average} averaged over {self.clips * self.crops} "
            f"view{'s' * (self.clips * self.crops > 1)}"
        )

    def views(self, chosen: LabelledClip) -> Float[Tensor, "clips crops t 3 {self.size} {self.size}"]:
        """Every view of a clip, in [0, 1]. Raises SampleError."""
        clip = chosen.open()
        stretches = self.frames.spread(clip.count, self.clips)
        numbers = sorted({number for stretch in stretches for number in stretch})
        frames = _read(clip, numbers)
        if self.short_side is not None:
            frames = resized(frames, self.short_side)
        height, width = _room(chosen, frames, self.size)
        shares = (0.5,) if self.crops == 1 else (0.0, 0.5, 1.0)
        wide = width >= height
        corners = [(round(height * (0.5 if wide else s)), round(width * (s if wide else 0.5))) for s in shares]
        squares = [frames[..., top : top + self.size, left : left + self.size] for top, left in corners]
        return torch.stack([torch.stack([x[[numbers.index(n) for n in s]] for x in squares]) for s in stretches])


def resized(frames: Float[Tensor, "t 3 h w"], short_side: int) -> Float[Tensor, "t 3 _ _"]:
    """Bilinear, without aliasing, to frames of this short side."""
    height, width = frames.shape[-2:]
    factor = short_side / min(height, width)
    if factor == 1:
        return frames
    size = (max(round(height * factor), short_side), max(round(width * factor), short_side))
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)


def _read(clip: TrainingClip, numbers: Sequence[int]) -> Float[Tensor, "t 3 h w"]:
    return torch.stack(list(clip.truth(numbers))).float() / 255


def _room(chosen: LabelledClip, frames: Tensor, size: int) -> tuple[int, int]:
    """In how many more than one place a square fits, down and to the right."""
    height, width = frames.shape[-2:]
    if min(height, width) < size:
        raise SampleError(chosen.name, f"{width}x{height}, smaller than size={size}: set short_side")
    return height - size, width - size
