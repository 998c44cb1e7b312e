"""Which program does the deformable sampling: the table of backends, and the choice among them for a device.

`RESTORE_DEFORM` names one of `BACKENDS`; "auto", the default, takes the first of `PREFERENCE` that is here, and
PyTorch alone where none is. The choice is made once a process and kind of device, with one line in the log where
something better was there in vain. Sampling, attention and the whole convolution are separate jobs: what the chosen
backend does not do itself is done by the next one, or made out of samples (`archs.layers.deform`).
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from archs.layers import compiled, deform_operators, deform_torch
from archs.layers import deform_kernel as cpp

VARIABLE = "RESTORE_DEFORM"

log = logging.getLogger(__name__)

Attender = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]  # deform_torch.attend
Convolver = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # deform_operators.convolve_torchvision


class Backend(NamedTuple):
    """What a backend does; None is what is left to others."""

    missing: Callable[[str], str]  # kind of device -> why it cannot be used there, "" if it can
    sample: deform_torch.Sampler | None = None
    attend: Attender | None = None
    convolve: Convolver | None = None
    channels: int = sys.maxsize  # of a group, at most: wider ones are PyTorch's


def _always(kind: str) -> str:
    return ""


def _missing_cpp(kind: str) -> str:
    if kind != "cpu":
        return "it is made for a CPU"
    return "" if cpp.kernel() is not None else "its C code cannot be compiled here"


def _sample_cpp(mode: int, x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor) -> Tensor:
    """By the kernel of `deform_kernel.c`."""
    storage = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    y = cpp.deform_kernel(
        x.to(storage).permute(0, 2, 3, 1),
        query.to(storage).permute(0, 2, 3, 1),
        displacement.permute(0, 4, 5, 1, 2, 3),
        weight.permute(0, 3, 4, 1, 2),
        mode,
    )
    if mode == cpp.TAPS:
        return y.permute(0, 4, 3, 1, 2).to(x.dtype)  # (B, H, W, K, C) -> (B, C, K, H, W)
    return y.permute(0, 3, 1, 2).to(torch.float32 if mode == cpp.DOT else x.dtype)


def _attend_cpp(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """By one kernel where no gradient is wanted, for it has no backward; else out of samples."""
    given = query, key, value, displacement, weight
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return deform_torch.attend(_sample_cpp, *given, top_k)
    return cpp.attend(*given, top_k)


def _missing_triton(kind: str) -> str:
    """Tried on one pixel: Triton may be installed without a compiler for its launcher, or not know the device."""
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it is made for a GPU (on a CPU there is only Triton's interpreter, with TRITON_INTERPRET=1)"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        from archs.layers import deform_triton

        image = torch.zeros(1, 1, 1, 1, device=kind)
        deform_triton.sample(cpp.TAPS, image, image, image.expand(1, 1, 1, 2, 1, 1), image[None])
    except Exception as error:  # of many kinds, from a compiler, a driver or Python
        return f"Triton fails on this device ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]})"
    return ""


def _sample_triton(mode: int, x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor) -> Tensor:
    from archs.layers import deform_triton

    return deform_triton.sample(mode, x, query, displacement, weight)


def _attend_triton(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    from archs.layers import deform_triton_attention

    return deform_triton_attention.attend(query, key, value, displacement, weight, top_k)


BACKENDS = {
    "torch": Backend(_always, deform_torch.sample),
    "cpp": Backend(_missing_cpp, _sample_cpp, _attend_cpp, cpp.convolve, cpp.MAX_CHANNELS),
    "triton": Backend(_missing_triton, _sample_triton, _attend_triton),
    "torchvision": Backend(deform_operators.missing_torchvision, convolve=deform_operators.convolve_torchvision),
    "mmcv": Backend(deform_operators.missing_mmcv, convolve=deform_operators.convolve_mmcv),
}
PREFERENCE = {"cpu": ("cpp",), "cuda": ("triton", "torchvision", "mmcv")}  # kind of device -> the best first


class Choice(NamedTuple):
    """Names of the backends that sample and that do the whole convolution; "" makes it out of samples."""

    sampling: str
    convolution: str

    def __str__(self) -> str:
        alone = self.convolution in ("", self.sampling)
        return self.sampling if alone else f"{self.convolution}, and {self.sampling} for samples"


@functools.cache
def choice(kind: str) -> Choice:
    """The backends for a kind of device. ValueError if `RESTORE_DEFORM` names none, or one that cannot be used."""
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in ("auto", *BACKENDS):
        raise ValueError(f"{VARIABLE}={asked}: there is auto, {', '.join(BACKENDS)}")
    if asked != "auto" and (reason := BACKENDS[asked].missing(kind)):
        raise ValueError(f"{VARIABLE}={asked} cannot be used on {kind}: {reason}; {VARIABLE}=auto takes what can")
    first = (asked,) if asked != "auto" else ()
    order = (*first, *(name for name in PREFERENCE.get(kind, ()) if name not in first), "torch")
    usable = (name for name in order if name in first or not _missing(name, kind))
    best = next(usable)
    sampling = best if BACKENDS[best].sample else next(name for name in usable if BACKENDS[name].sample)
    return Choice(sampling, best if BACKENDS[best].convolve else "")


def _missing(name: str, kind: str) -> str:
    """Why a backend cannot be used; said in the log of Triton, without which all is slower (C's kernel says it itself).
    """
    reason = BACKENDS[name].missing(kind)
    if reason and name == "triton":
        log.info("deformable sampling goes without Triton's kernels: %s", reason)
    return reason


@compiled.constant
def _chosen(kind: str, job: str) -> str:
    return getattr(choice(kind), job)


def sampler(x: Tensor, groups: int) -> deform_torch.Sampler:
    """What samples ``x`` in so many groups; an exported program has PyTorch's own operations only."""
    sample = _backend(x, groups, "sampling").sample
    assert sample is not None, "the choice is one that samples"
    return sample


def attender(x: Tensor, groups: int) -> Attender:
    """What does the attention to ``x``: its backend, or the samples of its backend."""
    return _backend(x, groups, "sampling").attend or functools.partial(deform_torch.attend, sampler(x, groups))


def convolver(x: Tensor, groups: int) -> Convolver | None:
    """What does the whole convolution of ``x``, if anything does."""
    return _backend(x, groups, "convolution").convolve


def _backend(x: Tensor, groups: int, job: str) -> Backend:
    name = "" if torch.compiler.is_exporting() else _chosen(x.device.type, job)
    found = BACKENDS[name or "torch"]
    return found if x.shape[1] // groups <= found.channels else BACKENDS["torch"]
