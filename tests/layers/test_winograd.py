"""3x3 convolutions by Winograd's filtering: equal to a direct sum, wherever the kernel is used."""

import pytest
import torch
from tiny import run_python
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from archs.layers import blocks, winograd_kernel
from archs.layers.blocks import Conv3x3, convolve3x3, interleave, stack_frames

needs_kernel = pytest.mark.skipif(
    not winograd_kernel.has_kernel(), reason="no C compiler, or RESTORE_CONVOLUTION=torch"
)
# batch, channels in and out, height, width: whole and cut tiles, channels that fill vectors and that do not
SHAPES = [
    (2, 16, 16, 32, 32), (3, 48, 48, 17, 30), (1, 64, 64, 40, 41), (2, 32, 96, 24, 19), (2, 17, 3, 21, 40),
    (1, 72, 216, 27, 31), (12, 33, 5, 8, 8), (48, 16, 40, 1, 3), (1, 144, 20, 33, 29),
]  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def values_and_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, along: Tensor) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    if bias is not None:
        inputs.append(bias.detach().clone().requires_grad_())
    y = convolve3x3(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, along.to(y.dtype))]


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_definition(shape, with_bias, threads, monkeypatch):
    """Values and gradients, against PyTorch in double precision."""
    m, c, k, h, w = shape
    x, weight, along = noise(m, c, h, w), noise(k, c, 3, 3), noise(m, k, h, w)
    bias = noise(k) if with_bias else None
    assert winograd_kernel.suits(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = values_and_gradients(x, weight, bias, along)
    finally:
        torch.set_num_threads(before)
    in_double = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, along)]
    for value, exact in zip(ours, values_and_gradients(*in_double), strict=True):
        assert_close(value.double(), exact, rtol=0, atol=2e-5 * exact.std().item())


@needs_kernel
@pytest.mark.parametrize("layout", ["channels first", "channels last", "a slice", "expanded"])
def test_any_layout_of_the_input_will_do(layout):
    x, weight, bias = noise(3, 24, 20, 36), noise(16, 24, 3, 3), noise(16)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "a slice":
        x = x[:, :, ::2, 3:]
    elif layout == "expanded":
        x = x[:1].expand(3, -1, -1, -1)
    y = convolve3x3(x, weight, bias)
    assert_close(y, F.conv2d(x, weight, bias, padding=1), atol=1e-4, rtol=1e-4)
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_kernel
@pytest.mark.parametrize("position", [(0, 0), (9, 14), (31, 30)])
def test_what_is_not_finite_reaches_at_least_what_a_direct_sum_does(position):
    x, weight = noise(1, 16, 32, 31), noise(16, 16, 3, 3)
    x[0, 5, position[0], position[1]] = torch.nan
    reached, direct = (y.isnan().any(1)[0] for y in (convolve3x3(x, weight), F.conv2d(x, weight, padding=1)))
    assert reached[direct].all()
    assert reached.sum() <= 64  # the tiles that see it


@needs_kernel
def test_only_what_is_asked_for_is_computed(monkeypatch):
    """A frozen layer needs no gradient of its filters; the first layer none of its input."""
    x, weight, bias = noise(2, 16, 32, 32), noise(16, 16, 3, 3), noise(16)
    along = noise(2, 16, 32, 32)
    expected = torch.autograd.grad(F.conv2d(xx := x.clone().requires_grad_(), weight, bias, padding=1), xx, along)[0]
    frozen = x.clone().requires_grad_()
    with FlopCounterMode(display=False, custom_mapping=winograd_kernel.FLOPS) as counter:
        convolve3x3(frozen, weight, bias).backward(along)
    assert counter.get_total_flops() == 2 * 2 * 9 * 16 * 16 * 2 * 32 * 32
    assert_close(frozen.grad, expected, atol=1e-4, rtol=1e-4)
    shift = bias.clone().requires_grad_()
    convolve3x3(x, weight, shift).backward(along)
    assert_close(shift.grad, along.sum((0, 2, 3)))


@needs_kernel
@pytest.mark.parametrize("why", ["double", "bf16", "few channels", "few tiles", "autocast", "export", "meta"])
def test_the_rest_goes_to_pytorch(why, monkeypatch):
    monkeypatch.setattr(winograd_kernel, "conv3x3_kernel", None)
    conv, x = Conv3x3(16, 16), noise(1, 16, 32, 32)
    with pytest.raises(TypeError, match="not callable"):
        conv(x)
    if why == "double":
        conv.double()(x.double())
    elif why == "bf16":
        conv.bfloat16()(x.bfloat16())
    elif why == "few channels":
        Conv3x3(15, 16)(x[:, :15])
    elif why == "few tiles":
        conv(x[:, :, :24, :28])
    elif why == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
    elif why == "export":
        program = torch.export.export(conv, (x,))
        assert "aten.conv2d" in program.graph_module.code and "restore_archs" not in program.graph_module.code
    else:
        assert conv.to("meta")(x.to("meta")).shape == (1, 16, 32, 32)


@needs_kernel
def test_operators_are_registered_right():
    x, weight, bias = (noise(*size).requires_grad_() for size in ((2, 16, 20, 24), (8, 16, 3, 3), (8,)))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(winograd_kernel.conv3x3_kernel, (x, weight, bias), test_utils=checks)
    torch.library.opcheck(winograd_kernel.conv3x3_kernel, (x, weight, None), test_utils=checks)


@needs_kernel
def test_a_network_that_is_compiled_at_once_takes_the_kernel_too():
    code = """
import torch
from archs.layers.blocks import Conv3x3
conv = Conv3x3(16, 16)
graphs = []
def backend(graph, inputs):
    graphs.append(graph.code)
    return graph
torch.compile(conv, backend=backend)(torch.zeros(1, 16, 32, 32))
print(sum("restore_archs.conv3x3" in code for code in graphs), len(graphs))
"""
    assert run_python(code).stdout == "1 1\n"


def test_the_kernel_can_be_switched_off():
    code = "from archs.layers.winograd_kernel import has_kernel; print(has_kernel())"
    assert run_python(code, RESTORE_CONVOLUTION="torch").stdout == "False\n"


def test_a_wrong_word_is_refused(monkeypatch):
    monkeypatch.setenv(winograd_kernel.VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"RESTORE_CONVOLUTION=fast: there is auto .* and torch"):
        winograd_kernel.kernel.__wrapped__()


@pytest.mark.parametrize("last", [True, False])
def test_frames_keep_their_layout(last):
    frames = [noise(2, 6, 5, 4) for _ in range(3)]
    if last:
        frames = [frame.to(memory_format=torch.channels_last) for frame in frames]
    for dim in (0, 1):
        stacked = stack_frames(frames, dim)
        assert torch.equal(stacked, torch.stack(frames, dim))
        flat = stacked.flatten(0, 1)
        assert flat.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    inputs, between = stack_frames(frames), stack_frames(frames[:2])
    sequence = interleave(inputs, between)
    assert torch.equal(sequence[:, ::2], inputs) and torch.equal(sequence[:, 1::2], between)
    assert (sequence.stride(2) == 1) == last


def test_the_layer_is_what_conv3x3_makes():
    assert type(blocks.conv3x3(4, 4)) is Conv3x3
    assert set(Conv3x3(4, 4).state_dict()) == {"weight", "bias"}
