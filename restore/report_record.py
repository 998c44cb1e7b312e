"""The record of an evaluation run, as a report reads it: what was scored, by which metrics, on which frames.

A record is what JSON holds of one data set. The last method is the subject of a report, the first its baseline.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A figure that frames are scored by."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    digits: int
    description: str

    def text(self, value: float) -> str:
        """The value with the metric's digits; a dash where there is none."""
        if math.isnan(value):
            return "–"
        return f"{value:.{self.digits}f}".replace("inf", "∞").replace("-", "−")

    def gain(self, value: float, other: float) -> float:
        """By how much ``value`` is better than ``other``: positive for better, nan where that cannot be said."""
        return value - other if self.higher_is_better else other - value


@dataclass(frozen=True)
class Method:
    """Who was scored, and what it costs where that is known."""

    name: str
    parameters: float | None
    gmac: float | None
    ms_per_frame: float | None
    peak_mb: float | None
    source: str


@dataclass(frozen=True)
class ClipFigures:
    """The figures of one clip; ``values[method, metric]`` has one per frame, nan where there is none."""

    name: str
    frames: list[int]  # their numbers, ascending
    synthesised: list[bool]
    values: dict[tuple[str, str], list[float]]

    def mean(self, method: str, metric: str) -> float:
        """Mean over the frames with a finite figure (of a frame equal to the truth PSNR is infinite)."""
        return _finite_mean(self.values[method, metric])


@dataclass(frozen=True)
class Record:
    """The results on one data set."""

    name: str
    scale: int
    time_scale: int
    protocol: str
    command: str
    date: str
    version: str
    metrics: list[Metric]
    methods: list[Method]
    clips: list[ClipFigures]
    averages: dict[str, dict[tuple[str, str], float]]  # all, input, synthesised -> by (method, metric)
    left_out: list[tuple[str, str]]
    diagnosis: list[str]
    images: Path | None

    @property
    def subject(self) -> str:
        """The method that the report is about: the last one."""
        return self.methods[-1].name

    @property
    def baseline(self) -> str | None:
        """The method that it is measured against, the first one; None where there is no other."""
        return self.methods[0].name if len(self.methods) > 1 else None


def read_record(raw: Mapping[str, Any]) -> Record:
    """A record from what JSON holds of it. ValueError names what is missing or of the wrong kind."""
    try:
        metrics = [_metric(entry) for entry in raw["metrics"]]
        methods = [_method(entry) for entry in raw["methods"]]
        if not metrics or not methods:
            raise ValueError("no metric or no method: a report needs one of each at least")
        names = [method.name for method in methods]
        return Record(
            name=str(raw.get("title") or raw["set"]),
            scale=int(raw["scale"]),
            time_scale=int(raw["time_scale"]),
            **{key: str(raw.get(key) or "") for key in ("protocol", "command", "date", "version")},
            metrics=metrics,
            methods=methods,
            clips=_clips(raw["clips"], names, [metric.name for metric in metrics]),
            averages=_averages(raw["averages"], metrics),
            left_out=[(str(entry["clip"]), str(entry["reason"])) for entry in raw.get("left_out") or ()],
            diagnosis=[str(line) for line in raw.get("diagnosis") or ()],
            images=Path(raw["images"]) if raw.get("images") else None,
        )
    except KeyError as error:
        raise ValueError(f"record of '{raw.get('set', '?')}': no {error}: make it anew with test.py") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"record of '{raw.get('set', '?')}': {error}: make it anew with test.py") from error


def worst_frames(clip: ClipFigures, metric: Metric, method: str, against: str | None = None) -> list[int]:
    """Positions of the frames, the worst of ``method`` first: by its figure, or by its gain over ``against``."""
    mine = clip.values[method, metric.name]
    other = clip.values[against, metric.name] if against else [0.0] * len(mine)
    gains = [metric.gain(*pair) for pair in zip(mine, other, strict=True)]
    return sorted((i for i, gain in enumerate(gains) if math.isfinite(gain)), key=gains.__getitem__)


def spread(clips: Sequence[ClipFigures], metric: Metric, method: str, count: int) -> list[ClipFigures]:
    """At most ``count`` clips, from the worst to the best of ``method`` in equal steps of rank, in their order."""
    if len(clips) <= count:
        return list(clips)
    means = [metric.gain(clip.mean(method, metric.name), 0.0) for clip in clips]
    ranked = sorted(range(len(clips)), key=lambda i: -math.inf if math.isnan(means[i]) else means[i])
    kept = {ranked[round(step * (len(clips) - 1) / max(count - 1, 1))] for step in range(count)}
    return [clip for i, clip in enumerate(clips) if i in kept]


def _metric(raw: Mapping[str, Any]) -> Metric:
    return Metric(
        name=str(raw["name"]),
        label=str(raw["label"]),
        unit=str(raw.get("unit") or ""),
        higher_is_better=bool(raw["higher_is_better"]),
        digits=int(raw["digits"]),
        description=str(raw.get("description") or ""),
    )


def _method(raw: Mapping[str, Any]) -> Method:
    known = ("parameters", "gmac", "ms_per_frame", "peak_mb")
    costs = {key: None if raw.get(key) is None else float(raw[key]) for key in known}
    return Method(name=str(raw["name"]), source=str(raw.get("source") or ""), **costs)


def _clips(raw: Iterable[Mapping[str, Any]], methods: list[str], metrics: list[str]) -> list[ClipFigures]:
    """Entries of one clip and method each -> clips in the order in which they first occur."""
    frames: dict[str, dict[int, bool]] = {}
    found: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for entry in raw:
        clip, method = str(entry["clip"]), str(entry["method"])
        for frame in entry["frames"]:
            number = int(frame["frame"])
            frames.setdefault(clip, {})[number] = bool(frame["synthesised"])
            found[clip, method, number] = frame["values"]
    result = []
    for clip, kinds in frames.items():
        numbers = sorted(kinds)
        values = {
            (method, metric): [_number(found.get((clip, method, number), {}).get(metric)) for number in numbers]
            for method in methods
            for metric in metrics
        }
        result.append(ClipFigures(clip, numbers, [kinds[number] for number in numbers], values))
    return result


def _averages(raw: Iterable[Mapping[str, Any]], metrics: list[Metric]) -> dict[str, dict[tuple[str, str], float]]:
    result: dict[str, dict[tuple[str, str], float]] = {}
    for entry in raw:
        group = result.setdefault(str(entry["which"]), {})
        for metric in metrics:
            group[str(entry["method"]), metric.name] = _number(entry["values"].get(metric.name))
    return result


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite_mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan
