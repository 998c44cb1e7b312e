"""What a network costs: parameters, multiply-adds, time, as tables print them."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from archs.layers import deform_kernel, window_kernel, winograd_kernel

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    """Trainable and frozen parameters together."""
    return sum(parameter.numel() for parameter in network.parameters())


def counting() -> "FlopCounterMode":
    """PyTorch's counter, which is told what the compiled kernels do: two operations a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where there is one, which takes a second

    kernels = {**deform_kernel.FLOPS, **window_kernel.FLOPS, **winograd_kernel.FLOPS}
    return FlopCounterMode(display=False, custom_mapping=kernels)


def count_gmac(network: nn.Module, frames: int, height: int, width: int) -> float:
    """Multiply-adds, in 1e9, of one clip of (frames, height, width) input, counted while it runs.

    Convolutions, matrix products and attention count, as PyTorch's FlopCounterMode has them; sampling, normalisation
    and activations do not.
    """
    parameter = next(network.parameters())
    clip = torch.zeros(1, frames, 3, height, width, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), counting() as counter:
        network(clip)
    return counter.get_total_flops() / 2e9


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable[[], object], runs: int, device: torch.device | None = None) -> float:
    """The least wall time of ``runs`` after one to warm up."""
    device = device or torch.device("cpu")
    work()
    times = []
    for _ in range(runs):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
