"""Reports in a real browser: the slider moves, choices change pictures, nothing is fetched, a phone scrolls one way."""

import re
import shutil
from collections.abc import Iterator

import pytest
import report_example as example

from restore.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LONG = "a_clip_with_a_long_name_without_any_space_</script>_0123456789"


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.BrowserContext"]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_context(viewport={"width": 1280, "height": 800})
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    record = example.record(folder / "images")
    silent = {**record, "images": None, "set": LONG, "diagnosis": [LONG]}
    renamed = [{**entry, "clip": LONG} if entry["clip"] == "first" else entry for entry in record["clips"]]
    write_report(folder / "report.html", [record, {**silent, "clips": renamed}], title="Report", command="x " * 80)
    return (folder / "report.html").as_uri()


@pytest.fixture
def page(browser, address) -> Iterator["playwright.Page"]:
    """The report on a desktop; whatever it logs or fetches beyond itself fails the test."""
    page = browser.new_page()
    page.set_default_timeout(5000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if _foreign(request.url, address) else None)
    page.goto(address)
    yield page
    page.close()
    assert not complaints


def _foreign(url: str, address: str) -> bool:
    return not url.startswith("data:") and url.partition("#")[0] != address


def _split(page) -> float:
    """Where the left picture ends, as a share of the width, read off the picture itself."""
    clip = page.locator(".stage:visible img.left").evaluate("image => getComputedStyle(image).clipPath")
    return 1 - float(re.fullmatch(r"inset\(0px ([\d.]+)%? 0px 0px\)", clip)[1]) / 100


def _shown(page) -> list[str]:
    """What the two visible pictures are."""
    images = page.locator(".stage:visible img:visible")
    sides = images.evaluate_all("images => images.map(image => [image.className, image.alt])")
    return [alt for _, alt in sorted(sides)]


def test_every_picture_is_drawn(page):
    widths = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert set(widths) == {example.WIDTH // 4, example.WIDTH, 128, 32} and page.locator("img:visible").count() > 8


def test_the_slider_moves_by_mouse_and_by_keys(page):
    stage = page.locator(".stage:visible")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    assert _split(page) == pytest.approx(0.5)
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 50, steps=4)
    page.mouse.up()
    assert _split(page) == pytest.approx(0.2, abs=0.015)
    before = stage.screenshot()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    assert _split(page) == pytest.approx(0.5, abs=0.015)
    assert stage.screenshot() != before
    page.keyboard.press("End")
    assert _split(page) == 1
    handle = page.locator(".stage:visible .handle").bounding_box()
    assert handle["x"] == pytest.approx(box["x"] + box["width"], abs=2)


def test_what_is_left_of_the_split_is_the_left_picture(page):
    """With the same method on both sides nothing changes across the split; with others the left part alone does."""
    compare = page.locator(".compare:visible")
    compare.locator("[data-role=left]").select_option(label="net")
    page.add_style_tag(content=".handle, .tag { visibility: hidden }")
    box = compare.locator(".stage").bounding_box()
    halves = [
        {"x": box["x"], "y": box["y"], "width": box["width"] // 2 - 2, "height": box["height"]},
        {"x": box["x"] + box["width"] // 2 + 2, "y": box["y"], "width": box["width"] // 2 - 2, "height": box["height"]},
    ]
    page.mouse.move(0, 0)
    same = [page.screenshot(clip=half, full_page=True) for half in _on_page(page, halves)]
    compare.locator("[data-role=left]").select_option(label="Truth")
    other = [page.screenshot(clip=half, full_page=True) for half in _on_page(page, halves)]
    assert same[0] != other[0] and same[1] == other[1]


def _on_page(page, boxes):
    scrolled = page.evaluate("scrollY")
    return [{**box, "y": box["y"] + scrolled} for box in boxes]


def test_choices_change_the_pictures(page):
    compare = page.locator(".compare:visible")
    frame, left, right = (compare.locator(f"[data-role={role}]") for role in ("frame", "left", "right"))
    assert _shown(page)[0].endswith(example.BASELINE) and _shown(page)[1].endswith(example.NETWORK)
    left.select_option(label="Input")
    assert _shown(page)[0].endswith("Input")
    right.select_option(label="Truth")
    assert _shown(page)[1].endswith("Truth") and "Truth" in compare.locator(".tag.right").inner_text()
    made = frame.locator("option", has_text="synthesised").first.get_attribute("value")
    frame.select_option(value=made)
    assert _shown(page)[0] == f"first, frame {made}, {example.BASELINE}", "there is no input of a synthesised frame"
    assert left.locator("option", has_text="Input").is_disabled()
    assert compare.locator(".reading td").first.inner_text() != ""
    compare.get_by_role("button", name="Swap sides").click()
    assert _shown(page)[0].endswith("Truth")
    left.select_option(value="0")
    right.select_option(value="0")
    assert len(_shown(page)) == 1
    assert page.locator(".stage:visible img:visible").evaluate("image => getComputedStyle(image).clipPath") == "none"


def test_clips_are_chosen(page):
    first = page.locator(".set").first
    assert first.locator(".clip:visible h4 .name").all_text_contents() == ["first"]
    assert first.get_by_role("button", name="Previous clip").is_disabled()
    first.get_by_role("button", name="Next clip").click()
    assert first.locator(".clip:visible h4 .name").all_text_contents() == ["second"]
    assert all(alt.startswith("second") for alt in _shown(page))
    first.get_by_role("link", name="first", exact=True).click()
    assert all(alt.startswith("first") for alt in _shown(page))
    assert first.get_by_label("Clip", exact=True).input_value() == "set0-clip0"
    page.goto(f"{page.url.partition('#')[0]}#set0-clip1")
    page.reload()
    assert all(alt.startswith("second") for alt in _shown(page))


def test_a_worst_frame_is_compared_on_demand(page):
    button = page.locator(".worst:visible button").first
    button.click()
    assert _shown(page)[0].startswith(f"first, frame {button.inner_text().split()[-1]},")
    assert page.locator(".split:focus").count() == 1
    assert page.locator(".stage:visible").evaluate("stage => stage.getBoundingClientRect().top") > 0


def test_charts_read_out_frames(page):
    figure = page.locator(".chart:visible").first
    figure.scroll_into_view_if_needed()
    when, values = figure.locator(".when"), figure.locator(".legend b")
    means = values.all_inner_texts()
    box = figure.locator(".plot").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 3 / 8, box["y"] + 20)
    assert when.inner_text() == "frame 3, synthesised" and values.all_inner_texts() != means
    page.mouse.move(0, 0)
    assert (when.inner_text(), values.all_inner_texts()) == ("mean of the clip", means)
    figure.locator("input").focus()
    page.keyboard.press("End")
    assert when.inner_text() == "frame 8"
    spoken = figure.locator("input").get_attribute("aria-valuetext")
    assert spoken == f"frame 8: {example.BASELINE} {values.all_inner_texts()[0]}, net {values.all_inner_texts()[1]}"
    ring = figure.locator(".plot").evaluate("plot => getComputedStyle(plot).outlineStyle")
    assert ring == "solid"


def test_nothing_is_wider_than_the_screen(page):
    boxes = page.locator(".stage:visible, .chart:visible, .scroll:visible, .tiles div, select:visible")
    for width in (360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        edges = boxes.evaluate_all("boxes => boxes.map(box => box.getBoundingClientRect().right)")
        assert len(edges) > 15 and max(edges) <= width
    page.set_viewport_size({"width": 360, "height": 740})
    for button in page.get_by_role("button", name="Next clip").all():
        button.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_every_control_has_a_name_and_takes_the_keyboard(page):
    nameless = page.evaluate("""[...document.querySelectorAll('select, input, button')].filter(control =>
        !control.labels?.length && !control.getAttribute('aria-label') && !control.textContent.trim()).length""")
    assert nameless == 0
    for control in page.locator("select:visible, button:visible:not(:disabled), input[type=range]:visible").all():
        control.focus()
        assert control.evaluate("control => control === document.activeElement")


def test_the_command_is_copied(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    block = page.locator("footer .command")
    block.get_by_role("button", name="Copy").click()
    block.get_by_text("Copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "x " * 80


def test_printing_shows_every_clip(page):
    assert page.locator(".clip:visible").count() == 2  # one of each data set
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator(".clip:visible").count() == 4
    assert page.locator(".picker:visible, .copy:visible").count() == 0
    paper = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper')")
    assert paper == "#fcfcfb"


def test_text_has_contrast(page):
    """Text, quiet text, gains and curves against what they stand on (WCAG 2.2: 4.5 for text, 3 for graphics)."""
    texts, lines = ["ink", "quiet", "accent", "good", "bad"], [f"m{i}" for i in range(8)]
    names = [*texts, *lines, "paper", "raised", "sunk", "alarm"]
    read = "names => names.map(name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`))"
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours = dict(zip(names, page.evaluate(read, names), strict=True))
        for ground in ("paper", "raised"):
            assert all(_contrast(colours[text], colours[ground]) >= 4.5 for text in texts)
            assert all(_contrast(colours[line], colours[ground]) >= 3 for line in lines)
        assert all(_contrast(colours["ink"], colours[ground]) >= 4.5 for ground in ("sunk", "alarm"))


def _contrast(one: str, other: str) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    digits = colour.strip().removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
