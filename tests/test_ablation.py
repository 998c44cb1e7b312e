"""The rows of the ablation: one file each, made by bench/ablation.py, all of which build, learn and fit their claim."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny import ROOT
from torch import Tensor

import train as command
from archs import ARCHS, STDANFreq
from bench.ablation import OFF, ROWS, SETTINGS, full_options, small_options
from restore.options import Options, load_options, parse
from restore.sample import sample_clip
from restore.writers import FrameFolderWriter

FILES = sorted((ROOT / "options" / "ablation").glob("*.yml"))
SMALL = (
    "channels=8", "embed_dim=8", "heads=1", "encoder_depths=[1]", "decoder_depths=[1]", "levels=1", "deform_groups=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def vimeo(tmp_path_factory):
    """A tree of Vimeo-90K's shape with two septuplets."""
    root = tmp_path_factory.mktemp("vimeo90k")
    for name in ("00001/0001", "00001/0002"):
        with FrameFolderWriter(root / "sequences" / name) as writer:
            for i, frame in enumerate(sample_clip(7, 64, 96), start=1):
                writer.write(f"im{i}", frame)
    (root / "sep_trainlist.txt").write_text("00001/0001\n00001/0002\n")
    return root


def test_the_files_are_what_the_script_writes():
    made = dict(full_options())
    assert {file.stem for file in FILES} == set(made)
    for file in FILES:
        assert yaml.safe_load(file.read_text()) == made[file.stem], f"{file.name}: run python -m bench.ablation --write"


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "A10_student"], ids=lambda file: file.stem)
def test_every_row_builds_and_learns(file, vimeo, capsys):
    """A dry run of each with few channels; the student needs the teacher's file, which its own tests make."""
    changes = [f"network_g.{key}" for key in SMALL]
    sizes = {"gt_size": 32, "batch_size_per_gpu": 1, "num_worker_per_gpu": 0, "dataroot_gt": vimeo}
    changes += ["device=cpu", *(f"datasets.train.{key}={value}" for key, value in sizes.items())]
    arguments = ["-opt", str(file), "--dry-run", *(word for change in changes for word in ("--set", change))]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "STDANFreq" in said or "Privileged" in said


def test_rows_are_what_they_are_called():
    networks = {file.stem: load_options(file).network_g for file in FILES}
    plain = networks["A0"]
    assert plain is not None and dict(plain.arguments) == OFF
    assert ARCHS["stdan_freq"](**plain.arguments, channels=8, embed_dim=8, heads=1, deform_groups=1).added
    whole = networks["A7"]
    assert whole is not None and whole.arguments["bands"] == "polar" and whole.arguments["prior"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_small_runs_differ_in_network_and_seed_alone(setting):
    start = Path("start.safetensors")
    runs = [small_options(row, setting, seed, 200, start) for row in ROWS for seed in range(2)]
    assert len({options["name"] for options in runs}) == len(runs)
    plain = parse(Options, runs[0], "")
    for options in runs:
        found = parse(Options, options, "")
        assert found.path.pretrain_network_g == str(start)
        assert found.train_set == plain.train_set and found.test_sets == plain.test_sets
        assert replace(found.train, param_groups=()) == replace(plain.train, param_groups=())


def test_all_small_runs_of_a_setting_load_the_weights_they_start_from():
    plain = {key: tensor.shape for key, tensor in _built(small_options("A0", "sharp", 0, 200, None)).items()}
    for row in ROWS:
        keys = {key: tensor.shape for key, tensor in _built(small_options(row, "sharp", 0, 200, Path("x"))).items()}
        assert plain.items() <= keys.items()
        assert all(key.startswith(STDANFreq.added) for key in keys.keys() - plain.keys())


def _built(options) -> dict[str, Tensor]:
    network = parse(Options, options, "").network_g
    return STDANFreq(**network.arguments).state_dict()
