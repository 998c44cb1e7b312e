"""Scores of networks on ground-truth clips, by a protocol that is stated beside every figure.

The published space-time protocol (STDAN's evaluation code): every second frame, reduced by MATLAB's bicubic and
rounded to 8 bit, is the input; windows of 7 frames with stride 6, then always the last 7; where windows overlap the
first result stays; sizes are padded with zeros to what the network needs; results are rounded to 8 bit and scored on
unrounded luma without a border crop; every frame counts, input and synthesised alike; the mean is over the frames of
a clip, then over clips.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from archs import VideoNet
from archs.layers.blocks import interleave
from restore.data import find_clips
from restore.degrade import imresize, quantize
from restore.device import resolve_precision
from restore.frames import Clip
from restore.metrics import psnr, ssim
from restore.sample import sample_clip
from restore.stream import restore_window
from restore.writers import write_image

log = logging.getLogger("restore")

Restorer = Callable[[Float[Tensor, "t 3 h w"]], Float[Tensor, "u 3 H W"]]
Which = Literal["all", "input", "synthesised"]

PROTOCOL = (
    "x{scale} space, x2 time; input: every 2nd frame, MATLAB bicubic, 8 bit; windows of 7 frames, stride 6, and the "
    "last 7, first result stays; zero padding; PSNR and SSIM on unrounded Y of 8-bit frames, no border crop; "
    "mean over frames, then clips"
)
WINDOW = 7
BASELINE = "bicubic + average"


@runtime_checkable
class TruthClip(Protocol):
    """A clip of true frames with random access."""

    @property
    def name(self) -> str:
        """Of the clip."""

    def length(self) -> int:
        """Number of frames."""

    def read(self, start: int, stop: int) -> Float[Tensor, "t 3 H W"]:
        """Frames start .. stop - 1, RGB in [0, 1]."""


@dataclass(frozen=True)
class FileTruth:
    """Ground truth from a folder of frames or a video file."""

    clip: Clip
    name: str

    def length(self) -> int:
        """Number of frames; a video is indexed once for it."""
        self.clip.read(0, 1)
        assert self.clip.count is not None
        return self.clip.count

    def read(self, start: int, stop: int) -> Float[Tensor, "t 3 H W"]:
        """Frames start .. stop - 1, RGB in [0, 1]."""
        return self.clip.read(start, stop)


@dataclass(frozen=True)
class MemoryTruth:
    """Ground truth in memory."""

    frames: Float[Tensor, "t 3 H W"]
    name: str

    def length(self) -> int:
        """Number of frames."""
        return len(self.frames)

    def read(self, start: int, stop: int) -> Float[Tensor, "t 3 H W"]:
        """Frames start .. stop - 1, RGB in [0, 1]."""
        return self.frames[start:stop]


def truth_clips(*, dataroot_gt: str, clips: tuple[str, ...] = ()) -> list[TruthClip]:
    """The clips under a folder, or those of them that ``clips`` names."""
    found = find_clips(dataroot_gt)
    unknown = set(clips) - {clip.name for clip in found}
    if unknown:
        names = ", ".join(clip.name for clip in found)
        raise ValueError(f"{dataroot_gt}: no clip {', '.join(sorted(unknown))}; there are {names}")
    return [FileTruth(clip, clip.name) for clip in found if not clips or clip.name in clips]


def sample_test(*, frames: int = 31, height: int = 256, width: int = 448, seed: int = 0) -> list[TruthClip]:
    """The embedded sample clip: nothing to download."""
    return [MemoryTruth(sample_clip(frames, height, width, seed=seed), f"sample{seed}")]


TEST_SETS: dict[str, Callable[..., list[TruthClip]]] = {"TestClips": truth_clips, "SampleTest": sample_test}


@dataclass(frozen=True)
class FrameScore:
    """Figures of one frame."""

    frame: int
    synthesised: bool
    psnr: float
    ssim: float


@dataclass(frozen=True)
class ClipScore:
    """Figures of one clip by one method."""

    clip: str
    method: str
    frames: list[FrameScore] = field(default_factory=list)
    seconds: float = 0.0

    def mean(self, metric: Literal["psnr", "ssim"], which: Which = "all") -> float:
        """Mean over the frames asked for; frames equal to the truth have infinite PSNR and are left out."""
        kept = [f for f in self.frames if which == "all" or f.synthesised == (which == "synthesised")]
        values = [getattr(f, metric) for f in kept if math.isfinite(f.psnr)]
        return fmean(values) if values else math.nan


def mean_over_clips(scores: Sequence[ClipScore], metric: Literal["psnr", "ssim"], which: Which = "all") -> float:
    """The protocol's average: clips count alike, however long."""
    values = [value for value in (score.mean(metric, which) for score in scores) if math.isfinite(value)]
    return fmean(values) if values else math.nan


def protocol_windows(length: int) -> list[range]:
    """Windows of 7 with stride 6 while they fit, then the last 7; the frames of a window are its range."""
    if length < WINDOW:
        raise ValueError(f"{length} frames, but the protocol needs windows of {WINDOW}")
    starts = list(range(0, length - WINDOW + 1, WINDOW - 1))
    if starts[-1] != length - WINDOW:  # the published program repeats it even then; the first result stays anyway
        starts.append(length - WINDOW)
    return [range(start, start + WINDOW) for start in starts]


def bicubic_average(lq: Float[Tensor, "t 3 h w"], scale: int = 4) -> Float[Tensor, "u 3 H W"]:
    """The baseline: MATLAB bicubic, and the mean of the two neighbours (before rounding) in between."""
    up = imresize(lq, scale)
    return interleave(up[None], ((up[:-1] + up[1:]) / 2)[None])[0]


def network_restorer(
    network: VideoNet, device: torch.device, *, tile: int | None = None, precision: str = "fp32"
) -> Restorer:
    """A network as the protocol runs it: through the streamer's window, with zero padding."""
    exact = resolve_precision(precision, device)

    def restore(lq: Tensor) -> Tensor:
        return restore_window(network, lq.to(device), tile=tile, padding="zero", precision=exact).cpu()

    return restore


def score_clip(
    truth: TruthClip, methods: Mapping[str, Restorer], *, scale: int = 4, images: Path | None = None
) -> list[ClipScore]:
    """Every method's figures on one clip; with ``images``, the results as <images>/<method>/<clip>/<frame>.png."""
    scores = {name: ClipScore(truth.name, name) for name in methods}
    seconds = dict.fromkeys(methods, 0.0)
    done: set[int] = set()
    folders = {name: images / name / truth.name for name in methods} if images else {}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for window in protocol_windows(truth.length()):
        gt = _whole_pixels(truth.read(window.start, window.stop), scale)
        lq = quantize(imresize(gt[::2], Fraction(1, scale)))
        fresh = [i for i, frame in enumerate(window) if frame not in done]
        done.update(window)
        for name, restore in methods.items():
            started = time.perf_counter()
            restored = quantize(restore(lq).float())
            seconds[name] += time.perf_counter() - started
            scores[name].frames.extend(score_frames(restored, gt, {i: window[i] for i in fresh}))
            for i in fresh if folders else ():
                write_image(folders[name] / f"{window[i]:08d}.png", restored[i])
    return [ClipScore(score.clip, score.method, score.frames, seconds[score.method]) for score in scores.values()]


def score_frames(
    restored: Float[Tensor, "t 3 H W"], truth: Float[Tensor, "t 3 H W"], numbers: Mapping[int, int]
) -> list[FrameScore]:
    """Figures of the frames that ``numbers`` maps to their number in the clip; the first frame is an input."""
    kept = list(numbers)
    figures = psnr(restored[kept], truth[kept]).tolist(), ssim(restored[kept], truth[kept]).tolist()
    return [FrameScore(numbers[i], bool(i % 2), *both) for i, *both in zip(kept, *figures, strict=True)]


def _whole_pixels(frames: Tensor, scale: int) -> Tensor:
    """Cut at the bottom and the right to a multiple of ``scale``, as data sets are prepared."""
    height, width = (extent // scale * scale for extent in frames.shape[2:])
    return frames[..., :height, :width]


def evaluate(
    clips: Iterable[TruthClip], methods: Mapping[str, Restorer], *, scale: int = 4, images: Path | None = None
) -> Iterator[tuple[str, list[ClipScore] | ValueError]]:
    """Clip after clip: its name and figures, or what is wrong with it; the others go on."""
    for clip in clips:
        try:
            yield clip.name, score_clip(clip, methods, scale=scale, images=images)
        except ValueError as error:
            yield clip.name, error


def table(scores: Sequence[ClipScore]) -> str:
    """The figures as text: a row a clip, PSNR-Y (dB) and SSIM-Y a method, then the averages."""
    methods = list(dict.fromkeys(score.method for score in scores))
    clips = list(dict.fromkeys(score.clip for score in scores))
    by = {(score.clip, score.method): score for score in scores}
    first = max(len(name) for name in [*clips, "synthesised frames"])
    lines = [" " * first + "  frames" + "".join(f"  {name:>17}" for name in methods)]
    for clip in clips:
        row = [by[clip, method] for method in methods]
        cells = [f"{score.mean('psnr'):9.3f} / {score.mean('ssim'):.4f}" for score in row]
        lines.append(f"{clip:<{first}}  {len(row[0].frames):6}" + "".join(f"  {cell:>17}" for cell in cells))
    rows: list[tuple[str, Which]] = [
        ("average", "all"), ("input frames", "input"), ("synthesised frames", "synthesised")
    ]  # fmt: skip
    for label, which in rows:
        cells = []
        for method in methods:
            mine = [by[clip, method] for clip in clips]
            cells.append(f"{mean_over_clips(mine, 'psnr', which):9.3f} / {mean_over_clips(mine, 'ssim', which):.4f}")
        lines.append(f"{label:<{first}}        " + "".join(f"  {cell:>17}" for cell in cells))
    return "\n".join(lines)


def as_record(scores: Sequence[ClipScore], scale: int) -> dict[str, object]:
    """The figures with their protocol, as JSON holds them."""
    return {"protocol": PROTOCOL.format(scale=scale), "clips": [asdict(score) for score in scores]}
