"""Training samples: augmented crops of random stretches of clips, input and truth of the same place and time.

A sample depends on the seed and its number alone, not on workers, processes or what was drawn before it, so a run
that continues at iteration n sees exactly what an uninterrupted one would have seen.
"""

import logging
import zlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from restore.clip_sources import SampleError, TrainingClip, reduced

log = logging.getLogger("restore")

APART = 2**40  # between the numbers of a sample and of what replaces it; more than any run has samples
ATTEMPTS = 100  # at a sample, so that a set without any readable file ends
REACH = 2  # input pixels around a crop that its low resolution depends on: half the width of the bicubic kernel


class Sample(TypedDict):
    """One training pair: input (T, 3, h, w) and truth (U, 3, H, W), float RGB in [0, 1], and where it is from."""

    lq: Tensor
    gt: Tensor
    name: str


@dataclass(eq=False)
class ClipCrops(Dataset[Sample]):
    """Augmented crops of clips; the keywords are those of every training set.

    ``num_frame`` frames are the truth, ``interval_list`` (one is drawn for each sample) apart; every
    ``time_scale``-th of them is the input. Crops of ``gt_size`` are uniform in position, aligned to ``scale``, and the
    same for all frames. ``use_hflip`` flips left-right, ``use_rot`` flips up-down and transposes, ``random_reverse``
    runs time backwards, each with probability 1/2 (the published STDAN recipe). A file that cannot be read is logged
    and passed over: the sample is replaced by another that depends on the seed and its number alone; more than
    ``skip_limit`` such files, counted over all workers, are a SampleError.

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
    skip_limit: int = 10

    def __post_init__(self) -> None:
        if self.gt_size % self.scale:
            raise ValueError(f"gt_size={self.gt_size} is not a multiple of scale={self.scale}")
        if (self.num_frame - 1) % self.time_scale:
            raise ValueError(f"num_frame={self.num_frame} is not a multiple of time_scale={self.time_scale} plus 1")
        if not self.interval_list or min(self.interval_list) < 1:
            raise ValueError(f"interval_list={list(self.interval_list)} needs whole numbers from 1 on, e.g. [1]")
        if self.skip_limit < 0:
            raise ValueError(f"skip_limit={self.skip_limit} must be at least 0")
        self.seed = 0
        # marks of unreadable files, in memory that all workers share
        self._unreadable = torch.zeros(self.skip_limit + 1, dtype=torch.int64).share_memory_()
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

    def __getitem__(self, number: int) -> Sample:
        """The sample of this number; any number >= 0 is valid."""
        for attempt in range(ATTEMPTS):
            try:
                return self.draw(np.random.default_rng((self.seed, number + APART * attempt)))
            except SampleError as error:
                self._note(error)
        raise SampleError(f"sample {number}", f"{ATTEMPTS} files in turn could not be read; see the log")

    def draw(self, rng: np.random.Generator) -> Sample:
        """A sample by these random numbers. Raises SampleError where a file cannot be read."""
        intervals = self.interval_list
        interval = intervals[int(rng.integers(len(intervals)))] if len(intervals) > 1 else intervals[0]
        ends = self._stretches[interval]
        stretch = int(rng.integers(int(ends[-1])))
        which = int(np.searchsorted(ends, stretch, side="right"))
        clip, start = self.clips[which], stretch - (int(ends[which - 1]) if which else 0)
        frames = range(start, start + (self.num_frame - 1) * interval + 1, interval)
        gt, lq = clip.truth(frames), clip.inputs(frames[:: self.time_scale])
        grid = self._grid(clip, gt[0], None if lq is None else lq[0])
        size = self.gt_size // self.scale
        top, left = (int(rng.integers(extent - size + 1)) for extent in grid)
        small = self._reduce(gt[:: self.time_scale], top, left) if lq is None else cut(lq, top, left, size)
        large = cut(gt, self.scale * top, self.scale * left, self.gt_size)
        small, large = self._augment(small, large, rng)
        return {"lq": small.float() / 255, "gt": large.float() / 255, "name": f"{clip.name}:{start}:{top},{left}"}

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
        size, grid = self.gt_size // self.scale, [extent // self.scale for extent in gt[0].shape[1:]]
        y, x = (max(edge - REACH, 0) for edge in (top, left))
        bottom, right = (min(edge + size + REACH, end) for edge, end in zip((top, left), grid, strict=True))
        rows, columns = slice(y * self.scale, bottom * self.scale), slice(x * self.scale, right * self.scale)
        small = reduced(torch.stack([frame[:, rows, columns] for frame in gt]), self.scale)
        return small[..., top - y : top - y + size, left - x : left - x + size]

    def _augment(self, lq: Tensor, gt: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        reverse, flip_x, flip_y, transpose = rng.random(4) < 0.5
        both = [lq, gt]
        if self.random_reverse and reverse:
            both = [x.flip(0) for x in both]
        if self.use_hflip and flip_x:
            both = [x.flip(3) for x in both]
        if self.use_rot and flip_y:
            both = [x.flip(2) for x in both]
        if self.use_rot and transpose:
            both = [x.transpose(2, 3) for x in both]
        return both[0], both[1]

    def _note(self, error: SampleError) -> None:
        """Log an unreadable file once; raise where there are too many."""
        mark = zlib.crc32(error.file.encode()) + 1
        if (self._unreadable == mark).any():
            return
        count = int(self._unreadable.count_nonzero())
        if count >= self.skip_limit:
            raise SampleError(error.file, f"{error.fault}; more than skip_limit={self.skip_limit} files like this")
        self._unreadable[count] = mark
        log.warning("%s; passed over", error)

    def _check_first(self) -> None:
        """Sizes that do not fit are told before training where the first clip shows them."""
        clip = self.clips[0]
        try:
            gt, lq = clip.truth([0]), clip.inputs([0])
        except SampleError:
            return  # one damaged file is passed over when its turn comes
        self._grid(clip, gt[0], None if lq is None else lq[0])


def cut(frames: Sequence[UInt8[Tensor, "3 _ _"]], top: int, left: int, size: int) -> UInt8[Tensor, "t 3 {size} {size}"]:
    """The same square of all frames."""
    return torch.stack([frame[:, top : top + size, left : left + size] for frame in frames])
