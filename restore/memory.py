"""What the process does with memory: peak use, keeping or giving back freed pages, a limit, running out of it."""

import ctypes
import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 2**29}  # arena_max, mmap_max, trim_threshold, top_pad (malloc.h)


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; True where that is possible.

    By default large tensors are mapped anew in every training step and their pages faulted in one by one. Measured for
    a small network on one core: 2.54 s a step with no page faults, against 2.84 s with about 100,000. Other systems are
    left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(ctypes.c_int(option), ctypes.c_int(value)) for option, value in _MALLOPT.items()])


def peak_memory_mb() -> int:
    """Peak memory: of the GPU where one is used, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def peak_during_mb(work: Callable[[], object]) -> int | None:
    """Peak memory while ``work`` runs: of the GPU where one is used, else of this process; None where nothing tells.

    On Linux the kernel's high-water mark is reset first, and freed pages that glibc keeps are given back.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() >> 20
    give_back_memory(torch.device("cpu"))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        work()
        return None
    work()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) >> 10  # type: ignore[index]


def resident_bytes() -> int:
    """Memory that the process holds now; ValueError where the system does not tell (it does on Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        raise ValueError("this system does not tell how much memory a process holds") from None
    return pages * resource.getpagesize()


def give_back_memory(device: torch.device) -> None:
    """Return freed memory that PyTorch (on a GPU) or glibc keep, as far as they can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def limit_memory(device: torch.device, count: int) -> None:
    """Make a GPU's allocator raise torch.OutOfMemoryError beyond ``count`` bytes; a CPU knows no such limit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(count / total, 1.0), device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or a CPU."""
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
