"""The demo: pictures, a video and figures from nothing but a network."""

import pytest
from tiny import ALONE, COMPACT, DEBLUR

from restore import demo
from restore.checkpoint import save_network
from restore.frames import open_clips, read_image


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"FRAMES": 7, "HEIGHT": 64, "WIDTH": 96, "SHOWN": (1, 4), "BLURRED_FRAMES": 4}.items():
        monkeypatch.setattr(demo, name, value)


def test_the_demo(tmp_path, capsys, tiny_stdan, ship):
    network, description = tiny_stdan
    save_network(tmp_path / "tiny.safetensors", network, description)
    assert demo.main(["-o", str(tmp_path / "demo"), "-m", str(tmp_path / "tiny.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "bicubic + average" in printed and "restored" in printed
    assert "no deblurring network ships yet" in printed and not (tmp_path / "demo" / "deblurred.png").exists()
    assert read_image(tmp_path / "demo" / "comparison.png").shape == (3, 2 * (64 + 24), 4 * 96)
    (video,) = open_clips(tmp_path / "demo" / "comparison.mp4")
    assert len(list(video)) == 7 and video.size == (64 + 24, 2 * 96)
    (inputs,) = open_clips(tmp_path / "demo" / "input")
    assert inputs.frame_names == ["00000000", "00000002", "00000004", "00000006"] and inputs.size == (16, 24)


def test_an_unknown_model(capsys):
    assert demo.main(["-m", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("restore.demo: error: nothing: neither a file nor a shipped model")


@pytest.mark.parametrize("arguments", [ALONE, DEBLUR], ids=["frame by frame", "all frames"])
def test_the_deblurring_picture(tmp_path, capsys, ship, arguments):
    """A fresh network changes nothing, so both rows have the figures of the blurred frames."""
    ship("tiny", COMPACT)
    ship("sharpener", arguments, task="deblur")
    assert demo.main(["-o", str(tmp_path / "demo"), "-m", "tiny"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("blurred", "sharp"))}
    assert rows["blurred"][-2:] == rows["sharpener"][-2:] and "RGB" in printed
    assert 15 < float(rows["blurred"][-2]) < 45, printed
    assert read_image(tmp_path / "demo" / "deblurred.png").shape == (3, 2 * (64 + 24), 3 * 96)


def test_a_network_for_something_else(capsys, ship):
    ship("tiny", COMPACT)
    ship("sharpener", ALONE, task="deblur")
    assert demo.main(["-m", "sharpener"]) == 2
    assert capsys.readouterr().err == (
        "restore.demo: error: task sr: sharpener is for deblur, sr is x4 in space, x2 in time; "
        "shipped models for sr: tiny\n"
    )
