"""Samples a second of the training sets on this machine: python -m bench.data [--source FOLDER] [--seconds 3].

Makes a small tree of septuplets (PNG), its databases (image files, raw pixels; truth and low resolution) and a video,
from the clips of --source or from the embedded sample clip, and reads samples of 7 x 128 x 128 with one process, files
in the page cache. One JSON line a source: samples and decoded megapixels a second of one worker, and the workers that
feed a GPU which takes --need samples a second.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from restore.clip_sources import to_bytes
from restore.crops import ClipCrops
from restore.data import ClipFolder, Vimeo90K, find_clips
from restore.lmdb_make import Plan, frames_below, make
from restore.sample import sample_clip
from restore.writers import FrameFolderWriter, VideoWriter

HEIGHT, WIDTH = 256, 448


def stretches(source: str | None, count: int) -> Iterator[torch.Tensor]:
    """``count`` clips of 7 frames, (7, 3, 256, 448) in [0, 1]: real ones of ``source``, or made ones."""
    if source is None:
        for seed in range(count):
            yield sample_clip(7, HEIGHT, WIDTH, seed=seed)
        return
    clips = find_clips(source)
    for i in range(count):
        frames = clips[i % len(clips)].read(7 * (i // len(clips)), 7 * (i // len(clips)) + 7)
        height, width = frames.shape[2:]
        factor = max(HEIGHT / height, WIDTH / width)
        frames = F.interpolate(frames, scale_factor=factor + 1e-3, mode="bilinear", antialias=True)
        yield frames[:, :, :HEIGHT, :WIDTH].clamp(0, 1)


def make_tree(root: Path, source: str | None, count: int) -> None:
    """The septuplets, their databases and a film of them all."""
    names = [f"00001/{i + 1:04d}" for i in range(count)]
    (root / "film").mkdir()
    with VideoWriter(root / "film" / "film.mp4", 25) as film:
        for name, frames in zip(names, stretches(source, count), strict=True):
            with FrameFolderWriter(root / "sequences" / name) as writer:
                for i, frame in enumerate(frames, start=1):
                    writer.write(f"im{i}", to_bytes(frame) / 255)
                    film.write(frame)
    (root / "sep_trainlist.txt").write_text("\n".join(names), encoding="utf-8")
    sequences = root / "sequences"
    for name, scale, raw in (("gt", 1, False), ("lq", 4, False), ("raw", 1, True), ("raw_lq", 4, True)):
        make(Plan(sequences, scale, raw), frames_below(sequences, None), root / f"{name}.lmdb", jobs=1)


def rate(samples: ClipCrops, seconds: float) -> float:
    """Samples a second, after one to warm up."""
    samples[0]
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        number += 1
        samples[number]
    return number / (time.perf_counter() - started)


def main() -> None:
    """Print one JSON line a source."""
    parser = argparse.ArgumentParser(description="Samples a second of the training sets.")
    parser.add_argument("--source", help="folder of clips to make the data from (default: the embedded sample clip)")
    parser.add_argument("--clips", type=int, default=24, help="septuplets to make")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each source")
    parser.add_argument("--need", type=float, default=30.0, help="samples a second that one GPU takes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker of a loader
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print("making the data ...", file=sys.stderr)
        make_tree(root, arguments.source, arguments.clips)
        sources = {
            "png": Vimeo90K(dataroot_gt=folder),
            "lmdb, image files": Vimeo90K(dataroot_gt=f"{folder}/gt.lmdb"),
            "lmdb, image files, low resolution stored": Vimeo90K(
                dataroot_gt=f"{folder}/gt.lmdb", dataroot_lq=f"{folder}/lq.lmdb"
            ),
            "lmdb, raw": Vimeo90K(dataroot_gt=f"{folder}/raw.lmdb"),
            "lmdb, raw, low resolution stored": Vimeo90K(
                dataroot_gt=f"{folder}/raw.lmdb", dataroot_lq=f"{folder}/raw_lq.lmdb"
            ),
            "video": ClipFolder(dataroot_gt=f"{folder}/film", cache_data=False),
            "memory": Vimeo90K(dataroot_gt=folder, cache_data=True),
            "memory, real degradations": Vimeo90K(dataroot_gt=folder, cache_data=True, degradation={"type": "real"}),
        }
        for name, samples in sources.items():
            found = rate(samples, arguments.seconds)
            record = {
                "source": name,
                "samples_per_s": round(found, 1),
                "megapixels_per_s": round(found * 7 * HEIGHT * WIDTH / 1e6, 1),
                "workers": math.ceil(arguments.need / found),
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
