"""The compiled CPU kernel of window attention: one pass over an image, without rolled, cut or transposed copies of it.

Where it cannot be built `archs.layers.window_attention` computes the same with PyTorch alone. It is registered as a
custom operator with its multiply-adds, so that autograd, `torch.compile` and FlopCounterMode know it.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archs.layers import compiled

SOURCES = [Path(__file__).with_name(name) for name in ("window_kernel.c", "window_kernel.h", "vector.h")]
MAX_TOKENS, MAX_DIM = 256, 64  # of a window, of a head


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, or None (logged once) where it cannot be built or `RESTORE_ATTENTION=torch` forbids it."""
    if os.environ.get("RESTORE_ATTENTION") == "torch":
        return None
    return compiled.load("window", SOURCES, "window attention runs in plain PyTorch (slower, same numbers)")


_found = False  # what the last eager call of has_kernel has said


def has_kernel() -> bool:
    """Whether `kernel()` gives one. `torch.compile` cannot trace the search and takes what eager calls have found."""
    global _found
    if not torch.compiler.is_compiling():
        _found = kernel() is not None
    return _found


def _call(name: str, tensors: list[Tensor], qkv: Tensor, bias: Tensor, side: int, shift: int) -> None:
    library = kernel()
    assert library is not None, "the caller asks has_kernel() first"
    m, h, w, c = qkv.shape
    heads = bias.shape[0]
    function = getattr(library, f"{name}_{'bf16' if qkv.dtype == torch.bfloat16 else 'f32'}")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    sizes = map(ctypes.c_int64, (m, h, w, heads, c // 3 // heads, side, shift))
    function(*pointers, *sizes, ctypes.c_int(torch.get_num_threads()))


@torch.library.custom_op("restore_archs::window_attention", mutates_args=(), device_types="cpu")
def window_kernel(qkv: Tensor, bias: Tensor, side: int, shift: int) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias + mask) v within the windows of images rolled by -shift, and rolled back.

    qkv: (M, H, W, 3C) float32 or bfloat16, [q | k | v] each heads x D; bias: (heads, side^2, side^2) float32, of
    [head, key, query]. Gives (M, H, W, C).
    """
    qkv, bias = qkv.contiguous(), bias.contiguous()
    y = _output(qkv)
    _call("window_forward", [qkv, bias, y], qkv, bias, side, shift)
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
    _call("window_backward", [qkv, bias, gy, gqkv, gbias], qkv, bias, side, shift)
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


@register_flop_formula(torch.ops.restore_archs.window_attention)
def _flops(qkv_shape: tuple[int, ...], bias_shape: tuple[int, ...], *rest: object, **named: object) -> int:
    """Of both products: every token with those of its window."""
    m, h, w, c = qkv_shape
    return 2 * 2 * m * h * w * bias_shape[1] * (c // 3)
