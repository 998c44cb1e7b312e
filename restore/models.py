"""The networks that ship, by what they are for: which one a task takes, whether given weights fit it, the list.

A file's metadata says its task. Where it does not (weights of a run, published ones), what the network does to sizes
and frame rates decides; whether its input is blurred cannot be seen there, so such a file is taken for either.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from archs import ARCHS, VideoNet
from restore.checkpoint import (
    DEFAULT_MODEL,
    CheckpointError,
    build_network,
    check_shipped,
    find_weights,
    load_network,
    read_info,
    shipped_models,
)
from restore.cost import count_parameters


@dataclass(frozen=True)
class Task:
    """What a network is for."""

    scale: int
    time_scale: int
    what: str
    recipe: str  # options to train one with


_NO_TIME, _NO_SPACE = (f"with {key}: 1 in network_g and both data sets" for key in ("time_scale", "scale"))
_JOINT = "options/deblur_sr_sample.yml"
TASKS: dict[str, Task] = {
    "sr": Task(4, 2, "small frames -> large ones and those in between", "options/stdan_freq_s.yml"),
    "upscale": Task(4, 1, "small frames -> large ones", f"options/sample.yml {_NO_TIME}"),
    "interpolate": Task(1, 2, "frames -> these and those in between", f"options/sample.yml {_NO_SPACE}"),
    "deblur": Task(1, 1, "blurred frames -> sharp ones", "options/deblur_sample.yml"),
    "deblur+sr": Task(4, 2, "small blurred frames -> large sharp ones and those in between", _JOINT),
    "deblur+upscale": Task(4, 1, "small blurred frames -> large sharp ones", f"{_JOINT} {_NO_TIME}"),
    "deblur+interpolate": Task(1, 2, "blurred frames -> sharp ones and those in between", f"{_JOINT} {_NO_SPACE}"),
}
DEFAULTS = {"sr": DEFAULT_MODEL}  # of several models for one task, the one that is taken


@dataclass(frozen=True)
class Model:
    """A shipped network: what its file says of it, and what can be counted."""

    name: str
    path: Path
    task: str
    scale: int
    time_scale: int
    parameters: int
    info: Mapping[str, Any]  # licence, summary, data, scores ... as in the metadata


def models(task: str | None = None) -> list[Model]:
    """The shipped networks, or those for one task, by name; `CheckpointError` for a file that is not as shipped."""
    return [described(name) for name in (shipped_models() if task is None else shipped_for(task))]


def described(name: str) -> Model:
    """A shipped model; `CheckpointError` for a file that is not as shipped."""
    path = find_weights(name)
    check_shipped(path)
    info = read_info(path)
    network = build_network(info.pop("network"), path, ARCHS)
    task = info.get("task") or derived_task(network)
    return Model(name, path, task, network.scale, network.time_scale, count_parameters(network), info)


def shipped_for(task: str) -> list[str]:
    """The names of shipped models for a task."""
    return [name for name in shipped_models() if _task_of(find_weights(name)) == task]


def default_model(task: str) -> str:
    """The shipped model that a task takes; ValueError, with the way to train one, where none ships."""
    names = shipped_for(task)
    if not names:
        raise ValueError(f"task {task}: {_fitting(task)}")
    return _default(task, names)


def described_task(path: Path) -> str | None:
    """The task in a file's metadata; None where it says none."""
    return read_info(path).get("task") if path.suffix == ".safetensors" else None


def derived_task(network: VideoNet) -> str:
    """What a network of this shape is for, as far as the shape tells: the first of `TASKS` with its factors."""
    factors = network.scale, network.time_scale
    return next((name for name, task in TASKS.items() if (task.scale, task.time_scale) == factors), "other")


def _default(task: str, names: Sequence[str]) -> str:
    return DEFAULTS[task] if DEFAULTS.get(task) in names else names[0]


def _task_of(path: Path) -> str:
    info = read_info(path)
    return info.get("task") or derived_task(build_network(info["network"], path, ARCHS))


def load_for_task(
    task: str | None, model: str | None, *, device: str | torch.device = "cpu"
) -> tuple[str, VideoNet]:
    """Name and network: the one that ships for ``task``, or ``model`` (a name or file) if it is for that task.

    Without either the default model. ValueError for weights of another task or scale, and where none ships.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task {task}: unknown; there is {', '.join(TASKS)}")
    name = model or (default_model(task) if task else DEFAULT_MODEL)
    network = load_network(name, device=device)
    if task:
        check_task(task, name, network)
    return name, network


def check_task(task: str, name: str | os.PathLike[str], network: VideoNet) -> None:
    """Raise ValueError for weights that are for another task, or of another scale, than ``task``."""
    said, wanted = described_task(find_weights(name)), TASKS[task]
    fits = (network.scale, network.time_scale) == (wanted.scale, wanted.time_scale)
    if said in (None, task) and fits:
        return
    what = f"for {said}" if said not in (None, task) else described_factors(network)
    needed = "" if fits else f", {task} is {_factors(wanted.scale, wanted.time_scale)}"
    raise ValueError(f"task {task}: {name} is {what}{needed}; {_fitting(task)}")


def described_factors(network: VideoNet) -> str:
    """What a network does to sizes and frame rates."""
    return _factors(network.scale, network.time_scale)


def _factors(scale: int, time_scale: int) -> str:
    return f"x{scale} in space, x{time_scale} in time"


def _fitting(task: str) -> str:
    """Which shipped models are for a task, or how to come by one."""
    if names := shipped_for(task):
        return f"shipped models for {task}: {', '.join(names)}"
    return f"no model ships for it yet: train one with {TASKS[task].recipe} and give its file with -m"


def listing(width: int = 100) -> tuple[str, list[str]]:
    """The shipped models as text in lines of at most ``width``, and what is wrong with those that are not listed."""
    found, faults = [], []
    for name in shipped_models():
        try:
            found.append(described(name))
        except CheckpointError as error:
            faults.append(str(error))
    if not found:
        return "no models: give a file with -m", faults
    return "\n".join([*_table(found), *(line for model in found for line in ("", *_details(model, width)))]), faults


def _table(found: Sequence[Model]) -> list[str]:
    rows = [("model", "task", "space", "time", "parameters", "size", "licence", "")]
    for model in found:
        rivals = [other.name for other in found if other.task == model.task]
        size = f"{model.path.stat().st_size / 1e6:.1f} MB"
        licence = str(model.info.get("licence", "not said"))
        default = "default" if model.name == _default(model.task, rivals) else ""
        factors = f"x{model.scale}", f"x{model.time_scale}"
        rows.append((model.name, model.task, *factors, f"{model.parameters / 1e6:.2f} M", size, licence, default))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {4, 5}  # columns of numbers
    padded = [
        [cell.rjust(w) if n in right else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in padded]


def _details(model: Model, width: int) -> list[str]:
    info = model.info
    purpose = TASKS[model.task].what if model.task in TASKS else "another task than those of --task"
    parts: list[tuple[str, Any]] = [("for", purpose), ("what", info.get("summary"))]
    parts += [("scores", score_text(score)) for score in info.get("scores", ())]
    parts += [("speed", info.get("speed")), ("data", info.get("data"))]
    lines = [model.name]
    for label, text in parts:
        if text:
            head = f"  {label:<8}"
            lines += textwrap.wrap(
                str(text), width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
            )
    return lines


def score_text(score: Mapping[str, Any]) -> str:
    """A measured figure of a model's metadata, with its protocol and what a baseline reaches."""
    text = f"{score['set']}: {score['psnr']:.2f} dB PSNR, {score['ssim']:.4f} SSIM, {score['protocol']}"
    if score.get("baseline"):
        text += f" ({score['baseline']}: {score['baseline_psnr']:.2f} dB, {score['baseline_ssim']:.4f})"
    return text
