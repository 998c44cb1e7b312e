"""Small training runs for the tests."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import ROOT

from restore.checkpoint import load_network
from restore.options import load_options
from restore.training import train

OPTIONS = """
name: tiny
num_threads: 1
device: cpu
datasets:
  train:
    {type: SampleClips, clips: 1, frames: 5, height: 64, width: 96, num_frame: 5, gt_size: 32,
     batch_size_per_gpu: 2, num_worker_per_gpu: 0}
  val: {type: SampleTest, frames: 7, height: 64, width: 64}
network_g:
  {type: stdan, channels: 8, embed_dim: 8, heads: 1, encoder_depths: [1], decoder_depths: [1], levels: 1,
   deform_groups: 1, temporal_radius: 1, upsampler: light, skip: bicubic, motion_prior: correlation, drop_path: 0}
train: {total_iter: 6, pixel_opt: {type: CharbonnierLoss}, ema_decay: 0.9, grad_clip: 1.0, optim_g: {lr: 1e-3}}
val: {val_freq: 6}
logger: {print_freq: 2, save_checkpoint_freq: 3}
"""


def run(options_file: Path, *overrides: str, folder: str = "runs") -> Path:
    """Train in this process; the experiment's folder."""
    root = options_file.parent / folder
    train(load_options(options_file, [f"path.experiments={root}", *overrides]))
    return root / "tiny"


def weights(experiment: Path, iteration: int) -> dict[str, torch.Tensor]:
    """The weights that a run has saved."""
    return load_network(experiment / "models" / f"net_g_{iteration}.safetensors").state_dict()


def states(experiment: Path) -> list[int]:
    """Iterations whose training state is on disk."""
    return sorted(int(path.stem) for path in (experiment / "training_states").glob("*.state"))


def start(arguments: list[str], *, launcher: list[str] | None = None, prelude: str = "") -> subprocess.Popen[str]:
    """The command as a process of its own, after the Python code ``prelude``; without the type checks."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{prelude}\nimport train; sys.exit(train.main(sys.argv[1:]))"
    command = [sys.executable, *(launcher or []), "-c", code, *arguments]
    if launcher:  # torchrun starts files
        script = Path(arguments[arguments.index("-opt") + 1]).with_name("started.py")
        script.write_text(code)
        command = [sys.executable, *launcher, str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
