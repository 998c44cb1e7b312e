"""Deformable sampling on a GPU as Triton kernels, forward and backward. Needs Triton, so import it where it is used.

What `deform_kernel.c` does for a CPU: every (pixel, tap, group) reads one bilinear sample of its group's channels.
A program takes a block of pixels, with the channels of a group side by side. Images are channels-last and dense, so a
corner of a sample is one run of memory; displacements and weights are read wherever their strides say. Arithmetic is
float32. The gradient of the image is a sum by atomic additions, whose order, and so the last bits, vary from run to
run, as those of `grid_sample` do on a GPU.

`_locate`, `_corner`, `_sample` and `_sample_backward` are shared with `deform_triton_attention`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from archs.layers.deform_kernel import DOT, SUM, TAPS

VALUES = 512  # of a program; with twice as many the compiler for sm_90 spills registers

_DOT = tl.constexpr(DOT)  # Triton takes only such from outside of a kernel
_SUM = tl.constexpr(SUM)
_TAPS = tl.constexpr(TAPS)


@triton.jit
@no_type_check
def _locate(displacement, at, step, live, row, column, height, width):
    """Whether a sample has a corner inside, its upper left corner, and how far beyond that it lies."""
    y = row + tl.load(displacement + at, mask=live, other=0.0)
    x = column + tl.load(displacement + at + step, mask=live, other=0.0)
    inside = live & (y > -1) & (y < height) & (x > -1) & (x < width)
    y = tl.where(inside, y, 0.0)
    x = tl.where(inside, x, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    return inside, top.to(tl.int32), left.to(tl.int32), y - top, x - left


@triton.jit
@no_type_check
def _corner(i: tl.constexpr, j: tl.constexpr, inside, top, left, ty, tx, height, width):
    """Corner (i, j) of a sample: whether it is inside, its pixel, its weight's two factors."""
    y = top + i
    x = left + j
    there = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return there, y * width + x, ty if i else 1 - ty, tx if j else 1 - tx


@triton.jit
@no_type_check
def _sample(x, lane, used, inside, top, left, ty, tx, height, width, channels):
    """Bilinear samples (pixels, lanes); ``x`` points at the image of every pixel, ``lane`` numbers its channels."""
    result = tl.zeros([top.shape[0], lane.shape[0]], tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            there, pixel, wy, wx = _corner(i, j, inside, top, left, ty, tx, height, width)
            at = x[:, None] + (pixel[:, None].to(tl.int64) * channels + lane[None, :])
            corner = tl.load(at, mask=there[:, None] & used[None, :], other=0.0).to(tl.float32)
            result += (wy * wx)[:, None] * corner
    return result


@triton.jit
@no_type_check
def _sample_backward(x, gx, grad, scale, lane, used, inside, top, left, ty, tx, height, width, channels):
    """Adds ``scale`` times the gradient ``grad`` of a sample to ``gx``; the derivatives by dy, dx and ``scale``."""
    along_y = tl.zeros([top.shape[0]], tl.float32)
    along_x = tl.zeros([top.shape[0]], tl.float32)
    along_scale = tl.zeros([top.shape[0]], tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            there, pixel, wy, wx = _corner(i, j, inside, top, left, ty, tx, height, width)
            at = pixel[:, None].to(tl.int64) * channels + lane[None, :]
            mask = there[:, None] & used[None, :]
            product = tl.sum(grad * tl.load(x[:, None] + at, mask=mask, other=0.0).to(tl.float32), 1)
            tl.atomic_add(gx[:, None] + at, (scale * wy * wx)[:, None] * grad, mask=mask, sem="relaxed")
            along_y += product * (wx if i else -wx)
            along_x += product * (wy if j else -wy)
            along_scale += product * (wy * wx)
    return scale * along_y, scale * along_x, along_scale


@triton.jit
@no_type_check
def _pixels(count, height, width, block: tl.constexpr):
    """The pixels of a program: their number, which of them exist, image, row and column."""
    pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    row = pixel // width
    return pixel, pixel < count, row // height, row % height, pixel % width


@triton.jit
@no_type_check
def _forward(
    x, query, displacement, weight, y, count, height, width, groups, depth,
    db, dg, dk, step, dh, dw, wb, wg, wk, wh, ww,
    mode: tl.constexpr, taps: tl.constexpr, block: tl.constexpr, lanes: tl.constexpr, slots: tl.constexpr,
):  # fmt: skip
    pixel, live, image, row, column = _pixels(count, height, width, block)
    channels = groups * depth
    lane = tl.arange(0, lanes)
    slot = tl.arange(0, slots)
    used = lane < depth
    here = live[:, None] & used[None, :]
    relevance = tl.zeros([block, slots], tl.float32)
    first = tl.program_id(1)
    last = groups if mode == _DOT else first + 1
    for g in range(first, last):
        own = pixel[:, None] * channels + (g * depth + lane)[None, :]
        total = tl.zeros([block, lanes], tl.float32)
        if mode == _DOT:
            asked = tl.load(query + own, mask=here, other=0.0).to(tl.float32)
        for k in range(taps):
            at = image * db + g * dg + k * dk + row * dh + column * dw
            inside, top, left, ty, tx = _locate(displacement, at, step, live, row, column, height, width)
            gain = tl.load(weight + image * wb + g * wg + k * wk + row * wh + column * ww, mask=live, other=0.0)
            sample = gain[:, None] * _sample(
                x + image * height * width * channels, g * depth + lane, used, inside, top, left, ty, tx,
                height, width, channels,
            )  # fmt: skip
            if mode == _TAPS:
                tl.store(y + (pixel * taps + k)[:, None] * channels + (g * depth + lane)[None, :], sample, mask=here)
            elif mode == _SUM:
                total += sample
            else:
                relevance += tl.where(slot[None, :] == k, tl.sum(sample * asked, 1)[:, None], 0.0)
        if mode == _SUM:
            tl.store(y + own, total, mask=here)
    if mode == _DOT:
        tl.store(y + pixel[:, None] * taps + slot[None, :], relevance, mask=live[:, None] & (slot < taps)[None, :])


@triton.jit
@no_type_check
def _backward(
    x, query, displacement, weight, gy, gx, gquery, gdisplacement, gweight, count, height, width, groups, depth,
    db, dg, dk, step, dh, dw, wb, wg, wk, wh, ww,
    mode: tl.constexpr, taps: tl.constexpr, block: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    pixel, live, image, row, column = _pixels(count, height, width, block)
    g = tl.program_id(1)
    channels = groups * depth
    lane = g * depth + tl.arange(0, lanes)
    used = tl.arange(0, lanes) < depth
    here = live[:, None] & used[None, :]
    own = pixel[:, None] * channels + lane[None, :]
    start = image * height * width * channels
    asked = tl.zeros([block, lanes], tl.float32)
    grad = tl.zeros([block, lanes], tl.float32)
    if mode == _DOT:
        asked = tl.load(query + own, mask=here, other=0.0).to(tl.float32)
    elif mode == _SUM:
        grad = tl.load(gy + own, mask=here, other=0.0).to(tl.float32)
    gasked = tl.zeros([block, lanes], tl.float32)
    for k in range(taps):
        at = image * db + g * dg + k * dk + row * dh + column * dw
        at_weight = image * wb + g * wg + k * wk + row * wh + column * ww
        inside, top, left, ty, tx = _locate(displacement, at, step, live, row, column, height, width)
        gain = tl.load(weight + at_weight, mask=live, other=0.0)
        if mode == _TAPS:
            of_tap = gy + (pixel * taps + k)[:, None] * channels + lane[None, :]
            grad = tl.load(of_tap, mask=here, other=0.0).to(tl.float32)
        elif mode == _DOT:
            grelevance = tl.load(gy + pixel * taps + k, mask=live, other=0.0)
            grad = grelevance[:, None] * asked
            gasked += (gain * grelevance)[:, None] * _sample(
                x + start, lane, used, inside, top, left, ty, tx, height, width, channels
            )
        along_y, along_x, along_weight = _sample_backward(
            x + start, gx + start, grad, gain, lane, used, inside, top, left, ty, tx, height, width, channels
        )
        tl.store(gdisplacement + at, along_y, mask=live)
        tl.store(gdisplacement + at + step, along_x, mask=live)
        tl.store(gweight + at_weight, along_weight, mask=live)
    if mode == _DOT:
        tl.store(gquery + own, gasked, mask=here)


def sizes(x: Tensor, groups: int) -> tuple[int, int, int, int, int]:
    """What the kernels want to know of (B, H, W, C) images: pixels, height, width, groups, channels of a group."""
    b, h, w, c = x.shape
    return b * h * w, h, w, groups, c // groups


def blocks(x: Tensor, groups: int, values: int) -> tuple[int, int, int]:
    """Programs, pixels a program and lanes for the channels of a group, of (B, H, W, C) images.

    ``values`` is about how many samples' channels a program holds, such that its threads' registers are enough.
    """
    pixels, _, _, _, depth = sizes(x, groups)
    lanes = triton.next_power_of_2(depth)
    block = max(16, min(64, values // lanes))
    return triton.cdiv(pixels, block), block, lanes


def dense(tensor: Tensor) -> Tensor:
    """The tensor, copied if several of its elements share memory or gaps lie between them."""
    return tensor if torch.empty_like(tensor).stride() == tensor.stride() else tensor.contiguous()


def _output(x: Tensor, weight: Tensor, mode: int) -> Tensor:
    taps = weight.shape[2]
    if mode == DOT:
        return torch.empty(*x.shape[:3], taps, device=x.device, dtype=torch.float32)
    return x.new_empty(*x.shape[:3], *((taps,) if mode == TAPS else ()), x.shape[3])


@torch.library.custom_op("restore_archs::deform_triton", mutates_args=())
def deform_triton(x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, mode: int) -> Tensor:
    """Sampling of channels-last images; ``query`` is read in mode DOT only.

    x, query: (B, H, W, C); displacement (B, G, K, 2, H, W) and weight (B, G, K, H, W) float32, strided as they like.
    By mode TAPS: (B, H, W, K, C), SUM: (B, H, W, C), DOT: (B, H, W, K) float32.
    """
    x, query = x.contiguous(), query.contiguous()
    y = _output(x, weight, mode)
    groups, taps = weight.shape[1:3]
    programs, block, lanes = blocks(x, groups, VALUES)
    with torch.cuda.device_of(x):
        _forward[programs, 1 if mode == DOT else groups](
            x, query, displacement, weight, y, *sizes(x, groups), *displacement.stride(), *weight.stride(),
            mode=mode, taps=taps, block=block, lanes=lanes, slots=triton.next_power_of_2(taps),
        )  # fmt: skip
    return y


@deform_triton.register_fake
def _(x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, mode: int) -> Tensor:
    return _output(x, weight, mode)


@torch.library.custom_op("restore_archs::deform_triton_backward", mutates_args=())
def _gradients(
    x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, gy: Tensor, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, query, gy = (tensor.contiguous() for tensor in (x, query, gy))
    displacement, weight = dense(displacement), dense(weight)
    gx = torch.zeros_like(x, dtype=torch.float32)  # many samples add up: not in bf16
    gquery = torch.empty_like(query) if mode == DOT else query.new_empty(0)
    places = torch.empty_like(displacement), torch.empty_like(weight)
    groups, taps = weight.shape[1:3]
    programs, block, lanes = blocks(x, groups, VALUES)
    with torch.cuda.device_of(x):
        _backward[programs, groups](
            x, query, displacement, weight, gy, gx, gquery, *places, *sizes(x, groups),
            *displacement.stride(), *weight.stride(), mode=mode, taps=taps, block=block, lanes=lanes,
        )  # fmt: skip
    return gx.to(x.dtype), gquery, *places


@_gradients.register_fake
def _(
    x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor, gy: Tensor, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gquery = torch.empty_like(query.contiguous()) if mode == DOT else query.new_empty(0)
    places = torch.empty_like(dense(displacement)), torch.empty_like(dense(weight))
    return torch.empty_like(x.contiguous()), gquery, *places


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, gy: Tensor) -> tuple[Tensor | None, ...]:
    gx, gquery, gdisplacement, gweight = _gradients(*ctx.saved_tensors, gy, ctx.mode)
    return gx, gquery if ctx.mode == DOT else None, gdisplacement, gweight, None


deform_triton.register_autograd(_autograd, setup_context=_save_inputs)


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C) in a type that the kernels store: float32, bfloat16 or float16."""
    kept = (torch.float32, torch.bfloat16, torch.float16)
    return (x if x.dtype in kept else x.float()).permute(0, 2, 3, 1)


def sample(mode: int, x: Tensor, query: Tensor, displacement: Tensor, weight: Tensor) -> Tensor:
    """`deform_torch.sample` by kernels."""
    y = deform_triton(channels_last(x), channels_last(query), displacement, weight, mode)
    if mode == TAPS:
        return y.permute(0, 4, 3, 1, 2).to(x.dtype)  # (B, H, W, K, C) -> (B, C, K, H, W)
    return y.permute(0, 3, 1, 2).to(torch.float32 if mode == DOT else x.dtype)
