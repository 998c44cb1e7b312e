"""The compiled CPU kernel of window attention: one pass over an image, no rolled, cut or transposed copies of it.

Where it cannot be built `archs.layers.window_attention` computes the same with PyTorch alone. They are registered as
custom operators, so that autograd and `torch.compile` know them; `FLOPS` is for FlopCounterMode's custom mapping.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from archs.layers import compiled

_FILES = ("window_kernel.c", "window_kernel.h", "window_pixels.h", "window.h", "both_types.h", "vector.h")
SOURCES = [Path(__file__).with_name(name) for name in _FILES]
VARIABLE = "RESTORE_ATTENTION"
MAX_TOKENS, MAX_DIM = 256, 64  # of a window, of a head


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, or None (logged once) where it cannot be built or `RESTORE_ATTENTION=torch` forbids it."""
    return compiled.load("window", SOURCES, "window attention runs in plain PyTorch (slower, same numbers)", VARIABLE)


@compiled.constant
def has_kernel() -> bool:
    """Whether `kernel()` gives one."""
    return kernel() is not None


class WindowShape(ctypes.Structure):
    """As window.h has it; ``hidden`` is of a Swin block."""

    _fields_ = [(name, ctypes.c_int64) for name in ("m", "h", "w", "heads", "dim", "side", "shift", "hidden")]


def call(library: ctypes.CDLL | None, name: str, like: Tensor, *arguments: Tensor | ctypes.Structure) -> None:
    """Run a function for the type of ``like`` with pointers to dense tensors and structures by value."""
    assert library is not None, "the caller asks has_kernel() first"
    function = getattr(library, f"{name}_{'bf16' if like.dtype == torch.bfloat16 else 'f32'}")
    passed = (ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments)
    function(*passed, ctypes.c_int(torch.get_num_threads()))


def _shape(x: Tensor, channels: int, heads: int, side: int, shift: int) -> WindowShape:
    return WindowShape(*x.shape[:3], heads, channels // heads, side, shift)


@torch.library.custom_op("restore_archs::window_attention", mutates_args=(), device_types="cpu")
def window_kernel(qkv: Tensor, bias: Tensor, side: int, shift: int) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias + mask) v within the windows of images rolled by -shift, and rolled back.

    qkv: (M, H, W, 3C) float32 or bfloat16, [q | k | v] each heads x D; bias: (heads, side^2, side^2) float32, of
    [head, key, query]. Gives (M, H, W, C).
    """
    qkv, bias = qkv.contiguous(), bias.contiguous()
    y = _output(qkv)
    call(kernel(), "window_forward", qkv, qkv, bias, y, _shape(qkv, y.shape[3], len(bias), side, shift))
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
    shape = _shape(qkv, gy.shape[3], len(bias), side, shift)
    call(kernel(), "window_backward", qkv, qkv, bias, gy, gqkv, gbias, shape)
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


def _backward_flops(qkv_shape: tuple[int, ...], bias_shape: tuple[int, ...], *rest: object, **named: object) -> int:
    """Two products for each of the forward pass; that of the logits, computed anew, is left out."""
    return 2 * _flops(qkv_shape, bias_shape)


FLOPS = {
    torch.ops.restore_archs.window_attention: _flops,
    torch.ops.restore_archs.window_attention_backward: _backward_flops,
}
