"""Curves of a report: a metric over the frames of a clip, a line a method, drawn as inline SVG.

The drawing has no text and is stretched to whatever width the page gives; ticks, legend and read-out are HTML around
it, so that they keep their size on a phone.
"""

import math
from collections.abc import Sequence
from html import escape

from restore.report_record import ClipFigures, Metric, Record

HUES = 8  # colours of methods that the style sheet has
MARKED_FRAMES = 120  # in longer clips single frames would run into one another
_SIZE = 1000  # units of the drawing in both directions


def colour(index: int) -> str:
    """The style attribute that gives an element the colour of the method at ``index``."""
    return f'style="--c:var(--m{index % HUES})"'


def chart(record: Record, clip: ClipFigures, metric: Metric) -> str:
    """The figure of one metric on one clip; the page's script reads out its frames in the legend."""
    unit = f" <small>{escape(metric.unit)}</small>" if metric.unit else ""
    legend = "".join(
        f"<li {colour(i)}><i></i>{escape(method.name)} <b>{metric.text(clip.mean(method.name, metric.name))}</b></li>"
        for i, method in enumerate(record.methods)
    )
    label = escape(f"{metric.label} of {clip.name}, frame")
    return (
        f'<figure class="chart" data-metric="{escape(metric.name)}">'
        f"<figcaption><b>{escape(metric.label)}</b>{unit}"
        f' <span class="when" data-rest="mean of the clip">mean of the clip</span></figcaption>'
        f'<div class="plot">{_drawing(record, clip, metric)}<i class="cursor"></i>'
        f'<input type="range" min="0" max="{len(clip.frames) - 1}" value="0" aria-label="{label}"></div>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _drawing(record: Record, clip: ClipFigures, metric: Metric) -> str:
    curves = [clip.values[method.name, metric.name] for method in record.methods]
    finite = [value for curve in curves for value in curve if math.isfinite(value)]
    if not finite:
        return '<p class="quiet">No finite value.</p>'
    margin = 0.06 * (max(finite) - min(finite)) or max(abs(finite[0]) * 0.01, 1e-3)
    low, high = min(finite) - margin, max(finite) + margin
    levels, spots = ticks(low, high), sorted({round(spot) for spot in ticks(0, len(clip.frames) - 1, 6)})
    x = [_SIZE * (i / (len(clip.frames) - 1) if len(clip.frames) > 1 else 0.5) for i in range(len(clip.frames))]
    grid = "".join(f"M0 {_height(level, low, high):.1f}H{_SIZE}" for level in levels)
    lines = "".join(
        f"<g {colour(i)}>{_line(x, [_height(value, low, high) for value in curve], clip.synthesised)}</g>"
        for i, curve in enumerate(curves)
    )
    digits = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9)) if len(levels) > 1 else metric.digits
    return (
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{grid}"/>{lines}</svg>'
        + "".join(
            f'<span class="y" style="top:{_height(level, low, high) / _SIZE:.1%}">{level:.{digits}f}</span>'
            for level in levels
        )
        + "".join(f'<span class="x" style="left:{x[spot] / _SIZE:.1%}">{clip.frames[spot]}</span>' for spot in spots)
    )


def _height(value: float, low: float, high: float) -> float:
    """Distance from the top of the drawing; nan and infinite values stay what they are."""
    return _SIZE * (high - value) / (high - low)


def _line(x: Sequence[float], y: Sequence[float], synthesised: Sequence[bool]) -> str:
    """A polyline that breaks where there is no value; dots for input frames, rings for synthesised ones."""
    path, pen = "", "M"
    for i, height in enumerate(y):
        if math.isfinite(height):
            path += f"{pen}{x[i]:.1f} {height:.1f}"
        pen = "L" if math.isfinite(height) else "M"
    if len(x) > MARKED_FRAMES:
        return f'<path class="line" d="{path}"/>'
    at = [i for i, height in enumerate(y) if math.isfinite(height)]
    dots = "".join(f"M{x[i]:.1f} {y[i]:.1f}h0" for i in at)
    holes = "".join(f"M{x[i]:.1f} {y[i]:.1f}h0" for i in at if synthesised[i])
    return f'<path class="line" d="{path}"/><path class="dots" d="{dots}"/><path class="holes" d="{holes}"/>'
