"""Evaluation: the published windows, the published baseline, the command line."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

import test as command
from restore.checkpoint import save_network
from restore.data import find_clips
from restore.evaluation import (
    BASELINE,
    FileTruth,
    MemoryTruth,
    bicubic_average,
    evaluate,
    mean_over_clips,
    protocol_windows,
    score_clip,
    table,
)
from restore.sample import sample_clip
from restore.writers import FrameFolderWriter

SHARED = Path(os.environ.get("RESTORE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.mark.parametrize(("length", "published"), [(41, 7), (34, 6), (49, 9), (47, 8), (7, 2), (31, 6)])
def test_windows_are_the_published_ones(length, published):
    windows = protocol_windows(length)
    repeated = (length - 7) % 6 == 0  # then the program's last window is one it has done already
    assert len(windows) == published - repeated
    assert all(len(window) == 7 for window in windows) and windows[-1].stop == length
    assert sorted({frame for window in windows for frame in window}) == list(range(length))
    assert [window.start for window in windows[:-1]] == [6 * i for i in range(len(windows) - 1)]


def test_a_clip_shorter_than_a_window():
    with pytest.raises(ValueError, match="6 frames, but the protocol needs windows of 7"):
        protocol_windows(6)


def test_first_result_wins_and_every_frame_counts_once():
    truth = MemoryTruth(sample_clip(10, 32, 32), "clip")
    calls = []

    def restore(lq: torch.Tensor) -> torch.Tensor:
        calls.append(len(lq))
        return torch.full((7, 3, 32, 32), 0.1 * len(calls))

    (score,) = score_clip(truth, {"constant": restore})
    assert calls == [4, 4]
    assert [f.frame for f in score.frames] == list(range(10))
    first = score_clip(MemoryTruth(truth.frames[:7], "clip"), {"c": lambda lq: torch.full((7, 3, 32, 32), 0.1)})[0]
    assert [f.psnr for f in score.frames[:7]] == [f.psnr for f in first.frames]
    # the last window starts at frame 3: there odd frames are inputs
    assert [f.synthesised for f in score.frames] == [False, True] * 3 + [False] + [False, True, False]


def test_perfect_frames_do_not_poison_the_mean():
    frames = sample_clip(7, 32, 32)

    def almost(lq: torch.Tensor) -> torch.Tensor:
        result = frames.clone()
        result[0] += 0.2
        return result

    (score,) = score_clip(MemoryTruth(frames, "clip"), {"almost": almost})
    assert math.isinf(score.frames[1].psnr) and math.isfinite(score.mean("psnr"))
    assert score.mean("psnr") == pytest.approx(score.frames[0].psnr)


def test_mean_over_clips_counts_clips_alike():
    frames = sample_clip(13, 32, 32)
    scores = [
        score_clip(MemoryTruth(frames[:n], str(n)), {BASELINE: bicubic_average})[0] for n in (7, 13)
    ]
    expected = (scores[0].mean("psnr") + scores[1].mean("psnr")) / 2
    assert mean_over_clips(scores, "psnr") == pytest.approx(expected)
    assert "input frames" in table(scores) and BASELINE in table(scores)


def test_the_others_go_on():
    good, short = MemoryTruth(sample_clip(7, 32, 32), "good"), MemoryTruth(sample_clip(5, 32, 32), "short")
    results = dict(evaluate([short, good], {BASELINE: bicubic_average}))
    assert isinstance(results["short"], ValueError) and isinstance(results["good"], list)


def test_the_baseline_on_vid4():
    """23.34 dB / 0.6158 over all of Vid4, measured with an independent implementation; here its shortest clip."""
    folder = SHARED / "data" / "eval" / "Vid4"
    if not folder.is_dir():
        pytest.skip(f"Vid4 is not at {folder}")
    (clip,) = (clip for clip in find_clips(str(folder)) if clip.name == "city")
    (score,) = score_clip(FileTruth(clip, "city"), {BASELINE: bicubic_average})
    assert score.mean("psnr") == pytest.approx(25.00, abs=0.01)
    assert score.mean("ssim") == pytest.approx(0.5877, abs=1e-4)


def options(folder: Path, **changes: str) -> list[str]:
    path = folder / "t.yml"
    path.write_text("name: t\ndatasets: {sample: {type: SampleTest, frames: 7, height: 32, width: 32}}\n")
    overrides = [argument for key, value in changes.items() for argument in ("--set", f"{key}={value}")]
    return ["-opt", str(path), *overrides]


def test_the_command(tmp_path, monkeypatch, capsys, tiny_stdan):
    monkeypatch.chdir(tmp_path)
    network, description = tiny_stdan
    save_network("tiny.safetensors", network, description)
    assert command.main(options(tmp_path, networks="[tiny.safetensors]")) == 0
    printed = capsys.readouterr().out
    assert "unrounded Y" in printed and "tiny" in printed and BASELINE in printed
    record = json.loads((tmp_path / "results" / "t" / "sample.json").read_text())
    assert "no border crop" in record["protocol"] and len(record["clips"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": "[nothing]"}, "nothing: neither a file nor a shipped model"),
        ({"baseline": "false"}, "nothing to score"),
        ({"datasets.sample.type": "Vid5"}, "unknown type 'Vid5'"),
        ({"datasets.sample": "{type: TestClips, dataroot_gt: nowhere}"}, "nowhere: no such folder"),
        ({"datasets.sample.frames": "5"}, "5 frames, but the protocol needs windows of 7"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    assert command.main(options(tmp_path, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_clips_are_chosen_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        with FrameFolderWriter(tmp_path / "set" / name) as writer:
            for i, frame in enumerate(sample_clip(7, 32, 32)):
                writer.write(str(i), frame)
    section = f"{{type: TestClips, dataroot_gt: {tmp_path}/set, clips: [b]}}"
    assert command.main(options(tmp_path, **{"datasets.sample": section})) == 0
    assert "\nb " in capsys.readouterr().out
