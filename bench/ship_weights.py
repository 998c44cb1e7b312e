"""Make a shipped model of a run's weights: python -m bench.ship_weights experiments/RUN/models/net_g_N.safetensors NAME

Reads what people should know of it from restore/weights/NAME.yml (`restore/weights/stdan_s.yml` is an example), writes
NAME.safetensors in half precision with that as its metadata, its card NAME.md and the hashes, SHA256SUMS. Loading casts
back to float32. After changes of the text alone, the source is the shipped file itself: NAME.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from archs import VideoNet
from bench.model_card import card
from restore import checkpoint, manifest
from restore.checkpoint import find_weights, load_network, read_info, replacing, save_network
from restore.models import TASKS, described, described_factors
from restore.schema import OptionError, StrictLoader, as_dict, parse

MOST_BYTES = 10_000_000  # of a file
STORAGE = {"fp16": torch.float16, "bf16": torch.bfloat16}
_KEPT = ("iteration", "validation")  # what a run's own metadata says


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measured figure, its protocol in words, and the command that measures it."""

    set: str
    psnr: float
    ssim: float
    protocol: str
    command: str
    baseline: str | None = None
    baseline_psnr: float | None = None
    baseline_ssim: float | None = None

    def __post_init__(self) -> None:
        if self.baseline and (self.baseline_psnr is None or self.baseline_ssim is None):
            raise OptionError("baseline_psnr: give both figures of the baseline, or no baseline")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a file of weights cannot say by itself."""

    task: str
    licence: str
    summary: str  # a line
    data: str  # what it was trained on, and under which licences
    trained: str  # how long, on what, from which start
    options: str
    command: str  # that trains it
    scores: tuple[Score, ...]
    limits: tuple[str, ...]  # what it is not good at
    speed: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise OptionError(f"task: {self.task!r} is none of {', '.join(TASKS)}")
        for name in ("scores", "limits"):
            if not getattr(self, name):
                raise OptionError(f"{name}: is empty; a model ships with its figures and its limits")


def main(argv: list[str] | None = None) -> int:
    """Write model, card and hashes; 2 for bad input, with one line that says why."""
    parser = argparse.ArgumentParser(description="Make a shipped model of a training run's weights.")
    parser.add_argument("source", help="a run's net_g_N.safetensors, or a shipped model to describe anew")
    parser.add_argument("name", help="name of the shipped model")
    parser.add_argument("--about", type=Path, help="what is to be known of it (restore/weights/NAME.yml)")
    parser.add_argument("--storage", choices=STORAGE, default="fp16", help="type on disk (%(default)s)")
    arguments = parser.parse_args(argv)
    about = arguments.about or checkpoint.WEIGHTS / f"{arguments.name}.yml"
    try:
        print(ship(arguments.source, arguments.name, read_about(about), STORAGE[arguments.storage]))
    except (ValueError, OSError) as error:
        print(f"ship_weights: error: {error}", file=sys.stderr)
        return 2
    return 0


def read_about(path: Path) -> About:
    """The description in a YAML file; `OptionError` names file and key."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
        return parse(About, tree, "")
    except OSError as error:
        raise OptionError(f"{path}: cannot be read; see restore/weights/stdan_s.yml for what it says") from error
    except (OptionError, yaml.YAMLError) as error:
        raise OptionError(f"{path}: {' '.join(str(error).split())}") from error


def ship(source: str, name: str, about: About, storage: torch.dtype) -> str:
    """Write NAME.safetensors, NAME.md and SHA256SUMS; a line on it. ValueError for what must not ship."""
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise ValueError(f"{name}: a model's name has letters, digits, - and _ only, for load_network takes it")
    info = read_info(find_weights(source))
    network = load_network(source)
    task = TASKS[about.task]
    if (network.scale, network.time_scale) != (task.scale, task.time_scale):
        needed = f"x{task.scale} in space, x{task.time_scale} in time"
        raise ValueError(f"{source}: {described_factors(network)}, but task: {about.task} is {needed}: name its task")
    said: dict[str, Any] = {key: info[key] for key in _KEPT if key in info}
    path = checkpoint.WEIGHTS / f"{name}.safetensors"
    with replacing(path) as temporary:
        save_network(temporary, halved(network, storage), info["network"], **said, **as_dict(about))
        size = temporary.stat().st_size
        if size > MOST_BYTES:
            most = f"no shipped file has more than {MOST_BYTES / 1e6:.0f} MB"
            raise ValueError(f"{source}: {size / 1e6:.1f} MB in half precision, but {most}")
    _write(path.with_name(manifest.MANIFEST), manifest.written(path.parent, "*.safetensors"))
    _write(path.with_suffix(".md"), card(described(name)))
    return f"{path}: {size / 1e6:.2f} MB; {path.with_suffix('.md').name} and {manifest.MANIFEST} beside it"


def halved(network: VideoNet, storage: torch.dtype) -> VideoNet:
    """The network with its floating-point tensors in another type; ValueError where one leaves its range."""
    network = network.to(storage)
    broken = [key for key, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{storage}: {', '.join(broken[:3])} would not be finite; store as bf16")
    return network


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
