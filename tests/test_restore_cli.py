"""The command `python -m restore`, on real files with a tiny network."""

import os
import re
import subprocess
import sys
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tiny import run_python

import restore.__main__ as cli
from archs import STDAN
from restore.checkpoint import load_network, save_network
from restore.frames import natural_key, open_clips, read_image
from restore.jobs import names_between
from restore.stream import restore_clip
from restore.video import ClipError
from restore.writers import FrameFolderWriter, VideoWriter

ARGUMENTS = {
    "channels": 16, "embed_dim": 16, "heads": 2, "encoder_depths": (1,), "decoder_depths": (1,), "levels": 1,
    "deform_groups": 2, "skip": "bicubic", "motion_prior": "correlation",
}  # fmt: skip
HEIGHT, WIDTH = 12, 18


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_network(path, STDAN(**ARGUMENTS), {"type": "stdan", **ARGUMENTS}, summary="a tiny network", psnr_y=25.5)
    return str(path)


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capsys):
    """Run the command in `tmp_path`: (exit status, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, list[str]]:
        argv = [str(argument) for argument in arguments]
        code = cli.main([*([] if "-m" in argv else ["-m", weights]), "--device", "cpu", "--fp32", *argv])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return command


def scene(count: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (
        torch.stack([torch.stack([(x * 7 + n * 9) % 256, (y * 11) % 256, (x + y) * 5 % 256]) for n in range(count)])
        / 255
    )


def folder(path: Path, count: int = 3, first: int = 4, **size: int) -> Path:
    with FrameFolderWriter(path) as writer:
        for n, frame in enumerate(scene(count, **size), start=first):
            writer.write(f"{n:08d}", frame)
    return path


def sound(path: Path, seconds: float) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        for n in range(round(seconds * 8000 / 800)):
            samples = (8000 * np.sin(np.arange(n * 800, n * 800 + 800) / 5)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, n * 800, Fraction(1, 8000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def film(path: Path, count: int = 5, fps: int = 10, audio: bool = False, codec: str = "ffv1") -> Path:
    source = sound(path.with_suffix(".wav"), count / fps) if audio else None
    with VideoWriter(path, fps, codec=codec, audio_from=source) as writer:
        for frame in scene(count):
            writer.write(frame)
    if source:
        source.unlink()
    return path


def tree(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def audio_bytes(path: Path) -> bytes:
    with av.open(str(path)) as container:
        return b"".join(bytes(packet) for packet in container.demux(audio=0)) if container.streams.audio else b""


def seconds(path: Path) -> float:
    with av.open(str(path)) as container:
        return container.duration / av.time_base


def test_a_folder_of_frames(run, tmp_path, weights):
    source = folder(tmp_path / "calendar", 6)
    code, out, err = run(source, "-o", "out/x", "--bits", 16)
    assert (code, err) == (0, [])
    assert out.startswith("calendar: 11 frames 72x48 -> out/x, ")
    expected = ["4", "4_5", "5", "5_5", "6", "6_5", "7", "7_5", "8", "8_5", "9"]
    assert names(tmp_path / "out/x") == [f"0000000{name}.png" for name in expected]
    (clip,) = open_clips(tmp_path / "out/x")
    assert clip.frame_names == [f"0000000{name}" for name in expected]
    net = load_network(weights)
    results = list(restore_clip(net, open_clips(source)[0]))
    assert (torch.stack(list(clip)) - torch.stack(results)).abs().max() <= 0.51 / 65535


def test_only_the_frames_at_input_times(run, tmp_path):
    source = folder(tmp_path / "in")
    assert run("-i", source, "-o", "out", "--slowmo", 1, "--suffix", "jpg")[0] == 0
    assert names(tmp_path / "out") == ["00000004.jpg", "00000005.jpg", "00000006.jpg"]


def test_a_part_of_a_clip(run, tmp_path):
    source, video = folder(tmp_path / "in", 6), film(tmp_path / "a.mkv", audio=True)
    assert run(source, "-o", "out", "--start", 2, "--frames", 2)[0] == 0
    assert names(tmp_path / "out") == ["00000006.png", "00000006_5.png", "00000007.png"]
    assert run(video, "-o", "part", "--start", 2, "--frames", 2)[0] == 0
    assert names(tmp_path / "part") == ["00000004.png", "00000005.png", "00000006.png"]
    code, _, err = run(video, "-o", "part.mkv", "--frames", 2, "--codec", "ffv1")
    assert (code, len(err)) == (0, 1)
    assert "warning" in err[0] and "only a part" in err[0]
    assert len(list(open_clips(tmp_path / "part.mkv")[0])) == 4
    code, _, err = run(source, "-o", "none", "--start", 6)
    assert code == 2 and "6 frames: --start 6" in err[0]


def test_a_video_keeps_duration_and_audio(run, tmp_path):
    video = film(tmp_path / "a.mkv", audio=True)
    code, out, err = run(video, "-o", "b.mkv", "--codec", "ffv1")
    assert (code, err) == (0, [])
    assert out.startswith("a: 9 frames 72x48 -> b.mkv, ")
    (clip,) = open_clips(tmp_path / "b.mkv")
    frames = torch.stack(list(clip))
    assert clip.fps == 20
    assert len(frames) == 10
    assert torch.equal(frames[8], frames[9])  # the last frame stays for the time of an input frame
    assert seconds(video) == pytest.approx(0.5, abs=0.01)
    assert seconds(tmp_path / "b.mkv") == pytest.approx(0.5, abs=0.01)
    assert audio_bytes(tmp_path / "b.mkv") == audio_bytes(video) != b""
    assert run(video, "-o", "c.mkv", "--slowmo", 1, "--no-audio")[0] == 0
    (clip,) = open_clips(tmp_path / "c.mkv")
    assert (clip.fps, len(list(clip)), audio_bytes(clip.path)) == (10, 5, b"")


def test_another_frame_rate(run, tmp_path):
    video = film(tmp_path / "a.mkv", audio=True)
    code, _, err = run(video, "-o", "slow.mkv", "--fps", "10")
    assert (code, len(err)) == (0, 1)
    assert "audio, if any, is left out: --fps 10 changes the duration" in err[0]
    assert open_clips(tmp_path / "slow.mkv")[0].fps == 10
    assert audio_bytes(tmp_path / "slow.mkv") == b""
    assert run(video, "-o", "stretched.mkv", "--fps", "10", "--stretch-audio")[::2] == (0, [])
    assert audio_bytes(tmp_path / "stretched.mkv")
    assert seconds(tmp_path / "stretched.mkv") == pytest.approx(1, abs=0.1)
    assert run(folder(tmp_path / "in"), "-o", "in.mp4")[::2] == (0, [])
    assert open_clips(tmp_path / "in.mp4")[0].fps == 50


def test_videos_become_frames(run, tmp_path):
    assert run(film(tmp_path / "a.mkv", 3), "-o", "out")[0] == 0
    assert names(tmp_path / "out") == [f"0000000{n}.png" for n in range(5)]


def test_a_folder_of_clips(run, tmp_path):
    folder(tmp_path / "clips/one")
    film(tmp_path / "clips/two.mkv", 3)
    code, out, _ = run("clips", "-o", "out")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["one", "two"]
    assert len(names(tmp_path / "out/one")) == len(names(tmp_path / "out/two")) == 5
    assert run("clips", "-o", "videos", "--suffix", ".mp4")[0] == 0
    assert names(tmp_path / "videos") == ["one.mp4", "two.mp4"]
    (tmp_path / "clips/two.mkv").unlink()
    assert run("clips", "-o", "again")[0] == 0
    assert names(tmp_path / "again") == ["one"]


def test_a_bad_clip_does_not_stop_the_others(run, tmp_path):
    folder(tmp_path / "clips/a", 1)
    folder(tmp_path / "clips/b")
    write_odd_frame(folder(tmp_path / "clips/c", 6), "00000008")
    folder(tmp_path / "clips/d")
    code, out, err = run("clips", "-o", "out", "--window", 2)
    assert code == 2
    assert [line.split(":")[0] for line in out.splitlines()] == ["b", "d"]
    assert len(err) == 2
    assert "clips/a: 1 frame, but" in err[0] and "nothing was written" in err[0]
    assert "00000008.png" in err[1] and "the 7 finished frames stay in out/c" in err[1]
    assert names(tmp_path / "out") == ["b", "c", "d"]
    assert len(names(tmp_path / "out/c")) == 7


def write_odd_frame(path: Path, name: str) -> None:
    with FrameFolderWriter(path) as writer:
        writer.write(name, scene(1, 20, 20)[0])


def truncated(path: Path) -> Path:
    film(path, 40, codec="libx264")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


BAD = {
    "no such input": (lambda t: ["nowhere", "-o", "out"], "nowhere: no such file"),
    "no input": (lambda t: ["-o", "out"], "one INPUT"),
    "two inputs": (lambda t: ["in", "-i", "in", "-o", "out"], "one INPUT"),
    "no output": (lambda t: ["in"], "-o"),
    "single image": (lambda t: ["in/00000004.png", "-o", "out"], "single image"),
    "single frame": (lambda t: [folder(t / "single", 1), "-o", "out/x"], "single: 1 frame, .* at least 2"),
    "single frame, video": (lambda t: [folder(t / "single", 1), "-o", "out/x.mp4"], "single: 1 frame, .* at least 2"),
    "mixed sizes": (lambda t: [write_odd_frame(t / "in", "00000005"), "in", "-o", "out"][1:], "00000005.png: 20x20"),
    "no image": (lambda t: [(t / "in/00000004.png").write_text("x"), "in", "-o", "out"][1:], "00000004.png: not an im"),
    "truncated mkv": (lambda t: [truncated(t / "t.mkv"), "-o", "o.mkv"], "t.mkv: .*damaged.*; nothing was written"),
    "truncated mp4": (lambda t: [truncated(t / "t.mp4"), "-o", "out"], "t.mp4: .*damaged.*; nothing was written"),
    "text as video": (lambda t: [(t / "t.mp4").write_text("x"), "t.mp4", "-o", "out"][1:], "t.mp4: "),
    "unknown model": (lambda t: ["in", "-o", "out", "-m", "stdan_x"], "stdan_x: neither a file nor a shipped model"),
    "no weights": (lambda t: ["in", "-o", "out", "-m", "in/00000004.png"], "00000004.png: not a readable file"),
    "other weights": (lambda t: ["in", "-o", "out", "-m", foreign(t)], "f.pth: its keys belong to no network"),
    "unknown flag": (lambda t: ["in", "-o", "out", "--tle", 3], "--tle.*--help"),
    "no number": (lambda t: ["in", "-o", "out", "--tile", "big"], "--tile: 'big'"),
    "slowmo": (lambda t: ["in", "-o", "out", "--slowmo", 3], "--slowmo 3 .*1 or 2"),
    "no memory": (lambda t: ["in", "-o", "out", "--max-memory", "lots"], "--max-memory: 'lots' is no size .* 4G"),
    "window": (lambda t: ["in", "-o", "out", "--window", 1], "--window 1, .* at least 2"),
    "overlap in time": (lambda t: ["in", "-o", "out", "--temporal-overlap", 0], "--temporal-overlap 0 .* 1 to 3"),
    "overlap in space": (lambda t: ["in", "-o", "out", "-t", 16, "--tile-overlap", 16], "--tile-overlap 16 .* 0 to 15"),
    "precision": (lambda t: ["in", "-o", "out", "--precision", "fp8"], "--precision: .*fp8"),
    "two precisions": (lambda t: ["in", "-o", "out", "--half"], "--half: not allowed with"),
    "device": (lambda t: ["in", "-o", "out", "--device", "tpu"], "device tpu: .*auto, cpu"),
    "frame rate": (lambda t: ["in", "-o", "out.mp4", "--fps", "1/0"], "--fps: '1/0'"),
    "fps of frames": (lambda t: ["in", "-o", "out", "--fps", 25, "--crf", 3], "out: .* no --fps --crf"),
    "bits of a video": (lambda t: ["in", "-o", "out.mp4", "--bits", 16], "out.mp4: --bits .*--pix-fmt"),
    "bits of jpeg": (lambda t: ["in", "-o", "out", "--bits", 16, "--suffix", "jpg"], "out: no .jpg of 16 bits"),
    "image suffix": (lambda t: ["in", "-o", "out", "--suffix", "xcf"], "--suffix: .*'xcf'"),
    "output an image": (lambda t: ["in", "-o", "out.png"], "out.png: names an image"),
    "suffix of a video": (lambda t: ["in", "-o", "out.mp4", "--suffix", "png"], "out.mp4: .*--suffix"),
    "codec": (lambda t: ["in", "-o", "out.mp4", "--codec", "h999"], "out.mp4: no video encoder 'h999'"),
    "container": (lambda t: ["in", "-o", "out.webm", "--codec", "libx264"], "out.webm: libx264 does not go into"),
    "no codec": (lambda t: ["in", "-o", "out.flv"], "no default codec for '.flv'"),
    "crf": (lambda t: ["in", "-o", "out.mp4", "--crf", 99], "out.mp4: crf=99"),
    "audio flags": (lambda t: ["in", "-o", "o.mp4", "--no-audio", "--stretch-audio"], "--stretch-audio and --no-audio"),
    "many into one": (lambda t: [two(t), "-o", "out.mp4"], "out.mp4: one video cannot take the 2 clips of .*two"),
    "out is taken": (lambda t: ["in", "-o", folder(t / "taken")], "taken: exists and is not empty.*--overwrite"),
    "video is taken": (lambda t: ["in", "-o", film(t / "v.mkv")], "v.mkv: exists.*--overwrite"),
    "out is a file": (lambda t: ["in", "-o", text(t)], "note.txt: is a file"),
    "out below a file": (lambda t: ["in", "-o", text(t) / "a/b"], "b: cannot be written"),
    "video below a file": (lambda t: ["in", "-o", text(t) / "a.mp4"], "a.mp4: cannot be written"),
    "out is in": (lambda t: ["in", "-o", "in/", "--overwrite"], "in: is the input"),
    "out inside in": (lambda t: ["in", "-o", "in/out", "--overwrite"], "in/out: is inside the input"),
    "video onto itself": (lambda t: [film(t / "v.mkv"), "-o", "v.mkv", "--overwrite"], "v.mkv: is the input"),
}


def foreign(path: Path) -> Path:
    torch.save({"some.weight": torch.zeros(3)}, path / "f.pth")
    return path / "f.pth"


def two(path: Path) -> Path:
    folder(path / "two/a")
    return folder(path / "two/b").parent


def text(path: Path) -> Path:
    (path / "note.txt").write_text("x")
    return path / "note.txt"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, run, tmp_path):
    folder(tmp_path / "in", 3)
    make, says = BAD[case]
    arguments = make(tmp_path)
    before = tree(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2
    assert len(err) == 1, err
    assert err[0].startswith("restore: error: ")
    assert re.search(says, err[0]), err[0]
    assert out == ""
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_forbids_writing(run, tmp_path):
    folder(tmp_path / "in")
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = run("in", "-o", "locked/out")
    assert code == 2
    assert "locked/out: cannot be written" in err[0]


def test_overwriting(run, tmp_path):
    folder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    assert run("in", "-o", "out")[0] == 0  # an empty folder is no obstacle
    first = tree(tmp_path / "out")
    code, _, err = run("in", "-o", "out", "--overwrite", "--slowmo", 1)
    assert (code, len(err)) == (0, 1)
    assert "out: 2 older images, e.g. 00000004_5.png, remain" in err[0]
    assert tree(tmp_path / "out") == first
    film(tmp_path / "v.mp4", codec="libx264")
    assert run("in", "-o", "v.mp4", "--overwrite")[::2] == (0, [])
    assert open_clips(tmp_path / "v.mp4")[0].size == (4 * HEIGHT, 4 * WIDTH)


def test_a_failed_video_does_not_harm_the_old_one(run, tmp_path):
    write_odd_frame(folder(tmp_path / "in", 6), "00000009")
    old = film(tmp_path / "v.mkv").read_bytes()
    code, _, err = run("in", "-o", "v.mkv", "--overwrite", "--window", 2)
    assert code == 2
    assert err[0].endswith("nothing was written")
    assert (tmp_path / "v.mkv").read_bytes() == old
    assert names(tmp_path) == ["in", "v.mkv"]


def test_interruption(run, tmp_path, monkeypatch):
    folder(tmp_path / "in", 6)

    def interrupted(net, frames, **settings):
        yield from islice(restore_clip(net, frames, **settings), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "restore_clip", interrupted)
    code, _, err = run("in", "-o", "out")
    assert (code, len(err)) == (130, 1)
    assert err[0] == "restore: interrupted at in; the 3 finished frames stay in out"
    assert names(tmp_path / "out") == ["00000004.png", "00000004_5.png", "00000005.png"]
    assert all(read_image(file).shape == (3, 48, 72) for file in (tmp_path / "out").iterdir())
    code, _, err = run("in", "-o", "new/out.mp4")
    assert (code, err) == (130, ["restore: interrupted at in; nothing was written"])
    assert names(tmp_path) == ["in", "out"]


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: x")]


def test_out_of_memory_halves_the_tiles(run, tmp_path, monkeypatch):
    folder(tmp_path / "in", 2, height=34, width=40)
    assert run("in", "-o", "small", "--tile", 32)[0] == 0
    call = STDAN.forward

    def forward(net, clip):
        if max(clip.shape[-2:]) > 32:
            raise OUT_OF_MEMORY[0]
        return call(net, clip)

    monkeypatch.setattr(STDAN, "forward", forward)
    code, _, err = run("in", "-o", "out")
    assert (code, err) == (
        0, ["restore: warning: out of memory with tiles of 40 pixels, 2 frames at once: going on with 32"]
    )  # fmt: skip
    assert tree(tmp_path / "out") == tree(tmp_path / "small")
    code, _, err = run("in", "-o", "none", "--tile-overlap", 24)
    assert (code, len(err)) == (2, 1)
    assert err[0].startswith("restore: error: in: out of memory even with tiles of 40 pixels, 2 frames at once: use a")
    assert "smaller --window, or a smaller --tile-overlap" in err[0]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, MemoryError()])
def test_out_of_memory_elsewhere(run, tmp_path, monkeypatch, error):
    folder(tmp_path / "in")

    def exhausted(net, frames, **settings):
        yield from ()
        raise error

    monkeypatch.setattr(cli, "restore_clip", exhausted)
    code, _, err = run("in", "-o", "out")
    assert (code, len(err)) == (2, 1)
    assert "in: out of memory: use a smaller --window" in err[0]
    assert names(tmp_path) == ["in"]


def test_a_budget_of_memory(run, tmp_path):
    folder(tmp_path / "in")
    code, out, err = run("in", "-o", "out", "--max-memory", "64G", "--dry-run")
    assert (code, err) == (0, [])
    assert "in: 3 frames 18x12 -> 5 frames 72x48 in out; 4 frames at once, whole frames, about " in out
    code, out, err = run("in", "-o", "out", "--max-memory", "64G", "--window", 3, "--tile", 16, "--tile-overlap", 8)
    assert (code, err) == (0, [])
    assert out.startswith("in: 3 frames at once, tiles of 16 pixels, about ")
    assert run("in", "-o", "same", "--window", 3, "--tile", 16, "--tile-overlap", 8)[0] == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "same")
    code, out, err = run("in", "-o", "none", "--max-memory", "60M")
    assert (code, out, len(err)) == (2, "", 1)
    assert re.search(r"in: 60M of memory is too little for frames of 18x12: at least \d.* is needed; nothing", err[0])
    assert not (tmp_path / "none").exists()


def test_a_full_disk(run, tmp_path, monkeypatch):
    """What writers raise in their threads ends the command as if it had been raised here."""
    folder(tmp_path / "in", 8)
    write = FrameFolderWriter.write

    def full(writer, name, frame):
        if name >= "00000006":
            raise ClipError(f"{writer.folder}: cannot be written (No space left on device)")
        write(writer, name, frame)

    monkeypatch.setattr(FrameFolderWriter, "write", full)
    code, _, err = run("in", "-o", "out")
    assert (code, len(err)) == (2, 1)
    assert err[0].endswith("No space left on device); the 4 finished frames stay in out")
    assert names(tmp_path / "out") == ["00000004.png", "00000004_5.png", "00000005.png", "00000005_5.png"]


def test_bugs_are_not_hidden(run, tmp_path, monkeypatch):
    folder(tmp_path / "in")

    def broken(net, frames, **settings):
        yield from ()
        raise RuntimeError("shapes")

    monkeypatch.setattr(cli, "restore_clip", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run("in", "-o", "out")


def test_dry_run_writes_nothing(run, tmp_path):
    folder(tmp_path / "clips/a")
    film(tmp_path / "clips/b.mkv")
    before = tree(tmp_path)
    code, out, err = run("clips", "-o", "out", "--dry-run", "-t", 8, "--tile-overlap", 4)
    assert (code, err) == (0, [])
    assert "STDAN" in out and re.search("cpu, fp32; sampling by (cpp|torch)", out)
    assert "4 frames, 1 shared; tiles of 8 pixels, 4 shared" in out
    assert "a: 3 frames 18x12 -> 5 frames 72x48 in out/a\n" in out
    assert "b: about 5 frames 18x12 -> about 9 frames 72x48 in out/b\n" in out
    assert "10 frames 72x48 in b.mp4 at 20 frames/s" in run("clips/b.mkv", "-o", "b.mp4", "--dry-run")[1]
    assert tree(tmp_path) == before
    folder(tmp_path / "clips/c", 1)
    code, _, err = run("clips", "-o", "out", "--dry-run")
    assert (code, len(err)) == (2, 1)


def test_a_backend_that_is_not_here_is_refused(tmp_path, weights):
    folder(tmp_path / "in")
    arguments = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", weights, "--device", "cpu"]
    code = f"import restore.__main__ as cli; raise SystemExit(cli.main({arguments}))"
    done = run_python(code, RESTORE_DEFORM="triton", TRITON_INTERPRET="0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("restore: error: RESTORE_DEFORM=triton cannot be used on cpu: it is made for a GPU")
    assert not (tmp_path / "out").exists()


def test_a_shipped_model_by_name(run, tmp_path, ship):
    ship("tiny", ARGUMENTS)
    folder(tmp_path / "in")
    assert run("in", "-o", "out", "-m", "tiny")[0] == 0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("00000004", "00000005", "00000004_5"),
        ("00000004", "00000006", "00000004_5"),
        ("9", "10", "9_5"),
        ("1", "10", "1_5"),
        ("frame_9", "frame_11", "frame_9_5"),
        ("4", "4_5", "4_0_5"),
        ("4_5", "5", "4_5_5"),
        ("4", "4_10", "4_0_5"),
        ("a", "b", "a_5"),
    ],
)
def test_names_of_inserted_frames(before, after, expected):
    assert names_between(before, after, 1) == [expected]
    row = [before, expected, after]
    assert sorted(row, key=natural_key) == row
    if before + ".png" < after + ".png" and before != "1":  # letter by letter, nothing fits between 1 and 10
        assert sorted(name + ".png" for name in row) == [name + ".png" for name in row]


def test_names_of_several_inserted_frames():
    row = ["0004", *names_between("0004", "0005", 3), "0005"]
    assert all(a < b for a, b in pairwise(row))
    with pytest.raises(ClipError, match="'4' and '4_'"):
        names_between("4", "4_", 1)


def test_as_a_process(tmp_path, weights):
    folder(tmp_path / "in", 2)
    command = [sys.executable, "-m", "restore", "in", "-o", "out", "-m", weights, "--device", "cpu"]
    root = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("in: 3 frames 72x48 -> out, ")
    assert len(names(tmp_path / "out")) == 3
