"""Test sets, their clips and their protocol: `TEST_SETS` is the table from a name in an options file to a class.

A preset is a published protocol: what it expects on disk, what it scores, and the traps of its lists. Every key that
changes a figure can be overridden and is stated in the protocol's text. datasets/README.md shows the trees.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from restore.clip_sources import FirstFrames, Frames, TrainingClip, WithInputs, lazy_clip, store_truth, to_bytes
from restore.crops import make_degradation, one_source
from restore.frames import ClipError
from restore.protocol import Protocol
from restore.sample import sample_clip
from restore.trees import DVD_TEST, find_clips, listed_clips, nested, paired, reds, septuplets, usual_folder

log = logging.getLogger("restore")


@dataclass(kw_only=True)
class TestClips:
    """The clips under a folder, at any depth, by the published space-time protocol; the base of every preset.

    ``clips`` chooses some by name; of each the first ``max_frames`` count (None: all). ``dataroot_lq`` holds input
    frames made before: for every true frame, or for every ``time_scale``-th. ``degradation`` ({type: bd, ...}) makes
    the input another way than by MATLAB's bicubic.
    ValueError where something is missing or does not match.
    """

    __test__ = False  # no test of pytest's
    title: ClassVar[str] = "clips of a folder"

    dataroot_gt: str
    dataroot_lq: str | None = None
    clips: tuple[str, ...] = ()
    max_frames: int | None = None
    scale: int = 4
    time_scale: int = 2
    window: int = 7
    overlap: int = 1
    color: str = "y"
    crop_border: int = 0
    degradation: Mapping[str, Any] | None = None

    seam: ClassVar[Any] = "first"

    def __post_init__(self) -> None:
        if self.color not in ("y", "rgb"):
            raise ValueError(f"color={self.color!r} is neither 'y' nor 'rgb'")
        one_source(self)
        self.left_out: dict[str, str] = {}  # clips that cannot be opened, and why
        self.note = ""  # of `look`, for the protocol
        found = self.look()
        unknown = set(self.clips) - {clip.name for clip in found}
        if unknown:
            names = ", ".join(clip.name for clip in found)
            raise ValueError(f"{self.dataroot_gt}: no clip {', '.join(sorted(unknown))}; there are {names}")
        chosen = [clip for clip in found if not self.clips or clip.name in self.clips]
        most = self.max_frames
        self.found = chosen if most is None else [FirstFrames(clip, min(most, clip.count)) for clip in chosen]
        given = self.degradation
        self.protocol = Protocol(
            scale=self.scale,
            time_scale=self.time_scale,
            window=self.window,
            overlap=self.overlap,
            seam=self.seam,
            color=self.color,  # type: ignore[arg-type]
            crop_border=self.crop_border,
            degradation=None if given is None else make_degradation(given, self.scale, "degradation"),
            given=self.has_inputs,
            max_frames=self.max_frames,
            note=self.note,
        )

    @property
    def has_inputs(self) -> bool:
        """Whether the clips bring their inputs."""
        return self.dataroot_lq is not None

    def __len__(self) -> int:
        """The number of clips."""
        return len(self.found)

    def look(self) -> Sequence[TrainingClip]:
        """The clips on disk."""
        return self._with_inputs(self._open(self.dataroot_gt))

    def _open(self, root: str) -> list[TrainingClip]:
        """The clips that can be opened; the others are noted, so that the rest goes on."""
        clips: list[TrainingClip] = []
        for clip in find_clips(root):
            try:
                clips.append(lazy_clip(clip, None))
            except ClipError as error:
                self.left_out[clip.name] = str(error)
        return clips

    def _with_inputs(self, clips: Sequence[TrainingClip]) -> Sequence[TrainingClip]:
        """The clips, with those of the same names under ``dataroot_lq`` as their inputs."""
        if self.dataroot_lq is None:
            return clips
        small = {clip.name: clip for clip in self._open(self.dataroot_lq)}
        missing = [clip.name for clip in clips if clip.name not in small]
        if missing:
            raise ValueError(f"{self.dataroot_lq}: no input frames for {', '.join(missing[:3])}")
        return [WithInputs(clip, small[clip.name], self._step(clip, small[clip.name])) for clip in clips]

    def _step(self, clip: TrainingClip, lq: TrainingClip) -> int:
        """How many true frames there are for an input frame."""
        for step in {1, self.time_scale}:
            if lq.count == (clip.count - 1) // step + 1:
                return step
        raise ValueError(
            f"{self.dataroot_lq}: {clip.name} has {lq.count} input frames for {clip.count} true frames; there must be "
            f"one for each, or one for every {self.time_scale}"
        )


@dataclass(kw_only=True)
class Vid4(TestClips):
    """Vid4: calendar (41 frames), city (34), foliage (49) and walk (47)."""

    title = "Vid4"
    LENGTHS: ClassVar[Mapping[str, int]] = {"calendar": 41, "city": 34, "foliage": 49, "walk": 47}

    def look(self) -> Sequence[TrainingClip]:
        """The four clips; a warning where their lengths are not those that published figures are about."""
        clips = {clip.name: clip for clip in super().look()}
        missing = set(self.clips or self.LENGTHS) - clips.keys()
        if missing:
            there = ", ".join(clips)
            raise ValueError(f"{self.dataroot_gt}: Vid4 needs the folder {', '.join(sorted(missing))}; there: {there}")
        for name, frames in self.LENGTHS.items():
            if name in clips and clips[name].count != frames:
                log.warning("%s: %d frames, published figures are about %d", name, clips[name].count, frames)
        return [clips[name] for name in self.LENGTHS if name in clips]


@dataclass(kw_only=True)
class Vimeo90KTest(TestClips):
    """Vimeo-90K's test clips of one speed, 7 frames each, listed in ``meta_info_file``.

    The default is <speed>_testset.txt beside ``sequences``. Blank lines of the lists are no clips. All-black clips,
    whose PSNR is infinite, are scored, reported and left out of the mean.
    """

    speed: ClassVar[str]
    sizes: ClassVar[Mapping[int, str]]  # number of clips -> whose list it is
    meta_info_file: str | None = None

    def look(self) -> Sequence[TrainingClip]:
        """The listed clips; says whose list it is by its size."""
        folder = Path(self.dataroot_gt).expanduser()
        folder = folder.parent if folder.name == "sequences" else folder
        listing = Path(self.meta_info_file).expanduser() if self.meta_info_file else folder / self._list_name(folder)
        wanted = listed_clips(listing)
        known = "; ".join(f"{whose}: {number:,}" for number, whose in self.sizes.items())
        whose = self.sizes.get(len(wanted), f"none of the known ones ({known})")
        self.note = f"{listing.name}: {len(wanted):,} clips, the list of {whose}"
        lq = septuplets(self.dataroot_lq, wanted, (64, 112)) if self.dataroot_lq else None
        return paired(septuplets(self.dataroot_gt, wanted, (256, 448)), lq, self.dataroot_gt)

    def _list_name(self, folder: Path) -> str:
        names = (f"{self.speed}_testset.txt", f"{self.speed}_testlist.txt", f"sep_{self.speed}_testset.txt")
        return next((name for name in names if (folder / name).is_file()), names[0])


class Vimeo90KFast(Vimeo90KTest):
    """Vimeo-90K, fast motion."""

    title, speed = "Vimeo-90K fast", "fast"
    sizes: ClassVar[Mapping[int, str]] = {1225: "Zooming Slow-Mo, RSTT and STDAN"}


class Vimeo90KMedium(Vimeo90KTest):
    """Vimeo-90K, medium motion."""

    title, speed = "Vimeo-90K medium", "medium"
    sizes: ClassVar[Mapping[int, str]] = {
        4977: "Zooming Slow-Mo and RSTT as released",
        4972: "Zooming Slow-Mo's paper, without all-black clips",
        4983: "STDAN, with 6 clips more",
    }


class Vimeo90KSlow(Vimeo90KTest):
    """Vimeo-90K, slow motion."""

    title, speed = "Vimeo-90K slow", "slow"
    sizes: ClassVar[Mapping[int, str]] = {
        1613: "Zooming Slow-Mo and RSTT as released",
        1610: "Zooming Slow-Mo's paper, without all-black clips",
        1616: "STDAN, with 3 clips more",
    }


@dataclass(kw_only=True)
class SPMC(TestClips):
    """SPMC, <clip>/truth/0000.png or a folder a clip; STDAN's extra set are 11 of them, to be named in ``clips``."""

    title = "SPMC"
    gt_folder: str = "truth"

    def look(self) -> Sequence[TrainingClip]:
        """The clips of either tree."""
        folder = Path(self.dataroot_gt).expanduser()
        if any((clip / self.gt_folder).is_dir() for clip in _folders(folder)):
            return self._with_inputs(paired(nested(self.dataroot_gt, self.gt_folder), None, self.dataroot_gt))
        return super().look()


@dataclass(kw_only=True)
class REDS4(TestClips):
    """REDS4: the clips 000, 011, 015 and 020 of REDS, scored in RGB; every frame is input unless ``time_scale: 2``."""

    title = "REDS4"
    seam = "middle"
    clips: tuple[str, ...] = ("000", "011", "015", "020")
    time_scale: int = 1
    window: int = 15
    overlap: int = 4
    color: str = "rgb"
    lq_folder: str | None = None

    @property
    def has_inputs(self) -> bool:
        """Whether a tree of inputs is named."""
        return self.dataroot_lq is not None or self.lq_folder is not None

    def look(self) -> Sequence[TrainingClip]:
        """The four clips; inputs from ``lq_folder``, or train_sharp_bicubic where ``dataroot_lq`` is given."""
        gt = reds(self.dataroot_gt, "train_sharp", (720, 1280))
        if missing := [name for name in self.clips if name not in gt]:
            some = ", ".join(list(gt)[:3]) + ", ..." * (len(gt) > 3)
            raise ValueError(f"{self.dataroot_gt}: no clip {', '.join(missing)}; there are {some}")
        gt = {name: gt[name] for name in self.clips if name in gt}
        if not self.has_inputs:
            return paired(gt, None, self.dataroot_gt)
        inner = self.lq_folder or f"train_sharp_bicubic/X{self.scale}"
        self.note = f"input from {inner}"
        lq = reds(self.dataroot_lq or self.dataroot_gt, inner, (720 // self.scale, 1280 // self.scale))
        return paired(gt, lq, self.dataroot_gt)


@dataclass(kw_only=True)
class REDSBlur(REDS4):
    """REDS4 for deblurring: ``train_blur``, or ``lq_folder: train_blur_comp``, is the input; 400 frames."""

    title = "REDS-blur"
    scale: int = 1
    lq_folder: str | None = "train_blur"


@dataclass(kw_only=True)
class Deblurring(TestClips):
    """Pairs of blurred and sharp frames, scored in RGB; every frame counts, means over clips and over frames.

    ``<clip>/<gt_folder>`` or, regrouped, ``<gt_folder>/<clip>``; ``lq_folder`` likewise, below ``dataroot_lq`` if that
    is given. Both are looked for by their usual names unless given; which folder of blurred frames was read is part of
    the protocol. With a ``degradation`` the input is made of the sharp frames instead.
    """

    seam = "middle"
    gt_folder: str | None = None
    lq_folder: str | None = None
    scale: int = 1
    time_scale: int = 1
    window: int = 15
    overlap: int = 4
    color: str = "rgb"

    GT: ClassVar[Sequence[str]] = ("sharp", "gt", "GT", "test_GT")
    LQ: ClassVar[Sequence[str]] = ("blur", "blur_gamma", "input", "test_GT_blurred")
    of: ClassVar[str] = "GoPro"
    test_clips: ClassVar[Sequence[str]] = ()  # where they lie among others
    published: ClassVar[tuple[int, int] | None] = None  # clips and frames that published figures are about

    @property
    def has_inputs(self) -> bool:
        """Pairs do, unless they are made."""
        return self.degradation is None

    def look(self) -> Sequence[TrainingClip]:
        """The clips of either tree. ValueError names what was looked for."""
        self.gt_folder, gt = self._frames(self.dataroot_gt, self.gt_folder, self.GT)
        only = set() if self.clips else gt.keys() & set(self.test_clips)
        gt = {name: frames for name, frames in gt.items() if not only or name in only}
        self.note, lq = f"truth from {self.gt_folder}", None
        if self.has_inputs:
            self.lq_folder, lq = self._frames(self.dataroot_lq or self.dataroot_gt, self.lq_folder, self.LQ)
            self.note += f", input from {self.lq_folder}"
        counts = len(gt), sum(len(frames.names) for frames in gt.values())
        if self.published and not self.clips and counts != self.published:
            numbers = (self.dataroot_gt, *counts, *self.published)
            log.warning("%s: %d clips, %d frames; published figures are about %d clips, %d frames", *numbers)
        return paired(gt, lq, self.dataroot_gt)

    def _frames(self, root: str, given: str | None, usual: Sequence[str]) -> tuple[str, dict[str, Frames]]:
        """The name of the folder, given or the first of the usual ones that is there, and the clips in it."""
        inner = given or usual_folder(root, usual, "test", self.of)
        return inner, nested(root, inner, "test", self.of)


class GoPro(Deblurring):
    """GoPro's 11 test clips, 1,111 frames; the released code of its paper reads blur_gamma, video papers do not say."""

    title = "GoPro"
    published = (11, 1111)


class DVD(Deblurring):
    """DVD's 10 test clips, 1,000 frames; all are scored (its paper scores 30 of each clip)."""

    title = "DVD"
    GT, LQ = ("GT", "gt", "sharp", "test_GT"), ("input", "blur", "test_GT_blurred")
    of, test_clips, published = "DVD", DVD_TEST, (10, 1000)


class BSD(Deblurring):
    """BSD: one of 1ms8ms, 2ms16ms, 3ms24ms; 150 frames a test clip."""

    title = "BSD"
    GT, LQ = ("Sharp/RGB",), ("Blur/RGB",)
    of = "BSD"


@dataclass(kw_only=True)
class SampleTest(TestClips):
    """The embedded sample clip: nothing to download."""

    title = "embedded sample clip"
    dataroot_gt: str = field(default="", init=False)
    dataroot_lq: str | None = field(default=None, init=False)
    frames: int = 31
    height: int = 256
    width: int = 448
    seed: int = 0

    def look(self) -> Sequence[TrainingClip]:
        """Make the clip."""
        clip = to_bytes(sample_clip(self.frames, self.height, self.width, seed=self.seed))
        return [store_truth(f"sample{self.seed}", clip, self.scale)]


TEST_SETS: dict[str, Callable[..., TestClips]] = {
    "TestClips": TestClips,
    "SampleTest": SampleTest,
    "folder": TestClips,
    "vid4": Vid4,
    "vimeo90k-fast": Vimeo90KFast,
    "vimeo90k-medium": Vimeo90KMedium,
    "vimeo90k-slow": Vimeo90KSlow,
    "spmc": SPMC,
    "reds4": REDS4,
    "reds_blur": REDSBlur,
    "gopro": GoPro,
    "dvd": DVD,
    "bsd": BSD,
}


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
