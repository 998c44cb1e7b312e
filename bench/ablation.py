"""The ablation of STDAN-freq: its options files, and a small one that is really run.

    python -m bench.ablation --write                     options/ablation/*.yml, a file for every row of the full grid
    python -m bench.ablation --run OUT [--jobs 2]        small networks on real clips, equal budgets, several seeds
    python -m bench.ablation --table OUT                 what they gave, with the spread over seeds

The small runs have three settings: "sharp", bicubic input of sharp frames; "blurred", where every input frame has a
motion blur of its own, so that neighbours differ in sharpness; and "deblur", frames of an open shutter to sharp ones of
their size, aligned by block matching from the start. In each, one network without any component (A0) is
trained first, and every row continues from its weights for the same number of iterations, A0 too: components start as
the identity, so the rows differ by nothing else than what they learn then, and a gain is no mere faster start. Seeds
change the order of the data and the components' first weights, not the common start.

They need the folder of clips that RESTORE_SHARED names (default ../shared), continue when they are interrupted, and
tell nothing about the size of an effect after a full training: 32 channels, plain convolutions for the window
attention, hundreds of iterations, scored on 13 frames each of three held-out clips and of Vid4.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from restore.device import resolve_precision

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("RESTORE_SHARED", ROOT.parent / "shared"))
HELD_OUT = ["parkour", "kite-surf", "02_cups"]

OFF = {"enhance": None, "guide": False, "prior": False, "location": False, "bands": None, "channel": False}
P3 = {"location": True, "bands": "polar", "channel": True}
FULL = {"enhance": "radial", "guide": True, "prior": True, **P3}

NETWORKS: dict[str, dict[str, Any]] = {  # row of the grid -> what is not off
    "A0": {},
    "A0_plain": {"enhance": "plain"},  # the control: as many parameters in plain convolutions
    "A1": {"enhance": "radial"},
    "A2": {"guide": True},
    "A3": {"guide": True, "prior": True},
    "A4": {"location": True},
    "A5r": {"bands": "radial"},
    "A5p": {"bands": "polar"},
    "A5b": {"bands": "bin"},
    "A6": P3,
    "A7": FULL,
    "A9_raw": {**FULL, "logit": "raw"},
    "A9_p0": {**FULL, "energy_power": 0.0},
    "A9_p1": {**FULL, "energy_power": 1.0},
    "A9_p4": {**FULL, "energy_power": 4.0},
    "A9_p11": {**FULL, "energy_power": 11.0},
    "A9_kappa0": {**FULL, "coherence": 0.0},
    "A9_window": {**FULL, "guidance_window": 64},
    "A9_dense": {**FULL, "enhance": "global"},
    "A9_dense_bicubic": {**FULL, "enhance": "global_bicubic"},
    "A10_explicit": {**FULL, "motion_branch": "explicit"},
    "A10_distilled": {**FULL, "motion_branch": "distilled"},
}
FFT = {"fft": {"type": "FFTLoss", "loss_weight": 0.1, "ramp": [0, 20000]}}
LOSSES: dict[str, dict[str, Any]] = {  # more than Charbonnier
    "A8_fft": FFT,
    "A8_energy": {**FFT, "energy": {"type": "SpectrumEnergyLoss", "loss_weight": 0.01}},
    "A8_focal": {"focal": {"type": "FocalFrequencyLoss", "loss_weight": 1.0}},
    "A10_distilled": {"motion": {"type": "AuxiliaryLoss", "name": "motion", "loss_weight": 1e-3}},
}
PRIVILEGED = {"A10_teacher": {"role": "teacher"}, "A10_student": {
    "role": "student", "teacher": "experiments/A10_teacher/models/teacher_600000.safetensors",
}}  # fmt: skip
ROWS = ("A0", "A3", "A6", "A7", "A1", "A0_plain")  # of the small runs, the most telling first


@dataclass(frozen=True)
class Setting:
    """What the small runs are shown and asked for."""

    degradation: dict[str, Any] | None = None
    scale: int = 4
    time_scale: int = 2
    frames: int = 7
    gt_size: int = 96
    network: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "sharp": Setting(),
    "blurred": Setting({"type": "motion_blur", "length_range": [0.0, 16.0]}),
    "deblur": Setting(
        {"type": "exposure", "exposure_range": [0.0, 2.0]}, 1, 1, frames=5, gt_size=128,
        network={"motion_prior": "correlation"},
    ),
}  # fmt: skip


def full_options() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of every row: the recipe of options/stdan_freq.yml, with Charbonnier alone where not said."""
    base = yaml.safe_load((ROOT / "options" / "stdan_freq.yml").read_text(encoding="utf-8"))
    for name in dict.fromkeys([*NETWORKS, *LOSSES, *PRIVILEGED]):
        network = {"type": "stdan_freq", **OFF, **NETWORKS.get(name, FULL)}
        without = {"losses"} if _has_numbers(network) else {"losses", "param_groups"}
        train = {key: value for key, value in base["train"].items() if key not in without}
        if name in LOSSES:
            train["losses"] = LOSSES[name]
        if name in PRIVILEGED:
            train["privileged"] = PRIVILEGED[name]
        yield name, {**base, "name": name, "network_g": network, "train": train}


def _has_numbers(network: Mapping[str, Any]) -> bool:
    """Whether the network has parameters that param_groups names: a group that matches nothing is refused."""
    return bool(network["location"] or network["bands"] or network["prior"])


def small_options(row: str, setting: str, seed: int, iterations: int, start: Path | None) -> dict[str, Any]:
    """Options of one small run: from the weights in ``start``, or the training of such weights."""
    precision = resolve_precision("auto", "cpu")
    shown = SETTINGS[setting]
    network = {
        "type": "stdan_freq", **OFF, **NETWORKS[row],
        "channels": 32, "embed_dim": 32, "trunk": "residual", "encoder_depths": [2], "decoder_depths": [3], "levels": 2,
        "deform_groups": 4, "temporal_radius": 2, "upsampler": "light", "upsample_width": 16, "skip": "bicubic",
        "scale": shown.scale, "time_scale": shown.time_scale, **shown.network,
    }  # fmt: skip
    clips = str(SHARED / "data" / "train")
    shape = {"scale": shown.scale, "time_scale": shown.time_scale, "degradation": shown.degradation}
    test = {"max_frames": 13, **shape}
    rate, last = (5e-4, 1e-6) if start else (1e-3, 2e-4)
    # single numbers whose scale is 1: at the common rate hundreds of steps would not move them there
    numbers = {"match": r"(fusion\.(beta|band\.p|band\.kappa)|guidance\.levels\.\d\.prior)$", "lr_mult": 30}
    return {
        "name": f"{row}-{setting}-{seed}" if start else f"start-{setting}",
        "scale": shown.scale,
        "manual_seed": seed,
        "num_threads": 1,
        "path": {"pretrain_network_g": str(start) if start else None},
        "datasets": {
            "train": {
                "type": "ClipFolder", "dataroot_gt": clips, "exclude": HELD_OUT, "max_frames": 90, **shape,
                "num_frame": shown.frames, "gt_size": shown.gt_size, "batch_size_per_gpu": 4, "num_worker_per_gpu": 0,
            },
            "clips": {"type": "TestClips", "dataroot_gt": clips, "clips": HELD_OUT, **test},
            "vid4": {"type": "vid4", "dataroot_gt": str(SHARED / "data" / "eval" / "Vid4"), **test},
        },
        "network_g": network,
        "train": {
            "total_iter": iterations,
            "optim_g": {"type": "Adam", "lr": rate},
            "scheduler": {"type": "CosineAnnealingRestartLR", "periods": [iterations], "eta_min": last},
            "warmup_iter": 20, "ema_decay": 0.99, "grad_clip": 1.0, "precision": precision,
            "param_groups": [numbers] if _has_numbers(network) else [],
            "pixel_opt": {"type": "CharbonnierLoss"},
        },
        "val": {"val_freq": iterations, "precision": precision},
        "logger": {"print_freq": 50, "save_checkpoint_freq": 100},
    }  # fmt: skip


def run(
    out: Path, jobs: int, seeds: int, iterations: int, start_iterations: int, settings: list[str], names: list[str]
) -> None:
    """Every small run that has not finished yet, seed by seed, ``jobs`` at a time; before them what they start from."""
    out.mkdir(parents=True, exist_ok=True)
    weights = f"models/net_g_{start_iterations}.safetensors"
    starts = {setting: out / f"start-{setting}" / weights for setting in settings}
    first = [small_options("A0", setting, 0, start_iterations, None) for setting in settings]
    rows = [(seed, setting, row) for seed in range(seeds) for setting in settings for row in names]
    then = [small_options(row, setting, seed, iterations, starts[setting]) for seed, setting, row in rows]
    with ThreadPoolExecutor(jobs) as pool:
        for batch in (first, then):
            for options, code in zip(batch, pool.map(lambda options: _train(out, options), batch), strict=True):
                print(f"{options['name']}: {'done' if code == 0 else f'exit code {code}'}", flush=True)


def _train(out: Path, options: dict[str, Any]) -> int:
    file = out / f"{options['name']}.yml"
    options["path"]["experiments"] = str(out)
    file.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(ROOT / "train.py"), "-opt", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out / f"{options['name']}.out").open("a") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode


def table(out: Path) -> str:
    """PSNR-Y by row, setting and test set: mean over seeds, and their spread, and the gain over A0 seed by seed."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for log in sorted(out.glob("A*/log.jsonl")):
        row, setting, seed = log.parent.name.rsplit("-", 2)
        for record in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if "validation" in record:
                found.setdefault((row, setting, record["validation"]), {})[int(seed)] = record["psnr"]
    columns = [key for setting in SETTINGS for key in ((setting, "clips"), (setting, "vid4"))
               if any(key == (shown, test) for _, shown, test in found)]  # fmt: skip
    lines = ["| | " + " | ".join(f"{setting}, {test}" for setting, test in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in dict.fromkeys(key[0] for key in found):
        cells = []
        for setting, test in columns:
            values, plain = found.get((row, setting, test), {}), found.get(("A0", setting, test), {})
            gains = [value - plain[seed] for seed, value in values.items() if seed in plain]
            cells.append(f"{_spread(list(values.values()))} ({_spread(gains, sign=True)})" if values else "")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], *, sign: bool = False) -> str:
    if not values:
        return "-"
    mean = f"{fmean(values):{'+' if sign else ''}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.3f}"


def main() -> None:
    """Write, run or print."""
    parser = argparse.ArgumentParser(description="The ablation of STDAN-freq.")
    parser.add_argument("--write", action="store_true", help="write options/ablation/*.yml")
    parser.add_argument("--run", type=Path, metavar="OUT", help="do the small runs in this folder")
    parser.add_argument("--table", type=Path, metavar="OUT", help="print what the small runs in this folder gave")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(NETWORKS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--start-iterations", type=int, default=1500, help="of the weights that all rows start from")
    arguments = parser.parse_args()
    if arguments.write:
        folder = ROOT / "options" / "ablation"
        folder.mkdir(exist_ok=True)
        for name, options in full_options():
            head = "# yaml-language-server: $schema=../schema.json\n"
            head += f"# Row {name} of the ablation, made by bench/ablation.py.\n"
            text = head + yaml.safe_dump(options, sort_keys=False)
            (folder / f"{name}.yml").write_text(text, encoding="utf-8")
    if arguments.run:
        run(
            arguments.run, arguments.jobs, arguments.seeds, arguments.iterations, arguments.start_iterations,
            arguments.settings, arguments.rows,
        )  # fmt: skip
    if arguments.table:
        print(table(arguments.table))


if __name__ == "__main__":
    main()
