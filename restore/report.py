"""Reports: the results of an evaluation as one HTML file that needs nothing else, neither network nor server.

Tables and curves are always there; pictures are where the evaluation wrote images, within `FILE_BUDGET`. The page is
complete without scripts, which only add the read-outs and hide all clips but one; every text of a record is escaped.
"""

import json
import string
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from restore.checkpoint import replacing
from restore.frames import ClipError
from restore.report_charts import chart
from restore.report_clip import pictures_html, worst_html
from restore.report_pictures import ClipPictures, clip_pictures
from restore.report_record import ClipFigures, Record, read_record, spread
from restore.report_tables import listing_html, results_html, tiles_html

PAGE = Path(__file__).with_name("report_page")  # page.html, page.css, page.js
FILE_BUDGET = 7_500_000  # characters of pictures in one file
SHOWN_CLIPS = 12  # with pictures and curves, of each data set


def write_report(path: Path, records: Sequence[Mapping[str, Any]], *, title: str, command: str) -> None:
    """Write the report on ``records``, one of each data set as JSON holds them, in place of what ``path`` held.

    ``images`` of a record is a folder, looked for beside ``path`` first if it is relative. ValueError for a record
    that lacks a part; a picture that is missing leaves out the pictures of its clip, and the page says so.
    """
    if not records:
        raise ValueError(f"{path}: no record to report on: score a data set first")
    read = [read_record(raw) for raw in records]
    shown = [spread(record.clips, record.metrics[0], record.subject, SHOWN_CLIPS) for record in read]
    budget = FILE_BUDGET // max(1, sum(map(len, shown)))
    links = "".join(f'<a href="#set{i}">{escape(record.name)}</a>' for i, record in enumerate(read))
    page = string.Template(_asset("page.html")).substitute(
        title=escape(title),
        style=_asset("page.css"),
        script=_asset("page.js"),
        contents=f'<nav aria-label="Data sets">{links}</nav>' if len(read) > 1 else "",
        sections="\n".join(
            _set_html(record, clips, f"set{i}", path.parent, budget)
            for i, (record, clips) in enumerate(zip(read, shown, strict=True))
        ),
        command=_command(
            command if command not in {record.command for record in read} else "", "This page was made by"
        ),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _asset(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _set_html(record: Record, clips: Sequence[ClipFigures], ident: str, beside: Path, budget: int) -> str:
    """The section of one data set; ``clips`` are those shown in detail."""
    facts = [
        f"×{record.scale} space" * (record.scale > 1),
        f"×{record.time_scale} time" * (record.time_scale > 1),
        _count(len(record.clips), "clip"),
        record.date,
        record.version,
    ]
    closer = "".join(
        _clip_html(record, clip, _pictures(record, clip, beside, budget), f"{ident}-clip{i}")
        for i, clip in enumerate(clips)
    )
    return (
        f'<section class="set" id="{ident}"><header><h2>{escape(record.name)}</h2>'
        f'<p class="facts">{" · ".join(escape(fact) for fact in facts if fact)}</p></header>'
        f"{_notices(record)}{tiles_html(record)}{results_html(record)}{listing_html(record, clips, ident)}"
        f"{_picker(record, clips, ident) if clips else ''}{closer}{_about(record)}</section>"
    )


def _pictures(record: Record, clip: ClipFigures, beside: Path, budget: int) -> ClipPictures | str:
    """The pictures of a clip, or why there are none."""
    if record.images is None:
        return "The evaluation kept no images."
    folder = next((place for place in (beside / record.images, record.images) if place.is_dir()), record.images)
    try:
        return clip_pictures(record, clip, folder, budget)
    except ClipError as error:
        return str(error)


def _notices(record: Record) -> str:
    """What must not be overlooked: the diagnosis, and clips that the averages do not hold."""
    notices = ""
    if record.diagnosis:
        lines = "".join(f"<li>{escape(line)}</li>" for line in record.diagnosis)
        notices += f'<div class="notice alarm"><h3>Diagnosis</h3><ul>{lines}</ul></div>'
    if record.left_out:
        lines = "".join(f"<li><b>{escape(clip)}</b>: {escape(reason)}</li>" for clip, reason in record.left_out)
        notices += f'<div class="notice"><h3>Left out of the averages</h3><ul>{lines}</ul></div>'
    return notices


def _picker(record: Record, clips: Sequence[ClipFigures], ident: str) -> str:
    """The choice of a clip, which the script shows; and what the choice leaves out."""
    head = '<h3 class="look">A closer look</h3>'
    if len(clips) < len(record.clips):
        head += (
            f'<p class="quiet">Curves and pictures of {len(clips)} of {len(record.clips)} clips, from the worst to the '
            f"best of {escape(record.subject)} by {escape(record.metrics[0].label)}.</p>"
        )
    if len(clips) < 2:
        return head
    options = "".join(f'<option value="{ident}-clip{i}">{escape(clip.name)}</option>' for i, clip in enumerate(clips))
    return (
        f'{head}<div class="picker"><label for="{ident}-pick">Clip</label><select id="{ident}-pick">{options}</select>'
        f'<button type="button" data-step="-1" aria-label="Previous clip">←</button>'
        f'<button type="button" data-step="1" aria-label="Next clip">→</button></div>'
    )


def _clip_html(record: Record, clip: ClipFigures, pictures: ClipPictures | str, ident: str) -> str:
    """All about one clip, with the texts that its charts read out as JSON."""
    facts, key = _count(len(clip.frames), "frame"), ""
    if any(clip.synthesised):
        facts += f", {sum(clip.synthesised)} of them synthesised"
        key = '<p class="quiet dots-key"><i class="dot"></i>input frame <i class="ring"></i>synthesised frame</p>'
    charts = "".join(chart(record, clip, metric) for metric in record.metrics)
    shots = {shot.position for shot in pictures.shots} if isinstance(pictures, ClipPictures) else set()
    before, after = pictures_html(record, clip, pictures, ident)
    return (
        f'<article class="clip" id="{ident}">'
        f'<h4><span class="name">{escape(clip.name)}</span> <small>{facts}</small></h4>'
        f'{before}<h5>Every frame</h5><div class="charts">{charts}</div>{key}{worst_html(record, clip, shots)}{after}'
        f'<script type="application/json">{_inline_json(_readings(record, clip))}</script></article>'
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _readings(record: Record, clip: ClipFigures) -> dict[str, Any]:
    """What the read-outs say: for each metric and method a text per frame."""
    names = [method.name for method in record.methods]
    values = {
        metric.name: [[metric.text(value) for value in clip.values[name, metric.name]] for name in names]
        for metric in record.metrics
    }
    return {"frames": clip.frames, "synthesised": clip.synthesised, "values": values}


def _inline_json(data: object) -> str:
    """JSON that cannot end the element that it stands in."""
    harmless = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}
    return json.dumps(data, allow_nan=False, separators=(",", ":")).translate(harmless)


def _about(record: Record) -> str:
    """Protocol, metrics, sources and the command, so that the figures can be made again."""
    terms = "".join(
        f"<dt>{escape(metric.label)}</dt><dd>{escape(metric.description)} "
        f"{'Higher' if metric.higher_is_better else 'Lower'} is better.</dd>"
        for metric in record.metrics
    )
    sources = "".join(
        f"<dt>{escape(method.name)}</dt><dd>{escape(method.source)}</dd>" for method in record.methods if method.source
    )
    return (
        f'<div class="about"><h3>How it was measured</h3><p>{escape(record.protocol)}</p><dl>{terms}</dl>'
        f"{f'<h4>Methods</h4><dl>{sources}</dl>' if sources else ''}"
        f"{_command(record.command, 'These figures were made by')}</div>"
    )


def _command(command: str, lead: str) -> str:
    if not command:
        return ""
    return (
        f'<div class="command"><p>{escape(lead)}</p><code>{escape(command)}</code>'
        f'<button type="button" class="copy">Copy</button><span role="status"></span></div>'
    )
