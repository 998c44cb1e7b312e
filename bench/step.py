"""Time and memory of one training step on this machine: python -m bench.step [--plain] [--recompute].

The recipe of options/stdan.yml but for the batch: one sample, 4 frames of 32x32 -> 7 of 128x128, Charbonnier loss,
Adam, stochastic depth. Prints one JSON line. ``--plain`` takes the order of the published program (`bench.plain`; set
`bench.plain.PLAIN` in the environment, too), ``--recompute`` is ``train.activation_checkpointing``.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from archs import STDAN
from bench.plain import plain_forward
from restore.cost import best_seconds
from restore.losses import CharbonnierLoss
from restore.memory import give_back_memory, keep_freed_memory, peak_during_mb, resident_bytes
from restore.run import lay_channels_last, recompute_activations


def training_step(network: STDAN, forward: Callable[[Tensor], Tensor], crop: int) -> Callable[[], None]:
    """A function that makes one step on a sample of noise."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(1, 4, 3, crop, crop, generator=generator)
    truth = torch.rand(1, 7, 3, 4 * crop, 4 * crop, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.9, 0.99))
    loss = CharbonnierLoss(reduction="sum")

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)  # so that gradients count as held
        loss(forward(clip), truth).backward()
        optimizer.step()

    return step


def measure(network: STDAN, *, plain: bool, recompute: bool, crop: int, runs: int) -> dict[str, object]:
    """Best seconds of a step, and MB that it needs beyond what the process holds between steps."""
    network.train()
    if recompute:
        recompute_activations(network)
    if not plain:
        lay_channels_last(network)
    step = training_step(network, partial(plain_forward, network) if plain else network, crop)
    seconds = best_seconds(step, runs)
    give_back_memory(torch.device("cpu"))
    held, peak = resident_bytes() >> 20, peak_during_mb(step)  # held: weights, gradients, moments, PyTorch itself
    needed = None if peak is None else peak - held
    return {"plain": plain, "recompute": recompute, "seconds": round(seconds, 3), "step_mb": needed}


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description="Time and memory of one training step.")
    parser.add_argument("--plain", action="store_true", help="in the order of the published program")
    parser.add_argument("--recompute", action="store_true", help="with activation checkpointing")
    parser.add_argument("--crop", type=int, default=32, help="pixels of the input")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    flags = {"plain": arguments.plain, "recompute": arguments.recompute}
    print(json.dumps(measure(STDAN(), **flags, crop=arguments.crop, runs=arguments.runs)))


if __name__ == "__main__":
    main()
