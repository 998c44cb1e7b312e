"""Training: the loss falls, runs continue exactly, rates follow the published table, bad input is refused."""

import json
from pathlib import Path

import pytest
import torch
from runs import run, start, states, weights

import train as command
from restore.checkpoint import read_info
from restore.experiment import Experiment
from restore.losses import CharbonnierLoss
from restore.options import SchedulerOptions, load_options
from restore.schedule import learning_rate
from restore.training import prepared


def test_a_continued_run_equals_an_uninterrupted_one(options_file):
    whole = run(options_file, folder="whole")
    run(options_file, "train.total_iter=3", folder="parts")
    parts = run(options_file, folder="parts")
    for key, value in weights(whole, 6).items():
        assert torch.equal(value, weights(parts, 6)[key]), key


def test_what_a_run_leaves(options_file):
    folder = run(options_file)
    info = read_info(folder / "models" / "net_g_6.safetensors")
    assert info["iteration"] == 6 and info["network"]["type"] == "stdan"
    assert 10 < info["validation"]["val"]["psnr"] < 60
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if "loss" in r] == [2, 4, 6]
    assert {"lr", "grad_norm", "samples_per_s", "memory_mb"} <= records[0].keys()
    assert states(folder) == [3, 6]
    assert load_options(folder / "options.yml").name == "tiny"


def test_the_loss_falls(options_file):
    folder = run(options_file, "train.total_iter=40", "logger.print_freq=10", "val.val_freq=null")
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]


def test_other_options_in_the_same_folder(options_file, capsys):
    root = options_file.parent / "runs"
    assert command.main(["-opt", str(options_file), "--set", f"path.experiments={root}"]) == 0
    arguments = ["--set", "train.optim_g.lr=1e-2", "--set", "network_g.channels=16"]
    assert command.main(["-opt", str(options_file), "--set", f"path.experiments={root}", *arguments]) == 2
    error = capsys.readouterr().err
    assert "network_g.channels, train.optim_g.lr" in error and error.count("\n") == 1


def test_a_damaged_newest_state_falls_back(options_file):
    folder = run(options_file)
    newest = folder / "training_states" / "0000006.state"
    newest.write_bytes(newest.read_bytes()[:1000])
    state = Experiment(folder).latest_state(torch.device("cpu"))
    assert state is not None and state["iteration"] == 3


def test_a_killed_run_continues(options_file):
    """SIGKILL after the first state was written; the same command then gives the uninterrupted run's weights."""
    whole = run(options_file, "train.total_iter=9", folder="whole")
    root = options_file.parent / "killed"
    arguments = ["-opt", str(options_file), "--set", f"path.experiments={root}", "--set", "train.total_iter=9"]
    prelude = (
        "import os, signal; from restore.experiment import Experiment; save = Experiment.save_state\n"
        "def save_and_die(self, *a, **k):\n    save(self, *a, **k)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Experiment.save_state = save_and_die"
    )
    process = start(arguments, prelude=prelude)
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert states(root / "tiny") == [3]
    assert command.main(arguments) == 0
    for key, value in weights(root / "tiny", 9).items():
        assert torch.equal(value, weights(whole, 9)[key]), key


def test_bad_input_is_one_line(options_file, capsys):
    for override in (
        "datasets.train.dataroot_gt=x", "datasets.train.type=Vimeo", "train.pixel_opt={type: L3}", "scale=2",
        "device=tpu", "network_g.heads=3", "path.pretrain_network_g=nothing.pth",
        "datasets.val={type: vid4, dataroot_gt: nowhere}", "datasets.val.time_scale=1", "datasets.train.time_scale=1",
        "val.metrics={d: {type: pyiqa, metric: dists}}",
    ):  # fmt: skip
        assert command.main(["-opt", str(options_file), "--set", override]) == 2, override
        error = capsys.readouterr().err
        assert error.startswith("train.py: error: ") and error.count("\n") == 1, error
    assert not Path("experiments/tiny/models").exists()


def test_fine_tuning_starts_from_given_weights(options_file):
    first = run(options_file, folder="first")
    path = first / "models" / "net_g_6.safetensors"
    second = run(options_file, f"path.pretrain_network_g={path}", "train.optim_g.lr=0", folder="second")
    for key, value in weights(first, 6).items():
        assert torch.allclose(value, weights(second, 6)[key], atol=1e-6), key


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [
        (1, 2.0e-4), (1_000, 1.99978e-4), (37_500, 1.70725e-4), (75_000, 1.0005e-4), (112_500, 2.93747e-5),
        (149_999, 1.0000002e-7), (150_000, 2.0e-4), (225_000, 1.0005e-4), (299_999, 1.0000002e-7), (300_000, 2.0e-4),
        (600_000, 1e-7),
    ],
)  # fmt: skip
def test_the_published_schedule(iteration, rate):
    scheduler = SchedulerOptions("CosineAnnealingRestartLR", periods=(150_000,) * 4, eta_min=1e-7)
    assert learning_rate(iteration, 2e-4, scheduler) == pytest.approx(rate, rel=1e-5)


def test_other_schedules():
    steps = SchedulerOptions("MultiStepLR", milestones=(10, 20), gamma=0.1)
    assert [learning_rate(i, 1.0, steps) for i in (9, 10, 20)] == pytest.approx([1, 0.1, 0.01])
    assert [learning_rate(i, 1.0, SchedulerOptions(), 4) for i in (1, 4, 5)] == [0.25, 1.0, 1.0]


def test_charbonnier():
    a, b = torch.zeros(2, 3), torch.full((2, 3), 0.5)
    assert CharbonnierLoss()(a, b).item() == pytest.approx((0.25 + 1e-6) ** 0.5)
    assert CharbonnierLoss(reduction="sum", loss_weight=2.0)(a, a).item() == pytest.approx(2 * 6 * 1e-3)


def test_the_average_follows(options_file):
    run = prepared(load_options(options_file)).run
    assert run.average is not None
    run.iteration = 1000
    for parameter in run.network.parameters():
        parameter.data.add_(1)
    before = [parameter.clone() for parameter in run.average.parameters()]
    run.update_average(0.75)
    for old, new in zip(before, run.average.parameters(), strict=True):
        assert torch.allclose(new, old + 0.25, atol=1e-6)
