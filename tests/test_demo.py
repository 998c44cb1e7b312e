"""The demo: pictures, a video and figures from nothing but a network."""

from restore import demo
from restore.checkpoint import save_network
from restore.frames import open_clips, read_image


def test_the_demo(tmp_path, monkeypatch, capsys, tiny_stdan):
    monkeypatch.setattr(demo, "FRAMES", 7)
    monkeypatch.setattr(demo, "HEIGHT", 64)
    monkeypatch.setattr(demo, "WIDTH", 96)
    monkeypatch.setattr(demo, "SHOWN", (1, 4))
    network, description = tiny_stdan
    save_network(tmp_path / "tiny.safetensors", network, description)
    assert demo.main(["-o", str(tmp_path / "demo"), "-m", str(tmp_path / "tiny.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "bicubic + average" in printed and "restored" in printed
    assert read_image(tmp_path / "demo" / "comparison.png").shape == (3, 2 * (64 + 24), 4 * 96)
    (video,) = open_clips(tmp_path / "demo" / "comparison.mp4")
    assert len(list(video)) == 7 and video.size == (64 + 24, 2 * 96)
    (inputs,) = open_clips(tmp_path / "demo" / "input")
    assert inputs.frame_names == ["00000000", "00000002", "00000004", "00000006"] and inputs.size == (16, 24)


def test_an_unknown_model(capsys):
    assert demo.main(["-m", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("restore.demo: error: nothing: neither a file nor a shipped model")
