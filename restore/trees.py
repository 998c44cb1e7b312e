"""Data sets on disk: which clips are where. datasets/README.md shows the trees.

Every function gives clips by name and reads no frame. What is missing is a ValueError of one line: the path that was
looked for, how the tree must look, and what runs without a download.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from restore.clip_sources import FolderStore, FrameClip, Frames
from restore.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip, natural_key, open_clips
from restore.lmdb_store import database_clips, is_database

log = logging.getLogger("restore")

WITHOUT_DOWNLOAD = "or train without any download with options/sample.yml"
VIMEO = "Vimeo90K needs sequences/00001/0001/im1.png ... im7.png and sep_trainlist.txt in it, or a *.lmdb folder"
SEPTUPLET = tuple(f"im{i}.png" for i in range(1, 8))
PAIRS = {  # sets of sharp and blurred frames: how their trees look
    "GoPro": "GOPR0372_07_00/sharp/000047.png ... or gt/GOPR0372_07_00/...",
    "DVD": "IMG_0001/GT/00000.jpg ... and IMG_0001/input/..., or gt/IMG_0001/... and blur/IMG_0001/...",
    "BSD": "000/Sharp/RGB/00000000.png ... and 000/Blur/RGB/... (of BSD_1ms8ms, BSD_2ms16ms or BSD_3ms24ms)",
}
DVD_TEST = (  # of the 71 clips that DVD has in one folder, as its authors list them
    *("720p_240fps_2", "IMG_0003", "IMG_0021", "IMG_0030", "IMG_0031"),
    *("IMG_0032", "IMG_0033", "IMG_0037", "IMG_0039", "IMG_0049"),
)


def find_clips(root: str, exclude: Sequence[str] = ()) -> list[Clip]:
    """All clips under ``root`` at any depth, without those whose names are in ``exclude``; ValueError if none."""
    folder = Path(root).expanduser()
    files = [file for file in folder.rglob("*") if not file.name.startswith(".")]
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    frame_folders = {file.parent for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
    clips = [clip for place in sorted({*videos, *frame_folders}) for clip in open_clips(place)]
    if not clips:
        what = "no clips in it" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{folder}: {what}; give a folder of clips (video files or folders of frames), {WITHOUT_DOWNLOAD}"
        )
    unknown = set(exclude) - {clip.name for clip in clips}
    if unknown:
        raise ValueError(f"{folder}: exclude names clips that are not there: {', '.join(sorted(unknown))}")
    return [clip for clip in clips if clip.name not in exclude]


def train_list(root: str, listing: str | None) -> list[str] | None:
    """The clips of Vimeo-90K to train on: those of ``listing``, or of sep_trainlist.txt beside ``sequences``.

    None for a database without ``listing``: all that it holds. ValueError where there is no list.
    """
    folder = Path(root).expanduser()
    if listing is not None:
        return listed_clips(Path(listing).expanduser())
    if is_database(folder):
        return None
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {VIMEO}, {WITHOUT_DOWNLOAD}")
    return listed_clips((folder.parent if folder.name == "sequences" else folder) / "sep_trainlist.txt")


def septuplets(root: str, wanted: Sequence[str] | None, frame_size: tuple[int, int]) -> dict[str, Frames]:
    """The clips ``wanted`` of Vimeo-90K by name ("00001/0001"), from the tree of PNG files or a database (None: all).

    ``frame_size`` (height, width) is that of raw values. Missing clips are logged; ValueError where all are missing.
    """
    folder = Path(root).expanduser()
    if is_database(folder):
        found = database_clips(folder, frame_size)
        wanted = list(found) if wanted is None else wanted
    else:
        assert wanted is not None
        folder = folder / "sequences" if (folder / "sequences").is_dir() else folder
        # one listing of each of the 96 folders instead of a question for each of the 64,612 clips
        tops = {name.partition("/")[0] for name in wanted}
        there = {f"{top}/{clip.name}" for top in tops for clip in _inside(folder / top)}
        store = FolderStore(str(folder))
        found = {name: Frames(store, f"{name}/", SEPTUPLET) for name in wanted if name in there}
    missing = [name for name in wanted if name not in found]
    if len(missing) == len(wanted):
        raise ValueError(f"{folder}: none of the {len(wanted)} listed clips is there; {VIMEO}, {WITHOUT_DOWNLOAD}")
    if missing:
        log.warning("%s: %d of %d listed clips are missing: %s", folder, len(missing), len(wanted), _some(missing))
    return {name: found[name] for name in wanted if name in found}


def listed_clips(file: Path) -> list[str]:
    """Names of clips in a text, one a line: "00001/0001", "00001/0001/im4.png ..." or "00001_0001_4"; sorted."""
    if file.suffix.lower() in (".pkl", ".pickle"):
        raise ValueError(
            f"{file}: a pickle is not opened, since it can run any code; give sep_trainlist.txt, or nothing: the keys "
            "of a database are then read from the database itself"
        )
    try:
        lines = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: no list of clips can be read ({error.__class__.__name__}); meta_info_file names a text with a "
            f"clip such as 00001/0001 on each line, {WITHOUT_DOWNLOAD}"
        ) from error
    return sorted({"/".join(re.split("[/_]", line)[:2]) for line in lines})


def reds(root: str, inner: str, frame_size: tuple[int, int]) -> dict[str, Frames]:
    """The clips of REDS by number ("000"), from ``root``, from its folder ``inner``, or from a database.

    ``frame_size`` (height, width) is that of raw values. ValueError where there are none.
    """
    folder = Path(root).expanduser()
    if is_database(folder):
        return database_clips(folder, frame_size)
    places = (folder / "train" / inner, folder / inner, folder)
    folder = next((place for place in places if place.is_dir()), folder)
    found = frame_folders(folder)
    if not found:
        what = f"no clips in it{_instead(folder)}" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {what}; REDS needs {inner}/000/00000000.png ... in it, {WITHOUT_DOWNLOAD}")
    return found


def nested(root: str, inner: str, split: str = "", of: str = "GoPro") -> dict[str, Frames]:
    """Clips of ``root``/<clip>/``inner``/*.png, or, regrouped, ``root``/``inner``/<clip>/*.png, by name.

    They are looked for in the folder ``split`` (train, test) of ``root`` if there is one. ValueError where there are
    none; it shows the tree that the set ``of`` this name in `PAIRS` has.
    """
    folder = part_of(root, split)
    if (folder / inner).is_dir():
        found = frame_folders(folder / inner)
    else:
        found = {clip.name: frames for clip in _inside(folder) if (frames := _frames(clip / inner))}
    if not found:
        what = f"neither <clip>/{inner} nor {inner}/<clip> with frames in it"
        raise ValueError(_missing(folder, what, (inner,), split, of))
    return found


def usual_folder(root: str, names: Sequence[str], split: str = "", of: str = "GoPro") -> str:
    """The first of these names that `nested` finds something by. ValueError where it is none of them."""
    folder = part_of(root, split)
    there = _there(folder, names)
    if not there:
        what = f"neither <clip>/NAME nor NAME/<clip> with NAME one of {', '.join(names)}"
        raise ValueError(_missing(folder, what, names, split, of, "; other names are given by gt_folder and lq_folder"))
    return there[0]


def _there(folder: Path, names: Sequence[str]) -> list[str]:
    """Which of the names are folders in a folder or in its first folder."""
    places = [folder, *list(_inside(folder))[:1]]
    return [name for name in names if any((place / name).is_dir() for place in places)]


def _missing(folder: Path, what: str, names: Sequence[str], split: str, of: str, way_out: str = "") -> str:
    """What was looked for in ``folder``, what is there instead, and the place below where it may be meant."""
    if not folder.is_dir():
        what, way_out = "no such folder", ""
    below = [place for place in _inside(folder) if place.name not in ("train", "val", "test")]  # never the other split
    deeper = [place for place in below if _there(part_of(str(place), split), names)]
    meant = f"; did you mean {deeper[0]}?" if deeper else ""
    needs = f"{of} needs {PAIRS[of]} in it, {WITHOUT_DOWNLOAD}"
    return f"{folder}: {what}{_instead(folder)}{meant}; {needs}{way_out}"


def part_of(root: str, split: str) -> Path:
    """The folder of a split of a set (train, test), or ``root`` where it is not split."""
    folder = Path(root).expanduser()
    return folder / split if (folder / split).is_dir() else folder


def frame_folders(folder: Path) -> dict[str, Frames]:
    """The folders of frames in ``folder``, by name."""
    return {clip.name: frames for clip in _inside(folder) if (frames := _frames(clip))}


def paired(gt: Mapping[str, Frames], lq: Mapping[str, Frames] | None, place: str) -> list[FrameClip]:
    """Clips of truth and, where given, input frames of the same name and number. ValueError where they do not match."""
    if lq is None:
        return [FrameClip(name, frames) for name, frames in gt.items()]
    missing = [name for name in gt if name not in lq]
    if missing:
        raise ValueError(f"{place}: no input frames for {len(missing)} of {len(gt)} clips: {_some(missing)}")
    for name, frames in gt.items():
        if lq[name] == frames:
            raise ValueError(f"{place}: clip {name}: the input frames are the true ones; name the folder of each")
        if len(lq[name].names) != len(frames.names):
            counts = f"{len(lq[name].names)} input frames for {len(frames.names)} true frames"
            raise ValueError(f"{place}: clip {name}: {counts}")
    _say_where_names_differ(gt, lq, place)
    return [FrameClip(name, frames, lq[name]) for name, frames in gt.items()]


def _say_where_names_differ(gt: Mapping[str, Frames], lq: Mapping[str, Frames], place: str) -> None:
    """Frames are paired in their order; a warning where their names speak of others."""
    pairs = ((name, zip(frames.names, lq[name].names, strict=True)) for name, frames in gt.items())
    unlike = [(name, a, b) for name, both in pairs for a, b in both if Path(a).stem != Path(b).stem]
    if unlike:
        name, a, b = unlike[0]
        log.warning("%s: frames are paired in order, though names differ: clip %s: %s and %s", place, name, a, b)


def _inside(folder: Path) -> Iterable[Path]:
    """The folders in a folder, in order; none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _frames(folder: Path) -> Frames | None:
    """The image files of one folder, in natural order; None where it has none."""
    if not folder.is_dir():
        return None
    names = [f.name for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
    return Frames(FolderStore(str(folder)), "", tuple(sorted(names, key=natural_key))) if names else None


def _instead(folder: Path) -> str:
    """What is in a folder where something else was looked for."""
    there = [f"{top.name}/{below.name}" for top in _inside(folder) for below in _inside(top)]
    there = there or [f"{top.name}/*{file}" for top in _inside(folder) if (file := _first_suffix(top))]
    return f", but {_some(there)}" if there else ""


def _first_suffix(folder: Path) -> str:
    """Of the frames in a folder; empty where it has none."""
    frames = _frames(folder)
    return Path(frames.names[0]).suffix if frames else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
