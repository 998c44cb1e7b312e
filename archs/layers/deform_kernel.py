"""The compiled CPU kernel of deformable sampling: built on first use with the machine's C compiler, cached, optional.

Where no compiler is found `kernel()` is None and `archs.layers.deform` samples with PyTorch alone, several times
slower and equal to rounding. The kernel is plain C behind ctypes, so it builds in a second and needs no headers of
PyTorch; it is registered as a custom operator, so that autograd and `torch.compile` know it.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCES = [Path(__file__).with_name(name) for name in ("deform_kernel.c", "deform_kernel.h")]
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-shared", "-fPIC", "-std=c11")

log = logging.getLogger(__name__)


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, or None (logged once) where it cannot be built or `RESTORE_DEFORM=torch` forbids it."""
    if os.environ.get("RESTORE_DEFORM") == "torch":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.info("no C compiler found: deformable sampling runs in plain PyTorch (slower, same numbers)")
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.info("the deformable kernel did not build (%s): sampling in plain PyTorch", reason.strip()[:200])
        return None


_found = False  # what the last eager call of has_kernel has said


def has_kernel() -> bool:
    """Whether `kernel()` gives one. `torch.compile` cannot trace the search and takes what eager calls have found."""
    global _found
    if not torch.compiler.is_compiling():
        _found = kernel() is not None
    return _found


def _build(compiler: str) -> Path:
    """Compile into the user's cache under a name that changes with source, flags and processor."""
    sources = [source.read_text() for source in SOURCES]
    identity = "\0".join([*sources, *FLAGS, compiler, platform.machine(), _processor()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "restore"
    library = cache / f"deform_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            command = [compiler, *FLAGS, str(SOURCES[0]), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)  # atomic: several processes may build at once
    return library


def _processor() -> str:
    """The processor's instruction sets: a home folder shared by unlike machines must not share the library."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    return flags[0] if flags else platform.processor()


TAPS, SUM, DOT = range(3)  # the modes of deform_kernel.c
MAX_CHANNELS = 256  # of a group


def _call(name: str, mode: int, tensors: list[Tensor], x: Tensor, weight: Tensor) -> None:
    """Run one kernel on dense tensors; the types and sizes are those of ``x`` and ``weight``."""
    library = kernel()
    assert library is not None, "the caller asks kernel() first"
    batch, height, width, channels = x.shape
    groups, taps = weight.shape[3:]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    sizes = map(ctypes.c_int64, (batch, height, width, groups, taps, channels // groups))
    suffix = "bf16" if x.dtype == torch.bfloat16 else "f32"
    function = getattr(library, f"{name}_{suffix}")
    function(ctypes.c_int(mode), *pointers, *sizes, ctypes.c_int(torch.get_num_threads()))


def _output(x: Tensor, weight: Tensor, mode: int) -> Tensor:
    taps = weight.shape[4]
    if mode == DOT:
        return torch.empty(*x.shape[:3], taps, device=x.device, dtype=torch.float32)
    return x.new_empty(*x.shape[:3], *((taps,) if mode == TAPS else ()), x.shape[3])


@torch.library.custom_op("restore_archs::deform", mutates_args=(), device_types="cpu")
def deform_kernel(x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, mode: int) -> Tensor:
    """Channels-last sampling as `deform_kernel.c` describes; ``query`` is read in mode DOT only.

    x, query: (B, H, W, C) float32 or bfloat16; displacement (B, H, W, G, K, 2) and weight (B, H, W, G, K) float32.
    """
    x, query, displacement, weight = (tensor.contiguous() for tensor in (x, query, displacement, weight))
    y = _output(x, weight, mode)
    _call("deform_forward", mode, [x, query, displacement, weight, y, y], x, weight)
    return y


@deform_kernel.register_fake
def _(x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, mode: int) -> Tensor:
    return _output(x, weight, mode)


@torch.library.custom_op("restore_archs::deform_backward", mutates_args=(), device_types="cpu")
def _backward_kernel(
    x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, gy: Tensor, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, query, displacement, weight, gy = (
        tensor.contiguous() for tensor in (x, query, displacement, weight, gy)
    )
    gx = torch.zeros_like(x, dtype=torch.float32)  # many samples add up: not in bf16
    gquery = torch.empty_like(query, dtype=torch.float32) if mode == DOT else query.new_empty(0)
    places = torch.empty_like(displacement), torch.empty_like(weight)
    _call("deform_backward", mode, [x, query, displacement, weight, gy, gy, gx, gquery, *places], x, weight)
    return gx.to(x.dtype), gquery.to(query.dtype), *places


@_backward_kernel.register_fake
def _(
    x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, gy: Tensor, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gquery = torch.empty_like(query) if mode == DOT else query.new_empty(0)
    return torch.empty_like(x), gquery, torch.empty_like(displacement), torch.empty_like(weight)


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gy: Tensor) -> tuple[Tensor | None, ...]:
    gx, gquery, gdisplacement, gweight = _backward_kernel(*ctx.saved_tensors, gy, ctx.mode)
    return gx, gquery if ctx.mode == DOT else None, gdisplacement, gweight, None


deform_kernel.register_autograd(_backward, setup_context=_save_inputs)
