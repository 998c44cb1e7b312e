"""Shapes and types in the signatures of archs and restore are enforced while the suite runs; shared fixtures."""

from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["archs", "restore"], "typecheck.check")

from archs import STDAN  # noqa: E402 - after the hook

TINY: dict[str, Any] = {
    "channels": 8, "embed_dim": 8, "heads": 1, "encoder_depths": (1,), "decoder_depths": (1,), "levels": 1,
    "deform_groups": 1, "temporal_radius": 1, "upsampler": "light", "skip": "bicubic", "motion_prior": "correlation",
}  # fmt: skip


@pytest.fixture
def tiny_stdan() -> tuple[STDAN, dict[str, Any]]:
    """A network of a few thousand parameters and the description its file carries."""
    torch.manual_seed(0)
    return STDAN(**TINY).eval(), {"type": "stdan", **TINY}
