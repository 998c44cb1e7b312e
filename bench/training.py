"""Iterations a second of a training run, and the share of time it waits for data: python -m bench.training [options].

Trains for some iterations of an options file in a temporary folder and prints one JSON line: what the log of any run
holds, averaged over the second half of these iterations.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

from restore.options import load_options
from restore.training import train


def measure(options_file: str, overrides: list[str], iterations: int) -> dict[str, object]:
    """Figures of ``iterations`` iterations, without those of the first half, in which caches fill."""
    every = max(iterations // 10, 1)
    with tempfile.TemporaryDirectory() as folder:
        short = [f"path.experiments={folder}", f"train.total_iter={iterations}", f"logger.print_freq={every}"]
        options = load_options(options_file, [*overrides, *short, "val.val_freq=null", "logger.use_tb_logger=false"])
        train(options)
        log = (Path(folder) / options.name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in log if (record := json.loads(line))["iteration"] > iterations // 2]
    assert options.train is not None
    samples = options.train_set.batch_size_per_gpu * options.train.accum_iter
    rate = fmean(record["samples_per_s"] for record in records)
    return {
        "options": options_file,
        "iterations_per_s": round(rate / samples, 3),
        "samples_per_s": round(rate, 2),
        "data_share": round(fmean(record["data_share"] for record in records), 4),
        "memory_mb": max(record["memory_mb"] for record in records),
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description="Iterations a second of a training run.")
    parser.add_argument("options", nargs="?", default="options/sample.yml")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.options, arguments.set, arguments.iterations)))


if __name__ == "__main__":
    main()
