"""The compiled CPU kernels of window attention and, where no gradient is wanted, of a whole Swin block.

One pass over an image: no rolled, cut or transposed copies of it, and of a block everything between its input and its
output stays in the caches.

Where it cannot be built `archs.layers.window_attention` computes the same with PyTorch alone. They are registered as
custom operators, so that autograd and `torch.compile` know them; `FLOPS` is for FlopCounterMode's custom mapping.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from archs.layers import compiled

_FILES = ("window_kernel.c", "window_kernel.h", "both_types.h", "vector.h")
SOURCES = [Path(__file__).with_name(name) for name in _FILES]
VARIABLE = "RESTORE_ATTENTION"
MAX_TOKENS, MAX_DIM, MAX_BLOCK = 256, 64, 64 * 4096  # of a window, of a head, numbers that a block holds at once


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, or None (logged once) where it cannot be built or `RESTORE_ATTENTION=torch` forbids it."""
    return compiled.load("window", SOURCES, "window attention runs in plain PyTorch (slower, same numbers)", VARIABLE)


@compiled.constant
def has_kernel() -> bool:
    """Whether `kernel()` gives one."""
    return kernel() is not None


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("m", "h", "w", "heads", "dim", "side", "shift", "hidden")]


class _Weights(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (
        "gain1", "shift1", "qkv", "qkv_bias", "project", "project_bias", "position",
        "gain2", "shift2", "widen", "widen_bias", "narrow", "narrow_bias",
    )]  # fmt: skip


def _call(name: str, like: Tensor, *arguments: Tensor | ctypes.Structure) -> None:
    """Run a function for the type of ``like`` with pointers to dense tensors and structures by value."""
    library = kernel()
    assert library is not None, "the caller asks has_kernel() first"
    function = getattr(library, f"{name}_{'bf16' if like.dtype == torch.bfloat16 else 'f32'}")
    passed = (ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments)
    function(*passed, ctypes.c_int(torch.get_num_threads()))


def _shape(x: Tensor, channels: int, heads: int, side: int, shift: int, hidden: int = 0) -> _Shape:
    return _Shape(*x.shape[:3], heads, channels // heads, side, shift, hidden)


@torch.library.custom_op("restore_archs::window_attention", mutates_args=(), device_types="cpu")
def window_kernel(qkv: Tensor, bias: Tensor, side: int, shift: int) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias + mask) v within the windows of images rolled by -shift, and rolled back.

    qkv: (M, H, W, 3C) float32 or bfloat16, [q | k | v] each heads x D; bias: (heads, side^2, side^2) float32, of
    [head, key, query]. Gives (M, H, W, C).
    """
    qkv, bias = qkv.contiguous(), bias.contiguous()
    y = _output(qkv)
    _call("window_forward", qkv, qkv, bias, y, _shape(qkv, y.shape[3], len(bias), side, shift))
    return y


@window_kernel.register_fake
def _(qkv: Tensor, bias: Tensor, side: int, shift: int) -> Tensor:
    return _output(qkv)


def _output(qkv: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@torch.library.custom_op("restore_archs::window_attention_backward", mutates_args=(), device_types="cpu")
def _backward_kernel(qkv: Tensor, bias: Tensor, gy: Tensor, side: int, shift: int) -> tuple[Tensor, Tensor]:
    qkv, bias, gy = qkv.contiguous(), bias.contiguous(), gy.contiguous()
    gqkv = torch.empty_like(qkv)
    gbias = bias.new_zeros(torch.get_num_threads(), *bias.shape)  # each thread adds to its own
    _call("window_backward", qkv, qkv, bias, gy, gqkv, gbias, _shape(qkv, gy.shape[3], len(bias), side, shift))
    return gqkv, gbias.sum(0)


@_backward_kernel.register_fake
def _(qkv: Tensor, bias: Tensor, gy: Tensor, side: int, shift: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(bias)


def _save_inputs(ctx, inputs, output) -> None:
    qkv, bias, ctx.side, ctx.shift = inputs
    ctx.save_for_backward(qkv, bias)


def _backward(ctx, gy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_kernel(*ctx.saved_tensors, gy, ctx.side, ctx.shift), None, None


window_kernel.register_autograd(_backward, setup_context=_save_inputs)


def _flops(qkv_shape: tuple[int, ...], bias_shape: tuple[int, ...], *rest: object, **named: object) -> int:
    """Of both products: every token with those of its window."""
    m, h, w, c = qkv_shape
    return 2 * 2 * m * h * w * bias_shape[1] * (c // 3)


@torch.library.custom_op("restore_archs::swin_block", mutates_args=(), device_types="cpu")
def swin_block_kernel(x: Tensor, weights: list[Tensor], side: int, shift: int) -> Tensor:
    """A Swin block without stochastic depth: (M, H, W, C) float32 or bfloat16 -> the same; has no backward.

    ``weights``, float32: norm1's weight and bias, those of qkv and of project, the positions' bias as for
    `window_kernel`, then norm2, widen and narrow.
    """
    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    y = torch.empty_like(x)
    shape = _shape(x, x.shape[3], len(weights[6]), side, shift, hidden=len(weights[9]))
    _call("swin_forward", x, x, _Weights(*(weight.data_ptr() for weight in weights)), y, shape)
    return y


@swin_block_kernel.register_fake
def _(x: Tensor, weights: list[Tensor], side: int, shift: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _block_flops(x_shape: tuple[int, ...], weight_shapes: list[tuple[int, ...]], *rest: object, **named: object) -> int:
    """Of the linear layers and of both products of the attention."""
    m, h, w, c = x_shape
    tokens, hidden = weight_shapes[6][1], weight_shapes[9][0]
    return 2 * m * h * w * (4 * c * c + 2 * c * hidden + 2 * tokens * c)


FLOPS = {torch.ops.restore_archs.window_attention: _flops, torch.ops.restore_archs.swin_block: _block_flops}
