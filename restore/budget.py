"""Restoring within a given memory: the window and the tile that stay below it.

    model = MemoryModel(net, "bf16")                      # before anything large is restored
    cut = fit(model, (360, 640), parse_bytes("4G"))       # Cut(window=4, tile=184, needed=...)

What is needed is the sum of what the process holds before, of the network on a tile, of the frames on their way and of
the encoder. The network's share is measured on tiles that grow for as long as they are sure to fit, for every number
of frames, and taken to be affine in the pixels of a tile beyond the largest; the rest is counted. On a GPU its memory
is meant, which holds the first two only. docs/streaming.md compares predictions with peaks.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from archs import VideoNet
from restore.memory import give_back_memory, keep_freed_memory, resident_bytes
from restore.stream import least_tile, restore_window, round_up, spans

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}  # powers of two
_FLOAT_RGB = 12  # bytes a pixel of a frame
_RESERVE = 1.05  # what was measured of one and the same tile differed by up to 4 %


@dataclass(frozen=True)
class Cut:
    """How a clip is cut: input frames at once, side of tiles in pixels (None: whole frames), bytes needed for that."""

    window: int
    tile: int | None
    needed: float

    def __str__(self) -> str:
        tiles = f"tiles of {self.tile} pixels" if self.tile else "whole frames"
        return f"{self.window} frames at once, {tiles}, about {as_size(self.needed)}"


def parse_bytes(text: str) -> int:
    """Bytes from a size such as "4G", "800M", "1.5GiB" or "2000000000", units being powers of 1024; else ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    count = 0 if match is None else int(float(match[1]) * 2 ** _UNITS[match[2].upper()])
    if not count:
        raise ValueError(f"{text!r} is no size of memory such as 4G, 800M or a number of bytes")
    return count


def as_size(count: float) -> str:
    """Bytes for people, rounded up: "3.25G", "800M"; `parse_bytes` reads it."""
    return f"{math.ceil(count / 2**30 * 100) / 100:g}G" if count >= 2**30 else f"{math.ceil(count / 2**20)}M"


class MemoryModel:
    """What ``net`` takes on its device, in bytes, measured when it is first asked for.

    On a CPU freed memory is kept from here on (`keep_freed_memory`), since what is measured must be what is done.
    ValueError where memory cannot be measured.
    """

    def __init__(self, net: VideoNet, precision: str = "fp32") -> None:
        self.net, self.precision = net, precision
        self.device = next(net.parameters()).device
        self.on_cpu = self.device.type == "cpu"
        if not (self.device.type == "cuda" or (self.on_cpu and keep_freed_memory())):
            raise ValueError(f"memory on {self.device} cannot be measured on this system: give --window and --tile")
        self._step = round_up(32, net.multiple_of)  # side of the smallest tile that is measured
        self._measure(net.min_frames, self._step)  # what libraries keep once they have run is no part of a tile's cost
        self._measured: dict[int, dict[int, int]] = {}  # frames -> pixels of a tile -> bytes

    def network(self, frames: int, pixels: int, room: float = math.inf) -> float:
        """Bytes for one call on ``frames`` of ``pixels``, beyond those ``before``; inf if not even a try fits ``room``.

        What is measured for it takes less than ``room`` in all likelihood: each tile has four times the pixels of the
        one before, which has to leave four times its bytes.
        """
        known = self._measured.setdefault(frames, {})
        for side in (self._step, 2 * self._step, 4 * self._step):
            if side**2 in known:
                continue
            if (known and pixels <= max(known)) or self._bound(frames, side**2) > room:
                break
            known[side**2] = self._measure(frames, side)
        if not known:
            return math.inf
        points = known if len(known) > 1 else {0: 0, **known}
        (p0, b0), (p1, b1) = list(points.items())[-2:]
        if pixels > p1:
            return b1 + (pixels - p1) * max(b1 - b0, 0) / (p1 - p0)
        return float(np.interp(pixels, list(known), list(known.values())))

    def _bound(self, frames: int, pixels: int) -> float:
        """The most that a call may take, judged by smaller ones: attention over time grows with frames squared."""
        for fewer in sorted(self._measured, reverse=True):
            if fewer <= frames and self._measured[fewer]:
                largest, count = list(self._measured[fewer].items())[-1]
                return count * max(pixels / largest, 1) * (frames / fewer) ** 2
        return 0

    def _measure(self, frames: int, side: int) -> int:
        clip = torch.rand(frames, 3, side, side)
        before = self._held()
        for _ in range(2):  # the first call leaves holes that the second cannot use
            restore_window(self.net, clip, precision=self.precision)
        # Freed memory is kept, so that what is held now is the peak.
        peak = resident_bytes() if self.on_cpu else torch.cuda.memory_reserved(self.device)
        self.before = self._held()  # weights, libraries
        return peak - before

    def _held(self) -> int:
        give_back_memory(self.device)
        return resident_bytes() if self.on_cpu else torch.cuda.memory_reserved(self.device)


def fit(
    model: MemoryModel, size: tuple[int, int], budget: int, *, windows: Iterable[int] = (4, 3, 2),
    temporal_overlap: int = 1, tile: int | None = None, tile_overlap: int = 16, writing: int = 0,
) -> Cut:  # fmt: skip
    """The cut for frames of ``size`` (h, w) that computes the fewest pixels and needs at most ``budget`` bytes.

    The longest of ``windows`` whose tiles are at least twice as large as `least_tile` is taken, else what computes the
    fewest; a given ``tile`` stays. ``writing`` is what the writer takes. ValueError, which names the least that works,
    where nothing fits.
    """
    net = model.net
    height, width = (round_up(side, net.multiple_of) for side in size)
    whole, least = max(height, width), least_tile(net, tile_overlap)
    shortest = max(net.min_frames, temporal_overlap + 1)
    lengths = sorted({max(window, shortest) for window in windows}, reverse=True)

    def cut(window: int, side: int, limit: float = budget) -> Cut:
        rest = model.before + (writing + frames_bytes(net, (height, width), window) if model.on_cpu else 0)
        area = min(side, height) * min(side, width)
        network = _RESERVE * model.network(window, area, (limit - rest) / _RESERVE)
        return Cut(window, side if side < whole else None, rest + network)

    def work(option: Cut) -> float:
        again = option.window / (option.window - temporal_overlap)
        rows, columns = (_computed(length, option.tile or whole, tile_overlap) for length in (height, width))
        return again * rows * columns

    smallest = cut(lengths[-1], tile or least, math.inf)
    if smallest.needed > budget:
        raise ValueError(
            f"{as_size(budget)} of memory is too little for frames of {size[1]}x{size[0]}: "
            f"at least {as_size(smallest.needed)} is needed"
        )
    sides = [round_up(tile, net.multiple_of)] if tile else [*range(whole, least, -net.multiple_of), least]
    found = [smallest]
    for window in lengths:
        fitting = [option for side in sides if (option := cut(window, side)).needed <= budget]
        if fitting:
            found.append(min(fitting, key=lambda option: (work(option), option.needed)))
            if tile or (found[-1].tile or whole) >= min(2 * least, whole):
                return found[-1]
    return min(found, key=work)


def frames_bytes(net: VideoNet, size: tuple[int, int], window: int) -> int:
    """What frames of ``size`` (h, w) take on their way through the memory of the CPU.

    Inputs are read ahead, listed, stacked and padded; the results of a window are written while the next is restored.
    """
    pixels = size[0] * size[1]
    return _FLOAT_RGB * (4 * window * pixels + 2 * net.frames_out(window) * pixels * net.scale**2)


def writing_bytes(pixels: int, *, threads: int | None) -> int:
    """What writing frames of ``pixels`` takes: as images by so many threads, or as a video if None.

    Of a video most is the encoder's, which looks ahead. Measured with default settings at 1280x720 and 2560x1440:
    libx264 258 and 698 MB, libx265 305 and about 800, libvpx-vp9 247; the estimate is 304 and 831.
    """
    return min(350 * pixels, (128 << 20) + 200 * pixels) if threads is None else 40 * pixels * threads


def _computed(length: int, side: int, overlap: int) -> int:
    """Pixels of an axis that tiles of ``side`` compute, those that they share counted for each."""
    return sum(stop - start for start, stop in spans(length, side, overlap))
