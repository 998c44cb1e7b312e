"""`python -m restore` with networks that keep the size, the frame rate or both."""

from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from test_restore_cli import folder, names, scene, sound
from tiny import ALONE, COMPACT, DEBLUR, HALF, HALF_RECURRENT, JOINT, awaken, seeded_clip

import restore.__main__ as cli
from archs import STDAN
from restore.checkpoint import load_network, save_network
from restore.frames import open_clips
from restore.stream import restore_clip
from restore.writers import VideoWriter

RATE = Fraction(30000, 1001)
SIZE = {"height": 40, "width": 72}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, ship):
    """Run the command where a network ships for each of three tasks: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name, arguments, task in (("all", DEBLUR, "deblur"), ("joint", COMPACT, "deblur+sr"), ("large", COMPACT, "sr")):
        path = ship(name, arguments, task=task)
        save_network(tmp_path / f"{name}.safetensors", awaken(load_network(path)), {"type": "stdan", **arguments})

    def command(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([*map(str, arguments), "--device", "cpu", "--fp32"])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def film(path: Path, count: int = 5) -> Path:
    source = sound(path.with_suffix(".wav"), float(count / RATE))
    with VideoWriter(path, RATE, codec="ffv1", audio_from=source) as writer:
        for frame in scene(count, **SIZE):
            writer.write(frame)
    return path


def test_frames_keep_names_and_size(run, tmp_path):
    """Every frame has its own restored one, as the streamer gives them, whatever its number and its format were."""
    source = folder(tmp_path / "in", 6, first=95, **SIZE)
    code, out, err = run(source, "-o", "out", "--task", "deblur", "-m", "all.safetensors", "--bits", 16)
    assert (code, err) == (0, "") and out.startswith("in: 6 frames 72x40 -> out, ")
    assert names(tmp_path / "out") == names(source)
    results = torch.stack(list(restore_clip(load_network("all.safetensors"), open_clips(source)[0])))
    assert (torch.stack(list(open_clips(tmp_path / "out")[0])) - results).abs().max() <= 0.51 / 65535
    assert not torch.equal(results, torch.stack(list(open_clips(source)[0])))


def test_a_video_keeps_rate_length_and_sound(run, tmp_path):
    source = film(tmp_path / "in.mkv")
    assert run(source, "-o", "out.mkv", "--task", "deblur", "--codec", "ffv1")[::2] == (0, "")
    rows = []
    for path in (source, tmp_path / "out.mkv"):
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            packets = b"".join(bytes(packet) for packet in container.demux(audio=0))
            rows.append((video.average_rate, video.width, video.height, container.duration, packets))
    assert rows[0] == rows[1] and rows[0][0] == RATE
    # a fresh network returns its input; 4:2:0 twice does not, at colours that jump
    before, after = (torch.stack(list(open_clips(path)[0])) for path in (source, tmp_path / "out.mkv"))
    assert before.shape == after.shape and (before - after).abs().mean() < 0.02


def test_tiles_and_a_budget(run, tmp_path):
    source = folder(tmp_path / "in", 4, **SIZE)
    code, out, err = run(source, "-o", "tiled", "--task", "deblur", "-t", 32, "--tile-overlap", 8)
    assert (code, err) == (0, "")
    frames = [torch.stack(list(open_clips(tmp_path / name)[0])) for name in ("in", "tiled")]
    assert torch.equal(*frames)  # fresh, a network changes nothing, and neither do seams
    code, out, err = run(source, "-o", "fitted", "--task", "deblur", "--max-memory", "64G")
    assert (code, err) == (0, "") and out.startswith("in: 4 frames at once, whole frames, about ")
    assert names(tmp_path / "fitted") == names(source)
    code, _, err = run(source, "-o", "none", "--task", "deblur", "--max-memory", "60M")
    assert code == 2 and "60M of memory is too little for frames of 72x40" in err


@pytest.mark.parametrize("arguments", [HALF, HALF_RECURRENT], ids=["attention", "recurrent"])
@pytest.mark.parametrize("tile", [None, 32])
def test_any_size_and_tiles_on_half_a_grid(arguments, tile):
    """Padding, windows and tiles of a fresh network leave every pixel as it was, but for the rounding of blends."""
    clip = seeded_clip(6, 3, 45, 79)
    results = list(restore_clip(STDAN(**arguments).eval(), clip, window=4, tile=tile, tile_overlap=8))
    assert (torch.stack(results) - clip).abs().max() < 1e-6


def test_the_joint_mode(run, tmp_path):
    source = folder(tmp_path / "in", 3)
    code, out, err = run(source, "-o", "out", "--task", "deblur+sr")
    assert (code, err) == (0, "") and out.startswith("in: 5 frames 72x48 -> out, ")
    assert names(tmp_path / "out")[:3] == ["00000004.png", "00000004_5.png", "00000005.png"]


@pytest.mark.parametrize("task", ["deblur", "upscale"])
def test_slow_motion_needs_a_network_that_makes_frames(run, tmp_path, task):
    folder(tmp_path / "in", 3, **SIZE)
    arguments = {**ALONE, "scale": 1 if task == "deblur" else 4}
    save_network(tmp_path / "net.safetensors", STDAN(**arguments), {"type": "stdan", **arguments})
    code, out, err = run("in", "-o", "out", "--task", task, "-m", "net.safetensors", "--slowmo", 2)
    assert (code, out) == (2, "")
    assert err == "restore: error: --slowmo 2, but STDAN makes no frames between those it is given: leave it out\n"
    assert run("in", "-o", "out", "--task", task, "-m", "net.safetensors", "--slowmo", 1)[0] == 0
    assert names(tmp_path / "out") == names(tmp_path / "in")


def test_frames_in_between_of_the_same_size(run, tmp_path):
    source = folder(tmp_path / "in", 3, **SIZE)
    save_network(tmp_path / "net.safetensors", STDAN(**JOINT), {"type": "stdan", **JOINT})
    code, out, _ = run(source, "-o", "out.mkv", "--task", "interpolate", "-m", "net.safetensors", "--codec", "ffv1")
    assert code == 0 and out.startswith("in: 5 frames 72x40 -> out.mkv")
    assert open_clips(tmp_path / "out.mkv")[0].fps == 50
