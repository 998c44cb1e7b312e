"""Tables of a report: the averages, every clip, and the subject's averages in large print."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from restore.report_charts import colour
from restore.report_record import ClipFigures, Method, Metric, Record, spread

LISTED_CLIPS = 200  # in a table
TALL = 40  # rows; a longer table scrolls within its box

Figures = Mapping[tuple[str, str], float]  # by (method, metric)

_GROUPS = {"all": "All frames", "input": "Input frames", "synthesised": "Synthesised frames"}
_COSTS = {  # attribute of a method -> head and unit of its column
    "parameters": ("Parameters", ""), "gmac": ("GMAC", ""), "ms_per_frame": ("Time", "ms / frame"),
    "peak_mb": ("Peak memory", "MB"),
}  # fmt: skip


def tiles_html(record: Record) -> str:
    """The subject's averages in large print, with their gain over the baseline."""
    averages = record.averages.get("all", {})
    tiles = ""
    for metric in record.metrics:
        label = ", ".join(filter(None, (metric.label, metric.unit)))
        text = metric.text(averages.get((record.subject, metric.name), math.nan))
        tiles += f"<div><dt>{escape(label)}</dt><dd><b>{text}</b>{_gain(record, metric, averages)}</dd></div>"
    return f'<p class="subject">Averages of <b>{escape(record.subject)}</b></p><dl class="tiles">{tiles}</dl>'


def results_html(record: Record) -> str:
    """The averages over all, input and synthesised frames, with what each method costs where that is known."""
    groups = [(label, record.averages[which]) for which, label in _GROUPS.items() if which in record.averages]
    costs = [key for key in _COSTS if any(getattr(method, key) is not None for method in record.methods)]
    return f"<h3>Results</h3>{_table(record, 'Mean over frames, then clips', groups, costs)}"


def listing_html(record: Record, shown: Sequence[ClipFigures], ident: str) -> str:
    """The figures of every clip, with links to those ``shown``; of very many those that stand for the others."""
    links = {clip.name: f'<a href="#{ident}-clip{i}">{escape(clip.name)}</a>' for i, clip in enumerate(shown)}
    listed = spread(record.clips, record.metrics[0], record.subject, LISTED_CLIPS)
    note = ""
    if len(listed) < len(record.clips):
        note = f'<p class="quiet">{len(listed)} of {len(record.clips)} clips, from the worst to the best.</p>'
    groups = [
        (links.get(clip.name, escape(clip.name)), {key: clip.mean(*key) for key in clip.values}) for clip in listed
    ]
    return f"<h3>Clips</h3>{note}{_table(record, 'Mean over the frames of each clip', groups, [])}"


def _gain(record: Record, metric: Metric, averages: Figures) -> str:
    if record.baseline is None:
        return ""
    mine, other = (averages.get((name, metric.name), math.nan) for name in (record.subject, record.baseline))
    gain = metric.gain(mine, other)
    if not math.isfinite(gain):
        return ""
    size, kind = metric.text(abs(gain)), "better" if gain > 0 else "worse"
    if size == metric.text(0.0):
        return f"<small>as {escape(record.baseline)}</small>"
    return f'<small class="{kind}">{size} {kind} than {escape(record.baseline)}</small>'


def _table(record: Record, caption: str, groups: Iterable[tuple[str, Figures]], costs: Sequence[str]) -> str:
    """Groups of rows under a label, which is HTML: a row a method, a column a metric; costs in the first group."""
    heads = "".join(_head(metric.label, metric.unit, metric.higher_is_better) for metric in record.metrics)
    heads += "".join(_head(*_COSTS[key]) for key in costs)
    columns, bodies, count = 1 + len(record.metrics) + len(costs), "", 0
    for label, figures in groups:
        rows = "".join(_row(record, i, figures, costs, shown=not count) for i in range(len(record.methods)))
        bodies += f'<tbody><tr class="group"><th scope="rowgroup" colspan="{columns}">{label}</th></tr>{rows}</tbody>'
        count += len(record.methods)
    return (
        f'<div class="scroll{" tall" * (count > TALL)}" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr><td></td>{heads}</tr></thead>{bodies}</table></div>"
    )


def _head(label: str, unit: str, higher_is_better: bool | None = None) -> str:
    """The head of a column, with an arrow where there is a better direction."""
    small = escape(unit)
    if higher_is_better is not None:
        way, word = ("↑", "higher") if higher_is_better else ("↓", "lower")
        small += f' <span aria-hidden="true">{way}</span><span class="unseen">{word} is better</span>'
    return f'<th scope="col">{escape(label)} <small>{small}</small></th>'


def _row(record: Record, index: int, figures: Figures, costs: Sequence[str], *, shown: bool) -> str:
    method = record.methods[index]
    cells = "".join(_cell(record, metric, method.name, figures) for metric in record.metrics)
    cells += "".join(f"<td>{_cost(method, key) if shown else ''}</td>" for key in costs)
    return f'<tr><th scope="row" {colour(index)}><i class="key"></i>{escape(method.name)}</th>{cells}</tr>'


def _cell(record: Record, metric: Metric, method: str, figures: Figures) -> str:
    """One figure; the best of its group, as printed, is marked unless all are alike."""
    values = {other.name: figures.get((other.name, metric.name), math.nan) for other in record.methods}
    known = {name: metric.gain(value, 0.0) for name, value in values.items() if not math.isnan(value)}
    texts = {name: metric.text(values[name]) for name in known}
    if method not in known:
        return f"<td>{metric.text(math.nan)}</td>"
    if texts[method] == texts[max(known, key=known.__getitem__)] and len(set(texts.values())) > 1:
        return f'<td class="best">{texts[method]}<span class="unseen"> best</span></td>'
    return f"<td>{texts[method]}</td>"


def _cost(method: Method, key: str) -> str:
    value: float | None = getattr(method, key)
    if value is None:
        return "–"
    if key == "parameters" and value >= 1e4:
        return f"{value / 1e6:.2f} M"
    return f"{value:.1f}" if value < 100 and value % 1 else f"{value:,.0f}"
