"""The compiled CPU kernel of a whole Swin block, forward and backward: everything between input and output stays in the
caches.

Where it cannot be built, or a block does not suit it, `archs.layers.window_attention.SwinBlock` goes layer by layer.
Registered as custom operators, so that autograd and `torch.compile` know them; `FLOPS` is for FlopCounterMode's custom
mapping and leaves out what the backward pass computes anew.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from archs.layers import compiled
from archs.layers.window_kernel import MAX_TOKENS, VARIABLE, WindowShape, call

_FILES = ("swin_kernel.c", "swin_kernel.h", "window_pixels.h", "window.h", "both_types.h", "vector.h")
SOURCES = [Path(__file__).with_name(name) for name in _FILES]
MAX_BLOCK = 64 * 4096  # numbers of a window that are held at once; weights whose gradients are
_ROUND = 16  # rows of transposed gradients are padded to a multiple


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, or None (logged once) where it cannot be built or `VARIABLE` forbids it."""
    return compiled.load("swin", SOURCES, "Swin blocks run layer by layer (slower, same numbers)", VARIABLE)


@compiled.constant
def has_kernel() -> bool:
    """Whether `kernel()` gives one."""
    return kernel() is not None


def suits(channels: int, hidden: int, tokens: int, *, learns: bool) -> bool:
    """Whether a window, and in training the gradients of the weights, fit into the caches."""
    held = tokens * (3 * channels + hidden)
    learnt = 4 * channels**2 + 2 * channels * hidden if learns else 0
    return tokens <= MAX_TOKENS and max(held, learnt) <= MAX_BLOCK


class _Weights(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (
        "qkv", "qkv_bias", "project", "project_bias", "position", "widen", "widen_bias", "narrow", "narrow_bias",
    )]  # fmt: skip


def _pointers(weights: list[Tensor]) -> _Weights:
    """Valid as long as the tensors, which must be dense, are."""
    return _Weights(*(weight.data_ptr() for weight in weights))


def _shape(x: Tensor, weights: list[Tensor], side: int, shift: int) -> WindowShape:
    heads, hidden = len(weights[4]), len(weights[5])
    return WindowShape(*x.shape[:3], heads, x.shape[3] // heads, side, shift, hidden)


@torch.library.custom_op("restore_archs::swin_block", mutates_args=(), device_types="cpu")
def swin_block_kernel(x: Tensor, weights: list[Tensor], factors: Tensor, side: int, shift: int) -> Tensor:
    """A Swin block whose norms have no gain and shift: (M, H, W, C) float32 or bfloat16 -> the same.

    ``weights``, float32: weight and bias of qkv and of project, the positions' bias as for `window_kernel`, weight and
    bias of widen and of narrow. ``factors``: (2, M) float32, what both branches of an image are multiplied by.
    """
    x, factors, *weights = (tensor.contiguous() for tensor in (x, factors, *weights))
    y = torch.empty_like(x)
    call(kernel(), "swin_forward", x, x, _pointers(weights), factors, y, _shape(x, weights, side, shift))
    return y


@swin_block_kernel.register_fake
def _(x: Tensor, weights: list[Tensor], factors: Tensor, side: int, shift: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("restore_archs::swin_block_backward", mutates_args=(), device_types="cpu")
def _backward_kernel(
    gy: Tensor, x: Tensor, weights: list[Tensor], factors: Tensor, side: int, shift: int
) -> list[Tensor]:
    """Gradients of x and of the weights."""
    gy, x, factors, *weights = (tensor.contiguous() for tensor in (gy.to(x.dtype), x, factors, *weights))
    gx = torch.empty_like(x)
    library, threads, shape = kernel(), torch.get_num_threads(), _shape(x, weights, side, shift)
    sums = factors.new_zeros(threads, _floats(library, "swin_gradient_floats", shape))  # each thread adds to its own
    space = factors.new_empty(threads, _floats(library, "swin_space_floats", shape))
    call(library, "swin_backward", x, x, gy, _pointers(weights), factors, gx, sums, space, shape)
    return [gx, *_parts(sums.sum(0), weights)]


def _floats(library: ctypes.CDLL | None, name: str, shape: WindowShape) -> int:
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    return function(shape)


def _parts(sums: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The weights' gradients out of those in a row, as the kernel lays them out: matrices transposed, rows padded."""
    parts, start = [], 0
    for weight in weights:
        matrix = weight.ndim == 2
        rows, columns = weight.shape[::-1] if matrix else (1, weight.numel())
        pitch = columns + -columns % _ROUND
        part = sums[start : start + rows * pitch].view(rows, pitch)[:, :columns]
        parts.append((part.T if matrix else part).clone(memory_format=torch.contiguous_format).view(weight.shape))
        start += rows * pitch
    return parts


@_backward_kernel.register_fake
def _(gy: Tensor, x: Tensor, weights: list[Tensor], factors: Tensor, side: int, shift: int) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, *weights)]


def _save_inputs(ctx, inputs, output) -> None:
    x, weights, factors, ctx.side, ctx.shift = inputs
    ctx.save_for_backward(x, factors, *weights)


def _backward(ctx, gy: Tensor) -> tuple[Tensor | list[Tensor] | None, ...]:
    x, factors, *weights = ctx.saved_tensors
    gx, *of_weights = _backward_kernel(gy, x, weights, factors, ctx.side, ctx.shift)
    return gx, of_weights, None, None, None


swin_block_kernel.register_autograd(_backward, setup_context=_save_inputs)


def _flops(x_shape: tuple[int, ...], weight_shapes: list[tuple[int, ...]], *rest: object, **named: object) -> int:
    """Of the linear layers and of both products of the attention."""
    m, h, w, c = x_shape
    tokens, hidden = weight_shapes[4][1], weight_shapes[5][0]
    return 2 * m * h * w * (4 * c * c + 2 * c * hidden + 2 * tokens * c)


def _backward_flops(gy_shape: tuple[int, ...], *rest: object, **named: object) -> int:
    """Two products for each of the forward pass."""
    return 2 * _flops(*rest)  # type: ignore[arg-type]


FLOPS = {torch.ops.restore_archs.swin_block: _flops, torch.ops.restore_archs.swin_block_backward: _backward_flops}
