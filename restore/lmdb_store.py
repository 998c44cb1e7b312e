"""Frames in LMDB databases, in two layouts that are recognised by their contents.

    BasicSR   key "00001/0001/im4", value: an encoded image file; meta_info.txt lists "00001/0001/im4.png (256,448,3) 1"
    raw       key "00001_0001_4",   value: H * W * 3 bytes, BGR, of a size that the database does not say (STDAN)

`restore.lmdb_make` writes both. A database is opened by each process for itself and closed before a fork, since LMDB
does not survive one. Needs the package lmdb.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from restore.clip_sources import Frames, SampleError, decode_image, from_bgr
from restore.frames import natural_key

META = "meta_info.txt"
_MAGIC = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # png jpg webp bmp tif
_open: dict[str, Any] = {}  # the environments of this process; one that is open cannot be opened again


def require_lmdb() -> Any:
    """The package lmdb; ValueError that says how to get it."""
    try:
        import lmdb
    except ImportError as error:
        raise ValueError("LMDB databases need the package lmdb: pip install lmdb") from error
    return lmdb


def is_database(path: str | Path) -> bool:
    """Whether ``path`` is the folder of an LMDB database."""
    return (Path(path) / "data.mdb").is_file()


@dataclass(frozen=True)
class Database:
    """The frames of a database, by key; nothing is open in it, so that it goes to workers as it is."""

    root: str
    frame_size: tuple[int, int] | None  # (height, width) of raw values; None: the values are image files

    def read(self, key: str) -> UInt8[Tensor, "3 H W"]:
        """One frame. Raises SampleError where it is missing or damaged."""
        place = f"{self.root}/{key}"
        with environment(self.root).begin(buffers=True) as transaction:
            value = transaction.get(key.encode())
            if value is None:
                raise SampleError(place, "the database has no such key")
            pixels = np.frombuffer(value, np.uint8)
            if self.frame_size is None:
                return decode_image(pixels, place)
            height, width = self.frame_size
            if len(pixels) != height * width * 3:
                raise SampleError(place, f"{len(pixels)} bytes, not {height * width * 3} for {width}x{height} pixels")
            return from_bgr(pixels.reshape(height, width, 3))


def environment(root: str) -> Any:
    """The database, open for reading in this process."""
    root = os.path.realpath(root)
    if root not in _open:
        lmdb = require_lmdb()
        _close_before_forks()
        try:
            _open[root] = lmdb.open(root, readonly=True, lock=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise SampleError(root, f"no LMDB database that can be opened ({error}): copy or make it again") from error
    return _open[root]


@cache
def _close_before_forks() -> None:
    if hasattr(os, "register_at_fork"):  # where there are forks
        os.register_at_fork(before=close_all)


def close_all() -> None:
    """Close what this process has open; the next read opens it again."""
    while _open:
        _open.popitem()[1].close()


def database_clips(root: str | Path, frame_size: tuple[int, int]) -> dict[str, Frames]:
    """The clips of a database by name ("00001/0001"), frames in natural order.

    ``frame_size`` (height, width) is used for raw values. ValueError where the values are neither images nor of it.
    """
    clips: dict[str, list[tuple[str, str]]] = {}
    for key in _keys(Path(root)):
        clip, separator, name = key.rpartition("/") if "/" in key else key.rpartition("_")
        clips.setdefault(clip.replace("_", "/") if separator == "_" else clip, []).append((clip + separator, name))
    if not clips:
        raise ValueError(f"{root}: the database is empty: make it again with python -m restore.lmdb_make")
    database = Database(str(root), _layout(str(root), "".join(next(iter(clips.values()))[0]), frame_size))
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # 60,000 clips of im1 .. im7 need one tuple of these names
    found = {}
    for clip in sorted(clips):
        names = tuple(sorted((name for _, name in clips[clip]), key=natural_key))
        found[clip] = Frames(database, clips[clip][0][0], shared.setdefault(names, names))
    return found


def _keys(root: Path) -> Iterator[str]:
    """The keys as meta_info.txt lists them, or as the database has them."""
    with suppress(FileNotFoundError):
        lines = (root / META).read_text(encoding="utf-8").splitlines()
        yield from (re.sub(r"\.\w+$", "", line.split(" (")[0]) for line in lines if line.strip())
        return
    with environment(str(root)).begin() as transaction, transaction.cursor() as cursor:
        yield from (bytes(key).decode() for key in cursor.iternext(values=False))


def _layout(root: str, key: str, frame_size: tuple[int, int]) -> tuple[int, int] | None:
    """None where the value of ``key`` is an image file, ``frame_size`` where it is that many raw pixels."""
    with environment(root).begin() as transaction:
        value = transaction.get(key.encode())
    if value is None:
        raise ValueError(f"{root}: {META} lists {key!r}, which the database does not have: make it again")
    height, width = frame_size
    if len(value) == height * width * 3:
        return height, width
    if value.startswith(_MAGIC):
        return None
    raise ValueError(
        f"{root}: its values are no image files, and {len(value)} bytes are no {width}x{height} pixels of 3 bytes: "
        f"set frame_size to the [height, width] of the true frames"
    )
