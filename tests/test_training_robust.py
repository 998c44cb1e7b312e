"""Training when things go wrong, and by unusual recipes: nothing is lost, nothing differs."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import run, start, states, weights

import train as command
from restore.experiment import Experiment
from restore.losses import LOSSES, CharbonnierLoss
from restore.options import load_options
from restore.training import prepared

NO_VALIDATION = "val.val_freq=null"


def arguments(options_file: Path, *overrides: str) -> list[str]:
    root = options_file.parent / "runs"
    pairs = [f"path.experiments={root}", NO_VALIDATION, *overrides]
    return ["-opt", str(options_file), *(item for pair in pairs for item in ("--set", pair))]


class Breaking(CharbonnierLoss):
    """Gives NaN at the calls that `at` names, counted over the process."""

    calls = 0
    at: tuple[int, ...] = ()

    def forward(self, restored: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        Breaking.calls += 1
        value = super().forward(restored, truth)
        return value * (torch.nan if Breaking.calls in self.at else 1)


@pytest.fixture
def breaking(monkeypatch):
    def at(*calls: int) -> None:
        monkeypatch.setitem(LOSSES, "Breaking", Breaking)
        Breaking.calls, Breaking.at = 0, calls

    return at


def test_a_nan_stops_with_iteration_and_names(options_file, capsys, breaking):
    breaking(5)
    assert command.main(arguments(options_file, "train.pixel_opt.type=Breaking")) == 1
    error = capsys.readouterr().err
    assert "iteration 5: the loss is nan on sample1:" in error and error.count("\n") == 1
    assert states(options_file.parent / "runs" / "tiny") == [3]


def test_a_nan_rolls_back_and_skips_that_batch(options_file, breaking):
    breaking(5)
    folder = run(options_file, "train.pixel_opt.type=Breaking", "train.on_nan=rollback", NO_VALIDATION)
    assert states(folder) == [3, 6]
    assert Breaking.calls == 7  # 1..5, then 4 and 6: the fifth batch is left out
    assert all(torch.isfinite(value).all() for value in weights(folder, 6).values())


def test_a_nan_before_anything_was_saved(options_file, capsys, breaking):
    breaking(1)
    assert command.main(arguments(options_file, "train.pixel_opt.type=Breaking", "train.on_nan=rollback")) == 1
    assert "nothing was saved yet" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first(options_file, number):
    """As Ctrl-C and Slurm send them: to every process, the loader's workers too."""
    many = ["train.total_iter=100000", "logger.save_checkpoint_freq=100000", "datasets.train.num_worker_per_gpu=1"]
    process = start(arguments(options_file, *many))
    log = options_file.parent / "runs" / "tiny" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    (iteration,) = states(log.parent)
    assert f"stopped at iteration {iteration}; the same command continues" in error and "Traceback" not in error
    state = Experiment(log.parent).latest_state(torch.device("cpu"))
    assert state is not None and state["iteration"] == iteration >= 2


def test_a_full_disk_leaves_the_state_before(options_file):
    """A limit on file size stands for the full disk: the write fails in the same way."""
    assert command.main(arguments(options_file, "train.total_iter=3")) == 0
    prelude = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))"
    )
    process = start(arguments(options_file), prelude=prelude)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "what was saved before is intact" in error and "Traceback" not in error
    folder = options_file.parent / "runs" / "tiny"
    assert states(folder) == [3]
    assert not list(folder.rglob("*.partial"))
    assert command.main(arguments(options_file)) == 0


def test_accumulated_batches_equal_a_larger_one(options_file):
    large = run(options_file, "datasets.train.batch_size_per_gpu=4", NO_VALIDATION, folder="large")
    parts = run(options_file, "train.accum_iter=2", NO_VALIDATION, folder="parts")
    for key, value in weights(large, 6).items():
        assert torch.allclose(value, weights(parts, 6)[key], atol=1e-6), key


def test_groups_have_rates_and_freeze(options_file):
    groups = "train.param_groups=[{match: '^encoder', lr_mult: 0}, {match: '^motion', freeze_until: 6}]"
    before = prepared(load_options(options_file)).run.network.state_dict()
    after = weights(run(options_file, groups, "train.ema_decay=0", NO_VALIDATION), 6)
    for key, value in before.items():
        same = torch.equal(value, after[key])
        assert same == key.startswith(("encoder", "motion")) or "position_bias" in key or "stillness" in key, key


def test_a_group_that_matches_nothing(options_file, capsys):
    assert command.main(arguments(options_file, "train.param_groups=[{match: decodr}]")) == 2
    assert "train.param_groups[0].match: 'decodr' matches no parameter" in capsys.readouterr().err


def test_losses_are_weighted_ramped_and_logged_apart(options_file):
    more = "train.losses={late: {type: CharbonnierLoss, loss_weight: 2.0, ramp: [2, 4]}}"
    folder = run(options_file, more, "train.optim_g.lr=0", "logger.print_freq=1", NO_VALIDATION)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    shares = [record["late"] / record["pixel"] for record in records]
    assert shares == pytest.approx([0, 0, 1, 2, 2, 2], rel=1e-5)
    assert all(r["loss"] == pytest.approx(r["pixel"] + r["late"]) for r in records)


def test_recomputed_activations_give_the_same_weights(options_file):
    short = ["train.total_iter=2", NO_VALIDATION]
    plain = run(options_file, *short, folder="plain")
    again = run(options_file, *short, "train.activation_checkpointing=true", folder="again")
    for key, value in weights(plain, 2).items():
        assert torch.allclose(value, weights(again, 2)[key], atol=1e-7), key


def test_bf16_trains(options_file):
    folder = run(options_file, "train.precision=bf16", "train.total_iter=3", NO_VALIDATION)
    assert all(torch.isfinite(value).all() for value in weights(folder, 3).values())
