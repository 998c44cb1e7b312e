"""Time of 3x3 convolutions by the compiled kernel against PyTorch's: python -m bench.convolution [--threads 1].

Forward, and the gradients of input and filters together, in float32, best of several runs; one JSON line a size.
"""

import argparse
import json

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.layers.winograd_kernel import conv3x3_kernel, has_kernel
from restore.cost import best_seconds
from restore.memory import keep_freed_memory

SIZES = [(8, 48, 32, 32), (8, 64, 32, 32), (1, 64, 256, 448)]  # batch, channels in and out, height, width


def measure(batch: int, channels: int, height: int, width: int, runs: int = 20) -> dict[str, object]:
    """Milliseconds of the kernel, and how many times PyTorch's convolution takes."""
    x = torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(channels, channels, 3, 3, requires_grad=True), torch.randn(channels, requires_grad=True)
    row: dict[str, object] = {"size": [batch, channels, height, width]}
    seconds: dict[str, tuple[float, float]] = {}
    for name in ("kernel", "torch"):

        def forward(name: str = name) -> Tensor:
            return conv3x3_kernel(x, weight, bias) if name == "kernel" else F.conv2d(x, weight, bias, padding=1)

        y = forward()
        along = torch.randn_like(y)

        def backward(y: Tensor = y, along: Tensor = along) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, (x, weight, bias), along, retain_graph=True)

        with torch.no_grad():
            ahead = best_seconds(forward, runs)
        seconds[name] = ahead, best_seconds(backward, runs)
    for i, way in enumerate(("forward", "backward")):
        row[f"{way}_ms"] = round(1e3 * seconds["kernel"][i], 2)
        row[f"{way}_times_faster"] = round(seconds["torch"][i] / seconds["kernel"][i], 2)
    return row


def main() -> None:
    """Print a line a size."""
    parser = argparse.ArgumentParser(description="Time of 3x3 convolutions against PyTorch's.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if not has_kernel():
        parser.error("the kernel is not here: there is no C compiler, or RESTORE_CONVOLUTION=torch forbids it")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    for size in SIZES:
        print(json.dumps(measure(*size)))


if __name__ == "__main__":
    main()
