"""python -m restore.demo: restore the embedded sample clip and show what it gives.

Writes a folder with the low-resolution input, a picture and a video that compare input, baseline, restored and true
frames, and prints the PSNR-Y of both methods; then, where a deblurring network ships, the same clip blurred as by an
open shutter, deblurred: a picture, and the PSNR of both.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from archs import VideoNet
from restore.checkpoint import DEFAULT_MODEL
from restore.degrade import quantize
from restore.degrade_exposure import Exposure
from restore.device import resolve_precision
from restore.evaluation import default_metrics, score_frames
from restore.memory import keep_freed_memory
from restore.methods import bicubic_average
from restore.metrics import psnr
from restore.models import load_for_task, shipped_for
from restore.protocol import Protocol
from restore.sample import low_resolution, sample_clip
from restore.scores import ClipScore, as_record
from restore.sheets import side_by_side
from restore.stream import restore_clip
from restore.tables import as_text
from restore.writers import FrameFolderWriter, VideoWriter, write_image

FRAMES, HEIGHT, WIDTH, FPS = 31, 256, 448, 25
BASELINE = "bicubic + average"
SHOWN = (13, 22)  # a synthesised frame and one at an input time
BLURRED_FRAMES, EXPOSURES = 11, (0.5, 2.0)  # of the deblurring picture; in intervals between frames


def main(argv: list[str] | None = None) -> int:
    """Make the demo; 2 for bad input, with one line that says why."""
    parser = argparse.ArgumentParser(prog="python -m restore.demo", description="Restore the embedded sample clip.")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help="shipped model or file (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        _, network = load_for_task("sr", arguments.model)
        run(arguments.output, network)
        if shipped_for("deblur"):
            name, network = load_for_task("deblur", None)
            deblur(arguments.output, name, network)
        else:
            print("no deblurring network ships yet: no deblurred.png")
    except ValueError as error:
        print(f"restore.demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(folder: Path, network: VideoNet) -> None:
    """Degrade, restore, score and show the sample clip in ``folder``."""
    keep_freed_memory()
    truth = sample_clip(FRAMES, HEIGHT, WIDTH)
    lq = low_resolution(truth, scale=network.scale, time_scale=network.time_scale)
    with FrameFolderWriter(folder / "input") as writer:
        for i, frame in enumerate(lq):
            writer.write(f"{network.time_scale * i:08d}", frame)
    frames = restore_clip(network, lq, precision=resolve_precision("auto", "cpu"))
    bar = tqdm(frames, "restoring", len(truth), unit=" frames", disable=not sys.stderr.isatty())
    restored = quantize(torch.stack(list(bar)))
    baseline = quantize(bicubic_average(lq, network.scale))
    write_image(folder / "comparison.png", comparison(lq, baseline, restored, truth, at=SHOWN))
    with VideoWriter(folder / "comparison.mp4", FPS, crf=12) as video:
        for left, right in zip(baseline, restored, strict=True):
            video.write(side_by_side({BASELINE: left, "restored": right}))
    print(figures({BASELINE: baseline, "restored": restored}, truth))
    print(f"written: {folder}/comparison.png, {folder}/comparison.mp4, {folder}/input/")
    print(f"next: python -m restore {folder}/input -o {folder}/output")


def deblur(folder: Path, name: str, network: VideoNet) -> None:
    """Blur the sample clip by exposures that differ from frame to frame, restore it, show the most blurred frames."""
    truth = sample_clip(BLURRED_FRAMES, HEIGHT, WIDTH)
    blurred = Exposure(scale=1, exposure_range=EXPOSURES)(truth, np.random.default_rng(0))
    frames = restore_clip(network, blurred, window=7, temporal_overlap=3, precision=resolve_precision("auto", "cpu"))
    bar = tqdm(frames, "deblurring", len(truth), unit=" frames", disable=not sys.stderr.isatty())
    restored = quantize(torch.stack(list(bar)))
    worst = psnr(blurred, truth, y_channel=False).argsort()[:2].tolist()
    rows = [
        _crops({f"blurred, frame {i}": blurred[i], f"restored by {name}": restored[i], "truth": truth[i]})
        for i in sorted(worst)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / "deblurred.png", torch.cat(rows, dim=1))
    protocol = Protocol(scale=1, time_scale=1, color="rgb")
    print(figures({"blurred": blurred, name: restored}, truth, protocol))
    print(f"written: {folder}/deblurred.png")


def figures(
    results: dict[str, Float[Tensor, "t 3 H W"]], truth: Float[Tensor, "t 3 H W"], protocol: Protocol | None = None
) -> str:
    """PSNR and SSIM of the results as a table, by the published space-time protocol, on Y, unless another is given."""
    protocol = protocol or Protocol()
    metrics = default_metrics(protocol)
    scores = [
        ClipScore("sample clip", name, score_frames(restored, truth, protocol, metrics))
        for name, restored in results.items()
    ]
    return as_text(as_record(scores, metrics, {}, set="sample clip"))


def comparison(
    lq: Tensor, baseline: Tensor, restored: Tensor, truth: Tensor, *, at: tuple[int, ...]
) -> Float[Tensor, "3 sheet_h sheet_w"]:
    """A sheet: for each output frame of ``at`` a row of input (nearest), baseline, restored, truth, cropped x2."""
    rows = []
    for i in at:
        nearest = F.interpolate(lq[i // 2][None], size=truth.shape[2:], mode="nearest")[0]
        kind = "synthesised" if i % 2 else "input time"
        parts = {
            f"input {i // 2}" + (" (the one before)" if i % 2 else ""): nearest,
            f"{BASELINE}, {kind}": baseline[i],
            "restored": restored[i],
            "truth": truth[i],
        }
        rows.append(_crops(parts))
    return torch.cat(rows, dim=1)


def _crops(parts: dict[str, Float[Tensor, "3 H W"]]) -> Float[Tensor, "3 row_h row_w"]:
    """The middles of frames, twice as large, next to each other under their names."""
    height, width = next(iter(parts.values())).shape[1:]
    rows, columns = slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4)
    return side_by_side({name: _twice(frame[:, rows, columns]) for name, frame in parts.items()})


def _twice(frame: Tensor) -> Tensor:
    return F.interpolate(frame[None], scale_factor=2, mode="nearest")[0]


if __name__ == "__main__":
    sys.exit(main())
