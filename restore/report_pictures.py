"""Pictures of a report: frames to compare, lossless details, slices through time, as data URIs.

They are made of the folder that an evaluation fills, <images>/<method>/<clip>/<frame:08d>.png, with the pseudo methods
"truth" and, at low resolution and for input frames only, "input". What is shown is chosen by rule, never by taste: the
middle frame and the worst one by the first metric, the region with the strongest gradients, the region with the
largest error, the row whose change over time is furthest from the truth's.
"""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from restore.frames import ClipError, read_image
from restore.metrics import rgb_to_y
from restore.report_record import ClipFigures, Record, worst_frames

TRUTH, INPUT = "truth", "input"
QUALITY = 88  # of WebP, for whole frames; details and slices are lossless
DETAIL_SIZE = (96, 128)
SLICE_WIDTH, SLICE_FRAMES = 180, 96
MOST_SHOTS = 6


@dataclass(frozen=True)
class Shot:
    """A frame to compare: by method, truth and, where there is one, input."""

    position: int
    why: str
    layers: dict[str, str]  # name -> data URI, in the order input, methods, truth


@dataclass(frozen=True)
class Detail:
    """A region of a frame, pixel by pixel; its input is that of the frame or of the last one before that has any."""

    position: int
    low_position: int
    why: str
    top: int
    left: int
    height: int
    width: int
    layers: dict[str, str]


@dataclass(frozen=True)
class Slices:
    """One row of pixels of successive frames, stacked downwards: x to the right, time down."""

    row: int
    left: int
    width: int
    count: int
    layers: dict[str, str]


@dataclass(frozen=True)
class ClipPictures:
    """All that is shown of one clip; the first of ``shots`` is the one to begin with."""

    size: tuple[int, int]
    shots: list[Shot]
    details: list[Detail]
    slices: Slices | None


def clip_pictures(record: Record, clip: ClipFigures, folder: Path, budget: int) -> ClipPictures:
    """Pictures of one clip in about ``budget`` characters; whole frames are left out first, but for one.

    ClipError names a file that is missing, damaged or of another size than the truth.
    """
    reader = _Reader(record, clip, folder)
    chosen = frames_to_show(record, clip)
    details = _details(reader, list(chosen))
    slices = _slices(reader) if len(clip.frames) > 3 else None
    room = budget - sum(map(_cost, details)) - (_cost(slices) if slices else 0)
    shots: list[Shot] = []
    for position, why in chosen.items():
        layers = {
            name: data_uri(frame, QUALITY if name in reader.names else None) for name, frame in reader.layers(position)
        }
        shot = Shot(position, why, layers)
        room -= _cost(shot)
        if shots and room < 0:
            break
        shots.append(shot)
    return ClipPictures(reader.size, shots, details, slices)


def frames_to_show(record: Record, clip: ClipFigures) -> dict[int, str]:
    """Positions of frames by importance, with the reason: typical ones, the worst, the least gain, the best."""
    metric = record.metrics[0]
    ranked = worst_frames(clip, metric, record.subject) or list(range(len(clip.frames)))
    inputs, made = ([i for i in ranked if clip.synthesised[i] is kind] for kind in (False, True))
    wanted = [(group[len(group) // 2], "typical") for group in (inputs, made) if group]
    wanted.insert(1, (ranked[0], "worst"))
    if record.baseline and (gains := worst_frames(clip, metric, record.subject, record.baseline)):
        wanted.append((gains[0], "least gain"))
    wanted.append((ranked[-1], "best"))
    reasons: dict[int, list[str]] = {}
    for position, why in wanted:
        reasons.setdefault(position, []).append(why)
    return {position: ", ".join(dict.fromkeys(why)) for position, why in list(reasons.items())[:MOST_SHOTS]}


def data_uri(frame: Float[Tensor, "3 h w"], quality: int | None = None) -> str:
    """The frame, RGB in [0, 1], as WebP of a quality up to 100, or without loss as PNG."""
    pixels = frame.clamp(0, 1).mul(255).round().byte().flip(0).permute(1, 2, 0).numpy()
    suffix, options = (".png", []) if quality is None else (".webp", [cv2.IMWRITE_WEBP_QUALITY, quality])
    done, data = cv2.imencode(suffix, np.ascontiguousarray(pixels), options)
    assert done, f"{frame.shape} cannot be encoded as {suffix}"
    return f"data:image/{suffix[1:]};base64,{base64.b64encode(data.tobytes()).decode()}"


def strongest_window(weights: Float[Tensor, "h w"], height: int, width: int) -> tuple[int, int]:
    """Top and left of the window with the largest sum."""
    sums = F.pad(weights.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    windows = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = divmod(int(windows.argmax()), windows.shape[1])
    return top, left


class _Reader:
    """Frames of one clip by method and position, all of the truth's size."""

    def __init__(self, record: Record, clip: ClipFigures, folder: Path) -> None:
        self.record, self.clip, self.folder = record, clip, folder
        self.names = [*(method.name for method in record.methods), TRUTH]
        first = read_image(self._path(TRUTH, 0))
        self.size = first.shape[1], first.shape[2]

    def read(self, name: str, position: int) -> Float[Tensor, "3 h w"]:
        """The frame by a method, or the true one."""
        path = self._path(name, position)
        frame = read_image(path)
        if frame.shape[1:] != self.size:
            height, width = self.size
            raise ClipError(f"{path}: {frame.shape[2]}x{frame.shape[1]}, but the truth is {width}x{height}")
        return frame

    def low(self, position: int) -> Tensor | None:
        """The input; None for synthesised frames, where inputs were not written and where it is scored as a method."""
        path = self._path(INPUT, position)
        absent = self.clip.synthesised[position] or INPUT in self.names or not path.is_file()
        return None if absent else read_image(path)

    def input_before(self, position: int) -> tuple[int, Tensor] | None:
        """The last input at or before a position, with its own position."""
        for candidate in range(position, -1, -1):
            low = self.low(candidate)
            if low is not None:
                return candidate, low
        return None

    def layers(self, position: int) -> Iterator[tuple[str, Tensor]]:
        """Input if there is one, every method, truth."""
        low = self.low(position)
        if low is not None:
            yield INPUT, low
        for name in self.names:
            yield name, self.read(name, position)

    def luma(self, name: str, position: int) -> Float[Tensor, "h w"]:
        """Y of a frame."""
        return rgb_to_y(self.read(name, position))[0]

    def _path(self, name: str, position: int) -> Path:
        return self.folder / name / self.clip.name / f"{self.clip.frames[position]:08d}.png"


def _details(reader: _Reader, chosen: list[int]) -> list[Detail]:
    """The region of most detail in the first frame chosen, and the one of the largest error in the second."""
    subject = reader.record.subject

    def gradients(position: int) -> Tensor:
        luma = reader.luma(TRUTH, position)
        return F.pad(luma.diff(dim=0).abs(), (0, 0, 0, 1)) + F.pad(luma.diff(dim=1).abs(), (0, 1))

    def error(position: int) -> Tensor:
        return (reader.luma(subject, position) - reader.luma(TRUTH, position)).square()

    plans: list[tuple[int, str, Callable[[int], Tensor]]] = [
        (chosen[0], "Most detail", gradients),
        (chosen[min(1, len(chosen) - 1)], f"Largest error of {subject}", error),
    ]
    return [_detail(reader, position, why, weigh(position)) for position, why, weigh in plans]


def _detail(reader: _Reader, position: int, why: str, weights: Tensor) -> Detail:
    scale = reader.record.scale
    height, width = (min(most, extent) // scale * scale for most, extent in zip(DETAIL_SIZE, reader.size, strict=True))
    top, left = (start // scale * scale for start in strongest_window(weights, height, width))
    layers = {}
    before = reader.input_before(position)
    if before is not None:
        y, x = top // scale, left // scale
        layers[INPUT] = data_uri(before[1][:, y : y + height // scale, x : x + width // scale])
    for name in reader.names:
        layers[name] = data_uri(reader.read(name, position)[:, top : top + height, left : left + width])
    return Detail(position, before[0] if before else position, why, top, left, height, width, layers)


def _slices(reader: _Reader) -> Slices:
    count = min(len(reader.clip.frames), SLICE_FRAMES)
    width = min(SLICE_WIDTH, reader.size[1])
    flicker = torch.zeros(reader.size)
    before: Tensor | None = None
    for position in range(count):
        error = reader.luma(reader.record.subject, position) - reader.luma(TRUTH, position)
        if before is not None:
            flicker += (error - before).abs()
        before = error
    row, left = strongest_window(flicker, 1, width)
    layers = {}
    for name in reader.names:
        rows = [reader.read(name, position)[:, row, left : left + width] for position in range(count)]
        layers[name] = data_uri(torch.stack(rows, dim=1))
    return Slices(row, left, width, count, layers)


def _cost(pictures: Shot | Detail | Slices) -> int:
    return sum(map(len, pictures.layers.values()))
