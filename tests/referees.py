"""Optional reference implementations for tests: torchvision and basicsr, skipped with a reason where missing.

Neither is a dependency. To run the tests that need them, on a CPU with torch 2.13:

    pip install --no-deps torchvision==0.28.0
    pip install addict future lmdb requests yapf opencv-python-headless pyyaml scikit-image scipy tqdm
    pip install --no-deps --no-build-isolation basicsr==1.4.2

Both need help to import there, and that help lives only here: the registry's torchvision wheel is built for CUDA and
cannot register its C++ operators beside a CPU torch, and basicsr 1.4.2 imports a module that torchvision has removed.
"""

import contextlib
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

_kept: list[torch.library.Library] = []  # an operator declaration lives as long as its Library object


def torchvision() -> types.ModuleType:
    """Import torchvision; its compiled operators are missing where the wheel does not fit torch."""
    module, reason = _torchvision()
    if module is None:
        pytest.skip(reason)
    return module


def basicsr(submodule: str) -> types.ModuleType:
    """Import a module of basicsr, e.g. `basicsr("metrics").calculate_psnr` or `basicsr("archs.edvr_arch")`."""
    torchvision()
    reason = _basicsr()
    if reason:
        pytest.skip(reason)
    return importlib.import_module(f"basicsr.{submodule}")


def basicsr_imresize(double: bool = False) -> Callable[[np.ndarray, float], np.ndarray]:
    """Return basicsr's port of MATLAB's imresize, (H, W, 3) float32 in and out.

    double: run the same code in float64, (H, W, 3) float64 in and out. As published it computes sample positions in
    float32, which at a factor of 3 costs up to 0.01 grey levels (white noise, 504x480).
    """
    imresize = basicsr("utils.matlab_functions").imresize
    if not double:
        return lambda image, scale: imresize(image.copy(), scale)

    def resize(image: np.ndarray, scale: float) -> np.ndarray:
        with _default_double(), mock.patch.object(torch, "FloatTensor", torch.DoubleTensor):
            return imresize(torch.from_numpy(image).permute(2, 0, 1), scale).permute(1, 2, 0).numpy()

    return resize


@functools.cache
def _torchvision() -> tuple[Any, str]:
    try:
        return importlib.import_module("torchvision"), ""
    except ImportError as error:
        return None, f"torchvision is not installed: {error}"
    except RuntimeError as error:  # operator torchvision::nms does not exist
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return importlib.import_module("torchvision"), ""


@functools.cache
def _basicsr() -> str:
    """Import basicsr once; the reason why that is impossible, or ''."""
    functional = importlib.import_module("torchvision.transforms.functional")
    removed = types.ModuleType("torchvision.transforms.functional_tensor")
    removed.rgb_to_grayscale = functional.rgb_to_grayscale
    sys.modules.setdefault(removed.__name__, removed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses names that scipy has deprecated
            importlib.import_module("basicsr")
    except ImportError as error:
        return f"basicsr is not installed, or a package that it imports: {error}"
    return ""


@contextlib.contextmanager
def _default_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
