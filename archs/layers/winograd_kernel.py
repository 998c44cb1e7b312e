"""3x3 convolutions on a CPU by Winograd's minimal filtering F(4x4, 3x3): the same numbers to rounding, in less than
half the time of a direct sum in float32, forward and backward.

A compiled kernel (`winograd_kernel.c`); where it cannot be built, and for whatever is not float32 on a CPU,
`archs.layers.blocks.convolve3x3` takes PyTorch's convolution. Registered as custom operators, so that autograd and
`torch.compile` know them; `FLOPS` is for FlopCounterMode's custom mapping and counts a direct sum.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.layers import compiled

SOURCES = [Path(__file__).with_name(name) for name in ("winograd_kernel.c", "vector.h")]
VARIABLE = "RESTORE_CONVOLUTION"
FEWEST_CHANNELS = 16  # a vector of the widest kind
FEWEST_TILES = 48  # of 4 x 4 outputs; fewer are done before the filters are transformed
_ROUND = 16  # output channels of the transformed filters are padded to a multiple


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, or None (logged once) where it cannot be built or `VARIABLE` forbids it."""
    return compiled.load("winograd", SOURCES, "convolutions run in plain PyTorch (slower, same numbers)", VARIABLE)


@compiled.constant
def has_kernel() -> bool:
    """Whether `kernel()` gives one."""
    return kernel() is not None


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes a 3x3 convolution with stride 1 and zero padding of ``x`` (M, C, H, W) by ``weight``."""
    return (
        x.device.type == "cpu"
        and x.ndim == 4
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[1] >= FEWEST_CHANNELS
        and x.shape[0] * -(-x.shape[2] // 4) * -(-x.shape[3] // 4) >= FEWEST_TILES
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and has_kernel()
    )


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("m", "h", "w", "channels_in", "channels_out")]


def _call(name: str, *arguments: Tensor | ctypes.Structure) -> None:
    library = kernel()
    assert library is not None, "the caller asks suits() first"
    passed = (ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments)
    getattr(library, name)(*passed, ctypes.c_int(torch.get_num_threads()))


def _shape(x: Tensor, channels_out: int) -> _Shape:
    m, c, h, w = x.shape
    return _Shape(m, h, w, c, channels_out)


@functools.cache
def _filter_transform() -> Tensor:
    """(36, 9), G x G: a 3x3 filter to the 36 numbers that transformed tiles are multiplied by.

    Rows of G belong to the points 0, p, -p, q, -q and infinity with p^2 = 1/2 and q^2 = 2: (1, t, t^2) over the product
    of the distances to the other finite points.
    """
    points = torch.tensor([0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)], dtype=torch.float64)
    distances = points[:, None] - points + torch.eye(5, dtype=torch.float64)
    rows = points[:, None] ** torch.arange(3) / distances.prod(1, keepdim=True)
    g = torch.cat([rows, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    return torch.kron(g, g).float()


def _transformed(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (36, C, K rounded up)."""
    k, c = weight.shape[:2]
    filters = _filter_transform() @ weight.permute(2, 3, 1, 0).reshape(9, c * k)
    return F.pad(filters.view(36, c, k), (0, -k % _ROUND))


@torch.library.custom_op("restore_archs::conv3x3", mutates_args=(), device_types="cpu")
def conv3x3_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, C, H, W) float32 -> (M, K, H, W), channels-last: stride 1, zero padding. weight: (K, C, 3, 3)."""
    x = x.contiguous(memory_format=torch.channels_last)
    bias = weight.new_zeros(len(weight)) if bias is None else bias.contiguous()
    y = _output(x, weight)
    _call("winograd_forward", x, _transformed(weight), bias, y, _shape(x, len(weight)))
    return y


def _output(x: Tensor, weight: Tensor) -> Tensor:
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@conv3x3_kernel.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _output(x, weight)


@torch.library.custom_op("restore_archs::conv3x3_weights", mutates_args=(), device_types="cpu")
def _weights_kernel(x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from those of the output."""
    x, gy = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, gy))
    (c, k), threads = (x.shape[1], gy.shape[1]), torch.get_num_threads()
    gu = x.new_zeros(threads, 36, c, k + -k % _ROUND)  # each thread adds to its own
    gbias = x.new_zeros(threads, k + -k % _ROUND)
    _call("winograd_weights", x, gy, gu, gbias, _shape(x, k))
    gw = _filter_transform().T @ gu.sum(0).flatten(1)
    return gw.view(3, 3, c, -1)[..., :k].permute(3, 2, 0, 1).contiguous(), gbias.sum(0)[:k].clone()


@_weights_kernel.register_fake
def _(x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(gy.shape[1], x.shape[1], 3, 3), x.new_empty(gy.shape[1])


def _save_inputs(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x if weight.requires_grad else None, weight)


def _backward(ctx, gy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    to_x, to_weight, to_bias = ctx.needs_input_grad
    gx = None
    if to_x:  # the convolution by the filters turned around, from output to input channels
        turned = weight.flip(2, 3).transpose(0, 1)
        narrow = len(weight) < FEWEST_CHANNELS
        gx = F.conv2d(gy, turned, padding=1) if narrow else conv3x3_kernel(gy, turned, None)
    gw, gbias = _weights_kernel(x, gy) if to_weight else (None, gy.sum((0, 2, 3)) if to_bias else None)
    return gx, gw, gbias if ctx.has_bias else None


conv3x3_kernel.register_autograd(_backward, setup_context=_save_inputs)


def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *rest: object, **named: object) -> int:
    m, c, h, w = x_shape
    return 2 * 9 * m * h * w * c * weight_shape[0]


def _weights_flops(x_shape: tuple[int, ...], gy_shape: tuple[int, ...], **named: object) -> int:
    return _flops(x_shape, (gy_shape[1],))


FLOPS = {torch.ops.restore_archs.conv3x3: _flops, torch.ops.restore_archs.conv3x3_weights: _weights_flops}
