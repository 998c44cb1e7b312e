"""Training sets: random stretches and crops of clips, with the low-resolution input made on the fly.

A sample depends on the seed and its number alone, not on workers, processes or what was drawn before it, so a run
that continues at iteration n sees exactly what an uninterrupted one would have seen. `DATASETS` is the table from a
name in an options file to a class.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from restore.degrade import imresize, quantize
from restore.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip, open_clips
from restore.sample import sample_clip


class Sample(TypedDict):
    """One training pair: input (T, 3, h, w) and truth (U, 3, H, W), float RGB in [0, 1], and where it is from."""

    lq: Tensor
    gt: Tensor
    name: str


@dataclass(frozen=True)
class StoredClip:
    """A clip in memory, 8 bit: truth and the low resolution made from its whole frames."""

    name: str
    gt: UInt8[Tensor, "t 3 H W"]
    lq: UInt8[Tensor, "t 3 h w"]


class ClipCrops(Dataset[Sample]):
    """Augmented crops of clips held in memory.

    ``num_frame`` consecutive frames are the truth, every ``time_scale``-th of them the input; crops are uniform in
    position, aligned, and the same for all frames. ``use_hflip`` flips left-right, ``use_rot`` flips up-down and
    transposes, ``random_reverse`` runs time backwards, each with probability 1/2 (the published STDAN recipe).
    """

    def __init__(
        self,
        clips: Sequence[StoredClip],
        *,
        scale: int,
        time_scale: int,
        num_frame: int,
        gt_size: int,
        use_hflip: bool,
        use_rot: bool,
        random_reverse: bool,
    ) -> None:
        if gt_size % scale:
            raise ValueError(f"gt_size={gt_size} is not a multiple of scale={scale}")
        if (num_frame - 1) % time_scale:
            raise ValueError(f"num_frame={num_frame} is not a multiple of time_scale={time_scale} plus 1")
        self.clips = [clip for clip in clips if len(clip.gt) >= num_frame and min(clip.gt.shape[2:]) >= gt_size]
        if not self.clips:
            raise ValueError(f"no clip has {num_frame} frames of at least {gt_size}x{gt_size} pixels")
        self.scale, self.time_scale, self.num_frame, self.gt_size = scale, time_scale, num_frame, gt_size
        self.use_hflip, self.use_rot, self.random_reverse = use_hflip, use_rot, random_reverse
        # every stretch of frames is as likely as every other, whatever clip it is from
        self._stretches = np.cumsum([len(clip.gt) - num_frame + 1 for clip in self.clips])
        self.seed = 0

    def __len__(self) -> int:
        """The number of different stretches of frames."""
        return int(self._stretches[-1])

    def __getitem__(self, number: int) -> Sample:
        """The sample of this number; any number >= 0 is valid."""
        rng = np.random.default_rng((self.seed, number))
        stretch = int(rng.integers(len(self)))
        which = int(np.searchsorted(self._stretches, stretch, side="right"))
        clip = self.clips[which]
        start = stretch - (int(self._stretches[which - 1]) if which else 0)
        size = self.gt_size // self.scale
        top, left = (int(rng.integers(extent - size + 1)) for extent in clip.lq.shape[2:])
        frames = slice(start, start + self.num_frame)
        lq = clip.lq[frames, :, top : top + size, left : left + size]
        fine = [slice(self.scale * edge, self.scale * (edge + size)) for edge in (top, left)]
        lq, gt = self._augment(lq, clip.gt[frames, :, fine[0], fine[1]], rng)
        lq = lq[:: self.time_scale]
        return {"lq": lq.float() / 255, "gt": gt.float() / 255, "name": f"{clip.name}:{start}:{top},{left}"}

    def _augment(self, lq: Tensor, gt: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        reverse, flip_x, flip_y, transpose = rng.random(4) < 0.5
        both = [lq, gt]
        if self.random_reverse and reverse:
            both = [x.flip(0) for x in both]
        if self.use_hflip and flip_x:
            both = [x.flip(3) for x in both]
        if self.use_rot and flip_y:
            both = [x.flip(2) for x in both]
        if self.use_rot and transpose:
            both = [x.transpose(2, 3) for x in both]
        return both[0], both[1]


def clip_folder(
    *,
    dataroot_gt: str,
    scale: int = 4,
    time_scale: int = 2,
    num_frame: int = 7,
    gt_size: int = 128,
    use_hflip: bool = True,
    use_rot: bool = True,
    random_reverse: bool = True,
    exclude: tuple[str, ...] = (),
    max_frames: int = 300,
) -> ClipCrops:
    """The clips under a folder (video files or folders of frames, at any depth), decoded once into memory.

    ``exclude`` leaves clips out by name, for validation; ``max_frames`` is read of each. ValueError where the folder
    is missing or holds no clip that is long and large enough.
    """
    stored = [
        store(clip.name, torch.stack([_to_bytes(frame) for frame in islice(clip, max_frames)]), scale)
        for clip in find_clips(dataroot_gt, exclude)
    ]
    augmentation = {"use_hflip": use_hflip, "use_rot": use_rot, "random_reverse": random_reverse}
    try:
        return ClipCrops(
            stored, scale=scale, time_scale=time_scale, num_frame=num_frame, gt_size=gt_size, **augmentation
        )
    except ValueError as error:
        raise ValueError(f"{dataroot_gt}: {error}") from error


def sample_clips(
    *,
    clips: int = 8,
    frames: int = 31,
    height: int = 256,
    width: int = 448,
    scale: int = 4,
    time_scale: int = 2,
    num_frame: int = 7,
    gt_size: int = 128,
    use_hflip: bool = True,
    use_rot: bool = True,
    random_reverse: bool = True,
) -> ClipCrops:
    """The embedded sample clips of seeds 1, 2, ... (0 is kept for measuring): nothing to download."""
    stored = [
        store(f"sample{seed}", _to_bytes(sample_clip(frames, height, width, seed=seed)), scale)
        for seed in range(1, clips + 1)
    ]
    augmentation = {"use_hflip": use_hflip, "use_rot": use_rot, "random_reverse": random_reverse}
    return ClipCrops(stored, scale=scale, time_scale=time_scale, num_frame=num_frame, gt_size=gt_size, **augmentation)


DATASETS: dict[str, Callable[..., ClipCrops]] = {"ClipFolder": clip_folder, "SampleClips": sample_clips}


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
            f"{folder}: {what}; give a folder of clips (video files or folders of frames), "
            "or train without any download with options/sample.yml"
        )
    unknown = set(exclude) - {clip.name for clip in clips}
    if unknown:
        raise ValueError(f"{folder}: exclude names clips that are not there: {', '.join(sorted(unknown))}")
    return [clip for clip in clips if clip.name not in exclude]


def store(name: str, gt: UInt8[Tensor, "t 3 H W"], scale: int) -> StoredClip:
    """Keep a clip with its low resolution; sizes are cut to multiples of ``scale`` at the bottom and the right."""
    height, width = (extent // scale * scale for extent in gt.shape[2:])
    gt = gt[:, :, :height, :width].contiguous()
    lq = [quantize(imresize(frame.float() / 255, Fraction(1, scale))) for frame in gt]
    return StoredClip(name, gt, (torch.stack(lq) * 255).round().byte())


def training_batches(
    samples: ClipCrops, *, first: int, last: int, batch: int, workers: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Batches for the iterations ``first`` .. ``last`` - 1, each {"lq", "gt", "name"}."""
    samples.seed = seed
    numbers = range(first * batch, last * batch)
    return iter(DataLoader(samples, batch, sampler=numbers, num_workers=workers, drop_last=True))


def _to_bytes(frame: Float[Tensor, "*t 3 h w"]) -> UInt8[Tensor, "*t 3 h w"]:
    return (frame * 255).round().byte()
