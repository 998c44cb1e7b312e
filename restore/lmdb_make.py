"""Put the frames of a data set into an LMDB database: python -m restore.lmdb_make SRC DST.lmdb [--scale 4].

    python -m restore.lmdb_make datasets/vimeo90k/sequences datasets/vimeo90k_gt.lmdb \
        --list datasets/vimeo90k/sep_trainlist.txt
    ... datasets/vimeo90k_lq4.lmdb --scale 4      the low resolution: MATLAB's bicubic, rounded to 8 bit
    ... datasets/vimeo90k_raw.lmdb --raw          raw pixels: more disk, no decoding while training

Every image below SRC (of the clips in the list) becomes a value under its path without suffix, BasicSR's layout; raw
pixels go under "00001_0001_4", STDAN's. What was interrupted, even killed, goes on when the command runs again;
meta_info.txt, written last, says that a database is complete.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from restore.checkpoint import replacing
from restore.clip_sources import FolderStore, reduced
from restore.frames import IMAGE_SUFFIXES
from restore.lmdb_store import META, close_all, is_database, require_lmdb
from restore.trees import listed_clips

BATCH = 64  # frames a transaction: what is lost when the command is killed
SPACE = 2**30  # bytes a new database may grow to before it is told to allow more


@dataclass(frozen=True)
class Plan:
    """What becomes of a folder of frames."""

    source: Path
    scale: int = 1
    raw: bool = False

    def key(self, file: str) -> str:
        """The key of a file, which is named by its path in the source."""
        stem = file.rpartition(".")[0]
        if not self.raw:
            return stem
        folder, _, name = stem.rpartition("/")
        return f"{folder.replace('/', '_')}_{name.removeprefix('im')}"

    def entry(self, file: str) -> tuple[bytes, str]:
        """The value of a file and its line of meta_info.txt. Raises SampleError for a damaged image."""
        frame = FolderStore(str(self.source)).read(file)
        if self.scale > 1:
            height, width = (extent // self.scale * self.scale for extent in frame.shape[1:])
            frame = reduced(frame[:, :height, :width], self.scale)
        suffix = Path(file).suffix if self.scale == 1 else ".png"
        line = f"{self.key(file)}{suffix} ({frame.shape[1]},{frame.shape[2]},3) 1"
        if self.raw:
            return _bgr(frame).tobytes(), line
        if self.scale == 1:
            return (self.source / file).read_bytes(), line  # the very file: nothing is encoded twice
        return cv2.imencode(".png", _bgr(frame))[1].tobytes(), line

    def identity(self) -> dict[str, Any]:
        """What a database must have been begun with to be continued."""
        return {"source": str(self.source.resolve()), "scale": self.scale, "raw": self.raw}


def _bgr(frame: Tensor) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2BGR)


def make(plan: Plan, files: Sequence[str], target: Path, *, jobs: int) -> int:
    """Write, or continue, the database ``target`` of ``files`` (paths in the source); the number of frames in it.

    ValueError where ``target`` belongs to something else, an image is damaged, or the count is wrong at the end.
    """
    keys = {plan.key(file): file for file in files}
    if len(keys) < len(files):
        raise ValueError(f"{plan.source}: {len(files) - len(keys)} frames would share a key with another")
    _claim(plan, target)
    meta, part = target / META, target / f"{META}.part"
    lines = _lines(meta) | _lines(part)
    close_all()  # a database cannot be open twice in one process
    with require_lmdb().open(str(target), map_size=SPACE) as database:
        with database.begin() as transaction:
            there = {bytes(key).decode() for key in transaction.cursor().iternext(values=False)}
        if strange := there - keys.keys():
            raise ValueError(f"{target}: holds {min(strange)}, which is not in {plan.source}: take another DST")
        todo = {key: file for key, file in keys.items() if key not in there or key not in lines}
        if todo and meta.exists():
            os.replace(meta, part)  # no longer complete
        lines |= _fill(database, plan, todo, part, jobs=jobs)
        count = database.stat()["entries"]
    if count != len(keys):
        raise ValueError(f"{target}: holds {count} frames, but should hold {len(keys)}: delete it and run again")
    if plan.raw and len({line.partition(" ")[2] for line in lines.values()}) > 1:
        raise ValueError(f"{target}: raw frames must be of one size; those of {plan.source} are not")
    with replacing(meta) as temporary:
        temporary.write_text("".join(f"{lines[key]}\n" for key in keys), encoding="utf-8")
    part.unlink(missing_ok=True)
    return count


def _fill(database: Any, plan: Plan, todo: Mapping[str, str], part: Path, *, jobs: int) -> dict[str, str]:
    """Store the files ``todo``, by key, a batch a transaction; their lines of meta_info.txt by key."""
    lines: dict[str, str] = {}
    keys, files = list(todo), list(todo.values())
    progress = tqdm(total=len(todo), desc=part.parent.name, unit="frame", disable=not todo)
    with progress, ThreadPoolExecutor(jobs) as pool, part.open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), BATCH):
            entries = list(pool.map(plan.entry, files[start : start + BATCH]))
            # lines first: a frame without its line is stored again, a line without its frame does no harm
            file.writelines(f"{line}\n" for _, line in entries)
            file.flush()
            new = keys[start : start + BATCH]
            _put(database, {key: value for key, (value, _) in zip(new, entries, strict=True)})
            lines.update((key, line) for key, (_, line) in zip(new, entries, strict=True))
            progress.update(len(new))
    return lines


def _put(database: Any, values: Mapping[str, bytes]) -> None:
    """One transaction; the database may become twice as large when it is full."""
    while True:
        try:
            with database.begin(write=True) as transaction:
                for key, value in values.items():
                    transaction.put(key.encode(), value)
            return
        except require_lmdb().MapFullError:
            database.set_mapsize(2 * database.info()["map_size"])


def _claim(plan: Plan, target: Path) -> None:
    """Begin a database, or check that it was begun from the same source in the same way."""
    note = target / "source.json"
    if note.exists():
        begun = json.loads(note.read_text(encoding="utf-8"))
        differing = [key for key, value in plan.identity().items() if begun.get(key) != value]
        if differing:
            had = ", ".join(f"{key} {begun.get(key)}" for key in differing)
            raise ValueError(f"{target}: was made with {had}: take another DST, or delete it")
        return
    if target.exists() and any(target.iterdir()):
        what = "a database of another program" if is_database(target) else "not empty"
        raise ValueError(f"{target}: {what}: take another DST")
    target.mkdir(parents=True, exist_ok=True)
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(plan.identity(), indent=1), encoding="utf-8")


def _lines(file: Path) -> dict[str, str]:
    """The lines of a meta_info.txt by key, without a last one that was cut off."""
    if not file.exists():
        return {}
    found = (re.fullmatch(r"(.+)\.\w+ \(\d+,\d+,3\) 1", line) for line in file.read_text("utf-8").splitlines())
    return {match[1]: match[0] for match in found if match}


def frames_below(source: Path, listing: Path | None) -> list[str]:
    """The images below a folder, of all clips or of those listed, as sorted paths in it. ValueError where none is."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; give a tree of frames such as .../00001/0001/im1.png")
    folders = [source] if listing is None else [source / clip for clip in listed_clips(listing)]
    missing = [str(folder.relative_to(source)) for folder in folders if not folder.is_dir()]
    if missing:
        raise ValueError(f"{source}: {len(missing)} of {len(folders)} listed clips are missing: {missing[0]}, ...")
    found = sorted(
        f"{Path(place).relative_to(source).as_posix()}/{name}".removeprefix("./")
        for folder in folders
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )
    if not found:
        raise ValueError(f"{source}: no frames in it ({' '.join(IMAGE_SUFFIXES)})")
    return found


def main(argv: list[str] | None = None) -> int:
    """Make a database; 2 for bad input, with one line that says why, 130 when interrupted."""
    parser = argparse.ArgumentParser(description="Put frames into an LMDB database; run again to continue.")
    parser.add_argument("source", type=Path, metavar="SRC", help="tree of frames, e.g. datasets/vimeo90k/sequences")
    parser.add_argument("target", type=Path, metavar="DST", help="folder of the database, e.g. datasets/vimeo90k.lmdb")
    parser.add_argument("--list", type=Path, metavar="FILE", help="clips to take, e.g. sep_trainlist.txt")
    parser.add_argument("--scale", type=int, default=1, help="store frames reduced by this factor")
    parser.add_argument("--raw", action="store_true", help="store raw pixels instead of image files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the frames are what runs side by side
    try:
        if arguments.scale < 1:
            raise ValueError(f"--scale {arguments.scale}: give a whole number from 1 on")
        files = frames_below(arguments.source, arguments.list)
        plan = Plan(arguments.source, arguments.scale, arguments.raw)
        count = make(plan, files, arguments.target, jobs=max(1, arguments.jobs))
    except (ValueError, OSError) as error:
        print(f"lmdb_make: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lmdb_make: interrupted; the same command continues", file=sys.stderr)
        return 130
    print(f"{arguments.target}: {count} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
