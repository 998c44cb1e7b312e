"""The compiled CPU kernel of deformable sampling: built on first use with the machine's C compiler, cached, optional.

Where no compiler is found `kernel()` is None and `archs.layers.deform` samples with PyTorch alone, several times
slower and equal to rounding. The kernel is plain C behind ctypes, so it builds in seconds and needs no headers of
PyTorch; it is registered as a custom operator, so that autograd and `torch.compile` know it.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.layers import compiled

_FILES = ("deform_kernel.c", "deform_kernel.h", "deform_backward.h", "both_types.h", "vector.h")
SOURCES = [Path(__file__).with_name(name) for name in _FILES]


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, or None (logged once) where it cannot be built."""
    return compiled.load("deform", SOURCES, "deformable sampling runs in plain PyTorch (slower, same numbers)")


TAPS, SUM, DOT = range(3)  # the modes of deform_kernel.c
MAX_CHANNELS = 256  # of a group


def _call(name: str, tensors: tuple[Tensor | None, ...], weight: Tensor, last: int) -> None:
    """Run a function with dense tensors (None: NULL), the sizes of the first and of ``weight``, and its last number."""
    library = kernel()
    assert library is not None, "the caller asks kernel() first"
    x, (groups, taps) = tensors[0], weight.shape[3:]
    assert x is not None
    numbers = (*x.shape[:3], groups, taps, x.shape[3] // groups, last)
    function = getattr(library, f"{name}_{'bf16' if x.dtype == torch.bfloat16 else 'f32'}")
    pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    function(*pointers, *map(ctypes.c_int64, numbers), ctypes.c_int(torch.get_num_threads()))


def _output(x: Tensor, weight: Tensor, mode: int) -> Tensor:
    taps = weight.shape[4]
    if mode == DOT:
        return torch.empty(*x.shape[:3], taps, device=x.device, dtype=torch.float32)
    return x.new_empty(*x.shape[:3], *((taps,) if mode == TAPS else ()), x.shape[3])


@torch.library.custom_op("restore_archs::deform", mutates_args=(), device_types="cpu")
def deform_kernel(x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, mode: int) -> Tensor:
    """Channels-last sampling as `deform_kernel.c` describes; ``query`` is read in mode DOT only.

    x, query: (B, H, W, C) float32 or bfloat16; displacement (B, H, W, G, K, 2) and weight (B, H, W, G, K) float32.
    """
    x, query, displacement, weight = (tensor.contiguous() for tensor in (x, query, displacement, weight))
    y = _output(x, weight, mode)
    _call("deform_forward", (x, query, displacement, weight, y, y), weight, mode)
    return y


@deform_kernel.register_fake
def _(x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, mode: int) -> Tensor:
    return _output(x, weight, mode)


@torch.library.custom_op("restore_archs::deform_backward", mutates_args=(), device_types="cpu")
def _backward_kernel(
    x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, gy: Tensor, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, query, displacement, weight, gy = (tensor.contiguous() for tensor in (x, query, displacement, weight, gy))
    gx, spare = _image_gradients(x)
    gquery = torch.empty_like(query, dtype=torch.float32) if mode == DOT else query.new_empty(0)
    places = torch.empty_like(displacement), torch.empty_like(weight)
    _call("deform_backward", (x, query, displacement, weight, gy, gy, gx, spare, gquery, *places), weight, mode)
    return gx.to(x.dtype), gquery.to(query.dtype), *places


@_backward_kernel.register_fake
def _(
    x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, gy: Tensor, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gquery = _dense(query) if mode == DOT else query.new_empty(0)
    return _dense(x), gquery, _dense(displacement), _dense(weight)


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32, since many samples add up: of the images, and an image a thread, see `deform_backward.h`."""
    threads = torch.get_num_threads()
    spare = x.new_empty(threads if threads > 1 else 0, *x.shape[1:], dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.float32), spare


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gy: Tensor) -> tuple[Tensor | None, ...]:
    gx, gquery, gdisplacement, gweight = _backward_kernel(*ctx.saved_tensors, gy, ctx.mode)
    return gx, gquery if ctx.mode == DOT else None, gdisplacement, gweight, None


deform_kernel.register_autograd(_backward, setup_context=_save_inputs)


# ---- the whole convolution


@torch.library.custom_op("restore_archs::deform_convolve", mutates_args=(), device_types="cpu")
def _convolve_kernel(x: Tensor, displacement: Tensor, modulation: Tensor, mix: Tensor, bias: Tensor) -> Tensor:
    """Samples as of `deform_kernel` times ``mix`` (K, C, D), plus ``bias`` (D): (B, H, W, D) of x's type."""
    x, displacement, modulation = (tensor.contiguous() for tensor in (x, displacement, modulation))
    given = mix.shape[2]
    width = (given + 15) // 16 * 16  # the widest vectors'
    mix, bias = (F.pad(tensor.float(), (0, width - given)).contiguous() for tensor in (mix, bias))
    y = x.new_empty(*x.shape[:3], width)
    _call("deform_convolve", (x, displacement, modulation, mix, bias, y), modulation, width)
    return y[..., :given].contiguous()


@_convolve_kernel.register_fake
def _(x: Tensor, displacement: Tensor, modulation: Tensor, mix: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:3], mix.shape[2])


def _save_convolution(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


@torch.library.custom_op("restore_archs::deform_convolve_backward", mutates_args=(), device_types="cpu")
def _convolve_backward_kernel(
    x: Tensor, displacement: Tensor, modulation: Tensor, mix: Tensor, gy: Tensor, mixed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, displacement, modulation, and of mix and bias (float32): those two are empty unless ``mixed``.

    The samples are computed again: they are nine times as large as the image.
    """
    x, displacement, modulation, gy = (tensor.contiguous() for tensor in (x, displacement, modulation, gy))
    taps, channels, out = mix.shape
    deep, wide = (-(-n // 16) * 16 for n in (channels, out))  # WIDEST
    across = F.pad(mix.float().transpose(1, 2), (0, deep - channels)).contiguous()
    gx, spare = _image_gradients(x)
    places = torch.empty_like(displacement), torch.empty_like(modulation)
    threads = torch.get_num_threads()
    each = across.new_empty(threads, taps * channels + 1, wide) if mixed else None  # every thread adds to its own
    tensors = (x, displacement, modulation, across, gy, gx, spare, *places, each)
    _call("convolve_backward", tensors, modulation, out)
    if each is None:
        return gx.to(x.dtype), *places, across.new_empty(0), across.new_empty(0)
    total = each.sum(0)[:, :out]
    return gx.to(x.dtype), *places, total[:-1].clone().view(mix.shape), total[-1].clone()


@_convolve_backward_kernel.register_fake
def _(
    x: Tensor, displacement: Tensor, modulation: Tensor, mix: Tensor, gy: Tensor, mixed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gmix = mix.new_empty(mix.shape if mixed else 0, dtype=torch.float32)
    gbias = mix.new_empty(mix.shape[2] if mixed else 0, dtype=torch.float32)
    return _dense(x), _dense(displacement), _dense(modulation), gmix, gbias


def _convolve_backward(ctx, gy: Tensor) -> tuple[Tensor | None, ...]:
    x, displacement, modulation, mix, bias = ctx.saved_tensors
    mixed = any(ctx.needs_input_grad[3:])
    *gradients, gmix, gbias = _convolve_backward_kernel(x, displacement, modulation, mix, gy, mixed)
    return *gradients, *((gmix.to(mix.dtype), gbias.to(bias.dtype)) if mixed else (None, None))


_convolve_kernel.register_autograd(_convolve_backward, setup_context=_save_convolution)


def _flops(
    x_shape: tuple[int, ...], d: object, m: object, mix_shape: tuple[int, ...], *rest: object, **named: object
) -> int:
    b, h, w, _ = x_shape
    taps, channels, out = mix_shape
    return 2 * b * h * w * taps * channels * out


FLOPS = {torch.ops.restore_archs.deform_convolve: _flops}  # for FlopCounterMode's custom mapping


def convolve(x: Tensor, displacement: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """DCNv2 at once, no column ever written to memory.

    x (B, C, H, W), displacement (B, G, 9, 2, H, W) from the pixel and modulation (B, G, 9, H, W) float32, weight
    (D, C, 3, 3); (B, D, H, W), bfloat16 if x is and float32 otherwise.
    """
    storage = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    mix = weight.flatten(2).permute(2, 1, 0)
    layout = x.to(storage).permute(0, 2, 3, 1), *_channels_last(displacement, modulation)
    return _convolve_kernel(*layout, mix, bias).permute(0, 3, 1, 2)


def _channels_last(displacement: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return displacement.permute(0, 4, 5, 1, 2, 3), weight.permute(0, 3, 4, 1, 2)


# ---- the whole attention, without a backward


@torch.library.custom_op("restore_archs::deform_attend", mutates_args=(), device_types="cpu")
def _attend_kernel(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    displacement, weight = displacement.contiguous(), weight.contiguous()
    y, best, taps = _attended(query, top_k)
    _call("deform_attend", (query, key, value, displacement, weight, y, best, taps), weight, top_k)
    return y, best, taps


@_attend_kernel.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _attended(query, top_k)


def _attended(query: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    best = query.new_empty(*query.shape[:3], top_k, dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), best, best.to(torch.int64)


def attend(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance of all taps, the best of them, values there, pixel by pixel; where no gradient is wanted.

    query, key, value: (B, C, H, W); displacement (B, G, K, 2, H, W) and weight (B, G, K, H, W) float32. The answer
    (B, C, H, W); the relevances (B, top_k, H, W) of the best taps, falling, float32; whose taps they are, int64.
    """
    storage = torch.bfloat16 if key.dtype == torch.bfloat16 else torch.float32
    frames = (tensor.to(storage).permute(0, 2, 3, 1) for tensor in (query, key, value))
    results = _attend_kernel(*frames, *_channels_last(displacement, weight), top_k)
    answer, best, taps = (tensor.permute(0, 3, 1, 2) for tensor in results)
    return answer, best, taps
