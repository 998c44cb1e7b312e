"""make bench: what networks, DCNv2 and a training step take on this machine, as ratios; JSON in results/bench.json.

Every row is measured in a process of its own, one after the other, and compared with a convolution of the same process
or with another row: quote the ratios, since machines are shared and noisy.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from archs.layers.compiled import has_amx
from bench.plain import PLAIN

Row = dict[str, Any]
STEPS = {"plain": ["--plain"], "fast": [], "recomputing": ["--recompute"]}


def rows_of(module: str, *arguments: str, **environment: str) -> list[Row]:
    """What ``python -m bench.<module>`` prints."""
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(threads: int, size: str, crop: int, runs: int, networks: list[str]) -> Row:
    """All rows, and the machine they belong to."""
    common = ["--threads", str(threads)]
    speed = [rows_of("speed", name, "--precision", precision, "--size", size, "--runs", str(runs), *common)[0]
             for name in networks for precision in ("fp32", "bf16")]  # fmt: skip
    steps = {}
    for name, flags in STEPS.items():
        environment = PLAIN if name == "plain" else {}
        steps[name] = rows_of("step", *flags, "--crop", str(crop), "--runs", str(runs), *common, **environment)[0]
    return {"machine": machine(), "threads": threads, "networks": speed, "deformable": rows_of("deformable", *common),
            "training": steps}  # fmt: skip


def machine() -> str:
    """The processor's widest instructions, as PyTorch names them, and AMX, which decides over bf16."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()} {'with' if has_amx() else 'without'} AMX"


def render(result: Row) -> str:
    """The table as text."""
    lines = [f"{result['machine']}, {result['threads']} threads, PyTorch {torch.__version__}", ""]
    lines.append("network      precision  parameters    GMAC        s  x limit  frames/s  peak MB")
    for row in result["networks"]:
        lines.append(
            f"{row['network']:<12} {row['precision']:<9} {row['parameters']:>11,} {row['gmac']:>7} {row['seconds']:>8}"
            f" {row['times_limit']:>8} {row['frames_per_s']:>9} {row['peak_mb']:>8}"
        )
    lines += ["", "DCNv2        forward ms  x convolution  backward ms  x forward"]
    for row in result["deformable"]:
        lines.append(
            f"{row['precision']:<12} {row['forward_ms']:>10} {row['forward_per_convolution']:>14}"
            f" {row['backward_ms']:>12} {row['backward_per_forward']:>10}"
        )
    lines += ["", "training step       s  x faster than plain  MB of a step"]
    plain = result["training"]["plain"]["seconds"]
    for name, row in result["training"].items():
        lines.append(f"{name:<13} {row['seconds']:>7} {plain / row['seconds']:>20.2f} {row['step_mb'] or '-':>13}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Speed of networks, DCNv2 and a training step, as ratios.")
    parser.add_argument("networks", nargs="*", default=["stdan", "stdan_s", "stdan_freq_s"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", default="64x112", help="of the networks' input, HxW")
    parser.add_argument("--crop", type=int, default=32, help="pixels of the training step's input")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/bench.json"))
    arguments = parser.parse_args(argv)
    result = measure(arguments.threads, arguments.size, arguments.crop, arguments.runs, arguments.networks)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))


if __name__ == "__main__":
    main()
