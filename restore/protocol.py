"""The protocol of an evaluation: what a network is given, in which windows, and how its results are scored.

The published space-time protocol (STDAN's evaluation code) is the default: every second frame, reduced by MATLAB's
bicubic and rounded to 8 bit, is the input; windows of 7 frames with stride 6, then always the last 7; where windows
overlap the first result stays; sizes are padded with zeros to what the network needs; results are rounded to 8 bit and
scored on unrounded luma without a border crop; every frame counts, input and synthesised alike; the mean is over the
frames of a clip, then over clips. Deblurring is scored in RGB, without windows' first results: seams lie in the middle
of what two windows share.
"""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from restore.clip_sources import SampleError, TrainingClip
from restore.degrade_video import Bicubic, Degradation, degraded

Color = Literal["y", "rgb"]


@dataclass(frozen=True)
class Window:
    """Frames ``start`` .. ``stop`` - 1 of the truth; ``fresh`` are those whose results are kept."""

    start: int
    stop: int
    fresh: range

    @property
    def frames(self) -> range:
        """All of them."""
        return range(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Choices that change figures; ValueError for those that do not fit each other.

    ``degradation`` makes the input from the truth unless the clips bring their own (``given``); None leaves it as it
    is, cut to size. ``seam`` says which window a shared frame is taken from.
    """

    scale: int = 4
    time_scale: int = 2
    window: int = 7  # frames of the truth
    overlap: int = 1  # of them shared by neighbours
    seam: Literal["first", "middle"] = "first"
    color: Color = "y"
    crop_border: int = 0
    degradation: Degradation | None = None
    given: bool = False  # inputs come with the clips
    max_frames: int | None = None  # of every clip; said here, applied where clips are opened
    note: str = ""  # what else the figures are about: which list of clips, which folder of inputs

    def __post_init__(self) -> None:
        if (self.window - 1) % self.time_scale or not 0 <= self.overlap < self.window:
            raise ValueError(
                f"window={self.window} must be a multiple of time_scale={self.time_scale} plus 1 and more than "
                f"overlap={self.overlap}"
            )
        if self.overlap < 1 < self.time_scale:
            raise ValueError("overlap=0: neighbouring windows must share a frame where frames are synthesised")
        if self.degradation is not None and self.degradation.scale != self.scale:
            raise ValueError(f"degradation: its scale is {self.degradation.scale}, the set's {self.scale}")

    def windows(self, length: int) -> list[Window]:
        """Windows while they fit, then the last one; ValueError for a clip that is shorter than one.

        The published program repeats the last window where it has been done already; that changes no result.
        """
        if length < self.window and (self.time_scale > 1 or length < 1):
            raise ValueError(f"{length} frames, but the protocol needs windows of {self.window}")
        size = min(self.window, length)
        starts = list(range(0, length - size + 1, self.window - self.overlap))
        if starts[-1] != length - size:
            starts.append(length - size)
        if self.seam == "first":
            ends = [start + size for start in starts]
        else:
            ends = [(start + size + following + 1) // 2 for start, following in itertools.pairwise(starts)]
            ends.append(length)
        begins = [0, *ends[:-1]]
        parts = zip(starts, begins, ends, strict=True)
        return [Window(start, start + size, range(begin, end)) for start, begin, end in parts]

    def truth(self, clip: TrainingClip, frames: Sequence[int]) -> Float[Tensor, "t 3 H W"]:
        """True frames, cut at the bottom and the right to multiples of the scale, as data sets are prepared."""
        gt = _stacked(clip.truth(frames))
        height, width = (extent // self.scale * self.scale for extent in gt.shape[2:])
        return gt[..., :height, :width]

    def inputs(
        self, clip: TrainingClip, window: Window, truth: Float[Tensor, "t 3 H W"]
    ) -> Float[Tensor, "n 3 h w"]:
        """What the network is given for a window: the clip's own input frames, or what is made of the true ones."""
        given = clip.inputs(list(window.frames)[:: self.time_scale]) if self.given else None
        if given is None:
            degrade = self.degradation or Bicubic(self.scale)
            # by clip and window alone, so that a random degradation is the same in every run
            rng = np.random.default_rng((zlib.crc32(clip.name.encode()), window.start))
            return degraded(degrade, truth, self.time_scale, rng)
        lq = _stacked(given)
        size = [extent // self.scale for extent in truth.shape[2:]]
        if any(extent not in (wanted, wanted + 1) for extent, wanted in zip(lq.shape[2:], size, strict=True)):
            sizes = f"input frames of {lq.shape[3]}x{lq.shape[2]} for true frames of {truth.shape[3]}x{truth.shape[2]}"
            raise SampleError(clip.name, f"{sizes}, but scale={self.scale}")
        return lq[..., : size[0], : size[1]]

    def synthesised(self, window: Window, frame: int) -> bool:
        """Whether the frame lies between inputs of this window."""
        return (frame - window.start) % self.time_scale != 0

    @property
    def text(self) -> str:
        """All of it in a paragraph, as it stands beside every figure."""
        every = "every frame" if self.time_scale == 1 else f"every {_ordinal(self.time_scale)} frame"
        made = "as given" if self.given else self._made()
        share = f"first result of {self.overlap} shared stays" if self.seam == "first" else (
            f"{self.overlap} shared, seam in their middle"
        )  # fmt: skip
        first = f"; the first {self.max_frames} frames of a clip" if self.max_frames else ""
        note = f"; {self.note}" if self.note else ""
        scored = "unrounded Y" if self.color == "y" else "RGB"
        crop = "no border crop" if not self.crop_border else f"{self.crop_border} px of border cropped"
        return (
            f"x{self.scale} space, x{self.time_scale} time{first}; input: {every}, {made}, 8 bit; "
            f"windows of {self.window} frames, stride {self.window - self.overlap}, and the last {self.window}, "
            f"{share}; zero padding; PSNR and SSIM on {scored} of 8-bit frames, {crop}; "
            f"mean over frames, then clips{note}"
        )

    def _made(self) -> str:
        degradation = self.degradation or Bicubic(self.scale)
        if isinstance(degradation, Bicubic):
            return "MATLAB bicubic" if self.scale > 1 else "unchanged"
        return repr(degradation)


def _stacked(frames: Sequence[Tensor]) -> Tensor:
    """8-bit frames as one float clip in [0, 1]."""
    return torch.stack(list(frames)).float() / 255


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")
