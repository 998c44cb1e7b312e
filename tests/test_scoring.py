"""test.py: figures of several methods, tables and files, interrupted runs, several processes, bad input."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

import test as command
from restore.checkpoint import save_network
from restore.sample import sample_clip
from restore.tables import as_latex, as_text
from restore.writers import FrameFolderWriter

BASELINE = "bicubic + average"


def options(folder: Path, **changes: str) -> list[str]:
    path = folder / "t.yml"
    path.write_text("name: t\ndatasets: {sample: {type: SampleTest, frames: 7, height: 32, width: 32}}\n")
    overrides = [argument for key, value in changes.items() for argument in ("--set", f"{key}={value}")]
    return ["-opt", str(path), *overrides]


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_stdan) -> Path:
    monkeypatch.chdir(tmp_path)
    network, description = tiny_stdan
    save_network("tiny.safetensors", network, description)
    return tmp_path


@pytest.fixture
def clips(here) -> Path:
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        with FrameFolderWriter(here / "set" / name) as writer:
            for i, frame in enumerate(sample_clip(7, 32, 32, seed=seed)):
                writer.write(str(i), frame)
    return here / "set"


def record(here: Path, name: str = "sample") -> dict:
    return json.loads((here / "results" / "t" / f"{name}.json").read_text())


def test_the_command(here, capsys):
    assert command.main(options(here, networks="[tiny.safetensors]")) == 0
    printed = capsys.readouterr().out
    assert "unrounded Y" in printed and "tiny" in printed and BASELINE in printed
    made = record(here)
    assert "no border crop" in made["protocol"] and len(made["clips"]) == 2 and not made["left_out"]
    assert "test.py" in made["command"] and made["images"] is None
    (network,) = (method for method in made["methods"] if method["name"] == "tiny")
    assert network["parameters"] > 1000 and network["gmac"] > 0 and network["ms_per_frame"] > 0
    assert network["peak_mb"] is None or network["peak_mb"] > 50
    assert [row["which"] for row in made["averages"]] == ["all", "input", "synthesised"] * 2


def test_tables_hold_the_same_figures(here, capsys):
    assert command.main(options(here, networks="[tiny.safetensors]")) == 0
    made, folder = record(here), here / "results" / "t"
    rows = list(csv.DictReader((folder / "sample.csv").read_text().splitlines()))
    (average,) = (row for row in rows if row["clip"] == "mean over clips" and row["method"] == "tiny"
                  and row["frames"] == "all")  # fmt: skip
    expected = next(row for row in made["averages"] if row["method"] == "tiny")["values"]
    assert float(average["psnr"]) == expected["psnr"] and float(average["ssim"]) == expected["ssim"]
    frames = list(csv.DictReader((folder / "sample_frames.csv").read_text().splitlines()))
    assert len(frames) == 14 and frames[1]["synthesised"] == "True"
    latex, text = (folder / "sample.tex").read_text(), as_text(made)
    assert latex == as_latex(made) and latex.count(r"\textbf") == 2
    for table in (latex, text, capsys.readouterr().out):
        assert f"{expected['psnr']:.3f}" in table and f"{expected['ssim']:.4f}" in table


def test_latex_escapes(here):
    assert command.main(options(here)) == 0
    made = record(here)
    made["set"] = "100 % _of_ {it} & more"
    assert r"100 \% \_of\_ \{it\} \& more" in as_latex(made)


def test_other_metrics_by_name(here):
    metrics = "{rgb: {type: psnr, y_channel: false, crop_border: 4}, flicker: {type: flicker}}"
    assert command.main(options(here, **{"val.metrics": metrics})) == 0
    made = record(here)
    assert [metric["name"] for metric in made["metrics"]] == ["rgb", "flicker"]
    assert "crop" in made["metrics"][0]["description"]
    (clip,) = made["clips"]
    assert "flicker" not in clip["frames"][0]["values"] and "flicker" in clip["frames"][1]["values"]


def test_finished_clips_are_not_done_again(here, capsys, clips):
    section = {"datasets.sample": f"{{type: folder, dataroot_gt: {clips}}}"}
    assert command.main(options(here, **section)) == 0
    first = record(here)
    (here / "results" / "t" / "sample" / BASELINE / "b.json").write_text("{cut of")
    capsys.readouterr()
    assert command.main(options(here, **section)) == 0
    printed = capsys.readouterr().out
    assert f"b: {BASELINE}: " in printed and f"a: {BASELINE}: " not in printed
    assert record(here)["averages"] == first["averages"]
    # another protocol counts anew
    section["datasets.sample"] = f"{{type: folder, dataroot_gt: {clips}, crop_border: 4}}"
    assert command.main(options(here, **section)) == 0
    assert f"a: {BASELINE}: " in capsys.readouterr().out
    assert command.main([*options(here, **section), "--anew"]) == 0
    assert f"a: {BASELINE}: " in capsys.readouterr().out


def test_results_of_somebody_else_stand_beside(here, clips):
    section = {"datasets.sample": f"{{type: folder, dataroot_gt: {clips}}}"}
    assert command.main([*options(here, **section), "--results", f"theirs={clips}"]) == 0
    made = record(here)
    assert {clip["method"] for clip in made["clips"]} == {BASELINE, "theirs"}
    assert {row["clip"] for row in made["left_out"]} == {"a", "b", "c"}  # equal to the truth: infinite PSNR
    assert all(row["values"]["psnr"] is None for row in made["averages"] if row["method"] == "theirs")


def test_classic_mistakes_are_told(here, capsys):
    for root, planes in (("large", [0, 1, 2]), ("swapped", [2, 1, 0])):
        with FrameFolderWriter(here / root / "a") as writer:
            for i, frame in enumerate(sample_clip(7, 96, 96)):
                writer.write(str(i), frame[planes] * 0.99)
    section = {"datasets.sample": "{type: folder, dataroot_gt: large}"}
    assert command.main([*options(here, **section), "--results", "swapped"]) == 0
    assert any("swapped" in line and "red and blue" in line.lower() for line in record(here)["diagnosis"])
    assert "swapped, a: " in capsys.readouterr().out


def test_a_claimed_figure_is_explained(here, capsys):
    assert command.main([*options(here, **{"val.metrics": "{rgb: {type: psnr, y_channel: false}}"})]) == 0
    rgb = record(here)["averages"][0]["values"]["rgb"]
    assert command.main([*options(here), "--claimed", f"{rgb:.2f}"]) == 0
    assert f"{BASELINE}: the claimed {rgb:.2f} dB is PSNR of RGB" in capsys.readouterr().out
    assert command.main([*options(here), "--claimed", "60"]) == 0
    assert "the claimed 60.00 dB is none of PSNR-Y" in record(here)["diagnosis"][-1]


def test_damaged_clips_are_named_and_the_others_go_on(here, clips, capsys):
    (clips / "b" / "3.png").write_bytes(b"no image")
    section = {"datasets.sample": f"{{type: folder, dataroot_gt: {clips}}}"}
    assert command.main(options(here, **section)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "b/3.png" in error
    made = record(here)
    assert [clip["clip"] for clip in made["clips"]] == ["a", "c"]
    assert [row["clip"] for row in made["left_out"]] == ["b"]


def test_two_processes_share_the_clips(here, clips):
    section = {"datasets.sample": f"{{type: folder, dataroot_gt: {clips}}}"}
    assert command.main(options(here, **section)) == 0
    alone = record(here)
    arguments = [*options(here, **section), "--anew", "--launcher", "pytorch"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "test.py"), *arguments],
        capture_output=True, text=True, cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared = record(here)
    assert [clip["frames"] for clip in shared["clips"]] == [clip["frames"] for clip in alone["clips"]]
    assert done.stdout.count("mean over frames, then clips") == 1


def test_the_report(here):
    page = here / "page.html"
    assert command.main([*options(here, networks="[tiny.safetensors]"), "--report", str(page)]) == 0
    assert "tiny" in page.read_text() and BASELINE in page.read_text()
    images = here / "results" / "t" / "images" / "sample"
    assert {folder.name for folder in images.iterdir()} == {"truth", "input", "tiny", BASELINE}
    assert len(list((images / "truth" / "sample0").iterdir())) == 7
    assert len(list((images / "input" / "sample0").iterdir())) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": "[nothing]"}, "nothing: neither a file nor a shipped model"),
        ({"baseline": "false"}, "nothing to score"),
        ({"datasets.sample.type": "Vid5"}, "unknown type 'Vid5'"),
        ({"datasets.sample": "{type: TestClips, dataroot_gt: nowhere}"}, "nowhere: no such folder"),
        ({"datasets.sample.frames": "5"}, "5 frames, but the protocol needs windows of 7"),
        ({"val.metrics": "{x: {type: psnrr}}"}, "unknown type 'psnrr'"),
        ({"datasets.sample.window": "6"}, "window=6 must be a multiple"),
        ({"networks": "[tiny.safetensors, tiny.safetensors]"}, "two methods have the name tiny"),
    ],
)
def test_bad_input(here, capsys, changes, message):
    assert command.main(options(here, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_report_that_cannot_be_written(here, capsys):
    (here / "file").write_text("")
    assert command.main([*options(here), "--report", str(here / "file" / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("test.py: error: ") and error.count("\n") == 1
    assert record(here)["averages"], "the tables are there"


def test_clips_are_chosen_by_name(here, clips):
    section = {"datasets.sample": f"{{type: TestClips, dataroot_gt: {clips}, clips: [b]}}"}
    assert command.main(options(here, **section)) == 0
    assert [clip["clip"] for clip in record(here)["clips"]] == ["b"]
