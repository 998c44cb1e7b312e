"""Where and how precisely to compute: devices, precision, autocast."""

import torch

from archs.layers.compiled import has_amx

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device that ``name`` stands for; "auto" is a GPU where there is one. ValueError for one that is not here."""
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    here = ["cpu", *(["cuda"] if cuda else []), *(f"cuda:{n}" for n in range(cuda)), *(["mps"] if mps else [])]
    if name not in here:
        raise ValueError(f"device {name}: not on this machine; there is auto, {', '.join(here)}")
    return torch.device(name)


def check_precision(precision: str, *others: str) -> None:
    """Raise ValueError for a name that is neither one of `PRECISIONS` nor of ``others``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is none of {', '.join((*others, *PRECISIONS))}")


def resolve_precision(precision: str, device: str | torch.device) -> str:
    """``precision``, with "auto" turned into the fastest that the device computes without harm: bf16, fp16 or fp32.

    ValueError for a name that is neither "auto" nor one of `PRECISIONS`.
    """
    kind = torch.device(device).type
    if precision != "auto":
        check_precision(precision, "auto")
        return precision
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if kind == "cpu" and has_amx() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for a network's forward pass; with fp32 it does nothing."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
