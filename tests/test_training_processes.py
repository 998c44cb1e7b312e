"""Several processes are one run: the same weights and figures, also when one of them is lost or all are stopped."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import run, start, states, weights
from torch import nn
from torch.distributed import HashStore

from restore import distributed
from restore.checkpoint import load_network, read_info
from restore.data import SampleNumbers
from restore.experiment import Experiment
from restore.interruptions import StopRequests
from restore.options import construct, load_options
from restore.restoration import Restoration
from restore.sample import sample_clip
from restore.test_sets import TEST_SETS
from restore.training import prepared
from restore.writers import write_image

# Adam turns rounding in a gradient near zero into a part of the rate: a low rate, that still moves all by 3e-5
RECIPE = ["train.optim_g.lr=1e-5", "datasets.train.num_worker_per_gpu=1", "logger.print_freq=1"]
TWICE = "datasets.train.batch_size_per_gpu=4"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def arguments(options_file: Path, folder: Path, *overrides: str, launcher: str = "pytorch") -> list[str]:
    pairs = [f"path.experiments={folder}", *RECIPE, *overrides]
    return ["-opt", str(options_file), "--launcher", launcher, *(item for pair in pairs for item in ("--set", pair))]


def finish(process: subprocess.Popen[str]) -> str:
    """What the process says on stderr, once it has ended well."""
    _, error = process.communicate(timeout=150)
    assert process.returncode == 0, error
    assert "Traceback" not in error and "forcefully exiting" not in error, error
    return error


def records(experiment: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (experiment / "log.jsonl").read_text().splitlines()]


def assert_close(one: Path, other: Path, iteration: int, tolerance: float = 1e-6) -> None:
    for key, value in weights(one, iteration).items():
        assert (value - weights(other, iteration)[key]).abs().max() <= tolerance, key


@pytest.fixture(scope="module")
def options_file(tmp_path_factory) -> Path:
    """Options with a test set of three clips beside that of one."""
    folder = tmp_path_factory.mktemp("processes")
    for seed in range(3):
        clip = folder / "clips" / f"clip{seed}"
        clip.mkdir(parents=True)
        for i, frame in enumerate(sample_clip(7, 64, 64, seed=seed)):
            write_image(clip / f"{i}.png", frame)
    path = folder / "tiny.yml"
    three = f"  three: {{type: TestClips, dataroot_gt: {folder / 'clips'}}}\nnetwork_g:"
    path.write_text(runs.OPTIONS.replace("network_g:", three))
    return path


@pytest.fixture(scope="module")
def together(options_file) -> Path:
    """The experiment of two processes that nothing has disturbed."""
    folder = options_file.parent / "together"
    assert finish(start(arguments(options_file, folder), launcher=TORCHRUN)).count("\n") == 0
    return folder / "tiny"


def test_two_processes_equal_one_with_twice_the_batch(options_file, together):
    alone = run(options_file, *RECIPE, TWICE, folder="alone")
    assert_close(together, alone, 3)
    for one, two in zip(records(alone), records(together), strict=True):  # written by one process only, too
        for key in one.keys() - {"samples_per_s", "data_share", "memory_mb"}:
            assert one[key] == (two[key] if key == "validation" else pytest.approx(two[key], rel=1e-4)), key


def test_shared_validation_gives_the_figures_of_one_process(options_file, together):
    """Three clips for two processes, and one clip, which leaves a process without any."""
    path = together / "models" / "net_g_6.safetensors"
    options, found = load_options(options_file), read_info(path)["validation"]
    assert [record["validation"] for record in records(together) if "validation" in record] == ["val", "three"]
    for name, section in options.test_sets.items():
        clips = construct(TEST_SETS, section, f"datasets.{name}")
        figures = Restoration().validate(options, load_network(path), name, clips, Path("unused"), StopRequests())
        # compiled kernels sum in another order with another number of threads
        assert figures and figures == pytest.approx(found[name], rel=1e-6)
        assert {"iteration": 6, "validation": name, **found[name]} in records(together)


DISASTERS = """
import os, signal
from multiprocessing import active_children
from pathlib import Path
from restore import training
step, here = training.Loop.step, Path(__file__).parent

def strike(loop, parts):
    if os.environ["RANK"] == "1" and loop.run.iteration == 5:
        if not (here / "killed").exists():
            (here / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if not (here / "worker_killed").exists():
            (here / "worker_killed").touch()
            os.kill(active_children()[0].pid, signal.SIGKILL)
    return step(loop, parts)

training.Loop.step = strike
"""


def test_torchrun_starts_again_after_a_loss(options_file, together):
    """A process is killed after a state was saved, then a worker of its loader; the weights stay bit-identical."""
    folder = options_file.parent / "disturbed"
    launcher = [*TORCHRUN, "--max-restarts=2"]
    disturbed = arguments(options_file, folder, "val.val_freq=null")
    error = finish(start(disturbed, launcher=launcher, prelude=DISASTERS))
    said = [line for line in error.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 3 and all(line.endswith("continues from the last saved state") for line in said), error
    assert sum("stopped: another process has ended" in line for line in said) == 2
    assert sum("is killed by signal: Killed, perhaps for want of memory" in line for line in said) == 1
    assert [r["iteration"] for r in records(folder / "tiny") if "loss" in r] == [1, 2, 3, 4, 4, 4, 5, 6]
    assert_close(folder / "tiny", together, 6, tolerance=0)


def test_sigterm_saves_and_one_process_continues(options_file):
    """As Slurm sends it: to every process, to which torchrun then passes it on once more."""
    folder = options_file.parent / "stopped"
    forever = ["logger.save_checkpoint_freq=100000", "val.val_freq=null"]
    process = start(arguments(options_file, folder, "train.total_iter=100000", *forever), launcher=TORCHRUN)
    log, deadline = folder / "tiny" / "log.jsonl", time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGTERM)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert len(children) == 2 and process.returncode != 0 and "forcefully exiting" not in error
    (stopped,) = states(folder / "tiny")
    assert error.count(f"train.py: stopped at iteration {stopped}; the same command continues") == 2
    assert len(latest_state(folder / "tiny")["rng"]) == 2

    run(options_file, *RECIPE, *forever, f"train.total_iter={stopped + 1}", folder="stopped")
    state = latest_state(folder / "tiny")
    assert state["iteration"] == stopped + 1 and len(state["rng"]) == 1
    said = (folder / "tiny" / "train.log").read_text()
    assert "processes: 2 saved this, 1 continue, so a step sees 0.5 times the clips" in said


def test_a_process_without_a_random_state_keeps_its_own(options_file, monkeypatch):
    """As where two continue what one has saved."""
    saved = prepared(load_options(options_file)).run.state()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    second = prepared(load_options(options_file)).run
    torch.rand(7)
    before = torch.get_rng_state()
    second.restore({**saved, "iteration": 5})
    assert second.iteration == 5 and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(saved["rng"][0]["cpu"], before)


def latest_state(experiment: Path) -> dict[str, Any]:
    state = Experiment(experiment).latest_state(torch.device("cpu"))
    assert state is not None
    return state


def test_slurm_starts_processes(options_file, tmp_path):
    """As srun starts them, with a scontrol that knows the nodes; a sum over the batch, this time."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && printf "localhost\\nnode4\\n"\n')
    scontrol.chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": str(port), "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2", "SLURM_NODELIST": "node[1-4]", "SLURM_STEP_NODELIST": "node[3-4]",
    }  # fmt: skip
    changes = ["train.pixel_opt.reduction=sum", "train.total_iter=2", "val.val_freq=null"]
    started = [
        start(
            arguments(options_file, tmp_path, *changes, launcher="slurm"),
            prelude=f"import os; os.environ.update({ {**job, 'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)} })",
        )
        for i in range(2)
    ]
    for process in started:
        assert finish(process) == ""
    alone = run(options_file, *RECIPE, *changes, TWICE, folder="alone_sum")
    assert_close(alone, tmp_path / "tiny", 2)


def test_slurm_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": ""})
    with pytest.raises(ValueError, match="SLURM_PROCID is not set; start with srun"), distributed.processes("slurm"):
        pass
    os.environ.update(SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_NODELIST="node1")
    with pytest.raises(ValueError, match="set MASTER_ADDR to the first node"), distributed.processes("slurm"):
        pass
    os.environ.update(MASTER_ADDR="node1", SLURM_JOB_ID="1234567")
    distributed._environment_of_slurm()
    assert {key: os.environ[key] for key in ("MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "MASTER_PORT": "24567", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
    }  # fmt: skip


def test_a_new_start_takes_nothing_from_the_dead():
    """One process is late, and meanwhile the store holds what its predecessor wrote."""
    store, found = HashStore(), {}
    before = {meet(store, 0, found), meet(store, 1, found)}
    for thread in before:
        thread.join()
    assert found[0] == found[1]
    old, first = found[0], meet(store, 0, found)
    time.sleep(0.2)
    assert first.is_alive()
    meet(store, 1, found).join()
    first.join()
    assert found[0] == found[1] != old


def meet(store: HashStore, number: int, found: dict[int, str]) -> threading.Thread:
    def go() -> None:
        found[number] = distributed._common_word(store, number, 2)

    thread = threading.Thread(target=go)
    thread.start()
    return thread


def test_processes_that_find_different_states_are_refused(options_file, monkeypatch):
    """As on two machines that do not share the experiment's folder."""
    shutil.rmtree(options_file.parent / "unshared", ignore_errors=True)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, 3])
    with pytest.raises(ValueError, match=r"different iterations there \(0, 3\); path.experiments must be a folder"):
        run(options_file, folder="unshared")


def test_processes_share_the_samples():
    numbers = SampleNumbers(2, 4, 2, accumulate=2)
    assert list(numbers) == list(range(8, 16)) and len(numbers) == 8


def test_one_process_shares_with_nobody():
    assert list(distributed.share([1, 2, 3])) == [1, 2, 3]
    assert distributed.mean({"a": 2.0}, torch.device("cpu")) == {"a": 2.0}
    assert isinstance(distributed.parallel(nn.Linear(1, 1)), nn.Linear)
