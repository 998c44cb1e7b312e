"""Deformable sampling and DCNv2: the definition written out pixel by pixel, and the layout of published weights."""

import functools
import logging
import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from referees import torchvision
from tiny import relative_error, run_python
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from archs.layers import deform_backends, deform_kernel, deform_torch
from archs.layers.deform import ModulatedDeformConv, deform_dot, deform_sample, deform_sum, warp
from archs.layers.deform_backends import BACKENDS


def use(name: str, monkeypatch) -> None:
    """Sample with one backend; beside PyTorch no other is there. Skips where it cannot be used."""
    reason = BACKENDS[name].missing("cpu")
    if reason:
        pytest.skip(f"{name}: {reason}")
    monkeypatch.setenv("RESTORE_DEFORM", name)
    monkeypatch.setattr(deform_backends, "choice", functools.cache(deform_backends.choice.__wrapped__))
    monkeypatch.setattr(deform_backends, "BACKENDS", {key: BACKENDS[key] for key in ("torch", name)})


@pytest.fixture(params=["torch", "cpp"])
def backend(request, monkeypatch) -> str:
    use(request.param, monkeypatch)
    return request.param


def by_definition(x: Tensor, displacement: Tensor, weight: Tensor) -> Tensor:
    """`deform_sample` one pixel after the other: four corners a sample, zero outside."""
    b, c, h, w = x.shape
    g, k = displacement.shape[1:3]
    pixels = x.reshape(b * g, c // g, h * w).unbind(0)
    shifts, weights = displacement.movedim(3, -1).flatten(0, -2).tolist(), iter(weight.flatten())
    places = iter(displacement.movedim(3, -1).flatten(0, -2).unbind(0))
    samples = []
    for (n, _, i, j), (dy, dx) in zip(product(range(b * g), range(k), range(h), range(w)), shifts, strict=True):
        top, left = math.floor(i + dy), math.floor(j + dx)
        ty, tx = (next(places) + torch.tensor([i - top, j - left])).unbind()
        sample = x.new_zeros(c // g)
        for row, column in product((0, 1), (0, 1)):
            if 0 <= top + row < h and 0 <= left + column < w:
                share = (ty if row else 1 - ty) * (tx if column else 1 - tx)
                sample = sample + share * pixels[n][:, (top + row) * w + left + column]
        samples.append(next(weights) * sample)
    return torch.stack(samples).view(b, g, k, h, w, c // g).movedim(-1, 2).flatten(1, 2)


OPERATIONS = {  # (x, query, displacement, weight) -> ours, and the same from samples by definition
    "sample": (lambda x, q, d, w: deform_sample(x, d, w), lambda samples, q: samples),
    "sum": (lambda x, q, d, w: deform_sum(x, d, w), lambda samples, q: samples.sum(2)),
    "dot": (deform_dot, lambda samples, q: (samples * q[:, :, None]).sum(1)),
}


def random_case(groups: int, size: tuple[int, int], *, taps: int = 2, channels: int = 2, seed: int = 0) -> list[Tensor]:
    """x, query, displacement (about two pixels) and weight for two images of ``channels`` a group."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (2, channels * groups, *size), (2, channels * groups, *size),
        (2, groups, taps, 2, *size), (2, groups, taps, *size),
    ]  # fmt: skip
    x, query, displacement, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x, query, 2 * displacement, weight]


def values_and_gradients(y: Tensor, inputs: list[Tensor]) -> Iterator[Tensor]:
    """The result and the gradient of every input along one random direction."""
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    yield y.detach()
    yield from torch.autograd.grad(y, inputs, along, allow_unused=True, materialize_grads=True)


def with_gradients(tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [tensor.to(dtype).clone().requires_grad_() for tensor in tensors]


def assert_as_defined(case: list[Tensor], operation: str) -> None:
    ours, from_samples = OPERATIONS[operation]
    inputs, exact = with_gradients(case), with_gradients(case, torch.float64)
    truth = from_samples(by_definition(exact[0], exact[2], exact[3]), exact[1])
    pairs = zip(values_and_gradients(ours(*inputs), inputs), values_and_gradients(truth, exact), strict=True)
    for what, (result, expected) in zip(("value", "x", "query", "displacement", "weight"), pairs, strict=True):
        assert_close(result.double(), expected, atol=1e-4, rtol=1e-4, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("groups", "size"), [(1, (5, 4)), (2, (3, 7)), (3, (4, 3)), (1, (2, 2))])
def test_values_and_gradients(backend, groups, size, operation):
    assert_as_defined(random_case(groups, size), operation)


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (1, 1)])
def test_a_single_row_or_column(backend, size):
    assert_as_defined(random_case(1, size), "sample")


def test_the_definition_is_differentiated_right():
    x, _, displacement, weight = with_gradients(random_case(1, (2, 3), taps=1), torch.float64)
    assert torch.autograd.gradcheck(by_definition, (x, displacement, weight))


@pytest.mark.parametrize("far", [-1e6, -50.0, -7.5, 7.5, 50.0, 1e6])
@pytest.mark.parametrize("axis", [0, 1])
def test_far_outside_is_zero(backend, far, axis):
    case = random_case(2, (5, 6))
    case[2][:, :, :, axis] = far
    inputs = with_gradients(case)
    for ours, _ in OPERATIONS.values():
        assert all(not tensor.any() for tensor in values_and_gradients(ours(*inputs), inputs))


def test_whole_pixels_read_pixels(backend):
    x = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    padded = F.pad(x, (7, 7, 7, 7))
    for dy, dx in product((-7, -1, 0, 2, 5), (-6, 0, 1, 7)):
        displacement = torch.tensor([dy, dx]).float().view(1, 1, 1, 2, 1, 1).expand(1, 1, 1, 2, 5, 6)
        shifted = padded[:, :, 7 + dy : 12 + dy, 7 + dx : 13 + dx]
        assert_close(deform_sample(x, displacement)[:, :, 0], shifted, atol=2e-5, rtol=0)


def test_samples_fade_out_over_one_pixel(backend):
    x = torch.ones(1, 1, 3, 3)
    displacement = torch.zeros(1, 1, 4, 2, 3, 3)
    displacement[0, 0, :, 0] = torch.tensor([-0.25, -0.75, -1.0, -1.5])[:, None, None]
    assert_close(deform_sample(x, displacement)[0, 0, :, 0, 1], torch.tensor([0.75, 0.25, 0, 0]))


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8, 9, 16, 20, 24, 32, 33, 257])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_kernel_agrees_for_every_number_of_channels(channels, operation, monkeypatch):
    inputs = with_gradients(random_case(2, (3, 4), taps=3, channels=channels))
    ours, _ = OPERATIONS[operation]
    with monkeypatch.context() as patch:
        use("cpp", patch)
        kernel = list(values_and_gradients(ours(*inputs), inputs))
    use("torch", monkeypatch)
    for a, b in zip(kernel, values_and_gradients(ours(*inputs), inputs), strict=True):
        assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_number_of_threads_changes_nothing(backend, operation):
    """One image and several threads: the backward pass is cut by groups."""
    case = [tensor[:1] for tensor in random_case(3, (6, 5))]
    ours, _ = OPERATIONS[operation]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            inputs = with_gradients(case)
            results.append(list(values_and_gradients(ours(*inputs), inputs)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_bf16_is_close_to_float(backend):
    """Only ``x`` and ``query`` are rounded: positions are float32, or samples would be pixels away."""
    x, query, displacement, weight = random_case(2, (6, 300), channels=4)
    half = [x.bfloat16(), query.bfloat16()]
    for name, (ours, _) in OPERATIONS.items():
        result = ours(*half, displacement, weight)
        assert result.dtype == (torch.float32 if name == "dot" else torch.bfloat16)
        assert relative_error(result, ours(half[0].float(), half[1].float(), displacement, weight)) < 4e-3


def test_autocast_leaves_positions_alone(backend):
    x, query, displacement, weight = random_case(1, (4, 300))
    for ours, _ in OPERATIONS.values():
        with torch.autocast("cpu", torch.bfloat16):
            result = ours(x, query, displacement, weight)
        assert_close(result, ours(x, query, displacement, weight))


def test_the_operator_is_registered_right():
    """Schema, shapes without data and autograd, as `torch.compile` relies on them."""
    if deform_kernel.kernel() is None:
        pytest.skip("the kernel cannot be built: no C compiler")
    x, query, displacement, weight = random_case(2, (3, 4))
    layout = [x.permute(0, 2, 3, 1), query.permute(0, 2, 3, 1), displacement.permute(0, 4, 5, 1, 2, 3),
              weight.permute(0, 3, 4, 1, 2)]  # fmt: skip
    for mode in (deform_kernel.TAPS, deform_kernel.SUM, deform_kernel.DOT):
        inputs = (*with_gradients([tensor.contiguous() for tensor in layout]), mode)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(deform_kernel.deform_kernel, inputs, test_utils=checks)


# ---- DCNv2


def random_conv(channels: int = 16, groups: int = 8) -> ModulatedDeformConv:
    """A layer whose offsets are still zero."""
    generator = torch.Generator().manual_seed(3)
    layer = ModulatedDeformConv(channels, groups)
    for parameter in (layer.weight, layer.bias):
        parameter.data.normal_(generator=generator)
    return layer.requires_grad_(False)


def random_images(channels: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, channels, 5, 7, generator=generator), torch.randn(2, channels, 5, 7, generator=generator)


def test_a_fresh_layer_is_half_a_convolution(backend):
    layer, (x, guide) = random_conv(), random_images()
    half = 0.5 * F.conv2d(x, layer.weight, padding=1) + layer.bias[:, None, None]
    assert_close(layer(x, guide), half, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (1, -2), (-3, 1)])
def test_whole_offsets_shift_a_convolution(backend, dy, dx):
    layer, (x, guide) = random_conv(), random_images()
    layer.offsets.conv.bias[:144] = torch.tensor([dy, dx]).float().repeat(72)
    layer.offsets.conv.bias[144:] = 40  # modulation 1
    wide = F.conv2d(F.pad(x, (5, 5, 5, 5)), layer.weight, layer.bias, padding=1)
    assert_close(layer(x, guide), wide[:, :, 5 + dy : 10 + dy, 5 + dx : 12 + dx], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("group", "tap"), [(0, 0), (1, 5), (3, 8), (4, 1), (7, 6)])
def test_channel_layout_of_published_weights(backend, group, tap):
    """Offset channel 18 g + 2 n is dy and the next dx, the mask's is 144 + 9 g + n; tap n = 3 row + column."""
    layer, (x, guide) = random_conv(), random_images()
    bias, row, column = layer.offsets.conv.bias, tap // 3, tap % 3
    bias[:144].normal_(generator=torch.Generator().manual_seed(5))
    bias[144:] = -100
    bias[144 + 9 * group + tap] = 40  # this tap alone is heard
    padded = F.pad(x, (5, 5, 5, 5))
    for dy, dx in ((1, 0), (0, 1), (-2, 3)):
        bias[18 * group + 2 * tap], bias[18 * group + 2 * tap + 1] = dy, dx
        top, left = 4 + row + dy, 4 + column + dx
        channels = slice(2 * group, 2 * group + 2)
        moved = padded[:, channels, top : top + 5, left : left + 7]
        mixed = torch.einsum("oc,bchw->bohw", layer.weight[:, channels, row, column], moved)
        assert_close(layer(x, guide), mixed + layer.bias[:, None, None], atol=1e-4, rtol=1e-4)


def test_base_moves_every_tap(backend):
    layer, (_, guide) = random_conv(), random_images()
    base = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(6))
    moved, modulation = layer.offsets(guide, base)
    still, same = layer.offsets(guide)
    assert_close(moved - still, base[:, None, None].expand_as(moved))
    assert_close(modulation, same)


def test_equals_torchvision(backend):
    torchvision()
    if not hasattr(torch.ops.torchvision, "deform_conv2d"):
        pytest.skip("torchvision has no compiled operators for this torch")
    from torchvision.ops import deform_conv2d

    layer, (x, guide) = random_conv(), random_images()
    layer.offsets.conv.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(7))
    raw = layer.offsets.conv(guide)
    referee = deform_conv2d(x, raw[:, :144], layer.weight, layer.bias, padding=1, mask=raw[:, 144:].sigmoid())
    assert_close(layer(x, guide), referee, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("channels", "groups", "out"), [(16, 8, 16), (6, 2, 20), (27, 3, 5), (64, 8, 64)])
@pytest.mark.parametrize("size", [(3, 4), (2, 101)])  # shorter and longer than the stretches it is cut into
def test_the_convolution_at_once(channels, groups, out, size):
    """Values and gradients against the convolution made of samples."""
    if deform_kernel.kernel() is None:
        pytest.skip("the kernel cannot be built: no C compiler")
    x, _, displacement, modulation = random_case(groups, size, taps=9, channels=channels // groups)
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(s, generator=generator) for s in ((out, channels, 3, 3), (out,)))
    inputs = with_gradients([x, displacement, modulation, weight, bias])
    ours = deform_kernel.convolve(*inputs)
    samples = deform_sample(*inputs[:3])
    expected = torch.einsum("bckhw,ock->bohw", samples, inputs[3].flatten(2)) + inputs[4][:, None, None]
    pairs = zip(values_and_gradients(ours, inputs), values_and_gradients(expected, inputs), strict=True)
    for result, referee in pairs:
        assert_close(result, referee, atol=2e-3, rtol=1e-4)
    half = deform_kernel.convolve(x.bfloat16(), *inputs[1:]).detach()
    assert half.dtype == torch.bfloat16 and relative_error(half, expected.detach()) < 1e-2


@pytest.mark.parametrize("top_k", [1, 2, 9])
@pytest.mark.parametrize(("groups", "channels"), [(1, 3), (2, 4), (8, 9)])
def test_the_attention_at_once(groups, channels, top_k):
    if deform_kernel.kernel() is None:
        pytest.skip("the kernel cannot be built: no C compiler")
    key, query, displacement, weight = random_case(groups, (5, 6), taps=9, channels=channels)
    value = random_case(groups, (5, 6), channels=channels, seed=1)[0]
    answer, best, taps = deform_kernel.attend(query, key, value, displacement, weight, top_k)
    referee = deform_torch.attend(deform_torch.sample, query, key, value, displacement, weight, top_k)
    assert_close(answer, referee[0], atol=1e-4, rtol=1e-4)
    assert_close(best, referee[1], atol=1e-4, rtol=1e-4)
    relevance = deform_dot(key, query, displacement, weight)  # equal ones may stand in any order, but each once
    assert_close(relevance.gather(1, taps), best, atol=1e-4, rtol=1e-4)
    assert all(len(set(places.tolist())) == top_k for places in taps.movedim(1, -1).reshape(-1, top_k))


# ---- warping


def test_warp_by_whole_pixels_repeats_the_border(backend):
    x, _ = random_images()
    padded = F.pad(x, (9, 9, 9, 9), mode="replicate")
    for dy, dx in product((-8, -1, 0, 3), (-9, 0, 2, 9)):
        flow = torch.tensor([dy, dx]).float()[None, :, None, None].expand(2, 2, 5, 7)
        assert_close(warp(x, flow), padded[:, :, 9 + dy : 14 + dy, 9 + dx : 16 + dx], atol=2e-5, rtol=0)


def test_warp_between_pixels_is_linear(backend):
    ramp = torch.arange(7.0).expand(1, 1, 5, 7) + 10 * torch.arange(5.0)[:, None]
    flow = torch.tensor([0.25, -0.5])[None, :, None, None].expand(1, 2, 5, 7)
    assert_close(warp(ramp, flow)[..., :4, 1:], ramp[..., :4, 1:] + 2, atol=1e-4, rtol=0)


# ---- choosing the backend


def test_the_kernel_can_be_switched_off():
    code = "from archs.layers import deform_backends, deform_kernel as cpp; "
    code += "print(deform_backends.choice('cpu'), cpp.kernel.cache_info().misses)"
    done = run_python(code, RESTORE_DEFORM="torch")
    assert done.returncode == 0 and done.stdout == "torch 0\n" and done.stderr == ""


def test_a_failing_compiler_falls_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RESTORE_DEFORM", raising=False)
    monkeypatch.setattr(deform_backends, "choice", functools.cache(deform_backends.choice.__wrapped__))
    caplog.set_level(logging.DEBUG)
    case = random_case(1, (3, 3))
    deform_kernel.kernel.cache_clear()
    try:
        assert_as_defined(case, "sample")
        assert_as_defined(case, "sample")
        assert deform_kernel.kernel() is None
    finally:
        deform_kernel.kernel.cache_clear()
    assert len(caplog.records) == 1 and "did not build" in caplog.text
    assert not list(tmp_path.rglob("*.so"))
