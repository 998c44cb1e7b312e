"""The record of an evaluation (`restore.scores.as_record`) as tables: on the console, CSV, LaTeX."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

KINDS = {"all": "", "input": "input frames", "synthesised": "synthesised frames"}
COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "gmac": ("GMAC/frame", lambda value: f"{value:.2f}"),
    "ms_per_frame": ("ms/frame", lambda value: f"{value:.1f}"),
    "peak_mb": ("peak MB", lambda value: f"{value:.0f}"),
}


def as_text(record: Record) -> str:
    """Two tables: methods with their averages and costs, then clips with the first metrics of every method."""
    return "\n\n".join([aligned(_averages(record)), aligned(_clips(record))])


def as_csv(record: Record) -> str:
    """A row for every clip and method and for every average, all metrics and costs."""
    names = [metric["name"] for metric in record["metrics"]]
    costs = {method["name"]: [method.get(key) for key in COSTS] for method in record["methods"]}
    rows: list[list[Any]] = [["set", "clip", "method", "frames", *names, *COSTS]]
    for clip in record["clips"]:
        values = clip_means(clip, names)
        rows.append([record["set"], clip["clip"], clip["method"], "all", *values, *costs[clip["method"]]])
    for row in record["averages"]:
        for over, key in (("mean over clips", "values"), ("mean over frames", "over_frames")):
            values = [row[key].get(name) for name in names]
            rows.append([record["set"], over, row["method"], row["which"], *values, *costs[row["method"]]])
    return written(rows)


def frames_csv(record: Record) -> str:
    """A row for every frame of every clip and method."""
    names = [metric["name"] for metric in record["metrics"]]
    rows: list[list[Any]] = [["set", "clip", "method", "frame", "synthesised", *names]]
    for clip in record["clips"]:
        for frame in clip["frames"]:
            values = [frame["values"].get(name) for name in names]
            rows.append([record["set"], clip["clip"], clip["method"], frame["frame"], frame["synthesised"], *values])
    return written(rows)


def as_latex(record: Record) -> str:
    """A booktabs table of the averages, the best of every metric bold, with the protocol as its caption."""
    metrics = record["metrics"]
    rows = {row["method"]: row["values"] for row in record["averages"] if row["which"] == "all"}
    best = {metric["name"]: _best(metric, rows.values()) for metric in metrics}
    heads = [_escaped(_head(metric)) + (r" $\uparrow$" if metric["higher_is_better"] else r" $\downarrow$")
             for metric in metrics]  # fmt: skip
    costs = {method["name"]: method for method in record["methods"]}
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(record['set'])}. {_escaped(record['protocol'])}.}}",
        rf"\begin{{tabular}}{{l{'r' * (len(metrics) + 2)}}}",
        r"\toprule",
        " & ".join(["Method", *heads, "Parameters", "ms/frame"]) + r" \\",
        r"\midrule",
    ]
    for method, values in rows.items():
        cells = [_bold(_figure(metric, values), values[metric["name"]] == best[metric["name"]]) for metric in metrics]
        spent = [_cost(costs[method], key) for key in ("parameters", "ms_per_frame")]
        lines.append(" & ".join([_escaped(method), *cells, *spent]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def clip_means(clip: Mapping[str, Any], names: Sequence[str]) -> list[float | None]:
    """Means over a clip's frames of the metrics ``names``; frames without a finite value are left out."""
    means = []
    for name in names:
        values = [frame["values"][name] for frame in clip["frames"] if frame["values"].get(name) is not None]
        means.append(sum(values) / len(values) if values else None)
    return means


def _averages(record: Record) -> list[list[str]]:
    metrics, costs = record["metrics"], {method["name"]: method for method in record["methods"]}
    shown = [key for key in COSTS if any(method.get(key) is not None for method in record["methods"])]
    rows = [[record["set"], *map(_head, metrics), *(COSTS[key][0] for key in shown)]]
    for row in record["averages"]:
        whole = row["which"] == "all"
        name = row["method"] if whole else "  " + KINDS[row["which"]]
        spent = [_cost(costs[row["method"]], key) if whole else "" for key in shown]
        rows.append([name, *(_figure(metric, row["values"]) for metric in metrics), *spent])
    return rows


def _clips(record: Record) -> list[list[str]]:
    metrics = record["metrics"][:2]
    names = [metric["name"] for metric in metrics]
    methods = [method["name"] for method in record["methods"]]
    by = {(clip["clip"], clip["method"]): clip for clip in record["clips"]}
    rows = [["clip", "frames", *methods]]
    for name in dict.fromkeys(clip["clip"] for clip in record["clips"]):
        cells, count = [], 0
        for method in methods:
            clip = by.get((name, method))
            if clip is None:
                cells.append("-")
                continue
            count = len(clip["frames"])
            values = dict(zip(names, clip_means(clip, names), strict=True))
            cells.append(" / ".join(_figure(metric, values) for metric in metrics))
        rows.append([name, str(count), *cells])
    return rows


def _head(metric: Mapping[str, Any]) -> str:
    return f"{metric['label']} {metric['unit']}".strip()


def _figure(metric: Mapping[str, Any], values: Mapping[str, float | None]) -> str:
    value = values.get(metric["name"])
    return "-" if value is None else f"{value:.{metric['digits']}f}"


def _cost(method: Mapping[str, Any], key: str) -> str:
    value = method.get(key)
    return "-" if value is None else COSTS[key][1](value)


def _best(metric: Mapping[str, Any], rows: Any) -> float | None:
    values = [row[metric["name"]] for row in rows if row.get(metric["name"]) is not None]
    return (max if metric["higher_is_better"] else min)(values) if values else None


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(
            zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip


def written(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _bold(text: str, best: bool) -> str:
    return rf"\textbf{{{text}}}" if best else text


def _escaped(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text
