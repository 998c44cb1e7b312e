"""Clips in: folders of frames and video files, read as float RGB tensors.

A frame is float32 RGB, (3, H, W), in [0, 1]. BGR and integer pixels exist only here and in the writers. 16-bit images
keep their 16 bits; grey becomes RGB by repetition; an alpha channel is dropped, not composited. An orientation tag of
a photograph is applied. What is particular to video files is in `restore.video`, the way out in `restore.writers`.

    for clip in open_clips("footage"):
        for frame in clip: ...                 # streams in order
        window = clip.read(10, 17)             # (7, 3, H, W), random access
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from restore.video import ClipError, VideoFile

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "Clip", "ClipError", "natural_key", "open_clips", "read_image"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
VIDEO_SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".vob", ".mxf", ".y4m", ".gif"),
)

_LOOKED_FOR = "frames ({}) or videos ({}, ...)".format(" ".join(IMAGE_SUFFIXES), " ".join(VIDEO_SUFFIXES[:5]))


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Key that sorts names, without their suffixes, as people count: "f1" < "f1_5" < "f2" < "f10"."""
    parts = re.split(r"([0-9]+)", name)  # text and digits alternate, so texts meet texts and numbers numbers
    return tuple(int(part) if n % 2 else part.casefold() for n, part in enumerate(parts)), name


@dataclass(frozen=True)
class Clip:
    """A sequence of frames of one size: a folder of images or a video file. Made by `open_clips`."""

    name: str  # of the folder, or the stem of the file
    path: Path
    source: "FrameFolder | VideoFile" = field(repr=False, compare=False)

    @property
    def is_video(self) -> bool:
        """Whether the clip is a video file rather than a folder of frames."""
        return isinstance(self.source, VideoFile)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the first frame; a folder reads that frame at the first call. Raises ClipError."""
        return self.source.size

    @property
    def count(self) -> int | None:
        """Number of frames: exact for a folder; for a video an estimate or None until `read` or a full iteration."""
        return self.source.count

    @property
    def fps(self) -> Fraction | None:
        """Frames per second; None for a folder and where a video does not say."""
        return self.source.fps if isinstance(self.source, VideoFile) else None

    @property
    def frame_names(self) -> list[str] | None:
        """Stems of the frame files in order; None for a video."""
        return None if isinstance(self.source, VideoFile) else [file.stem for file in self.source.files]

    def __iter__(self) -> Iterator[Tensor]:
        """Stream the frames in order, each (3, H, W) float32 in [0, 1]; memory does not grow with the length.

        Raises ClipError at a frame that cannot be read or whose size is not that of the first.
        """
        return iter(self.source)

    def read(self, start: int, stop: int) -> Tensor:
        """Frames start .. stop - 1 as (T, 3, H, W) float32 in [0, 1]; nothing outside the range is kept.

        A folder reads only these files; a video is indexed once and decoded from the key frame before `start`, and
        gives the very frames of an iteration. Raises ClipError for an empty or outlying range, and as iterating does.
        """
        return self.source.read(start, stop)

    def pick(self, numbers: Sequence[int]) -> Tensor:
        """Frames of these numbers, which increase, as `read` gives them; no others are kept."""
        return self.source.pick(numbers)


class FrameFolder:
    """The image files of one folder, in natural order of their stems."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        """Take over `files` of the folder `path`; two files of one stem are a ClipError."""
        self.path = path
        self.files = sorted(files, key=lambda file: natural_key(file.stem))
        self._size: tuple[int, int] | None = None
        _refuse_twins(path, [(file.stem, file) for file in self.files], "frame")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the first frame, which is read unless the size is known already."""
        if self._size is None:
            self._size = _size_of(read_image(self.files[0]))
        return self._size

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.files)

    def __iter__(self) -> Iterator[Tensor]:
        """Stream the frames, (3, H, W) float32 in [0, 1]."""
        self._size = None
        for file in self.files:
            yield self._frame(file)

    def read(self, start: int, stop: int) -> Tensor:
        """Frames start .. stop - 1, (T, 3, H, W) float32 in [0, 1]."""
        if not 0 <= start < stop <= self.count:
            raise ClipError(
                f"{self.path}: no frames {start} to {stop} (the folder has {self.count}): "
                "ask for 0 <= start < stop <= count"
            )
        return self.pick(range(start, stop))

    def pick(self, numbers: Sequence[int]) -> Tensor:
        """Frames of these numbers, within 0 .. count - 1."""
        return torch.stack([self._frame(self.files[number]) for number in numbers])

    def _frame(self, file: Path) -> Tensor:
        """The frame in `file`, whose size must be that of the frame that was read first."""
        frame = read_image(file)
        size = _size_of(frame)
        self._size = first = self._size or size
        if size != first:
            raise ClipError(
                f"{file}: {size[1]}x{size[0]}, but the first frame of this folder is {first[1]}x{first[0]}: "
                "put frames of each size into a folder of their own"
            )
        return frame


def open_clips(path: str | Path) -> list[Clip]:
    """The clips at `path`, without decoding them.

    A folder of frames or a video file is one clip; a folder of such folders and video files is one clip each, in
    natural order of their names. Hidden files and files that are neither image nor video are passed over.

    Raises ClipError (one line: file, fault, way out) for a missing path, a single image, a file that is no video, and a
    folder that is empty, mixes frames with folders or videos, or gives two clips or two frames one name.
    """
    path = Path(path)
    if path.is_dir():
        return _clips_in(path)
    if not path.exists():
        raise ClipError(f"{path}: no such file or folder: give a folder of frames, a video file or a folder of these")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ClipError(f"{path}: a single image, but a clip needs at least two frames: give the folder of frames")
    return [Clip(path.stem, path, VideoFile(path))]


def read_image(path: str | Path) -> Tensor:
    """One image as a frame, (3, H, W) float32 in [0, 1]: v / 255 or v / 65535. Raises ClipError where it is none."""
    path = Path(path)
    try:
        data = np.fromfile(path, dtype=np.uint8)  # cv2.imread cannot open every name on every system
    except OSError as err:
        raise ClipError(f"{path}: cannot be read ({err.strerror}): check its name and permissions") from err
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH) if data.size else None
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ClipError(f"{path}: not an image that can be decoded (empty, damaged or another format): replace it")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ClipError(f"{path}: pixels of type {pixels.dtype}: save it with 8 or 16 bits a channel")
    planes = np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(planes).div_(255 if pixels.dtype == np.uint8 else 65535)


def _size_of(frame: Tensor) -> tuple[int, int]:
    _, height, width = frame.shape
    return height, width


@dataclass(frozen=True)
class _Listing:
    """What a folder holds, hidden entries left out, each list in natural order."""

    images: list[Path]
    videos: list[Path]
    folders: list[Path]
    others: list[Path]


def _listing(folder: Path) -> _Listing:
    found = _Listing([], [], [], [])
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: natural_key(entry.name))
        for entry in entries:
            suffix = entry.suffix.lower()
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found.folders.append(entry)
            elif suffix in IMAGE_SUFFIXES:
                found.images.append(entry)
            elif suffix in VIDEO_SUFFIXES:
                found.videos.append(entry)
            else:
                found.others.append(entry)
    except OSError as err:
        raise ClipError(f"{folder}: cannot be listed ({err.strerror}): check its permissions") from err
    return found


def _clips_in(folder: Path) -> list[Clip]:
    found = _listing(folder)
    inner = found.folders + found.videos
    if found.images and inner:
        raise ClipError(
            f"{folder}: holds both frames ({found.images[0].name}, ...) and {_named(inner)}: "
            "keep the frames of each clip in a folder of their own"
        )
    if found.images:
        return [_folder_clip(folder, found.images)]
    if not inner:
        what = f"holds only {_named(found.others)}" if found.others else "the folder is empty"
        raise ClipError(f"{folder}: {what}: looked for {_LOOKED_FOR}")
    clips = [_folder_clip(inside, _frames_of(inside)) for inside in found.folders]
    clips += [Clip(file.stem, file, VideoFile(file)) for file in found.videos]
    _refuse_twins(folder, [(clip.name, clip.path) for clip in clips], "clip")
    return sorted(clips, key=lambda clip: natural_key(clip.name))


def _folder_clip(folder: Path, images: list[Path]) -> Clip:
    return Clip(Path(os.path.abspath(folder)).name, folder, FrameFolder(folder, images))


def _frames_of(folder: Path) -> list[Path]:
    """The frames of a folder inside a folder of clips, which may hold nothing else that could be meant."""
    found = _listing(folder)
    inner = found.folders + found.videos
    if found.images and not inner:
        return found.images
    holds = [*inner, *found.images, *found.others]
    what = f"holds {_named(holds)}" if holds else "the folder is empty"
    raise ClipError(
        f"{folder}: {what}, but a folder inside a folder of clips holds the frames of one clip "
        f"({' '.join(IMAGE_SUFFIXES)}): move it away or open it by itself"
    )


def _named(paths: list[Path]) -> str:
    names = [path.name + "/" * path.is_dir() for path in paths[:3]]
    return ", ".join(names) + ", ..." * (len(paths) > 3)


def _refuse_twins(folder: Path, named: list[tuple[str, Path]], kind: str) -> None:
    seen: dict[str, Path] = {}
    for name, path in named:
        if name in seen:
            raise ClipError(f"{folder}: {seen[name].name} and {path.name} give one {kind} name '{name}': rename one")
        seen[name] = path
