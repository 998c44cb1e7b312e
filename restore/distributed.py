"""Several processes as one: small functions that do nothing in a single process, so that no loop asks how many.

Processes are started by `torchrun` (``--launcher pytorch``) or by Slurm's `srun` (``--launcher slurm``); gradients are
averaged by PyTorch's DistributedDataParallel. A process whose peer has died ends with `LostProcess`; after
`torchrun --max-restarts=N` has started all of them again they continue from the last saved state.
"""

import hashlib
import inspect
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
Launcher = Literal["none", "pytorch", "slurm"]
ARRIVAL = 1800.0  # seconds within which all processes must have started; PyTorch's own limit


class LostProcess(RuntimeError):  # noqa: N818 - named for what has happened
    """Another process has ended or cannot be reached, so that this one cannot go on."""


@contextmanager
def processes(launcher: Launcher) -> Iterator[None]:
    """Join the other processes for the block: gloo for what is on the CPU, nccl for what is on a GPU.

    ValueError where they were not started as ``launcher`` says or do not find each other, `LostProcess` when one of
    them ends before the others.
    """
    if launcher == "none":
        yield
        return
    if launcher == "slurm":
        _environment_of_slurm()
    if "RANK" not in os.environ:
        raise ValueError("--launcher pytorch: start with torchrun, e.g. torchrun --nproc_per_node=4 train.py ...")
    if torch.cuda.is_available():  # Slurm may show each process its own GPU only, which then is number 0
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        _meet()
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(f"--launcher {launcher}: the processes did not meet at {where} ({_reason(error)})") from error
    try:
        yield
    except RuntimeError as error:
        if not _of_a_peer(error):
            raise
        lost = f"another process has ended or cannot be reached ({_reason(error)})"
        raise LostProcess(f"{lost}; the same command continues from the last saved state") from error
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
    parallel_class = nn.parallel.DistributedDataParallel
    # buffers are constants but for the statistics of norms over batches, where those of process 0 count; the keyword
    # that says so changed its name in PyTorch 2.13
    named = "forward_sync_buffers" in inspect.signature(parallel_class).parameters
    varying = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    sync: dict[str, Any] = {"forward_sync_buffers" if named else "broadcast_buffers": varying}
    return parallel_class(network, device_ids=devices, find_unused_parameters=find_unused_parameters, **sync)


def _meet() -> None:
    """Make the group of all processes that the environment (MASTER_ADDR, RANK, ...) speaks of."""
    store, number, many = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(_common_word(store, number, many), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=many)


def _common_word(store: dist.Store, number: int, many: int) -> str:
    """A word that the ``many`` processes of one start have in common, and those of no other start.

    The store of torchrun outlives a restart, with the addresses of the dead, and who takes one for new waits for ever
    (pytorch issue 135712). So each process writes a new word, and a digest of the words of all as it finds them, until
    all digests are equal: whoever wrote this one has read the new words, hence lives.
    """
    store.set(f"word/{number}", uuid.uuid4().hex)
    end = time.monotonic() + ARRIVAL
    while time.monotonic() < end:
        words = store.multi_get([f"word/{i}" for i in range(many)])
        digest = hashlib.sha256(b"".join(words)).hexdigest()
        store.set(f"read/{number}", digest)
        if set(store.multi_get([f"read/{i}" for i in range(many)])) == {digest.encode()}:
            return digest
        time.sleep(0.05)
    raise dist.DistStoreError(f"not all of {many} processes have come")


def _of_a_peer(error: RuntimeError) -> bool:
    """Whether a collective has failed for want of another process; gloo raises errors without a class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _reason(error: RuntimeError) -> str:
    """The first sentence, without the place in PyTorch's source."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]


def _environment_of_slurm() -> None:
    """What torchrun would set, from what srun sets; MASTER_ADDR and MASTER_PORT stay where they are set."""
    missing = [name for name in ("SLURM_PROCID", "SLURM_NTASKS") if name not in os.environ]
    if missing:
        example = "srun -N 2 --ntasks-per-node=8 python train.py ..."
        raise ValueError(f"--launcher slurm: {missing[0]} is not set; start with srun, e.g. {example}")
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_node()
    # by number of the job, since two jobs may share a node
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")


def _first_node() -> str:
    """Where process 0 is: the first node of this job step, which may have only some of the job's."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "")
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        asked = f"scontrol show hostnames {nodes}"
        raise ValueError(f"--launcher slurm: {asked!r} named no node; set MASTER_ADDR to the first node") from error
