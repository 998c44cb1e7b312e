"""Memory, speed and seams of `python -m restore`: python -m bench.streaming [length budget speed seams] [-o FILE.json].

    length   peak memory for a short and a long clip of the same frames: it must not grow with the length
    budget   what --max-memory chooses, and the peak that it then has
    speed    restored frames/s of the command, reading and writing included, over those of the network's calls alone;
             the same for seconds of all cores, which other processes on the machine disturb less
    seams    |difference| to whole frames and to all frames at once, in levels of 255, by tile and overlap

Every run is a process of its own. The footage is the embedded sample clip at the size of input frames, forth and back;
--clip takes a real one for the seams. Times of shared machines are noisy: the best of --runs counts, and ratios.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restore.__main__ import main as restore_command
from restore.budget import parse_bytes
from restore.checkpoint import DEFAULT_MODEL, load_network
from restore.cost import synchronize
from restore.device import autocast, pick_device, resolve_precision
from restore.frames import open_clips
from restore.memory import keep_freed_memory, peak_during_mb
from restore.sample import sample_clip
from restore.seams import seams, uncut
from restore.stream import pad_to, spans
from restore.writers import FrameFolderWriter

WINDOW, OVERLAP = 4, 1  # what the command does by itself


def in_a_process(work: Callable[..., Any], *arguments: object) -> Any:
    """What ``work`` returns in a fresh process, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def command(argv: list[str]) -> dict[str, Any]:
    """Run the command here: its seconds as it says itself, its peak memory, and what --max-memory chose."""
    said, complaints, codes = StringIO(), StringIO(), []
    began = time.process_time()
    with redirect_stdout(said), redirect_stderr(complaints):
        peak = peak_during_mb(lambda: codes.append(restore_command(argv)))
    if codes != [0]:
        sys.exit(f"python -m restore {' '.join(argv)}: {complaints.getvalue()}")
    seconds, chosen = re.search(r" ([0-9.]+) s \(", said.getvalue()), re.search(r": (.* at once, .*)", said.getvalue())
    assert seconds is not None
    cpu = time.process_time() - began
    return {"seconds": float(seconds[1]), "cpu_s": cpu, "peak_mb": peak, "chosen": chosen[1] if chosen else ""}


def network_alone(model: str, device_name: str, precision: str, source: Path, frames: int) -> dict[str, float]:
    """Seconds of the calls that the command makes for a folder of frames, from memory and with nothing around them."""
    keep_freed_memory()
    device = pick_device(device_name)
    net = load_network(model, device=device)
    clip = pad_to(open_clips(source)[0].read(0, frames), net.multiple_of)[0].to(device)
    began, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode(), autocast(device, resolve_precision(precision, device)):
        for start, stop in spans(frames, WINDOW, OVERLAP):
            net(clip[None, start:stop])
    synchronize(device)
    return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def footage(folder: Path, frames: int, width: int, height: int) -> Path:
    """A folder of so many frames, of which 20 are different."""
    clip = list(sample_clip(min(frames, 20), height, width))
    with FrameFolderWriter(folder) as writer:
        for number, frame in enumerate(clip):
            writer.write(f"{number:06d}", frame)
    for number, source in islice(enumerate(_forth_and_back(len(clip))), len(clip), frames):
        (folder / f"{number:06d}.png").write_bytes((folder / f"{source:06d}.png").read_bytes())
    return folder


def _forth_and_back(count: int) -> Iterator[int]:
    return cycle([*range(count), *range(count - 2, 0, -1)])


class Bench:
    """Runs for one model, precision and size of frames, with files in ``folder``."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.network = options.model, options.device, options.precision
        self.size = "{}x{}".format(*options.size)
        self.source = footage(folder / "in", max(options.frames), *options.size)

    def length(self) -> list[dict[str, object]]:
        """Peak memory by number of frames, to a folder and to a video."""
        rows: list[dict[str, object]] = []
        for output in ("out", "out.mp4"):
            peaks = {frames: self._restore(output, frames)["peak_mb"] for frames in self.options.frames}
            first = next(iter(peaks.values()))
            for frames, peak in peaks.items():
                row = {"output": output, "size": self.size, "frames": frames}
                rows.append({**row, "peak_mb": peak, "ratio": round(peak / first, 3)})
        return rows

    def budget(self) -> list[dict[str, object]]:
        """Peak memory under --max-memory, and its share of that."""
        rows: list[dict[str, object]] = []
        for budget in self.options.max_memory:
            found = self._restore("out.mp4", self.options.frames[0], "--max-memory", budget)
            share = round(found["peak_mb"] * 2**20 / parse_bytes(budget), 3)
            rows.append({"size": self.size, "max_memory": budget, **found, "share": share})
        return rows

    def speed(self) -> list[dict[str, object]]:
        """Restored frames a second of the command over those of the network."""
        frames = self.options.frames[0]
        found: dict[str, list[dict[str, float]]] = {"network": [], "out": [], "out.mp4": []}
        for _ in range(self.options.runs):  # in turn, as the load of the machine changes
            found["network"].append(in_a_process(network_alone, *self.network, self.source, frames))
            for output in ("out", "out.mp4"):
                found[output].append(self._restore(output, frames))
        rows: list[dict[str, object]] = []
        for what, runs in found.items():
            row: dict[str, object] = {"what": what, "size": self.size, "frames_in": frames}
            for key, ratio in (("seconds", "ratio"), ("cpu_s", "cpu_ratio")):
                least, alone = (min(run[key] for run in each) for each in (runs, found["network"]))
                row |= {key: round(least, 2), ratio: round(alone / least, 3)}
            rows.append(row)
        return rows

    def seams(self) -> list[dict[str, object]]:
        """Differences that tiles and windows make."""
        device = pick_device(self.options.device)
        precision = resolve_precision(self.options.precision, device)
        net = load_network(self.options.model, device=device)
        clip = self._clip(self.options.seam_frames)
        whole = uncut(net, clip, precision)
        cuts: list[dict[str, int]] = [
            {"tile": tile, "tile_overlap": overlap} for tile in self.options.tiles for overlap in self.options.overlaps
        ]
        cuts += [{"window": WINDOW, "temporal_overlap": overlap} for overlap in (1, 2, 3) if len(clip) > WINDOW]
        rows: list[dict[str, object]] = []
        for cut in cuts:
            found = seams(net, clip, whole=whole, precision=precision, **cut)
            rows.append({**cut, "largest": round(255 * found.largest, 2), "mean": round(255 * found.mean, 4)})
        return rows

    def _clip(self, frames: int) -> Tensor:
        width, height = self.options.size
        if self.options.clip is None:
            return sample_clip(frames, height, width)
        return open_clips(self.options.clip)[0].read(0, frames)[..., :height, :width]

    def _restore(self, output: str, frames: int, *flags: str) -> dict[str, Any]:
        model, device, precision = self.network
        settings = ["-m", model, "--device", device, "--precision", precision, "--no-progress", "--overwrite", *flags]
        where = [str(self.source), "-o", str(self.folder / output), "--frames", str(frames)]
        return in_a_process(command, [*where, *settings])


def table(rows: Sequence[dict[str, object]]) -> str:
    """Rows as text, a column for every key of any."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([str(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main() -> None:
    """Print a table for each part that was asked for, and write all as JSON."""
    parser = argparse.ArgumentParser(description="Memory, speed and seams of python -m restore.")
    parser.add_argument("parts", nargs="*", default=["length", "budget", "speed", "seams"])
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--size", type=_size, default=(320, 180), metavar="WxH", help="of input frames (320x180)")
    parser.add_argument("--frames", type=int, nargs="+", default=[20, 1000], help="lengths of the clip (20 1000)")
    parser.add_argument("--max-memory", nargs="+", default=["4G"])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--clip", type=Path, help="for the seams: its first frames, cropped to --size")
    parser.add_argument("--seam-frames", type=int, default=7)
    parser.add_argument("--tiles", type=int, nargs="*", default=[96, 128])
    parser.add_argument("--overlaps", type=int, nargs="*", default=[0, 8, 16, 32, 48])
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    keep_freed_memory()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for part in arguments.parts:
            found[part] = getattr(bench, part)()
            print(f"{part}\n{table(found[part])}\n", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"threads": torch.get_num_threads(), **found}, indent=1))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


if __name__ == "__main__":
    main()
