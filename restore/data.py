"""Training sets by name, and their batches: `DATASETS` is the table from a name in an options file to a class.

A class's constructor keywords are the keys of its section; those of `ClipCrops` (crops, augmentation, spacing of
frames) belong to every set. Frames are read when a sample needs them, unless ``cache_data`` keeps a set in memory.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from restore import distributed
from restore.clip_sources import StoredClip, TrainingClip, lazy_clip, store, store_truth, to_bytes
from restore.crops import ClipCrops, Sample, make_degradation, one_source
from restore.sample import sample_clip
from restore.samples import Samples
from restore.schema import Component, OptionError, construct, parse
from restore.trees import DVD_TEST, find_clips, nested, paired, reds, septuplets, train_list

__all__ = [
    *("DATASETS", "REDS", "ClipCrops", "ClipFolder", "GoPro", "Mixed", "Sample", "SampleClips", "StoredClip"),
    *("Vimeo90K", "SampleNumbers", "find_clips", "store", "training_batches"),
]

REDS_HELD_OUT = {
    "REDS4": ("000", "011", "015", "020"),
    "official": tuple(f"{number:03d}" for number in range(240, 270)),  # the 30 validation clips, numbered on
}


@dataclass(eq=False, kw_only=True)
class SampleClips(ClipCrops):
    """The embedded sample clips of seeds 1, 2, ... (0 is kept for measuring): nothing to download."""

    clips: Any = field(default=8, repr=False)  # their number; afterwards they themselves
    frames: int = 31
    height: int = 256
    width: int = 448

    def find(self) -> Sequence[TrainingClip]:
        """Make the clips."""
        return [
            _kept(self, f"sample{seed}", to_bytes(sample_clip(self.frames, self.height, self.width, seed=seed)))
            for seed in range(1, self.clips + 1)
        ]


@dataclass(eq=False, kw_only=True)
class _OnDisk(ClipCrops):
    """A set below ``dataroot_gt``; ``cache_data`` decodes all of it once into memory."""

    clips: Sequence[TrainingClip] = field(init=False, repr=False)
    dataroot_gt: str
    cache_data: bool = False

    def __post_init__(self) -> None:
        one_source(self)
        super().__post_init__()

    def find(self) -> Sequence[TrainingClip]:
        """The clips, or what the cache makes of them."""
        clips = self.look()
        return [self._cached(clip) for clip in clips] if self.cache_data else clips

    def look(self) -> Sequence[TrainingClip]:
        """The clips on disk."""
        raise NotImplementedError

    def _cached(self, clip: TrainingClip) -> StoredClip:
        numbers = range(clip.count)
        lq = clip.inputs(numbers)
        gt = torch.stack(list(clip.truth(numbers)))
        return _kept(self, clip.name, gt, None if lq is None else torch.stack(list(lq)))

    def prepare(self) -> None:
        """As every set; errors name the folder."""
        try:
            super().prepare()
        except ValueError as error:
            raise ValueError(f"{self.dataroot_gt}: {error}") from error


@dataclass(eq=False, kw_only=True)
class ClipFolder(_OnDisk):
    """The clips under a folder: video files or folders of frames, at any depth, with low resolution made from them.

    ``exclude`` leaves clips out by name, for validation. Of each clip the first ``max_frames`` are used: 300 unless
    set otherwise where they are cached, all where ``cache_data`` is off. ValueError where the folder is missing or
    holds no clip that is long and large enough.
    """

    cache_data: bool = True
    exclude: tuple[str, ...] = ()
    max_frames: int | None = None

    def find(self) -> Sequence[TrainingClip]:
        """The clips; for the cache each is decoded in one run."""
        clips = find_clips(self.dataroot_gt, self.exclude)
        if not self.cache_data:
            return [lazy_clip(clip, self.max_frames) for clip in clips]
        most = self.max_frames or 300
        return [
            _kept(self, clip.name, torch.stack([to_bytes(frame) for frame in islice(clip, most)])) for clip in clips
        ]


@dataclass(eq=False, kw_only=True)
class Vimeo90K(_OnDisk):
    """Vimeo-90K septuplets: ``sequences/00001/0001/im1.png .. im7.png``, or an LMDB database of them (either layout).

    ``meta_info_file`` lists the clips (default: ``sep_trainlist.txt`` beside ``sequences``; of a database all).
    ``dataroot_lq`` is a tree or database of low resolution made before, else it is made from the crops.
    ``frame_size`` (height, width) is that of the true frames in a database of raw pixels.
    """

    dataroot_lq: str | None = None
    meta_info_file: str | None = None
    frame_size: tuple[int, int] = (256, 448)

    def look(self) -> Sequence[TrainingClip]:
        """The listed clips. ValueError where they are missing."""
        height, width = self.frame_size
        wanted = train_list(self.dataroot_gt, self.meta_info_file)
        gt = septuplets(self.dataroot_gt, wanted, (height, width))
        if self.dataroot_lq is None:
            return paired(gt, None, self.dataroot_gt)
        small = (height // self.scale, width // self.scale)
        return paired(gt, septuplets(self.dataroot_lq, list(gt), small), self.dataroot_lq)


@dataclass(eq=False, kw_only=True)
class REDS(_OnDisk):
    """REDS: ``train_sharp/000/00000000.png``, or an LMDB database of it, without the clips of ``val_partition``.

    ``val_partition`` is REDS4 (000, 011, 015, 020) or official (240 to 269, where the validation clips were added to
    the training clips). ``dataroot_lq`` is a tree such as ``train_sharp_bicubic/X4``, else it is made from the crops.
    ``lq_folder`` is another tree of input frames, there or beside the truth: train_blur_bicubic/X4 ...
    """

    dataroot_lq: str | None = None
    lq_folder: str | None = None
    val_partition: str = "REDS4"

    def look(self) -> Sequence[TrainingClip]:
        """The clips to train on. ValueError where they are missing."""
        held_out = REDS_HELD_OUT.get(self.val_partition)
        if held_out is None:
            raise ValueError(f"val_partition={self.val_partition!r} is none of {', '.join(REDS_HELD_OUT)}")
        everything = reds(self.dataroot_gt, "train_sharp", (720, 1280))
        gt = {name: frames for name, frames in everything.items() if name not in held_out}
        if self.dataroot_lq is None and self.lq_folder is None:
            return paired(gt, None, self.dataroot_gt)
        small = (720 // self.scale, 1280 // self.scale)
        root = self.dataroot_lq or self.dataroot_gt
        return paired(gt, reds(root, self.lq_folder or f"train_sharp_bicubic/X{self.scale}", small), root)


@dataclass(eq=False, kw_only=True)
class REDSBlur(REDS):
    """REDS for deblurring: ``train_blur``, or ``lq_folder: train_blur_comp``, is the input of ``train_sharp``."""

    lq_folder: str | None = "train_blur"
    scale: int = 1
    time_scale: int = 1


@dataclass(eq=False, kw_only=True)
class GoPro(_OnDisk):
    """Trees of sharp and blurred frames: ``<clip>/sharp/*.png`` (as released) or ``sharp/<clip>/*.png`` (regrouped).

    Both are looked for in ``train`` below ``dataroot_gt`` if that is there. ``gt_folder`` is the name of the folder of
    true frames (sharp, gt, train_GT ...). ``lq_folder`` (blur, blur_gamma, train_GT_blurred ...) makes its frames the
    input, with ``scale: 1`` and ``time_scale: 1`` for deblurring; without it the input is made of the true frames.
    """

    gt_folder: str = "sharp"
    lq_folder: str | None = None

    of: ClassVar[str] = "GoPro"
    held_out: ClassVar[Sequence[str]] = ()

    def look(self) -> Sequence[TrainingClip]:
        """The clips. ValueError where they are missing."""
        found = nested(self.dataroot_gt, self.gt_folder, "train", self.of)
        gt = {name: frames for name, frames in found.items() if name not in self.held_out}
        if not gt:
            raise ValueError(f"{self.dataroot_gt}: only test clips are in it: {', '.join(found)}")
        if self.lq_folder is None:
            return paired(gt, None, self.dataroot_gt)
        return paired(gt, nested(self.dataroot_gt, self.lq_folder, "train", self.of), self.dataroot_gt)


@dataclass(eq=False, kw_only=True)
class DVD(GoPro):
    """DVD: ``<clip>/GT`` and ``<clip>/input`` as released, or as ``gt_folder`` and ``lq_folder`` say.

    The ten test clips are left out where they lie among the others.
    """

    gt_folder: str = "GT"
    lq_folder: str | None = "input"
    scale: int = 1
    time_scale: int = 1

    of, held_out = "DVD", DVD_TEST


@dataclass(eq=False, kw_only=True)
class BSD(GoPro):
    """BSD, one of BSD_1ms8ms, BSD_2ms16ms and BSD_3ms24ms: ``<clip>/Sharp/RGB`` and ``<clip>/Blur/RGB``."""

    gt_folder: str = "Sharp/RGB"
    lq_folder: str | None = "Blur/RGB"
    scale: int = 1
    time_scale: int = 1

    of = "BSD"


@dataclass(eq=False, kw_only=True)
class Mixed(ClipCrops):
    """Several sets: each sample is of one of them, drawn by ``weight`` (default 1).

    ``sets`` are sections as of a set alone. The keywords of every set stand beside ``sets`` and hold for all of them;
    a section may give its own ``interval_list``, ``use_hflip``, ``use_rot``, ``random_reverse`` and ``degradation``.
    """

    clips: Sequence[TrainingClip] = field(init=False, repr=False)
    sets: tuple[Mapping[str, Any], ...]

    def find(self) -> Sequence[TrainingClip]:
        """Make the sets; their clips together."""
        if not self.sets:
            raise OptionError("datasets.train.sets: list at least one set, e.g. [{type: ClipFolder, dataroot_gt: ...}]")
        made = [self._set(section, f"datasets.train.sets[{i}]") for i, section in enumerate(self.sets)]
        self._sets = [part for part, _ in made]
        self._odds = np.cumsum([weight for _, weight in made]) / sum(weight for _, weight in made)
        return [clip for part in self._sets for clip in part.clips]

    def prepare(self) -> None:
        """The sets have done it."""

    def __len__(self) -> int:
        """The number of different stretches of frames."""
        return sum(map(len, self._sets))

    def draw(self, rng: np.random.Generator) -> Sample:
        """A sample of one of the sets."""
        return self._sets[int(np.searchsorted(self._odds, rng.random(), side="right"))].draw(rng)

    def _set(self, section: Any, where: str) -> tuple[ClipCrops, float]:
        """One set and its weight."""
        component = parse(Component, section, where)
        arguments = dict(component.arguments)
        weight = parse(float, arguments.pop("weight", 1.0), f"{where}.weight")
        if weight <= 0:
            raise OptionError(f"{where}.weight: {weight:g} must be more than 0")
        shared = {f.name: getattr(self, f.name) for f in fields(ClipCrops) if f.name != "clips"}
        for key in ("scale", "time_scale", "num_frame", "gt_size", "skip_limit"):
            if arguments.get(key, shared[key]) != shared[key]:
                raise OptionError(f"{where}: {key!r} is the same for all sets: put it beside 'sets'")
        if arguments.get("degradation") is not None:  # so that its errors name this place
            arguments["degradation"] = make_degradation(arguments["degradation"], self.scale, f"{where}.degradation")
        sets = {name: kind for name, kind in DATASETS.items() if name != "Mixed"}
        return construct(sets, Component(component.type, {**shared, **arguments}), where), weight


DATASETS: dict[str, Callable[..., ClipCrops]] = {
    "ClipFolder": ClipFolder,
    "SampleClips": SampleClips,
    "Vimeo90K": Vimeo90K,
    "REDS": REDS,
    "REDSBlur": REDSBlur,
    "GoPro": GoPro,
    "DVD": DVD,
    "BSD": BSD,
    "Mixed": Mixed,
}


@dataclass(frozen=True)
class SampleNumbers(Sampler[int]):
    """The numbers of this process's samples for the iterations ``first`` .. ``last`` - 1.

    An iteration takes world_size * accumulate * batch consecutive numbers, so that two processes see together what
    one with twice the batch would see.
    """

    first: int
    last: int
    batch: int
    accumulate: int = 1

    def __iter__(self) -> Iterator[int]:
        """The numbers in order."""
        for part in range(self.first * self.accumulate, self.last * self.accumulate):
            start = (part * distributed.world_size() + distributed.rank()) * self.batch
            yield from range(start, start + self.batch)

    def __len__(self) -> int:
        """How many there are."""
        return (self.last - self.first) * self.batch * self.accumulate


def training_batches(
    samples: Samples, numbers: SampleNumbers, *, workers: int, seed: int, pin_memory: bool = False
) -> Iterator[dict[str, Any]]:
    """Batches of the samples of these numbers."""
    samples.seed = seed
    return iter(
        DataLoader(
            samples,
            numbers.batch,
            sampler=numbers,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_loop,
        )
    )


def _kept(
    samples: ClipCrops, name: str, gt: UInt8[Tensor, "t 3 H W"], lq: UInt8[Tensor, "t 3 h w"] | None = None
) -> StoredClip:
    """A clip in memory, with the low resolution that samples need: none where each degrades its own."""
    if samples.degradation is not None:
        return store_truth(name, gt, samples.scale)
    return store(name, gt, samples.scale, lq)


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C and Slurm signal every process at once; a worker that died of it would take the unsaved run along."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
