"""Time of DCNv2 against a plain convolution: python -m bench.deformable [--precision bf16] [--threads 2].

64 -> 64 channels, 3x3, 8 groups, six frames of 64x112, displacements of about two pixels. Prints one JSON line a
precision.
"""

import argparse
import json

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.layers.deform import ModulatedDeformConv
from restore.cost import best_seconds
from restore.device import PRECISIONS
from restore.memory import keep_freed_memory


class Given(torch.nn.Module):
    """In the place of the convolution that predicts offsets: those that were given."""

    def __init__(self, displacement: Tensor, modulation: Tensor) -> None:
        super().__init__()
        self.places = displacement.requires_grad_(), modulation.requires_grad_()

    def forward(self, *ignored: object) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.places


def measure(precision: str, size: tuple[int, int] = (64, 112), runs: int = 5) -> dict[str, object]:
    """Milliseconds of a convolution and of DCNv2 forward and backward (all gradients), and their ratios."""
    dtype, (h, w), generator = PRECISIONS[precision] or torch.float32, size, torch.Generator().manual_seed(0)
    layer = ModulatedDeformConv(64, 8)
    displacement = 2 * torch.randn(6, h, w, 8, 9, 2, generator=generator)
    modulation = torch.rand(6, h, w, 8, 9, generator=generator)
    layer.offsets = Given(displacement.permute(0, 3, 4, 5, 1, 2), modulation.permute(0, 3, 4, 1, 2))  # type: ignore
    x = torch.randn(6, 64, h, w, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = layer.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()

    def both() -> None:
        layer(x, x).sum().backward()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        plain = best_seconds(lambda: F.conv2d(x, weight, padding=1), runs)
        forward = best_seconds(lambda: layer(x, x), runs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        backward = best_seconds(both, runs) - forward
    return {
        "precision": precision,
        "convolution_ms": round(1e3 * plain, 2),
        "forward_ms": round(1e3 * forward, 2),
        "backward_ms": round(1e3 * backward, 2),
        "forward_per_convolution": round(forward / plain, 2),
        "backward_per_forward": round(backward / forward, 2),
    }


def main() -> None:
    """Print one JSON line a precision."""
    parser = argparse.ArgumentParser(description="Time of DCNv2 against a plain convolution.")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    for precision in arguments.precision:
        print(json.dumps(measure(precision)))


if __name__ == "__main__":
    main()
