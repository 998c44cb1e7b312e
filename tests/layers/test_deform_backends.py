"""Which backend samples, and the operators of other packages: what they are handed, and what becomes of it.

torchvision's operator is tested itself where its compiled part fits torch, mmcv's where it is installed with its
operators; in their place stands here what both document: `documented`.
"""

import functools
import logging
import sys
import types
from itertools import product

import pytest
import torch
from test_deform import by_definition, random_conv, random_images, use, with_gradients
from tiny import run_python
from torch import Tensor
from torch.testing import assert_close

from archs.layers import deform_backends
from archs.layers.deform_backends import BACKENDS, PREFERENCE, VARIABLE, Choice


@pytest.fixture
def choice(monkeypatch):
    """The choice of a process that has made none yet."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(deform_backends, "choice", functools.cache(deform_backends.choice.__wrapped__))
    return lambda kind: deform_backends.choice(kind)


def only(monkeypatch, *usable: str) -> None:
    """These backends can be used, on any device, and no others."""
    table = {
        name: backend._replace(missing=lambda kind, name=name: "" if name in usable else f"no {name}")
        for name, backend in BACKENDS.items()
    }
    monkeypatch.setattr(deform_backends, "BACKENDS", table)


@pytest.mark.parametrize(
    ("kind", "usable", "expected"),
    [
        ("cpu", ("torch", "cpp"), Choice("cpp", "cpp")),
        ("cpu", ("torch", "cpp", "triton", "torchvision", "mmcv"), Choice("cpp", "cpp")),
        ("cpu", ("torch",), Choice("torch", "")),
        ("cuda", ("torch", "cpp", "triton", "torchvision"), Choice("triton", "")),
        ("cuda", ("torch", "torchvision", "mmcv"), Choice("torch", "torchvision")),
        ("cuda", ("torch", "mmcv"), Choice("torch", "mmcv")),
        ("cuda", ("torch",), Choice("torch", "")),
        ("mps", ("torch", "cpp", "triton", "torchvision"), Choice("torch", "")),
    ],
)
def test_the_best_that_is_here(choice, monkeypatch, kind, usable, expected):
    only(monkeypatch, *usable)
    assert choice(kind) == expected


@pytest.mark.parametrize(
    ("asked", "kind", "expected"),
    [
        ("auto", "cpu", "cpp"),
        ("torch", "cpu", "torch"),
        ("cpp", "cpu", "cpp"),
        ("torchvision", "cpu", "torchvision, and cpp for samples"),
        ("mmcv", "cuda", "mmcv, and triton for samples"),
        ("triton", "cuda", "triton"),
        ("torch", "cuda", "torch"),
    ],
)
def test_what_is_asked_for(choice, monkeypatch, asked, kind, expected):
    only(monkeypatch, *BACKENDS)
    monkeypatch.setenv(VARIABLE, asked)
    assert str(choice(kind)) == expected


@pytest.mark.parametrize("asked", ["", "Torch", "cuda", "grid_sample"])
def test_unknown_names_are_refused(choice, monkeypatch, asked):
    monkeypatch.setenv(VARIABLE, asked)
    with pytest.raises(ValueError, match=f"^RESTORE_DEFORM={asked}: there is auto, {', '.join(BACKENDS)}$"):
        choice("cpu")


@pytest.mark.parametrize("asked", ["cpp", "triton", "torchvision", "mmcv"])
def test_what_is_not_here_is_refused(choice, monkeypatch, asked):
    only(monkeypatch, "torch")
    monkeypatch.setenv(VARIABLE, asked)
    rule = f"^RESTORE_DEFORM={asked} cannot be used on cpu: no {asked}; RESTORE_DEFORM=auto takes what can$"
    with pytest.raises(ValueError, match=rule) as caught:
        choice("cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("asked", "kind"), [("cpp", "cuda"), ("cpp", "mps"), ("triton", "cpu")])
def test_kernels_are_for_a_device(choice, monkeypatch, asked, kind):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(VARIABLE, asked)
    with pytest.raises(ValueError, match="made for a"):
        choice(kind)


def test_going_without_triton_is_said_once(choice, monkeypatch, caplog):
    only(monkeypatch, "torch")
    caplog.set_level(logging.DEBUG)
    assert choice("cuda") == choice("cuda") == Choice("torch", "")
    assert [record.message for record in caplog.records] == [
        "deformable sampling goes without Triton's kernels: no triton"
    ]


def test_packages_that_are_not_here_say_so():
    """With the package hidden; a wheel of torchvision for another torch raises what is no ImportError."""
    code = """
import sys
sys.modules.update({name: None for name in ("triton", "torchvision", "mmcv")})
from archs.layers.deform_backends import BACKENDS, choice
print([bool(BACKENDS[name].missing("cpu")) for name in BACKENDS], choice("cpu"))
"""
    done = run_python(code, TRITON_INTERPRET="1", RESTORE_DEFORM="torch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("True, True, True] torch\n") and done.stdout.startswith("[False")


def test_preferences_are_backends():
    assert all(name in BACKENDS for names in PREFERENCE.values() for name in names)
    assert all(any(BACKENDS[name][1:]) for name in BACKENDS)


# ---- operators of the whole convolution


def documented(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, padding: int, groups: int
) -> Tensor:
    """DCNv2 as both packages document it, stride and dilation 1: offset channel 2 (9 g + n) is dy, the next dx."""
    taps = list(product((-padding, 1 - padding, 2 - padding), repeat=2))
    shifts = offset.unflatten(1, (groups, 9, 2)) + torch.tensor(taps, dtype=x.dtype)[:, :, None, None]
    samples = by_definition(x, shifts, mask.unflatten(1, (groups, 9)))  # (B, C, 9, H, W)
    return torch.einsum("ocn,bcnhw->bohw", weight.flatten(2), samples) + bias[:, None, None]


def stand_in(name: str) -> dict[str, types.ModuleType]:
    """The package with its operator as documented: the same names, the same order of arguments."""
    package, operators = types.ModuleType(name), types.ModuleType(f"{name}.ops")

    def deform_conv2d(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
        assert stride == dilation == 1
        return documented(input, offset, mask, weight, bias, padding, offset.shape[1] // 18)

    def modulated_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
        assert stride == dilation == groups == 1
        return documented(input, offset, mask, weight, bias, padding, deform_groups)

    operators.deform_conv2d, operators.modulated_deform_conv2d = deform_conv2d, modulated_deform_conv2d
    package.ops = operators
    return {name: package, f"{name}.ops": operators}


def convolved(layer, x: Tensor, guide: Tensor) -> list[Tensor]:
    """The result, and gradients of input, guide, weight, bias and the offsets' weights."""
    inputs = [*with_gradients([x, guide]), *layer.requires_grad_().parameters()]
    y = layer(inputs[0], inputs[1])
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(8))
    return [y, *torch.autograd.grad(y, inputs, along)]


def assert_convolves_like_torch(name: str, monkeypatch) -> None:
    layer, (x, guide) = random_conv(4, 2), random_images(4)
    layer.offsets.conv.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(7))
    with monkeypatch.context() as patch:
        use("torch", patch)
        expected = convolved(layer, x, guide)
    monkeypatch.setattr(deform_backends, "_chosen", lambda kind, job: {"sampling": "torch", "convolution": name}[job])
    for a, b in zip(convolved(layer, x, guide), expected, strict=True):
        assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["torchvision", "mmcv"])
def test_operators_are_handed_their_layout(name, monkeypatch):
    for module, value in stand_in(name).items():
        monkeypatch.setitem(sys.modules, module, value)
    assert_convolves_like_torch(name, monkeypatch)


@pytest.mark.parametrize("name", ["torchvision", "mmcv"])
def test_the_operators_themselves(name, monkeypatch):
    reason = BACKENDS[name].missing("cpu")
    if reason:
        pytest.skip(reason)
    assert_convolves_like_torch(name, monkeypatch)


@pytest.mark.parametrize("name", ["torchvision", "mmcv"])
def test_operators_give_the_type_of_a_convolution(name, monkeypatch):
    for module, value in stand_in(name).items():
        monkeypatch.setitem(sys.modules, module, value)
    monkeypatch.setattr(deform_backends, "_chosen", lambda kind, job: {"sampling": "torch", "convolution": name}[job])
    layer, (x, guide) = random_conv(2, 1), random_images(2)
    exact = layer(x, guide)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x, guide)
    half = layer.bfloat16()(x.bfloat16(), guide.bfloat16())
    assert exact.dtype == torch.float32 and mixed.dtype == half.dtype == torch.bfloat16
    assert_close(mixed.float(), exact, atol=0.1, rtol=0.02)
