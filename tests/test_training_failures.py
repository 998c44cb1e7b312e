"""What fails in the middle of a run ends it with one line; numbers too large for fp16 only cost a step."""

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from runs import run, start, states, weights
from torch.utils.data import get_worker_info

import train as command
from restore import interruptions, restoration, training
from restore.clip_sources import SampleError
from restore.data import DATASETS, Sample, SampleClips
from restore.experiment import Experiment
from restore.interruptions import StopRequests
from restore.losses import LOSSES, CharbonnierLoss
from restore.options import load_options
from restore.training import prepared

NO_VALIDATION = "val.val_freq=null"


@pytest.fixture(autouse=True)
def no_worker_is_left():
    """What PyTorch keeps of a failed loader would cost a later test seconds a worker."""
    yield
    handler = signal.getsignal(signal.SIGCHLD)
    interruptions._kill_workers()
    gc.collect()
    signal.signal(signal.SIGCHLD, handler)


def arguments(options_file: Path, *overrides: str) -> list[str]:
    pairs = [f"path.experiments={options_file.parent / 'runs'}", *overrides]
    return ["-opt", str(options_file), *(item for pair in pairs for item in ("--set", pair))]


def latest_state(experiment: Path) -> dict[str, Any]:
    state = Experiment(experiment).latest_state(torch.device("cpu"))
    assert state is not None
    return state


def records(experiment: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (experiment / "log.jsonl").read_text().splitlines()]


class Fatal(SampleClips):
    """Its samples fail in a worker, from the 8th iteration on."""

    how: ClassVar[str] = ""

    def __getitem__(self, number: int) -> Sample:
        if get_worker_info() and number >= 14:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)  # as by the kernel, for want of memory
            if self.how == "bug":
                raise KeyError("frames")
            if self.how == "bad input":
                raise ValueError("clip7: no such frame")
        return super().__getitem__(number)

    def draw(self, rng: np.random.Generator) -> Sample:
        if self.how == "unreadable" and rng.random() < 0.5:
            raise SampleError(f"{rng.random()}.png", "damaged")
        return super().draw(rng)


@pytest.mark.parametrize(
    ("how", "workers", "code", "line"),
    [
        ("killed", 1, 1, "is killed by signal: Killed, perhaps for want of memory; the same command continues"),
        ("killed", 2, 1, "is killed by signal: Killed, perhaps for want of memory; the same command continues"),
        ("bug", 2, 1, "stopped: a worker of the data loader met KeyError: 'frames' ("),
        ("bad input", 1, 2, "error: clip7: no such frame"),
        ("unreadable", 1, 2, ".png: damaged; more than skip_limit=2 files like this"),
        ("unreadable", 2, 2, ".png: damaged; more than skip_limit=2 files like this"),
    ],
)
def test_a_worker_that_fails_is_one_line(options_file, monkeypatch, capsys, how, workers, code, line):
    monkeypatch.setitem(DATASETS, "Fatal", Fatal)
    monkeypatch.setattr(Fatal, "how", how)
    call = arguments(
        options_file, "datasets.train.type=Fatal", f"datasets.train.num_worker_per_gpu={workers}", NO_VALIDATION,
        "datasets.train.skip_limit=2", "logger.save_checkpoint_freq=1", "train.total_iter=9",
    )  # fmt: skip
    assert command.main(call) == code
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and line in error and error.count("\n") == 1, error
    folder = options_file.parent / "runs" / "tiny"
    saved = states(folder)
    assert how == "unreadable" or latest_state(folder)["iteration"] == saved[-1] < 8
    if how == "killed" and workers == 1:
        monkeypatch.setattr(Fatal, "how", "")
        assert command.main(call) == 0 and states(folder)[-1] == 9


def test_a_program_that_fails_does_not_wait_for_its_workers(options_file):
    """They ignore the signal by which Python would end them."""
    prelude = "from restore import training; training.Loop.step = lambda loop, parts: 1 / 0"
    process = start(arguments(options_file, "datasets.train.num_worker_per_gpu=2"), prelude=prelude)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "ZeroDivisionError" in error


class Faulty(CharbonnierLoss):
    """At the calls that `at` names the loss, or with a finite loss its gradient, is not finite."""

    at: ClassVar[tuple[int, ...]] = ()
    what: ClassVar[str] = "loss"
    calls: ClassVar[int] = 0

    def forward(self, restored: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        Faulty.calls += 1
        if Faulty.calls in self.at and self.what == "loss":
            return super().forward(restored, truth) * torch.nan
        if Faulty.calls in self.at:
            restored.register_hook(lambda gradient: gradient * torch.inf)
        return super().forward(restored, truth)


@pytest.fixture
def faulty(monkeypatch):
    def prepare(what: str, *at: int) -> str:
        monkeypatch.setitem(LOSSES, "Faulty", Faulty)
        Faulty.calls, Faulty.what, Faulty.at = 0, what, at
        return "train.pixel_opt.type=Faulty"

    return prepare


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_or_gradient_that_is_not_finite(options_file, capsys, faulty, what, precision):
    """It ends the run before it reaches the weights; but an infinite gradient is a matter of course for fp16."""
    call = arguments(options_file, faulty(what, 4), f"train.precision={precision}", NO_VALIDATION, "train.total_iter=4")
    normal = precision == "fp16" and what == "gradient"
    assert command.main(call) == (0 if normal else 1)
    error = capsys.readouterr().err
    assert error == "" if normal else "stopped: iteration 4: the " in error and f"{what}" in error, error
    assert states(options_file.parent / "runs" / "tiny") == ([3, 4] if normal else [3])


def test_an_overflow_costs_a_step_and_halves_the_scale(options_file):
    options = ["train.precision=fp16", "train.pixel_opt.loss_weight=1e4", "train.total_iter=1", NO_VALIDATION]
    folder = run(options_file, *options, "logger.print_freq=1")
    before = prepared(load_options(options_file, options)).run.network.state_dict()
    state = latest_state(folder)
    assert state["scaler"]["scale"] == 2.0**15
    assert all(torch.equal(value, state["network"][key]) for key, value in before.items())
    (record,) = records(folder)
    assert record["skipped"] == 1 and record["grad_norm"] == 0 and record["loss"] > 0


def test_fp16_continues_exactly(options_file):
    options = ["train.precision=fp16", "train.pixel_opt.loss_weight=100", "logger.print_freq=1", NO_VALIDATION]
    whole = run(options_file, *options, "train.total_iter=4", folder="whole")
    run(options_file, *options, "train.total_iter=2", folder="parts")
    parts = run(options_file, *options, "train.total_iter=4", folder="parts")
    assert [r["skipped"] for r in records(whole)] == [r["skipped"] for r in records(parts)]
    assert {r["skipped"] for r in records(whole)} == {0, 1}
    assert latest_state(whole)["scaler"] == latest_state(parts)["scaler"]
    assert all(torch.equal(value, weights(parts, 4)[key]) for key, value in weights(whole, 4).items())


def test_gradients_that_are_infinite_at_any_scale(options_file, monkeypatch, faulty):
    monkeypatch.setattr(training, "LEAST_SCALE", 2.0**15)
    options = ["train.precision=fp16", "logger.save_checkpoint_freq=1", NO_VALIDATION]
    with pytest.raises(FloatingPointError, match="iteration 5: the gradient's norm is "):
        run(options_file, faulty("gradient", 3, 4, 5), *options, folder="stop")
    folder = run(options_file, faulty("gradient", 3, 4, 5), *options, "train.on_nan=rollback", folder="rollback")
    assert states(folder)[-1] == 6 and latest_state(folder)["optimizer"]["state"][0]["step"] == 3


def test_a_request_to_stop_ends_validation(options_file, monkeypatch):
    """Torchrun kills what has not ended 30 s after it."""

    def evaluate(clips, *others, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(clips) == []
        return []

    monkeypatch.setattr(restoration, "evaluate", evaluate)
    assert command.main(arguments(options_file, "val.val_freq=2")) == 130
    folder = options_file.parent / "runs" / "tiny"
    assert states(folder) == [2] and not any("validation" in record for record in records(folder))
    monkeypatch.undo()
    assert command.main(arguments(options_file, "val.val_freq=6")) == 0
    assert records(folder)[-1]["validation"] == "val"


def test_only_a_later_signal_ends_at_once(monkeypatch):
    stop, now = StopRequests(), 100.0
    monkeypatch.setattr(interruptions.time, "monotonic", lambda: now)
    stop(signal.SIGTERM, None)
    stop(signal.SIGTERM, None)
    assert stop.requested
    now += 10
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)
