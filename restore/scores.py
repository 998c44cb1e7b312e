"""Figures of frames and clips, their means, and the record of an evaluation as JSON holds it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from restore.checkpoint import replacing
from restore.conventions import matching_conventions
from restore.metrics import Metric

Which = Literal["all", "input", "synthesised"]
WHICH: tuple[Which, ...] = ("all", "input", "synthesised")


@dataclass(frozen=True)
class FrameScore:
    """Figures of one frame by the metrics' names; metrics of two frames have none for the first."""

    frame: int
    synthesised: bool
    values: dict[str, float]


@dataclass(frozen=True)
class ClipScore:
    """Figures of one clip by one method, and what it took: ``computed`` frames in ``seconds``."""

    clip: str
    method: str
    frames: list[FrameScore] = field(default_factory=list)
    seconds: float = 0.0
    computed: int = 0
    diagnosis: list[str] = field(default_factory=list)
    conventions: dict[str, float] = field(default_factory=dict)  # PSNR by other conventions, where asked for

    def mean(self, metric: str, which: Which = "all") -> float:
        """Mean over the frames asked for; frames equal to the truth have infinite PSNR and are left out."""
        return mean(self.values(metric, which))

    def values(self, metric: str, which: Which = "all") -> list[float]:
        """The metric's values on the frames asked for."""
        kept = [f for f in self.frames if which == "all" or f.synthesised == (which == "synthesised")]
        return [f.values[metric] for f in kept if metric in f.values]


def mean(values: Sequence[float]) -> float:
    """Mean of the finite ones; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def mean_over_clips(scores: Sequence[ClipScore], metric: str, which: Which = "all") -> float:
    """The published average of super-resolution: clips count alike, however long."""
    return mean([score.mean(metric, which) for score in scores])


def mean_over_frames(scores: Sequence[ClipScore], metric: str, which: Which = "all") -> float:
    """The average of some deblurring papers: frames count alike, so long clips count more."""
    return mean([value for score in scores for value in score.values(metric, which)])


def averages(scores: Sequence[ClipScore], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Means by method and kind of frame, over clips and over frames; kinds that do not occur are left out."""
    rows = []
    for method in methods_of(scores):
        mine = [score for score in scores if score.method == method]
        for which in WHICH:
            over_clips = {name: mean_over_clips(mine, name, which) for name in metrics}
            over_frames = {name: mean_over_frames(mine, name, which) for name in metrics}
            if any(math.isfinite(value) for value in over_clips.values()):
                rows.append({"method": method, "which": which, "values": over_clips, "over_frames": over_frames})
    return rows


def methods_of(scores: Sequence[ClipScore]) -> list[str]:
    """The methods, in order of their first appearance."""
    return list(dict.fromkeys(score.method for score in scores))


def infinite_clips(scores: Sequence[ClipScore]) -> dict[str, str]:
    """Clips that a method restores without any error, whose infinite PSNR no mean can hold: all-black ones."""
    found = {}
    for score in scores:
        values = score.values("psnr")
        if values and all(math.isinf(value) for value in values):
            found[score.clip] = "every frame equals the truth, PSNR is infinite (an all-black clip): not in the mean"
    return found


def as_record(
    scores: Sequence[ClipScore], metrics: Mapping[str, Metric], costs: Mapping[str, Mapping[str, Any]], **about: Any
) -> dict[str, Any]:
    """Everything about an evaluation, for JSON, tables and the report; values that are not finite are null.

    ``costs`` are what is known of a method beside its speed; ``about`` are set, protocol, command and the like.
    """
    methods = []
    for name in methods_of(scores):
        mine = [score for score in scores if score.method == name]
        computed = sum(score.computed for score in mine)
        ms = 1000 * sum(score.seconds for score in mine) / computed if computed else None
        methods.append({"name": name, **costs.get(name, {}), "ms_per_frame": ms})
    record = {
        **about,
        "metrics": [_described(name, metric) for name, metric in metrics.items()],
        "methods": methods,
        "clips": [
            {key: value for key, value in asdict(score).items() if key not in ("diagnosis", "conventions")}
            for score in scores
        ],
        "averages": averages(scores, list(metrics)),
        "diagnosis": _diagnosis(scores),
    }  # fmt: skip
    return _finite(record)


def _described(name: str, metric: Metric) -> dict[str, Any]:
    return {
        "name": name,
        "label": metric.label,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "digits": metric.digits,
        "description": metric.describe(),
    }


def claim_explained(scores: Sequence[ClipScore], claimed: float) -> list[str]:
    """For every method, which convention's mean over clips a claimed PSNR is."""
    lines = []
    for method in methods_of(scores):
        mine = [score.conventions for score in scores if score.method == method]
        figures = {name: mean([one[name] for one in mine]) for name in mine[0]}
        met = matching_conventions(figures, claimed)
        told = ", ".join(f"{name} {figures[name]:.2f} dB" for name in met or figures)
        what = f"is {told}" if met else f"is none of {told}"
        lines.append(f"{method}: the claimed {claimed:.2f} dB {what}")
    return lines


def _diagnosis(scores: Sequence[ClipScore]) -> list[str]:
    """What was found wrong with a method's results, by method and clip."""
    return [f"{score.method}, {score.clip}: {finding}" for score in scores for finding in score.diagnosis]


def _finite(tree: Any) -> Any:
    """The tree with null for what JSON cannot hold."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


@dataclass(frozen=True)
class SavedScores:
    """Figures of finished clips in a folder, so that an interrupted evaluation continues.

    They count only for the same ``fingerprint``: everything that they depend on.
    """

    folder: Path
    fingerprint: Mapping[str, Any]

    def load(self, clip: str, method: str) -> ClipScore | None:
        """What was saved for them, or None."""
        try:
            saved = json.loads(self._path(clip, method).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # not there yet, or cut off by a kill
        if saved["fingerprint"] != _plain(self.fingerprint):
            return None
        frames = [FrameScore(**frame) for frame in saved["score"].pop("frames")]
        return ClipScore(frames=frames, **saved["score"])

    def save(self, score: ClipScore) -> None:
        """Keep the figures of a finished clip."""
        record = {"fingerprint": _plain(self.fingerprint), "score": asdict(score)}
        with replacing(self._path(score.clip, score.method)) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")

    def _path(self, clip: str, method: str) -> Path:
        return self.folder / method.replace("/", "_") / f"{clip.replace('/', '_')}.json"


def _plain(tree: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(tree))
