"""Several processes as one: small functions that do nothing in a single process, so that no loop asks how many.

Processes are started by `torchrun` (``--launcher pytorch``) or by Slurm's `srun` (``--launcher slurm``); gradients are
averaged by PyTorch's DistributedDataParallel.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
Launcher = Literal["none", "pytorch", "slurm"]


@contextmanager
def processes(launcher: Launcher, backend: str | None = None, port: int = 29500) -> Iterator[None]:
    """Join the other processes for the block; ``backend`` None is nccl with a GPU and gloo without."""
    if launcher == "none":
        yield
        return
    if launcher == "slurm":
        _environment_of_slurm(port)
    if "RANK" not in os.environ:
        raise ValueError("--launcher pytorch: start with torchrun, e.g. torchrun --nproc_per_node=4 train.py ...")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 .. world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of ``items``: every world_size()-th, from its rank on."""
    return items[rank() :: world_size()]


def gather(value: T) -> list[T]:
    """The values of all processes in order of rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether any process says so; all processes get the same answer."""
    if world_size() == 1:
        return flag
    answer = torch.tensor(float(flag), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean over processes of every value."""
    if world_size() == 1:
        return values
    total = torch.tensor(list(values.values()), device=device, dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def parallel(network: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:
    """The network with gradients averaged over processes."""
    if world_size() == 1:
        return network
    device = next(network.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        network,
        device_ids=devices,
        broadcast_buffers=False,  # buffers are constants here
        find_unused_parameters=find_unused_parameters,
    )


def _environment_of_slurm(port: int) -> None:
    """What torchrun would set, from what srun sets."""
    if "SLURM_PROCID" not in os.environ:
        raise ValueError("--launcher slurm: start with srun, e.g. srun -N 2 --ntasks-per-node=8 python train.py ...")
    nodes = os.environ["SLURM_NODELIST"]
    first = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    os.environ.setdefault("MASTER_ADDR", first.stdout.split()[0])
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
