"""A picture of real clips restored by a shipped network: python -m bench.picture [-m MODEL] [-o FILE].

Of each held-out clip one row: the input (nearest), bicubic + average, the restored frame and the true one, which is a
frame in between, the middle of it twice as large. README's picture is that of the default.
"""

import argparse
import os
from pathlib import Path

import torch

from restore.checkpoint import DEFAULT_MODEL, load_network
from restore.degrade import quantize
from restore.demo import comparison
from restore.methods import bicubic_average
from restore.sample import low_resolution
from restore.stream import restore_clip
from restore.test_sets import TestClips
from restore.writers import write_image

SHARED = Path(os.environ.get("RESTORE_SHARED", Path(__file__).parents[2] / "shared"))
SHOWN = {"02_cups": 5, "kite-surf": 9}  # clip -> frame; odd ones are synthesised
HEIGHT, WIDTH = 272, 384  # of the middle that is restored


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="A picture of real clips restored by a shipped network.")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help="shipped model or file (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/restored.jpg"))
    arguments = parser.parse_args()
    network = load_network(arguments.model)
    rows = []
    for name, shown in SHOWN.items():
        (clip,) = TestClips(dataroot_gt=str(SHARED / "data/train"), clips=(name,), max_frames=2 * shown + 1).found
        frames = torch.stack(list(clip.truth(range(clip.count)))) / 255
        top, left = ((have - want) // 2 for have, want in zip(frames.shape[2:], (HEIGHT, WIDTH), strict=True))
        truth = frames[..., top : top + HEIGHT, left : left + WIDTH]
        lq = low_resolution(truth)
        restored = quantize(torch.stack(list(restore_clip(network, lq, precision="fp32"))))
        rows.append(comparison(lq, bicubic_average(lq), restored, truth, at=(shown,)))
    write_image(arguments.output, torch.cat(rows, dim=1))


if __name__ == "__main__":
    main()
