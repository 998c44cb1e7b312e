"""What is to be restored into what: settled and checked before any work.

    INPUT                                  OUTPUT                         result
    frames/ or film.mp4                    out                            frames in out/
    frames/ or film.mp4                    out.mp4                        a video
    a folder of such folders and videos    out                            frames in out/CLIP/, for each clip
    any of these                           out, --suffix mp4              a video out/CLIP.mp4, for each clip

Frames from a folder keep their names; one inserted between 0004.png and 0005.png is 0004_5.png, which sorts between
them. Frames of a video are numbered from 00000000 by their place in the result. A video lasts as long as its input:
slow motion raises its frame rate, so that copied audio stays in step, and its last frame is shown for the time of an
input frame. Another `fps` changes the duration; audio is then left out or, if wished, stretched.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from restore.buffering import write_behind
from restore.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip, ClipError, natural_key, open_clips
from restore.writers import FrameFolderWriter, VideoWriter

log = logging.getLogger(__name__)

DEFAULT_FPS = Fraction(25)  # of folders, and of videos that do not say
WRITERS = min(4, os.cpu_count() or 1)  # threads that write images: much of their time they wait for the disk
_SAME_DURATION = Fraction(1, 100_000)  # 23.976 for 24000/1001: 36 ms in an hour


@dataclass(frozen=True, kw_only=True)
class Output:
    """How the results are to be written; what is None is left to the writer or the input."""

    path: Path
    suffix: str | None = None  # of the files written into `path`, with the dot; that of a video makes videos
    overwrite: bool = False
    bits: int | None = None  # 8 or 16 a channel, of frames; the rest is for videos
    fps: Fraction | None = None
    codec: str | None = None
    crf: int | None = None
    preset: str | None = None
    pix_fmt: str | None = None
    audio: bool = True
    stretch_audio: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip and where its restored frames go. Made by `plan`."""

    clip: Clip
    target: Path  # a video file or a folder of frames
    is_video: bool  # of the target
    output: Output
    slowmo: int  # frames out for every frame in
    start: int = 0  # the first frame of the clip that is restored
    limit: int | None = None  # how many are
    explain: Path | None = None  # the folder for pictures of what the network sees

    @property
    def frames_in(self) -> int | None:
        """Frames taken from the clip; None or an estimate for a video."""
        total = self.clip.count
        if total is None:
            return None
        rest = max(total - self.start, 0)
        return rest if self.limit is None else min(rest, self.limit)

    @property
    def frames_out(self) -> int | None:
        """Frames written, as far as `frames_in` is known."""
        if not self.frames_in:
            return self.frames_in
        return self.frames_in * self.slowmo if self.is_video else (self.frames_in - 1) * self.slowmo + 1

    @property
    def fps(self) -> Fraction:
        """Frame rate of the result, if it is a video."""
        return self.output.fps or (self.clip.fps or DEFAULT_FPS) * self.slowmo

    def inputs(self) -> Iterator[Tensor]:
        """The frames to restore, in order, (3, h, w) in [0, 1]. Raises ClipError as reading the clip does."""
        if self.clip.is_video or not self.start:
            stop = None if self.limit is None else self.start + self.limit
            yield from islice(self.clip, self.start, stop)
            return
        for n in range(self.start, self.start + (self.frames_in or 0)):
            yield self.clip.read(n, n + 1)[0]

    def names(self, count: int, time_scale: int) -> list[str]:
        """Names for the first `count` frames that a network gives for every 1 / `time_scale` of an input frame.

        Those of the files written; frames between the inputs that `slowmo` leaves out are named alike.
        """
        written = list(islice(self._names(), (count - 1) * self.slowmo // time_scale + 1))
        skipped = range(1, time_scale // self.slowmo)
        between = [[f"{name}_{10 * n * self.slowmo // time_scale}" for n in skipped] for name in written]
        return [name for first, rest in zip(written, between, strict=True) for name in (first, *rest)][:count]

    @contextmanager
    def sink(self, behind: int = 1, written: Callable[[], object] = lambda: None) -> Iterator[Callable[[Tensor], None]]:
        """Open the target; what is yielded has the next frame written by other threads, at most `behind` at a time.

        After each frame a thread calls `written`. After an exception images are still finished; a video is given up,
        and a folder made for nothing is removed again.
        """
        with _tidy(self.target), (self._video if self.is_video else self._folder)(behind, written) as write:
            yield write

    def check(self) -> None:
        """Raise ClipError for settings that do not go together; the target is not touched."""
        if self.is_video:
            self._video_writer()
        else:
            self._folder_writer()
        if self.clip.frame_names and not (self.is_video and self.explain is None):
            for _ in self._names():
                pass
        if not self.clip.is_video and not self.frames_in:
            raise ClipError(f"{self.clip.path}: it has {self.clip.count} frames: --start {self.start} leaves none")

    def warn(self) -> None:
        """Say what of the input does not reach the result."""
        if not (self.clip.is_video and self.is_video):
            return
        if self.clip.fps is None and self.output.fps is None:
            log.warning("%s: no frame rate in the file: %s is taken; --fps sets it", self.clip.path, DEFAULT_FPS)
        if self.output.audio and (why := self._silenced()):
            log.warning("%s: its audio, if any, is left out: %s", self.clip.path, why)

    @contextmanager
    def _video(self, behind: int, written: Callable[[], object]) -> Iterator[Callable[[Tensor], None]]:
        last: Tensor | None = None
        with self._video_writer() as writer:

            def write(frame: Tensor) -> None:
                nonlocal last
                last = frame
                writer.write(frame)
                written()

            with write_behind(write, behind, finish=False) as put:
                yield put
            if last is not None:
                for _ in range(self.slowmo - 1):  # nothing comes after the last frame: it stays for its whole time
                    writer.write(last)

    @contextmanager
    def _folder(self, behind: int, written: Callable[[], object]) -> Iterator[Callable[[Tensor], None]]:
        names = self._names()
        with self._folder_writer() as writer:
            older = {file.name for file in self.target.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES}

            def write(name: str, frame: Tensor) -> None:
                writer.write(name, frame)
                older.discard(name + writer.suffix)
                written()

            with write_behind(write, behind, threads=WRITERS) as put:
                yield lambda frame: put(next(names), frame)
        if older:
            log.warning("%s: %d older images, e.g. %s, remain among the new", self.target, len(older), min(older))

    def _names(self) -> Iterator[str]:
        """Names of the frames written, without suffix."""
        if self.clip.frame_names is None:
            yield from (f"{n:08d}" for n in count(self.start * self.slowmo))
            return
        stop = None if self.limit is None else self.start + self.limit
        before: str | None = None
        for name in self.clip.frame_names[self.start : stop]:
            if before is not None:
                yield from names_between(before, name, self.slowmo - 1)
            yield name
            before = name

    def _folder_writer(self) -> FrameFolderWriter:
        return FrameFolderWriter(self.target, self.output.suffix or ".png", self.output.bits or 8)

    def _video_writer(self) -> VideoWriter:
        settings: dict[str, Any] = {name: getattr(self.output, name) for name in ("codec", "crf", "preset", "pix_fmt")}
        settings = {name: value for name, value in settings.items() if value is not None}
        stretch = self._stretch()
        if stretch is not None:
            settings |= {"audio_from": self.clip.path, "audio_stretch": stretch}
        return VideoWriter(self.target, self.fps, **settings)

    def _stretch(self) -> Fraction | None:
        """Duration of the result over that of the input, for its audio; None where the result has no audio."""
        if not (self.clip.is_video and self.is_video and self.output.audio) or self._silenced():
            return None
        return self._slowdown() if self.output.stretch_audio else Fraction(1)

    def _slowdown(self) -> Fraction:
        exact = (self.clip.fps or DEFAULT_FPS) * self.slowmo / self.fps
        return Fraction(1) if abs(exact - 1) < _SAME_DURATION else exact

    def _silenced(self) -> str | None:
        """Why the audio of the clip cannot go along."""
        if self.start or self.limit is not None:
            return "only a part of the video is restored"
        if self._slowdown() != 1 and not self.output.stretch_audio:
            return f"--fps {self.fps} changes the duration (--stretch-audio takes it along)"
        return None


def plan(
    source: str | Path,
    output: Output,
    *,
    slowmo: int = 1,
    start: int = 0,
    limit: int | None = None,
    explain: Path | None = None,
) -> list[Job]:
    """A job for each clip at `source`, after every check that needs no frame.

    `explain` is the folder for pictures of what the network sees, with a folder in it for each of several clips.
    Raises ClipError for what `open_clips` refuses, an output that exists (unless it may be overwritten), cannot be
    written or would mix with the input, and for settings that do not go together.
    """
    source = Path(source)
    clips = open_clips(source)
    single = len(clips) == 1 and clips[0].path == source
    one_video = output.path.suffix.lower() in VIDEO_SUFFIXES and not output.path.is_dir()
    is_video = one_video or output.suffix in VIDEO_SUFFIXES
    _check_output(output, one_video, is_video)
    if one_video and len(clips) > 1:
        raise ClipError(
            f"{output.path}: one video cannot take the {len(clips)} clips of {source}: "
            "give a folder, with --suffix mp4 for videos in it"
        )
    jobs = []
    for clip in clips:
        target = output.path
        if is_video and not one_video:
            target /= f"{clip.name}{output.suffix}"
        elif not is_video and not single:
            target /= clip.name
        jobs.append(
            Job(
                clip=clip, target=target, is_video=is_video, output=output, slowmo=slowmo, start=start, limit=limit,
                explain=explain if explain is None or single else explain / clip.name,
            )
        )  # fmt: skip
    if explain is not None and output.path.resolve() in (explain.resolve(), *explain.resolve().parents):
        raise ClipError(f"{explain}: is the output or inside of it: choose another folder for --explain")
    for job in jobs:
        _check_target(source, job.target, is_video=job.is_video, overwrite=output.overwrite)
        if job.explain is not None:
            _check_target(source, job.explain, is_video=False, overwrite=output.overwrite)
        job.check()
    return jobs


def names_between(before: str, after: str, number: int) -> list[str]:
    """`number` names that sort between two, as people count and, where it is possible, letter by letter.

    Halves end in _5: "0004" "0004_5" "0005". Raises ClipError where no name fits.
    """
    rows = []
    for depth in range(8):  # 4_0_5 is between 4 and 4_5
        names = [f"{before}{'_0' * depth}_{10 * n // (number + 1)}" for n in range(1, number + 1)]
        if _ascending([before, *names, after], natural_key):
            rows.append([before, *names, after])
    rows.sort(key=lambda row: not _ascending(row, _letters))  # stable: the shortest of the best
    if not rows:
        raise ClipError(f"no name for a frame sorts between '{before}' and '{after}': rename the frames, e.g. to 0001")
    return rows[0][1:-1]


def _ascending(names: list[str], key: Callable[[str], Any]) -> bool:
    return all(key(a) < key(b) for a, b in pairwise(names))


def _letters(name: str) -> str:
    return name + "."  # what follows a stem


def _check_output(output: Output, one_video: bool, is_video: bool) -> None:
    """Flags that contradict the kind of output."""
    path = output.path
    if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
        raise ClipError(f"{path}: names an image: give a folder for frames, or a video such as {path.stem}.mp4")
    if one_video and output.suffix:
        raise ClipError(f"{path}: is a video by itself, --suffix is for files in a folder: leave one of them out")
    if one_video and path.exists() and not path.is_file():
        raise ClipError(f"{path}: exists and is no ordinary file: choose another name")
    videos_only = {
        "--fps": output.fps,
        "--codec": output.codec,
        "--crf": output.crf,
        "--preset": output.preset,
        "--pix-fmt": output.pix_fmt,
        "--stretch-audio": output.stretch_audio or None,
    }
    if is_video and output.bits is not None:
        raise ClipError(f"{path}: --bits is for frames: for a deep video use e.g. --pix-fmt yuv420p10le")
    if not is_video and (given := [flag for flag, value in videos_only.items() if value is not None]):
        raise ClipError(f"{path}: a folder of frames takes no {' '.join(given)}: give a video, e.g. -o {path.name}.mp4")
    if output.stretch_audio and not output.audio:
        raise ClipError(f"{path}: --stretch-audio and --no-audio exclude each other: leave one out")


def _check_target(source: Path, target: Path, *, is_video: bool, overwrite: bool) -> None:
    """Refuse a target that is taken, out of reach or part of the input."""
    here, there = target.resolve(), source.resolve()
    if here == there or (source.is_dir() and there in here.parents):
        raise ClipError(f"{target}: is {'inside ' if here != there else ''}the input: choose a place outside of it")
    if is_video and target.exists() and not overwrite:
        raise ClipError(f"{target}: exists: choose another name or give --overwrite")
    if not is_video and target.exists():
        if not target.is_dir():
            raise ClipError(f"{target}: is a file, but pictures need a folder: choose another name")
        if not os.access(target, os.R_OK):
            raise ClipError(f"{target}: cannot be listed: check its permissions")
        if not overwrite and any(not file.name.startswith(".") for file in target.iterdir()):
            raise ClipError(f"{target}: exists and is not empty: choose another folder or give --overwrite")
    folder = target.parent if is_video else target
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ClipError(f"{target}: cannot be written: {folder} is no folder or forbids it; choose another place")


@contextmanager
def _tidy(target: Path) -> Iterator[None]:
    """After an exception, remove the folders that were made on the way to `target` and are empty."""
    missing = [path for path in (target, *target.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
