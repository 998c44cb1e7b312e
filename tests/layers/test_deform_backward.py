"""The backward pass of the compiled deformable sampling and DCNv2 against plain PyTorch: layouts, types, threads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_deform import OPERATIONS, random_case, use, values_and_gradients, with_gradients
from tiny import relative_error
from torch import Tensor
from torch.testing import assert_close

from archs.layers import deform_kernel, deform_torch

WIDTHS = [(1, 5), (1, 33), (2, 9), (2, 13), (8, 3), (8, 4), (8, 8), (8, 20)]  # groups, channels of a group


@pytest.fixture(autouse=True)
def _cpp(monkeypatch) -> None:
    use("cpp", monkeypatch)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def convolution_case(groups: int, channels: int, out: int = 20, size: tuple[int, int] = (4, 31)) -> list[Tensor]:
    """x, displacement, modulation, weight and bias, of two images."""
    x, _, displacement, modulation = random_case(groups, size, taps=9, channels=channels)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out, groups * channels, 3, 3, generator=generator) / 8
    return [x, displacement, modulation, weight, torch.randn(out, generator=generator)]


def plain_convolution(x: Tensor, displacement: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    samples = deform_torch.sample(deform_kernel.TAPS, x, x, displacement, modulation)
    return torch.einsum("bckhw,ock->bohw", samples, weight.flatten(2)) + bias[:, None, None]


def plain(operation: str) -> Callable[..., Tensor]:
    mode = {"sample": deform_kernel.TAPS, "sum": deform_kernel.SUM, "dot": deform_kernel.DOT}[operation]
    return lambda *inputs: deform_torch.sample(mode, *inputs)


def assert_alike(ours: Callable[..., Tensor], plain: Callable[..., Tensor], case: list[Tensor]) -> None:
    """Values and all gradients; to float's rounding of sums whose terms are of both signs."""
    inputs, same = with_gradients(case), with_gradients(case)
    pairs = zip(values_and_gradients(ours(*inputs), inputs), values_and_gradients(plain(*same), same), strict=True)
    for result, expected in pairs:
        assert_close(result, expected, atol=2e-5 * max(1.0, float(expected.abs().max())), rtol=1e-4)


@pytest.mark.parametrize(("groups", "channels"), WIDTHS)
@pytest.mark.parametrize("count", [1, 3])  # of two images: the second thread's range begins within the first
def test_the_convolution(groups, channels, count):
    with threads(count):
        assert_alike(deform_kernel.convolve, plain_convolution, convolution_case(groups, channels))


@pytest.mark.parametrize("out", [1, 16, 33])
def test_any_number_of_output_channels(out):
    assert_alike(deform_kernel.convolve, plain_convolution, convolution_case(2, 4, out))


def test_more_channels_than_a_stretch_holds():
    assert_alike(deform_kernel.convolve, plain_convolution, convolution_case(4, 130, out=4, size=(3, 11)))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("count", [3, 13])  # more threads than images, than pixels
def test_threads_that_share_an_image(operation, count):
    case = random_case(2, (2, 3), taps=3, channels=9)
    with threads(count):
        assert_alike(OPERATIONS[operation][0], plain(operation), case)


@pytest.mark.parametrize(("groups", "channels"), WIDTHS)
def test_bf16(groups, channels):
    """Against float from the same rounded inputs: what differs is how values and gradients are stored."""
    x, *rest = convolution_case(groups, channels)
    inputs = [x.bfloat16().requires_grad_(), *with_gradients(rest)]
    same = with_gradients([tensor.detach().float() for tensor in inputs])
    along = torch.randn(2, 20, 4, 31, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = torch.autograd.grad(deform_kernel.convolve(*inputs), inputs, along)
    expected = torch.autograd.grad(plain_convolution(*same), same, along.float())
    assert results[0].dtype == torch.bfloat16 and results[3].dtype == torch.float32
    for result, referee in zip(results, expected, strict=True):
        assert relative_error(result.float(), referee) < 4e-3


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("channels", [3, 4, 8, 9, 20])
def test_bf16_of_sampling(operation, channels):
    x, query, *places = random_case(2, (4, 9), taps=3, channels=channels)
    half = [x.bfloat16().requires_grad_(), query.bfloat16().requires_grad_(), *with_gradients(places)]
    same = with_gradients([tensor.detach().float() for tensor in half])
    y, referee = OPERATIONS[operation][0](*half), plain(operation)(*same)
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = torch.autograd.grad(y, half, along.to(y.dtype), materialize_grads=True, allow_unused=True)
    expected = torch.autograd.grad(referee, same, along.float(), materialize_grads=True, allow_unused=True)
    for result, exact in zip(results, expected, strict=True):
        assert not exact.any() if not result.any() else relative_error(result.float(), exact) < 4e-3


def test_inputs_of_any_layout():
    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    case = [strided(tensor) if tensor.ndim > 1 else tensor for tensor in convolution_case(2, 9)]
    assert not any(tensor.is_contiguous() for tensor in case[:4])
    assert_alike(deform_kernel.convolve, plain_convolution, case)


@pytest.mark.parametrize("count", [1, 3])
def test_the_same_twice(count):
    case = convolution_case(8, 8)
    with threads(count):
        first, second = (
            list(values_and_gradients(deform_kernel.convolve(*inputs), inputs))
            for inputs in (with_gradients(case), with_gradients(case))
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_weights():
    """Their gradient is not computed; the others are the same."""
    case = convolution_case(2, 8)
    learning = with_gradients(case)
    frozen = [*with_gradients(case[:3]), *case[3:]]
    _, *expected = values_and_gradients(deform_kernel.convolve(*learning), learning)
    _, *results = values_and_gradients(deform_kernel.convolve(*frozen), frozen[:3])
    assert len(results) == 3
    assert all(torch.equal(a, b) for a, b in zip(results, expected[:3], strict=True))
    only = [*case[:4], case[4].clone().requires_grad_()]
    (_, gbias) = values_and_gradients(deform_kernel.convolve(*only), only[4:])
    assert_close(gbias, expected[4])


def test_the_operator_is_registered_right():
    """Schema, shapes without data and autograd, as `torch.compile` relies on them."""
    x, displacement, modulation, weight, bias = convolution_case(2, 4, size=(3, 4))
    layout = [x.permute(0, 2, 3, 1), displacement.permute(0, 4, 5, 1, 2, 3), modulation.permute(0, 3, 4, 1, 2)]
    inputs = with_gradients([*(tensor.contiguous() for tensor in layout), weight.flatten(2).permute(2, 1, 0), bias])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(deform_kernel._convolve_kernel, inputs, test_utils=checks)
    for mixed in (True, False):
        given = (*(tensor.detach() for tensor in inputs[:4]), torch.randn(2, 3, 4, 20), mixed)
        torch.library.opcheck(deform_kernel._convolve_backward_kernel, given, test_utils=checks[:3])
