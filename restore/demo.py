"""python -m restore.demo: restore the embedded sample clip and show what it gives.

Writes a folder with the low-resolution input, a picture and a video that compare input, baseline, restored and true
frames, and prints the PSNR-Y of both methods.
"""

import argparse
import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from archs import VideoNet
from restore.checkpoint import DEFAULT_MODEL, load_network
from restore.degrade import quantize
from restore.device import resolve_precision
from restore.evaluation import default_metrics, score_frames
from restore.memory import keep_freed_memory
from restore.methods import bicubic_average
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


def main(argv: list[str] | None = None) -> int:
    """Make the demo; 2 for bad input, with one line that says why."""
    parser = argparse.ArgumentParser(prog="python -m restore.demo", description="Restore the embedded sample clip.")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help="shipped model or file (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        run(arguments.output, load_network(arguments.model))
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


def figures(results: dict[str, Float[Tensor, "t 3 H W"]], truth: Float[Tensor, "t 3 H W"]) -> str:
    """PSNR-Y and SSIM-Y of the results as a table."""
    protocol = Protocol()
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
        height, width = truth.shape[2:]
        nearest = F.interpolate(lq[i // 2][None], size=(height, width), mode="nearest")[0]
        kind = "synthesised" if i % 2 else "input time"
        parts = {
            f"input {i // 2}" + (" (the one before)" if i % 2 else ""): nearest,
            f"{BASELINE}, {kind}": baseline[i],
            "restored": restored[i],
            "truth": truth[i],
        }
        centre = (slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4))
        rows.append(side_by_side({name: _twice(frame[:, centre[0], centre[1]]) for name, frame in parts.items()}))
    return torch.cat(rows, dim=1)


def _twice(frame: Tensor) -> Tensor:
    return F.interpolate(frame[None], scale_factor=2, mode="nearest")[0]


if __name__ == "__main__":
    sys.exit(main())
