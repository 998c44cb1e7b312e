"""Scores of methods on ground-truth clips, by a protocol that is stated beside every figure (`restore.protocol`).

A clip is read window by window, every method restores each window, and its frames go to the metrics in order of time,
so memory does not grow with the length of a clip.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from restore.clip_sources import SampleError, TrainingClip
from restore.conventions import figures_by_convention
from restore.degrade import quantize
from restore.diagnose import LEAST_SIDE, diagnose
from restore.methods import Method
from restore.metric_table import METRICS
from restore.metrics import Metric
from restore.protocol import Protocol, Window
from restore.schema import Component, OptionError, construct
from restore.scores import ClipScore, FrameScore, mean
from restore.writers import write_image

log = logging.getLogger("restore")

TRUTH, INPUT = "truth", "input"  # names of saved images that are no method's


class MetricStream:
    """One metric over a clip that comes in parts: it sees the last frames of the part before, where it needs them."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.before: tuple[Tensor, Tensor] | None = None

    def add(self, restored: Float[Tensor, "t 3 H W"], truth: Float[Tensor, "t 3 H W"]) -> list[float | None]:
        """A value for each of these frames, which follow those of the last call; None where there are too few."""
        count = len(restored)
        if self.before is not None:
            restored, truth = (torch.cat(pair) for pair in zip(self.before, (restored, truth), strict=True))
        if self.metric.frames > 1:
            self.before = restored[1 - self.metric.frames :], truth[1 - self.metric.frames :]
        values = self.metric(restored, truth).tolist() if len(restored) >= self.metric.frames else []
        return [None] * (count - len(values)) + values


def evaluate(
    clips: Iterable[TrainingClip],
    protocol: Protocol,
    methods: Sequence[Method],
    metrics: Mapping[str, Metric],
    *,
    images: Path | None = None,
    diagnosing: bool = False,
    conventions: bool = False,
) -> Iterator[tuple[str, ClipScore | ValueError]]:
    """Clip after clip and method after method: the clip's name and figures, or what is wrong; the others go on."""
    for clip in clips:
        for method in methods:
            try:
                score = score_clip(
                    clip, protocol, method, metrics, images=images, diagnosing=diagnosing, conventions=conventions
                )
                yield clip.name, score
            except ValueError as error:
                yield clip.name, error


def check_methods(where: str, protocol: Protocol, methods: Sequence[Method]) -> None:
    """Raise ValueError for two methods of one name and for a network that does not restore what is asked for."""
    names = [method.name for method in methods]
    twice = {name for name in names if names.count(name) > 1 or name in (TRUTH, INPUT)}
    if twice:
        raise OptionError(f"two methods have the name {', '.join(sorted(twice))}; name results: --results NAME=FOLDER")
    for method in methods:
        network = method.network
        if network and (network.scale, network.time_scale) != (protocol.scale, protocol.time_scale):
            raise OptionError(
                f"{method.name} restores x{network.scale} in space and x{network.time_scale} in time, datasets.{where} "
                f"is x{protocol.scale} and x{protocol.time_scale}: set its scale and time_scale, or score them apart"
            )


def default_metrics(protocol: Protocol) -> dict[str, Metric]:
    """PSNR and SSIM as the protocol has them."""
    arguments = {"y_channel": protocol.color == "y", "crop_border": protocol.crop_border}
    return {name: METRICS[name](**arguments) for name in ("psnr", "ssim")}


def chosen_metrics(sections: Mapping[str, Component], protocol: Protocol) -> dict[str, Metric]:
    """The metrics of val.metrics by their names, or the protocol's."""
    made = {name: construct(METRICS, section, f"val.metrics.{name}") for name, section in sections.items()}
    return made or default_metrics(protocol)


def score_clip(
    clip: TrainingClip,
    protocol: Protocol,
    method: Method,
    metrics: Mapping[str, Metric],
    *,
    images: Path | None = None,
    diagnosing: bool = False,
    conventions: bool = False,
) -> ClipScore:
    """One method's figures on one clip; with ``images``, its results as <images>/<method>/<clip>/<frame>.png.

    ``diagnosing`` looks for classic mistakes, ``conventions`` adds PSNR by other conventions than the protocol's.

    Raises SampleError and other ValueErrors for a clip that is too short, cannot be read or has other results.
    """
    streams = {name: MetricStream(metric) for name, metric in metrics.items()}
    frames: list[FrameScore] = []
    seconds, computed = 0.0, 0
    findings: list[str] = []
    others: list[dict[str, float]] = []
    for window in protocol.windows(clip.count):
        truth = protocol.truth(clip, window.frames)
        lq = protocol.inputs(clip, window, truth)
        started = time.perf_counter()
        restored = method.restore(lq, clip.name, window).float()
        seconds += time.perf_counter() - started
        computed += len(restored)
        restored = quantize(_fitting(restored, truth, method, clip))
        if diagnosing and not window.start:
            findings = _findings(restored, truth, lq if protocol.given else None, protocol)
        kept = [frame - window.start for frame in window.fresh]
        if not kept:
            continue
        columns = {name: stream.add(restored[kept], truth[kept]) for name, stream in streams.items()}
        frames += _rows(protocol, window, columns)
        if conventions:
            others += [figures_by_convention(restored[i : i + 1], truth[i : i + 1]) for i in kept]
        if images:
            save_frames(images / method.name / clip.name, window.fresh, restored[kept])
    named = {name: mean([one[name] for one in others]) for name in (others[0] if others else ())}
    return ClipScore(clip.name, method.name, frames, seconds, computed, findings, named)


def score_frames(
    restored: Float[Tensor, "t 3 H W"],
    truth: Float[Tensor, "t 3 H W"],
    protocol: Protocol,
    metrics: Mapping[str, Metric],
) -> list[FrameScore]:
    """Figures of a whole clip at once, of which the first frame is an input."""
    columns = {name: MetricStream(metric).add(restored, truth) for name, metric in metrics.items()}
    return list(_rows(protocol, Window(0, len(truth), range(len(truth))), columns))


def _rows(protocol: Protocol, window: Window, columns: Mapping[str, Sequence[float | None]]) -> Iterator[FrameScore]:
    for i, frame in enumerate(window.fresh):
        values = {name: value for name, column in columns.items() if (value := column[i]) is not None}
        yield FrameScore(frame, protocol.synthesised(window, frame), values)


def _findings(restored: Tensor, truth: Tensor, lq: Tensor | None, protocol: Protocol) -> list[str]:
    """Classic mistakes that the first window shows; frames can be too small to tell."""
    if min(truth.shape[2:]) < LEAST_SIDE:
        return []
    return [finding.message for finding in diagnose(restored, truth, lq=lq, scale=protocol.scale)]


def _fitting(restored: Tensor, truth: Tensor, method: Method, clip: TrainingClip) -> Tensor:
    """The results, cut at the bottom and the right as the truth was; SampleError where they are of another size."""
    sizes = [tuple(x.shape[2:]) for x in (restored, truth)]
    (height, width), (true_height, true_width) = sizes
    if len(restored) != len(truth) or not (true_height <= height < true_height + 8) or not (
        true_width <= width < true_width + 8
    ):  # fmt: skip
        what = f"{method.name} gives {len(restored)} frames of {width}x{height}"
        raise SampleError(clip.name, f"{what}, the truth has {len(truth)} of {true_width}x{true_height}")
    return restored[..., :true_height, :true_width]


def save_truth(clip: TrainingClip, protocol: Protocol, images: Path) -> None:
    """True frames and inputs beside the results, for the report; what cannot be read has been told already."""
    try:
        for window in protocol.windows(clip.count):
            truth = protocol.truth(clip, window.frames)
            lq = protocol.inputs(clip, window, truth)
            kept = [frame - window.start for frame in window.fresh]
            save_frames(images / TRUTH / clip.name, window.fresh, truth[kept])
            given = [frame for frame in window.fresh if not protocol.synthesised(window, frame)]
            numbers = [(frame - window.start) // protocol.time_scale for frame in given]
            save_frames(images / INPUT / clip.name, given, lq[numbers])
    except ValueError as error:
        log.debug("%s: %s", clip.name, error)


def save_frames(folder: Path, numbers: Sequence[int], frames: Float[Tensor, "t 3 H W"]) -> None:
    """Frames by their number in the clip."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in zip(numbers, frames, strict=True):
        write_image(folder / f"{number:08d}.png", frame)

