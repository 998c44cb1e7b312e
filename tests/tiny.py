"""Small networks and helpers that several tests share."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]

PUBLISHED: dict[str, Any] = {  # as published, but narrow and shallow
    "channels": 8, "embed_dim": 8, "heads": 2, "encoder_depths": (2,), "decoder_depths": (1,), "levels": 2,
    "deform_groups": 2,
}  # fmt: skip
COMPACT: dict[str, Any] = {  # with attention, and every other departure from the published network
    **PUBLISHED, "levels": 1, "upsampler": "light", "upsample_width": 4, "temporal_radius": 1, "skip": "bicubic",
    "motion_prior": "correlation",
}  # fmt: skip

RECURRENT: dict[str, Any] = {  # convolutions and propagation in the place of all attention
    "channels": 8, "encoder_depths": (1,), "decoder_depths": (1,), "deform_groups": 2, "propagation_depth": 1,
    "trunk": "residual", "between": "warp", "exchange": "propagation", "upsampler": "light", "upsample_width": 4,
    "skip": "bicubic", "motion_prior": "correlation",
}  # fmt: skip

FUSION: dict[str, Any] = {"location": True, "bands": "polar", "channel": True}  # the components that are off by default
FREQUENCY: dict[str, Any] = {**PUBLISHED, **FUSION, "dct_condition": True}  # stdan_freq with every component

# sharp frames of the input's size: with every component; without interpolation, guided offsets in STDFA
DEBLUR: dict[str, Any] = {**PUBLISHED, "scale": 1, "time_scale": 1, "window": 4, "upsampler": "light"}
JOINT: dict[str, Any] = {**COMPACT, "scale": 1, "window": 4}  # sharp frames and those in between
ALONE: dict[str, Any] = {  # every frame restored alone
    "channels": 8, "encoder_depths": (1,), "decoder_depths": (1,), "deform_groups": 2, "scale": 1, "time_scale": 1,
    "trunk": "residual", "exchange": None, "upsampler": "light", "upsample_width": 4,
}  # fmt: skip
HALF: dict[str, Any] = {**DEBLUR, "grid": 2, "embed": "unshuffle"}  # on a grid of half the size
HALF_RECURRENT: dict[str, Any] = {**RECURRENT, "scale": 1, "time_scale": 1, "grid": 2, "embed": "unshuffle"}

# stdan_freq without its components: with parts of action networks, at both sizes
OFF: dict[str, Any] = {
    "enhance": None, "guide": False, "prior": False, "location": False, "bands": None, "channel": False,
}  # fmt: skip
WITH_DTF: dict[str, Any] = {**PUBLISHED, **OFF, "temporal": "dtf", "extractor": "dtf_resnet"}
WITH_ATM: dict[str, Any] = {**DEBLUR, **OFF, "temporal": "atm", "extractor": "atm_resnet"}


def awaken(network: nn.Module, scale: float = 0.02) -> nn.Module:
    """Replace zeros by noise, so that offsets, refinements and skips that start silent take part."""
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=scale, generator=generator)
    return network


def seeded_clip(*shape: int, seed: int = 0) -> Tensor:
    """Uniform noise, the same in every run."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Mean |difference| over mean |expected|."""
    return float((result.double() - expected.double()).abs().mean() / expected.double().abs().mean())


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """No enforcement of annotations: what a user meets who gives a wrong shape or choice."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that can import the project and the tests' helpers, annotations not enforced."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
