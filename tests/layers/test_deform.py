"""Deformable sampling and DCNv2: the definition written out pixel by pixel, and the layout of published weights."""

import math
from itertools import product

import pytest
import torch
from referees import torchvision
from tiny import relative_error, run_python
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from archs.layers import deform, deform_kernel
from archs.layers.deform import (
    DeformOffsets,
    ModulatedDeformConv,
    deform_dot,
    deform_sample,
    deform_sum,
    tap_grid,
    warp,
)


@pytest.fixture(params=["torch", "kernel"])
def backend(request, monkeypatch) -> str:
    """Sample with PyTorch alone, or with the compiled kernel; the other one refuses to run."""
    if request.param == "torch":
        monkeypatch.setattr(deform, "kernel", lambda: None)
        monkeypatch.delattr(deform, "_sample_kernel")
    else:
        if deform_kernel.kernel() is None:
            pytest.skip("no C compiler here, or RESTORE_DEFORM=torch: the kernel cannot run")
        monkeypatch.delattr(deform, "_sample_torch")
    return request.param


def reference(x: Tensor, displacement: Tensor, weight: Tensor) -> Tensor:
    """`deform_sample` by its definition: four corners a sample, zero outside, one pixel after the other."""
    b, c, h, w = x.shape
    g, k = displacement.shape[1:3]
    shifts = iter(displacement.movedim(3, -1).flatten(0, -2))  # (dy, dx), each
    weights = iter(weight.flatten())
    pixels = [[list(row.unbind(-1)) for row in image.unbind(-2)] for image in x.unflatten(1, (g, c // g)).flatten(0, 1)]
    samples = []
    for n, _, i, j in product(range(b * g), range(k), range(h), range(w)):
        dy, dx = next(shifts)
        py, px = i + dy, j + dx
        top, left = math.floor(py), math.floor(px)
        ty, tx = py - top, px - left
        corners = {(0, 0): (1 - ty) * (1 - tx), (0, 1): (1 - ty) * tx, (1, 0): ty * (1 - tx), (1, 1): ty * tx}
        sample = x.new_zeros(c // g)
        for (row, column), share in corners.items():
            if 0 <= top + row < h and 0 <= left + column < w:
                sample = sample + share * pixels[n][top + row][left + column]
        samples.append(next(weights) * sample)
    return torch.stack(samples).view(b, g, k, h, w, c // g).movedim(-1, 2).flatten(1, 2)


def random_case(groups: int, size: tuple[int, int], *, taps: int = 2, spread: float = 2.0, each: int = 2) -> list[Tensor]:
    """x, query, displacement, weight with two images of ``each`` channels a group, as leaves."""
    generator = torch.Generator().manual_seed(groups)
    shapes = [
        (2, each * groups, *size), (2, each * groups, *size), (2, groups, taps, 2, *size), (2, groups, taps, *size),
    ]  # fmt: skip
    case = [torch.randn(shape, generator=generator) for shape in shapes]
    case[2] *= spread
    return [tensor.requires_grad_() for tensor in case]


def outputs(case: list[Tensor]) -> list[Tensor]:
    x, query, displacement, weight = case
    return [
        deform_sample(x, displacement, weight),
        deform_sum(x, displacement, weight),
        deform_dot(x, query, displacement, weight),
    ]


def expected(case: list[Tensor]) -> list[Tensor]:
    x, query, displacement, weight = case
    samples = reference(x, displacement, weight)
    return [samples, samples.sum(2), (samples * query[:, :, None]).sum(1)]


@pytest.mark.parametrize(("groups", "size"), [(1, (5, 4)), (2, (3, 7)), (3, (4, 3)), (1, (2, 2))])
def test_values_and_gradients_by_definition(backend, groups, size):
    case = random_case(groups, size)
    exact = [tensor.detach().double().requires_grad_() for tensor in case]
    for y, truth in zip(outputs(case), expected(exact), strict=True):
        assert_close(y.double(), truth, atol=2e-5, rtol=1e-5)
        along = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        used = [i for i in range(4) if i != 1 or y.ndim == 4 and y.shape[1] == 2]  # the query is part of the dot only
        for i in range(4):
            case[i].grad = exact[i].grad = None
        (y * along).sum().backward()
        (truth * along.double()).sum().backward(retain_graph=True)
        for i in used:
            if exact[i].grad is None:
                assert case[i].grad is None or not case[i].grad.any()
            else:
                assert_close(case[i].grad.double(), exact[i].grad, atol=1e-4, rtol=1e-4)
