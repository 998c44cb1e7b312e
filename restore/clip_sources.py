"""Where the frames of training clips come from: memory, folders, LMDB databases, video files.

Every clip gives the frames that are asked for by number, and reads nothing else. Frames are 8-bit RGB, (3, H, W):
training takes small crops of them, so they stay bytes, and uncopied, until they are cut. `restore.trees` finds the
clips of the known data sets on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from restore.degrade import imresize, quantize
from restore.frames import Clip, ClipError


class SampleError(ValueError):
    """A file that cannot serve a training sample: ``file`` names it, ``fault`` says what is wrong."""

    def __init__(self, file: str, fault: str = "") -> None:
        # A DataLoader raises the error of a worker anew, with a traceback as its only argument: its last line is ours.
        if not fault:
            file, _, fault = file.strip().splitlines()[-1].removeprefix(f"{__name__}.SampleError: ").partition(": ")
        super().__init__(file, fault)
        self.file, self.fault = file, fault

    def __str__(self) -> str:
        return f"{self.file}: {self.fault}"


@runtime_checkable
class TrainingClip(Protocol):
    """A clip with random access: true frames and, where they are given, the network's input frames."""

    @property
    def name(self) -> str:
        """For messages and logs."""

    @property
    def count(self) -> int:
        """Number of frames."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the true frames; None where only reading them tells."""

    def truth(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 H W"]]:
        """The true frames of these numbers. Raises SampleError."""

    def inputs(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 h w"]] | None:
        """The input frames of these numbers; None where they are to be made from the truth. Raises SampleError."""


@dataclass(frozen=True)
class StoredClip:
    """A clip in memory, 8 bit: truth and the low resolution made from its whole frames, unless others make it."""

    name: str
    gt: UInt8[Tensor, "t 3 H W"]
    lq: UInt8[Tensor, "t 3 h w"] | None = None

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.gt)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the true frames."""
        return self.gt.shape[2], self.gt.shape[3]

    def truth(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 H W"]]:
        """Views of the true frames of these numbers."""
        return [self.gt[i] for i in frames]

    def inputs(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 h w"]] | None:
        """Views of the low-resolution frames of these numbers, or None."""
        return None if self.lq is None else [self.lq[i] for i in frames]


def store_truth(name: str, gt: UInt8[Tensor, "t 3 H W"], scale: int) -> StoredClip:
    """Keep a clip without low resolution, its sizes cut to multiples of ``scale`` at the bottom and the right."""
    height, width = (extent // scale * scale for extent in gt.shape[2:])
    return StoredClip(name, gt[:, :, :height, :width].contiguous())


def store(
    name: str, gt: UInt8[Tensor, "t 3 H W"], scale: int, lq: UInt8[Tensor, "t 3 h w"] | None = None
) -> StoredClip:
    """Keep a clip with its low resolution, made here unless given; sizes are cut as in `store_truth`."""
    gt = store_truth(name, gt, scale).gt
    if lq is None:
        lq = torch.stack([reduced(frame, scale) for frame in gt])
    height, width = (extent // scale for extent in gt.shape[2:])
    return StoredClip(name, gt, lq[:, :, :height, :width].contiguous())


def reduced(frames: UInt8[Tensor, "*t 3 H W"], scale: int) -> UInt8[Tensor, "*t 3 h w"]:
    """Frames at 1 / scale by MATLAB's bicubic, rounded to 8 bit; H and W divide by ``scale``."""
    small = quantize(imresize(frames.float() / 255, Fraction(1, scale)))
    return (small * 255).round().byte()


def to_bytes(frame: Float[Tensor, "*t 3 h w"]) -> UInt8[Tensor, "*t 3 h w"]:
    """[0, 1] to 0 .. 255, rounded."""
    return (frame * 255).round().byte()


@runtime_checkable
class FrameStore(Protocol):
    """Frames by key: a folder with file names, or a database."""

    @property
    def root(self) -> str:
        """Where it is."""

    def read(self, key: str) -> UInt8[Tensor, "3 H W"]:
        """One frame. Raises SampleError where it is missing or damaged."""


@dataclass(frozen=True)
class FolderStore:
    """Image files below a folder; the keys are their paths in it."""

    root: str

    def read(self, key: str) -> UInt8[Tensor, "3 H W"]:
        """One frame. Raises SampleError where it is missing or damaged."""
        file = f"{self.root}/{key}"
        try:
            data = np.fromfile(file, dtype=np.uint8)  # cv2.imread cannot open every name on every system
        except OSError as error:
            raise SampleError(file, f"cannot be read ({error.strerror})") from error
        return decode_image(data, file)


def decode_image(data: UInt8[np.ndarray, " n"], file: str) -> UInt8[Tensor, "3 H W"]:
    """The image in an encoded file's bytes; 16 bits a channel are rounded to 8. ``file`` is for the SampleError."""
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH) if data.size else None
    except cv2.error:
        pixels = None
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
        raise SampleError(file, "not an image that can be decoded (empty, damaged or another format): replace it")
    if pixels.dtype == np.uint16:
        pixels = (pixels / np.float32(257)).round().astype(np.uint8)
    return from_bgr(pixels)


def from_bgr(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[Tensor, "3 H W"]:
    """An image as OpenCV has it, as a frame; the result does not share its memory."""
    return torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)


@dataclass(frozen=True)
class Frames:
    """The frames of one clip in a store: keys ``prefix + names[i]``. Small, since a data set has many."""

    store: FrameStore = field(repr=False)
    prefix: str
    names: tuple[str, ...]

    def read(self, frames: Sequence[int]) -> list[UInt8[Tensor, "3 _ _"]]:
        """The frames of these numbers, all of one size. Raises SampleError."""
        read = [self.store.read(self.prefix + self.names[i]) for i in frames]
        for i, frame in zip(frames, read, strict=True):
            if frame.shape != read[0].shape:
                (_, height, width), first = frame.shape, read[0].shape
                raise SampleError(
                    f"{self.store.root}/{self.prefix}{self.names[i]}",
                    f"{width}x{height}, but another frame of this clip is {first[2]}x{first[1]}",
                )
        return read


@dataclass(frozen=True)
class FrameClip:
    """A clip of single images: true frames and, where given, input frames of the same numbers."""

    name: str
    gt: Frames
    lq: Frames | None = None
    size: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.gt.names)

    def truth(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 H W"]]:
        """The true frames of these numbers. Raises SampleError."""
        return self.gt.read(frames)

    def inputs(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 h w"]] | None:
        """The input frames of these numbers, or None. Raises SampleError."""
        return self.lq.read(frames) if self.lq else None


@dataclass(frozen=True)
class VideoClip:
    """The first ``count`` frames of a video file; a stretch is decoded from the key frame before it."""

    clip: Clip
    count: int

    @property
    def name(self) -> str:
        """Of the file, without its suffix."""
        return self.clip.name

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the frames."""
        return self.clip.size

    def truth(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 H W"]]:
        """The frames of these numbers. Raises SampleError."""
        numbers = sorted(set(frames))
        try:
            found = dict(zip(numbers, self.clip.pick(numbers), strict=True))
        except ClipError as error:
            raise SampleError(str(self.clip.path), str(error).removeprefix(f"{self.clip.path}: ")) from error
        return [to_bytes(found[i]) for i in frames]

    def inputs(self, frames: Sequence[int]) -> None:
        """Inputs are made from the truth."""


@dataclass(frozen=True)
class FirstFrames:
    """The first ``count`` frames of a clip."""

    clip: TrainingClip
    count: int

    @property
    def name(self) -> str:
        """Of the clip."""
        return self.clip.name

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the true frames."""
        return self.clip.size

    def truth(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 H W"]]:
        """The true frames of these numbers. Raises SampleError."""
        return self.clip.truth(frames)

    def inputs(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 h w"]] | None:
        """The input frames of these numbers, or None. Raises SampleError."""
        return self.clip.inputs(frames)


@dataclass(frozen=True)
class WithInputs:
    """A clip with input frames of its own: one for every ``step``-th true frame."""

    clip: TrainingClip
    lq: TrainingClip
    step: int

    @property
    def name(self) -> str:
        """Of the true clip."""
        return self.clip.name

    @property
    def count(self) -> int:
        """Number of true frames."""
        return self.clip.count

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the true frames."""
        return self.clip.size

    def truth(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 H W"]]:
        """The true frames of these numbers. Raises SampleError."""
        return self.clip.truth(frames)

    def inputs(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 h w"]]:
        """The input frames of these true frames. Raises SampleError, also where one falls between inputs."""
        between = [frame for frame in frames if frame % self.step]
        if between:
            raise SampleError(self.name, f"no input frame for frame {between[0]}: there is one for every {self.step}")
        return self.lq.truth([frame // self.step for frame in frames])


def lazy_clip(clip: Clip, most: int | None) -> TrainingClip:
    """The first ``most`` frames of a clip (all: None), read when they are asked for.

    A video is indexed, without decoding it. Raises ClipError where that fails.
    """
    if clip.is_video:
        clip.read(0, 1)  # counts the frames exactly
        assert clip.count is not None
        return VideoClip(clip, min(clip.count, most or clip.count))
    names = tuple(file.name for file in clip.source.files)  # type: ignore[union-attr]
    return FrameClip(clip.name, Frames(FolderStore(str(clip.path)), "", names[:most]))
