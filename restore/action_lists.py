"""Which clips belong to which classes: folders, and the lists of published data sets. datasets/README.md shows them.

Every function gives the clips and the names of the classes, and reads no frame. What does not fit is a ValueError of
one line that names the file, the place in it and the way out.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from restore.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from restore.labelled_clips import Labelled, LabelledClip

log = logging.getLogger("restore")

WITHOUT_DOWNLOAD = "or train without any download with options/action_sample.yml"
KINETICS = ("label", "youtube_id", "time_start", "time_end")  # columns of its lists


def classes_in_folders(root: str) -> Labelled:
    """``<class>/<clip>.mp4`` and ``<class>/<clip>/<frame>.jpg``: each folder is a class, in order of the names."""
    folder = _folder(root)
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: no folders in it; give one that has a folder of clips for each class")
    clips = []
    for label, name in enumerate(names):
        found = _clips_in(folder / name)
        if not found:
            raise ValueError(f"{folder / name}: a class without clips; put videos or folders of frames there")
        clips += [LabelledClip(f"{name}/{path.name}", label, path) for path in found]
    return Labelled(clips, tuple(names))


def something_something(root: str, annotations: str, labels_file: str, *, skip_missing: bool = False) -> Labelled:
    """Something-Something: version 2's JSON (clips have templates), or version 1's CSV ("id;label" in each line).

    ``labels_file`` names the classes: version 2 has {"template without brackets": "number"}, version 1 a name a line.
    Clips are ``<id>.webm`` (or another video) or folders ``<id>`` of frames below ``root``.
    """
    folder, listing = _folder(root), Path(annotations).expanduser()
    names = _something_classes(Path(labels_file).expanduser())
    numbers = {name: number for number, name in enumerate(names)}
    entries = _something_json(listing) if listing.suffix.lower() == ".json" else _something_csv(listing)
    chosen = []
    for place, clip, label in entries:
        if label not in numbers:
            raise ValueError(f"{listing}: {place}: the class {label!r} is none of the {len(names)} in {labels_file}")
        chosen.append((clip, numbers[label]))
    return Labelled(_present(folder, chosen, listing, skip_missing), names)


def kinetics(root: str, annotations: str, *, skip_missing: bool = False) -> Labelled:
    """Kinetics: a CSV with the columns label, youtube_id, time_start, time_end (others are not looked at).

    A clip is ``<youtube_id>_<start>_<end>.mp4``, times of six digits, or ``<youtube_id>.mp4``, below ``root`` or in the
    folder of its class there. Classes are the labels of the list in alphabetical order.
    """
    folder, listing = _folder(root), Path(annotations).expanduser()
    rows = list(csv.DictReader(io.StringIO(_text(listing))))
    lacking = [column for column in KINETICS if not rows or column not in rows[0]]
    if lacking:
        raise ValueError(f"{listing}: no column {', '.join(lacking)}; Kinetics has {','.join(KINETICS)},split")
    names = tuple(sorted({row["label"] for row in rows}))
    numbers = {name: number for number, name in enumerate(names)}
    chosen = []
    for i, row in enumerate(rows, 2):
        try:
            start, end = (round(float(row[key])) for key in ("time_start", "time_end"))
        except (TypeError, ValueError):
            times = f"{row['time_start']!r}, {row['time_end']!r}"
            raise ValueError(f"{listing}: line {i}: the times {times} are no numbers") from None
        chosen.append((_kinetics_clip(folder, row["label"], row["youtube_id"], start, end), numbers[row["label"]]))
    return Labelled(_present(folder, chosen, listing, skip_missing), names)


def listed(root: str, annotations: str, labels_file: str | None = None, *, skip_missing: bool = False) -> Labelled:
    """Lists of other programs: a line is ``path label``, or ``path frames label`` for folders of frames (TSN, TSM).

    Between them is a space or, as PySlowFast and VideoMAE write them, a comma. Paths are below ``root``; labels count
    from 0. ``labels_file`` has the names of the classes, one a line; without it they are their numbers.
    """
    folder, listing = _folder(root), Path(annotations).expanduser()
    names = tuple(_lines(Path(labels_file).expanduser())) if labels_file else None
    chosen = []
    for i, line in enumerate(_text(listing).splitlines(), 1):
        if not line.strip():
            continue
        path, label = _listed_line(line)
        if label is None:
            raise ValueError(f"{listing}: line {i}: {line.strip()!r} is not 'path label' or 'path frames label'")
        if names is not None and label >= len(names):
            raise ValueError(f"{listing}: line {i}: label {label}, but {labels_file} has classes 0 .. {len(names) - 1}")
        chosen.append((path, label))
    return Labelled(_present(folder, chosen, listing, skip_missing), names)


# ---- what the lists hold


def _something_classes(file: Path) -> tuple[str, ...]:
    if file.suffix.lower() != ".json":
        return tuple(_lines(file))
    found = _json(file)
    try:
        numbered = sorted((int(number), name) for name, number in found.items())
    except (AttributeError, TypeError, ValueError):
        numbered = []
    if not numbered or [number for number, _ in numbered] != list(range(len(numbered))):
        raise ValueError(f'{file}: not a list of classes {{"Holding something": "0", ...}}, numbered from 0 on')
    return tuple(name for _, name in numbered)


def _something_json(file: Path) -> list[tuple[str, str, str]]:
    """Of every entry its place in the file, the clip and the class: the template without brackets."""
    entries = []
    found = _json(file)
    for i, entry in enumerate(found if isinstance(found, list) else [None]):
        if not isinstance(entry, dict) or not {"id", "template"} <= entry.keys():
            raise ValueError(f'{file}: entry {i}: not {{"id": ..., "template": ...}}; test lists have no classes')
        entries.append((f"entry {i}", str(entry["id"]), str(entry["template"]).replace("[", "").replace("]", "")))
    return entries


def _something_csv(file: Path) -> list[tuple[str, str, str]]:
    entries = []
    for i, line in enumerate(_text(file).splitlines(), 1):
        clip, semicolon, label = line.strip().partition(";")
        if line.strip() and not semicolon:
            raise ValueError(f"{file}: line {i}: {line.strip()!r} is not 'id;label'; test lists have no classes")
        if line.strip():
            entries.append((f"line {i}", clip, label))
    return entries


def _kinetics_clip(folder: Path, label: str, video: str, start: int, end: int) -> str:
    """The path of a clip below ``folder``, by the first of the usual names that is there."""
    stems = (f"{video}_{start:06d}_{end:06d}", video)
    places = (f"{label}/", f"{label.replace(' ', '_')}/", "")
    found = (f"{place}{stem}" for place in places for stem in stems if _found(folder / f"{place}{stem}"))
    return next(found, f"{places[0]}{stems[0]}")


def _listed_line(line: str) -> tuple[str, int | None]:
    parts = line.strip().rsplit(",", 2) if "," in line else line.strip().rsplit(maxsplit=2)
    numbers = [part.strip().isdecimal() for part in parts]
    if len(parts) == 3 and numbers[1:] == [True, True]:
        return parts[0], int(parts[2])
    if len(parts) >= 2 and numbers[-1]:
        return line.strip()[: -len(parts[-1])].rstrip(", "), int(parts[-1])
    return line, None


# ---- what is on disk


def _present(
    folder: Path, chosen: Sequence[tuple[str, int]], listing: Path, skip_missing: bool
) -> list[LabelledClip]:
    """The listed clips that are there; all have to be, unless those that are not may be skipped."""
    clips, missing = [], []
    for name, label in chosen:
        path = _found(folder / name)
        if path is None:
            missing.append(name)
        else:
            clips.append(LabelledClip(name, label, path))
    if not chosen:
        raise ValueError(f"{listing}: lists no clips")
    if missing and (not skip_missing or not clips):
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        way = "skip_missing: true leaves them out" if clips else f"dataroot is where they are, {WITHOUT_DOWNLOAD}"
        raise ValueError(f"{listing}: {len(missing):,} of {len(chosen):,} clips are not in {folder}: {some}; {way}")
    if missing:
        log.warning("%s: %d of %d clips are not in %s and are left out", listing, len(missing), len(chosen), folder)
    return clips


def _found(path: Path) -> Path | None:
    """A clip by its path with or without suffix, among what its folder holds."""
    there = _names(path.parent)
    if path.name in there:
        return path
    return next((path.with_name(path.name + suffix) for suffix in VIDEO_SUFFIXES if path.name + suffix in there), None)


@cache
def _names(folder: Path) -> frozenset[str]:
    """One listing of a folder instead of a question for each of its clips."""
    return frozenset(entry.name for entry in folder.iterdir()) if folder.is_dir() else frozenset()


def _clips_in(folder: Path) -> list[Path]:
    """Videos, and folders that hold images or a folder ``frames`` of them."""
    found = []
    for entry in sorted(folder.iterdir()):
        inner = entry / "frames" if (entry / "frames").is_dir() else entry
        if entry.name.startswith("."):
            continue
        if entry.suffix.lower() in VIDEO_SUFFIXES:
            found.append(entry)
        elif entry.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in inner.iterdir()):
            found.append(inner)
    return found


def _folder(root: str) -> Path:
    folder = Path(root).expanduser()
    _names.cache_clear()  # it may have changed since another list was read
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of the clips, {WITHOUT_DOWNLOAD}")
    return folder


def _lines(file: Path) -> Iterable[str]:
    lines = [line.strip() for line in _text(file).splitlines() if line.strip()]
    twice = next((line for i, line in enumerate(lines) if line in lines[:i]), None)
    if not lines or twice:
        raise ValueError(f"{file}: " + (f"the class {twice!r} comes twice" if twice else "names no classes"))
    return lines


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: cannot be read ({error.__class__.__name__}); annotations and labels_file name texts, "
            f"{WITHOUT_DOWNLOAD}"
        ) from error


def same_classes(ours: Mapping[str, int], theirs: Sequence[str]) -> dict[int, int]:
    """From the numbers of a set's classes to a network's, by name. ValueError names those that the network lacks."""
    lacking = [name for name in theirs if name not in ours]
    if lacking:
        some = ", ".join(lacking[:3]) + ", ..." * (len(lacking) > 3)
        raise ValueError(f"{len(lacking)} of {len(theirs)} classes are not those of the network: {some}")
    return {number: ours[name] for number, name in enumerate(theirs)}
