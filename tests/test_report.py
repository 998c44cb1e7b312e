"""Reports: one file that holds all it shows, shows it exactly, and survives whatever a record says."""

import base64
import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import report_example as example
import torch
from report_example import Page

from restore import report
from restore.frames import read_image
from restore.report import write_report
from restore.report_charts import chart, ticks
from restore.report_pictures import clip_pictures, frames_to_show, strongest_window
from restore.report_record import Metric, read_record, spread, worst_frames
from restore.report_tables import listing_html, results_html, tiles_html
from restore.writers import FrameFolderWriter

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&${title}"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluation") / "images"


@pytest.fixture(scope="module")
def kept(images) -> dict[str, Any]:
    return example.record(images)


@pytest.fixture
def record(kept) -> dict[str, Any]:
    return copy.deepcopy(kept)


def written(tmp_path: Path, *records: dict[str, Any], title: str = "A report") -> Page:
    write_report(tmp_path / "report.html", records, title=title, command="make report")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def decoded(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/webp;base64")
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(data, validate=True), np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    return pixels[..., ::-1]


def pixels_of(images: Path, method: str, clip: str, frame: int) -> np.ndarray:
    return (read_image(images / method / clip / f"{frame:08d}.png") * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def page(kept, tmp_path_factory) -> Page:
    return written(tmp_path_factory.mktemp("report"), kept)


def test_everything_is_in_the_file(page):
    references = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert references and all(reference.startswith(("data:", "#")) for reference in references)
    assert "default-src 'none'" in next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    styles = "".join(data for element, data in page.raw if element == "style")
    assert "{" in styles and not re.search(r"url\(|@import|http", styles)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert all(link["href"][1:] in identifiers for link in page.all("a"))
    assert all(label["for"] in identifiers for label in page.all("label"))


def test_every_picture_decodes_and_has_a_text(page):
    pictures = page.all("img")
    assert all(picture["alt"] for picture in pictures)
    sizes = [decoded(picture["src"]).shape[:2] for picture in pictures]
    low = (example.HEIGHT // 4, example.WIDTH // 4)
    for picture, size in zip(pictures, sizes, strict=True):
        if "data-layer" in picture:
            assert size == (low if picture["data-layer"] == "input" else (example.HEIGHT, example.WIDTH))
    frames = {(picture["data-frame"], picture["data-layer"]) for picture in pictures if "data-layer" in picture}
    for frame in {frame for frame, _ in frames}:
        inputs = {"input"} if int(frame) % 2 == 0 else set()
        assert {layer for number, layer in frames if number == frame} >= {"0", "1", "truth"} | inputs


@pytest.mark.parametrize("clip", ["first", "second"])
def test_details_are_the_very_pixels(page, images, clip):
    found = 0
    for picture in page.all("img"):
        parts = re.fullmatch(rf"{clip}, (.+?), (?:Most|Largest).*frame (\d+), x (\d+), y (\d+)", picture["alt"])
        if not parts:
            continue
        label, frame, x, y = parts[1], *map(int, parts.groups()[1:])
        if label.startswith("Input"):
            frame -= frame % 2  # the input of a synthesised frame is the one before
            assert label == ("Input" if int(parts[2]) == frame else f"Input, frame {frame}")
            expected = pixels_of(images, "input", clip, frame)[y // 4 : y // 4 + 24, x // 4 : x // 4 + 32]
        else:
            name = "truth" if label == "Truth" else label
            expected = pixels_of(images, name, clip, frame)[y : y + 96, x : x + 128]
        np.testing.assert_array_equal(decoded(picture["src"]), expected)
        found += 1
    assert found == 2 * 4


def test_slices_stack_one_row_over_time(page, images):
    found = set()
    for picture in page.all("img"):
        parts = re.fullmatch(r"second, (.+?), Row (\d+), x (\d+) to (\d+), frames 0 to 8", picture["alt"])
        if parts:
            name, row, start, stop = parts[1].replace("Truth", "truth"), *map(int, parts.groups()[1:])
            rows = [pixels_of(images, name, "second", i)[row, start : stop + 1] for i in range(example.FRAMES)]
            np.testing.assert_array_equal(decoded(picture["src"]), np.stack(rows))
            found.add(name)
    assert found == {example.BASELINE, example.NETWORK, "truth"}


def test_what_is_shown_is_found_by_rule(record, tmp_path):
    """Texture in one place, an error in another, a row that flickers: each is found."""
    truth = torch.full((example.FRAMES, 3, 240, 320), 0.5)
    truth[:, :, 8:100:2, 176:300] = 0.6  # lines
    made = truth.clone()
    made[1::2, :, 170, :180] += 0.1  # flickers
    made[:, :, 200, :180] += 0.3  # stands still: wrong, but no flicker
    made[3, :, 120:210, 40:160] = 0.2
    for name, frames in {example.BASELINE: truth, example.NETWORK: made, "truth": truth}.items():
        with FrameFolderWriter(tmp_path / name / "first") as writer:
            for i, frame in enumerate(frames):
                writer.write(f"{i:08d}", frame)
    for frame in record["clips"][1]["frames"]:
        frame["values"]["psnr"] = 20.0 + (frame["frame"] != 3)
    read = read_record({**record, "images": str(tmp_path)})
    found = clip_pictures(read, read.clips[0], tmp_path, 10**6)
    texture, error = found.details
    assert texture.top <= 8 and 172 <= texture.left <= 176
    assert error.position == 3 and 112 <= error.top <= 120 and 32 <= error.left <= 40
    assert found.slices is not None and (found.slices.row, found.slices.left) == (170, 0)


def test_it_says_what_was_measured_and_how(page):
    for text in ("A report", "small", "×4 space · ×2 time · 2 clips · 2026-11-23 · torch 2.13", "Of motion.",
                 "Every second frame is the input.", "python test.py -opt options/small.yml", "make report", "shipped",
                 "1.02 M", "46.1", "0.750 better than bicubic + average", "9 frames, 4 of them synthesised",
                 "Worst frames of net"):  # fmt: skip
        assert text in page.text
    assert "Peak memory" not in page.text, "nothing is known of it"
    assert "Diagnosis" not in page.text


def test_names_cannot_break_out(record, tmp_path):
    text = json.dumps(record)
    for number, name in enumerate(("first", "net", "tof"), 1):
        text = text.replace(json.dumps(name), json.dumps(f"{HOSTILE}{number}"))
    words = dict.fromkeys(("set", "protocol", "command", "date", "version"), HOSTILE)
    lists = {"diagnosis": [HOSTILE], "left_out": [{"clip": HOSTILE, "reason": HOSTILE}]}
    hostile = {**json.loads(text), **words, **lists, "images": None}
    page = written(tmp_path, hostile, title=HOSTILE)
    assert not page.all("img")
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert [script.get("type") for script in page.all("script")] == ["application/json"] * 2 + [None]
    assert page.text.count(HOSTILE + "2") > 5 and page.texts.count(HOSTILE) > 5
    readings = next(data for element, data in page.raw if element == "script")
    assert "<" not in readings and HOSTILE + "3" in json.loads(readings)["values"]


def test_the_readings_are_json_of_the_figures(page, kept):
    first = json.loads(next(data for element, data in page.raw if element == "script"))
    assert first["frames"] == list(range(example.FRAMES))
    assert first["synthesised"] == [bool(i % 2) for i in range(example.FRAMES)]
    psnr = [frame["values"]["psnr"] for frame in kept["clips"][0]["frames"]]
    assert first["values"]["psnr"][0] == [f"{value:.3f}" for value in psnr]
    assert first["values"]["tof"][1][0] == "–", "the first frame has none"


def test_values_that_are_no_numbers(record, tmp_path):
    frames = record["clips"][1]["frames"]
    frames[2]["values"] = {"psnr": math.inf, "ssim": 1.0, "tof": None}
    frames[4]["values"]["psnr"] = math.nan
    record["averages"][1]["values"]["psnr"] = math.nan
    page = written(tmp_path, record)
    readings = json.loads(next(data for element, data in page.raw if element == "script"))["values"]["psnr"][1]
    assert (readings[2], readings[4]) == ("∞", "–")
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    read = read_record(record)
    finite = [frame["values"]["psnr"] for i, frame in enumerate(frames) if i not in (2, 4)]
    assert read.clips[0].mean(example.NETWORK, "psnr") == pytest.approx(np.mean(finite))
    assert not {2, 4} & set(worst_frames(read.clips[0], read.metrics[0], example.NETWORK))


def test_a_curve_breaks_where_there_is_no_value(record):
    record["clips"][1]["frames"][4]["values"]["psnr"] = None
    read = read_record(record)
    lines = re.findall(r'class="line" d="([^"]*)"', chart(read, read.clips[0], read.metrics[0]))
    assert [line.count("M") for line in lines] == [1, 2]
    assert [line.count("L") for line in lines] == [8, 6]
    for frame in record["clips"][0]["frames"] + record["clips"][1]["frames"]:
        frame["values"]["psnr"] = None
    read = read_record(record)
    assert "No finite value" in chart(read, read.clips[0], read.metrics[0])


@pytest.mark.parametrize("span", [(0, 1), (20.03, 21.4), (0.5441, 0.6611), (1e-4, 3e-4), (-3, 250)])
def test_ticks_are_round_and_inside(span):
    marks = ticks(*span)
    assert 2 <= len(marks) <= 9
    assert all(span[0] - 1e-9 <= mark <= span[1] + 1e-9 for mark in marks)
    step = marks[1] - marks[0]
    assert f"{step:.0e}"[0] in "125" and np.allclose(np.diff(marks), step)


def test_without_pictures(record, tmp_path):
    page = written(tmp_path, {**record, "images": None})
    assert page.text.count("No pictures of this clip. The evaluation kept no images.") == 2
    assert not page.all("img")
    assert len([plot for plot in page.all("figure") if plot.get("class") == "chart"]) == 2 * 3


@pytest.mark.parametrize("fault", ["missing", "damaged", "another size"])
def test_a_bad_picture_costs_its_clip_only(record, images, tmp_path, fault):
    copied = tmp_path / "images"
    for file in images.rglob("*.png"):
        target = copied / file.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    bad = copied / example.NETWORK / "second" / "00000003.png"
    bad.unlink()
    if fault == "damaged":
        bad.write_bytes(b"no image")
    elif fault == "another size":
        bad.symlink_to(images / "input" / "second" / "00000002.png")
    page = written(tmp_path, {**record, "images": "images"})  # relative: beside the report
    assert page.text.count("No pictures of this clip") == 1
    assert str(Path(example.NETWORK, "second", "00000003.png")) in page.text
    assert {picture["alt"].partition(",")[0] for picture in page.all("img")} == {"first"}


def test_without_inputs_the_rest_is_shown(record, images, tmp_path):
    for name in (example.BASELINE, example.NETWORK, "truth"):
        (tmp_path / name).symlink_to(images / name)
    page = written(tmp_path, {**record, "images": str(tmp_path)})
    assert page.all("img") and not any("nput" in picture["alt"] for picture in page.all("img"))


def test_deblurring_scores_its_input(record, images, tmp_path):
    """At scale 1 the baseline is the input: it is a method, no second picture beside it."""
    for name, source in (("input", example.BASELINE), (example.NETWORK, example.NETWORK), ("truth", "truth")):
        (tmp_path / name).symlink_to(images / source)
    text = json.dumps(record | {"images": str(tmp_path), "scale": 1}).replace(json.dumps(example.BASELINE), '"input"')
    page = written(tmp_path, json.loads(text))
    assert {image["data-layer"] for image in page.all("img") if "data-layer" in image} == {"0", "1", "truth"}
    assert all(decoded(image["src"]).shape[0] == example.HEIGHT for image in page.all("img") if "data-layer" in image)
    assert page.texts.count("Input") == 2 * 6  # a clip: tag, two choices, two details, slices


def test_whole_frames_keep_within_the_budget(record, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FILE_BUDGET", 1)
    page = written(tmp_path, record)
    shots = [picture for picture in page.all("img") if "data-frame" in picture]
    assert len({(picture["alt"].partition(",")[0], picture["data-frame"]) for picture in shots}) == 2


def test_the_best_is_marked(record):
    record["averages"][0]["values"]["ssim"] = 0.70001  # alike as printed
    html = results_html(read_record(record))
    assert re.findall(r'class="best">([^<]*)<', html) == ["25.750", "0.75"] * 3
    assert '<th scope="rowgroup" colspan="7">Synthesised frames' in html
    assert "as bicubic + average" in tiles_html(read_record(record))
    record["averages"] = [entry for entry in record["averages"] if entry["which"] == "all"]
    assert "Synthesised" not in results_html(read_record(record))


def test_a_single_method_has_no_baseline(record, tmp_path):
    record["methods"] = record["methods"][1:]
    page = written(tmp_path, record)
    assert "better than" not in page.text and "Least gain" not in page.text and 'class="best"' not in str(page.tags)
    assert {image["data-layer"] for image in page.all("img") if image.get("class") == "left"} == {"truth"}


def test_worst_frames_respect_the_direction(record):
    read = read_record(record)
    clip = read.clips[0]
    higher, lower = read.metrics[:2]
    ranked = worst_frames(clip, higher, example.NETWORK)
    values = clip.values[example.NETWORK, "psnr"]
    assert [values[i] for i in ranked] == sorted(values)
    assert worst_frames(clip, lower, example.NETWORK)[0] == max(
        range(1, 9), key=clip.values[example.NETWORK, "tof"].__getitem__
    )
    gains = [mine - other for mine, other in zip(values, clip.values[example.BASELINE, "psnr"], strict=True)]
    assert worst_frames(clip, higher, example.NETWORK, example.BASELINE)[0] == gains.index(min(gains))
    shown = frames_to_show(read, clip)
    assert "worst" in shown[ranked[0]] and "best" in shown[ranked[-1]]
    assert clip.synthesised[next(iter(shown))] is False


def test_many_clips_are_represented(record, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SHOWN_CLIPS", 3)
    template = record["clips"][:2]
    record["clips"] = []
    for n in range(9):
        for entry in copy.deepcopy(template):
            entry["clip"] = f"clip{n}"
            for frame in entry["frames"]:
                frame["values"]["psnr"] = 20 + (4 * n) % 9  # clip0 is the worst, clip1 in the middle, clip2 the best
            record["clips"].append(entry)
    page = written(tmp_path, {**record, "images": None})
    assert "Curves and pictures of 3 of 9 clips" in page.text
    assert [page.texts.count(f"clip{n}") for n in range(9)] == [3] * 3 + [1] * 6  # table, choice and section; table
    read = read_record(record)
    shown = spread(read.clips, read.metrics[0], example.NETWORK, 3)
    assert [clip.name for clip in shown] == ["clip0", "clip1", "clip2"]
    assert spread(read.clips, read.metrics[0], example.NETWORK, 9) == read.clips
    listing = listing_html(read, shown, "x")
    assert (listing.count("<tbody>"), listing.count("<a ")) == (9, 3)


def test_the_strongest_window():
    weights = torch.rand(20, 30, generator=torch.Generator().manual_seed(0))
    sums = {(y, x): float(weights[y : y + 7, x : x + 5].sum()) for y in range(14) for x in range(26)}
    assert strongest_window(weights, 7, 5) == max(sums, key=sums.__getitem__)
    assert strongest_window(weights, 20, 30) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": []}, "no metric or no method"),
        ({"scale": None}, "record of 'small': .* make it anew"),
        ({"clips": [{"clip": "a", "method": "b"}]}, "record of 'small': no 'frames'"),
    ],
)
def test_a_record_that_lacks_a_part(record, tmp_path, change, message):
    path = tmp_path / "report.html"
    path.write_text("the report before")
    with pytest.raises(ValueError, match=message):
        write_report(path, [{**record, **change}], title="t", command="c")
    with pytest.raises(ValueError, match="no record to report on"):
        write_report(path, [], title="t", command="c")
    assert path.read_text() == "the report before" and list(tmp_path.iterdir()) == [path]


def test_two_data_sets_on_one_page(record, tmp_path):
    page = written(tmp_path, {**record, "images": None}, {**record, "set": "other", "images": None})
    assert [link["href"] for link in page.all("a")][:2] == ["#set0", "#set1"]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_texts_of_values():
    metric = Metric("psnr", "PSNR", "dB", True, 2, "")
    assert [metric.text(value) for value in (1.005, -3.0, math.inf, math.nan)] == ["1.00", "−3.00", "∞", "–"]
