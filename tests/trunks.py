"""LPIPS without a download: trunks of torchvision's form with random weights, for tests."""

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from referees import torchvision
from torch import Tensor

_ALEXNET = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
_CLASSIFIER = {1: (4096, 9216), 4: (4096, 4096), 6: (1000, 4096)}


def lpips() -> ModuleType:
    """The package, with the torchvision that it needs."""
    torchvision()
    return pytest.importorskip("lpips")


def alexnet_file(path: Path, seed: int = 0) -> Path:
    """Write a state_dict of torchvision's AlexNet; the classifier, which LPIPS leaves out, takes no room."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for i, shape in _ALEXNET.items():
        gain = math.sqrt(2 / math.prod(shape[1:]))
        state[f"features.{i}.weight"] = gain * torch.randn(shape, generator=generator)
        state[f"features.{i}.bias"] = 0.1 * torch.randn(shape[:1], generator=generator)
    for i, shape in _CLASSIFIER.items():
        state[f"classifier.{i}.weight"] = torch.zeros(()).expand(shape)
        state[f"classifier.{i}.bias"] = torch.zeros(()).expand(shape[:1])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path
