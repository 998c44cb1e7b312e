"""The published network's seeded weights, inputs and expected numbers: see golden/README.md."""

import functools
import math
import os
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).with_name("golden")
SHARED = Path(os.environ.get("RESTORE_SHARED", Path(__file__).parents[2] / "shared"))  # optional, see golden/README.md

# inputs are torch.rand of a generator with this seed
INPUTS = {"a": (1, (1, 2, 3, 32, 32)), "b": (2, (2, 3, 3, 24, 32)), "c": (3, (1, 4, 3, 16, 24))}
TRUTH_A = (21, (1, 3, 3, 128, 128))  # what the loss of case `a` compares with


def uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Values in 0..1 that follow from a seed."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def value(key: str, shape: tuple[int, ...], salt: str = "", gain: float = 1.0) -> Tensor:
    """The seeded tensor of a published key: the first rule that fits, rounded to half precision."""
    generator = torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var"):
        return (0.75 + 0.5 * torch.rand(shape, generator=generator)).half().float()
    normal = torch.randn(shape, generator=generator)
    return _scaled(key, normal, gain).half().float()


def _scaled(key: str, normal: Tensor, gain: float) -> Tensor:
    if "conv_offset" in key:
        return 0.01 * normal if normal.ndim > 1 else normal  # the bias moves taps by about one pixel
    for suffix, factor in _FACTORS.items():
        if key.endswith(suffix):
            return factor * normal
    if key.endswith("complex_weight"):
        return normal / math.sqrt(2 * normal.shape[1])
    if key.endswith("weight") and normal.ndim == 1:  # the scale of a norm
        return 1 + 0.1 * normal
    if key.endswith("bias") and (normal.ndim == 1 or (normal.ndim == 5 and len(normal) == 1)):
        return 0.1 * normal
    return normal * math.sqrt(gain / max(1, math.prod(normal.shape[1:])))


_FACTORS = {
    "relative_position_bias_table": 0.2, "running_mean": 0.1, "alpha1": 0.5,
    "embedding": 0.1, "pos_embed": 0.1, "cls_token": 0.1,
}  # fmt: skip


@functools.cache
def published_shapes() -> dict[str, tuple[tuple[int, ...], str]]:
    """Every entry of the published STDAN's state_dict: its shape, and whether it is a param or a buffer."""
    rows = (line.split() for line in (GOLDEN / "stdan_keys.txt").read_text().splitlines())
    return {key: (tuple(map(int, shape.split("x"))), kind) for key, shape, kind in rows}


@functools.cache
def published_parameters() -> dict[str, Tensor]:
    """Seeded values of the published STDAN's 842 parameters; not to be written to."""
    return {key: value(key, shape) for key, (shape, kind) in published_shapes().items() if kind == "param"}


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    """The tensors of one golden file."""
    return load_file(GOLDEN / f"{name}.safetensors")


def assert_match(result: Tensor, expected: Tensor, *, flipped: float = 0.001) -> None:
    """The same numbers but for rounding, which may flip the choice of a tap at a handful of pixels.

    Attention carries what a flip changes over the windows around it: the share ``flipped`` of the values. More than a
    thousandth is for small images, where the typical value has to agree the better.
    """
    assert result.shape == expected.shape
    error = (result - expected).abs()
    if flipped > 0.001:
        assert error.median() <= 4e-6, f"median error {error.median():.2e}"
    else:
        assert error.mean() <= 2e-5, f"mean error {error.mean():.2e}"
    assert (error <= 1e-3).float().mean() >= 1 - flipped, f"{(error > 1e-3).sum()} of {error.numel()} values differ"
