"""A clip in a report: frames to compare with a slider, lossless details, the worst frames, slices through time."""

from collections.abc import Iterable, Set
from html import escape

from restore.report_charts import colour
from restore.report_pictures import INPUT, QUALITY, TRUTH, ClipPictures, Detail, Slices
from restore.report_record import ClipFigures, Metric, Record, worst_frames

WORST = 3  # frames in each list


def pictures_html(record: Record, clip: ClipFigures, pictures: ClipPictures | str, ident: str) -> tuple[str, str]:
    """What stands before the curves of a clip and what after; instead of pictures, the reason why there are none."""
    if isinstance(pictures, str):
        return f'<p class="notice">No pictures of this clip. {escape(pictures)}</p>', ""
    before = _comparison(record, clip, pictures, ident)
    details = "".join(_detail(record, clip, detail) for detail in pictures.details)
    after = f"<h5>Details</h5>{details}"
    if pictures.slices:
        after += f"<h5>Slices through time</h5>{_slices(record, clip, pictures.slices)}"
    return before, after


def worst_html(record: Record, clip: ClipFigures, shots: Set[int]) -> str:
    """The subject's worst frames by the first metric, and those with the least gain over the baseline."""
    metric = record.metrics[0]
    tables = _worst_table(record, clip, metric, None, shots)
    if record.baseline is not None:
        tables += _worst_table(record, clip, metric, record.baseline, shots)
    return f'<h5>Worst frames of {escape(record.subject)}</h5><div class="worst">{tables}</div>' if tables else ""


def _worst_table(record: Record, clip: ClipFigures, metric: Metric, against: str | None, shots: Set[int]) -> str:
    caption = f"Least gain over {against}" if against else "Furthest from the truth"
    heads = [record.subject, *([against, "gain"] if against else ["against its mean"])]
    mean = clip.mean(record.subject, metric.name)
    rows = ""
    for i in worst_frames(clip, metric, record.subject, against)[:WORST]:
        mine = clip.values[record.subject, metric.name][i]
        other = clip.values[against, metric.name][i] if against else mean
        gain = metric.gain(mine, other)
        figures = [metric.text(mine), *([metric.text(other)] if against else []), _signed(metric, gain)]
        number = str(clip.frames[i])
        if i in shots:
            hint = '<span class="unseen">compare frame </span>'
            number = f'<button type="button" data-show="{i}">{hint}{number}</button>'
        rows += (
            f'<tr><th scope="row">{_mark(clip, i)}{number}</th>'
            f"{''.join(f'<td>{figure}</td>' for figure in figures)}</tr>"
        )
    if not rows:
        return ""
    cells = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}, {escape(metric.label)}</caption>"
        f'<thead><tr><th scope="col">frame</th>{cells}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _signed(metric: Metric, gain: float) -> str:
    return metric.text(gain) if gain < 0 else f"+{metric.text(gain)}"


def _mark(clip: ClipFigures, position: int) -> str:
    """The dot or ring that the curves have, with a word for those who do not see it."""
    kind, word = ("ring", "synthesised frame ") if clip.synthesised[position] else ("dot", "frame ")
    return f'<i class="{kind}"></i><span class="unseen">{word}</span>' if any(clip.synthesised) else ""


def _comparison(record: Record, clip: ClipFigures, pictures: ClipPictures, ident: str) -> str:
    """Two pictures of a frame on top of each other with a slider between, and the choice of what they are."""
    first = pictures.shots[0]
    left, right = record.baseline or TRUTH, record.subject
    images = "".join(
        f'<img src="{uri}" data-frame="{shot.position}" data-layer="{_layer(record, name)}" decoding="sync"'
        f"{_side(shot.position == first.position, name, left, right)}"
        f' alt="{escape(f"{clip.name}, frame {clip.frames[shot.position]}, {_label(name)}")}">'
        for shot in pictures.shots
        for name, uri in shot.layers.items()
    )
    height, width = pictures.size
    shots = sorted(pictures.shots, key=lambda shot: shot.position)
    frames = [(str(shot.position), _shot_label(clip, shot.position, shot.why)) for shot in shots]
    names = dict.fromkeys(name for shot in pictures.shots for name in shot.layers)
    layers = [(_layer(record, name), _label(name)) for name in dict.fromkeys([INPUT, *_ours(record)]) if name in names]
    return (
        f'<h5>Compare</h5><div class="compare"><figure class="stage" style="--ratio:{width / height:.4f};'
        f'aspect-ratio:{width}/{height};--width:{width}px">{images}'
        f'<span class="tag left">{escape(_label(left))}</span><span class="tag right">{escape(_label(right))}</span>'
        f'<i class="handle"></i><input type="range" class="split" min="0" max="100" step="1" value="50" '
        f'aria-label="Share of the left picture, percent"></figure><div class="controls">'
        f"{_select(f'{ident}-frame', 'Frame', 'frame', frames, str(first.position))}"
        f"{_select(f'{ident}-left', 'Left', 'left', layers, _layer(record, left))}"
        f"{_select(f'{ident}-right', 'Right', 'right', layers, _layer(record, right))}"
        f'<button type="button" class="swap">Swap sides</button><div class="reading" aria-live="polite"></div>'
        f'<p class="quiet">Move the slider by mouse, touch or arrow keys. Pictures are WebP of quality {QUALITY}, '
        f"figures those of the originals.</p></div></div>"
    )


def _side(shown: bool, name: str, left: str, right: str) -> str:
    sides = {left: ' class="left"', right: ' class="right"'}
    return sides.get(name, "") if shown else ""


def _ours(record: Record) -> Iterable[str]:
    return [*(method.name for method in record.methods), TRUTH]


def _layer(record: Record, name: str) -> str:
    """The name by which the page's script knows a layer: the number of a method, truth or input."""
    names = [method.name for method in record.methods]
    return str(names.index(name)) if name in names else name


def _label(name: str) -> str:
    return {TRUTH: "Truth", INPUT: "Input"}.get(name, name)


def _shot_label(clip: ClipFigures, position: int, why: str) -> str:
    kind = ("synthesised, " if clip.synthesised[position] else "input, ") if any(clip.synthesised) else ""
    return f"{clip.frames[position]}: {kind}{why}"


def _select(ident: str, label: str, role: str, options: Iterable[tuple[str, str]], chosen: str) -> str:
    items = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(text)}</option>'
        for value, text in options
    )
    return f'<label for="{ident}">{label}</label><select id="{ident}" data-role="{role}">{items}</select>'


def _detail(record: Record, clip: ClipFigures, detail: Detail) -> str:
    kind = "synthesised frame" if clip.synthesised[detail.position] else "frame"
    where = f"{detail.why}: {kind} {clip.frames[detail.position]}, x {detail.left}, y {detail.top}"
    low = "Input" if detail.low_position == detail.position else f"Input, frame {clip.frames[detail.low_position]}"
    figures = _figures(record, clip, detail.layers, where, low)
    return (
        f'<p class="quiet">{escape(where)}</p><div class="strip" style="--shape:{detail.width}/{detail.height};'
        f'--columns:{len(detail.layers)}">{figures}</div>'
    )


def _slices(record: Record, clip: ClipFigures, slices: Slices) -> str:
    last = clip.frames[slices.count - 1]
    where = f"Row {slices.row}, x {slices.left} to {slices.left + slices.width - 1}, frames {clip.frames[0]} to {last}"
    stretch = max(1, min(4, round(100 / slices.count)))
    shape = f"{slices.width}/{slices.count * stretch}"
    return (
        f'<p class="quiet">{escape(where)}: one row of pixels of each frame, the first on top. Still things draw '
        f"vertical lines, motion slants them, flicker tears them sideways. It is the row whose change over time is "
        f"furthest from the truth’s with {escape(record.subject)}.</p>"
        f'<div class="strip wide" style="--shape:{shape};--columns:{len(slices.layers)}">'
        f"{_figures(record, clip, slices.layers, where)}</div>"
    )


def _figures(record: Record, clip: ClipFigures, layers: dict[str, str], where: str, low: str = "Input") -> str:
    names = list(_ours(record))
    figures = ""
    for name, uri in layers.items():
        label, key = low if name == INPUT and name not in names else _label(name), ""
        if name in names[:-1]:
            key = f'<i class="key" {colour(names.index(name))}></i>'
        figures += (
            f'<figure><img src="{uri}" alt="{escape(f"{clip.name}, {label}, {where}")}">'
            f"<figcaption>{key}{escape(label)}</figcaption></figure>"
        )
    return figures
