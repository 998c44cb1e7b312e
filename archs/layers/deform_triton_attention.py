"""The deformable attention of STDAN for one source frame as one Triton kernel each way, without the samples.

Relevance of all taps, the best `top_k` of them, their softmax and the weighted sum of values in one pass over the
pixels: of keys and values nothing is ever written but the answer. The backward pass reads them again at the chosen
taps only, since no gradient reaches the others. Needs Triton, as `deform_triton`, whose layouts are these.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from archs.layers.deform_triton import (
    _locate,
    _pixels,
    _sample,
    _sample_backward,
    blocks,
    channels_last,
    dense,
    sizes,
)

VALUES = 256  # of a program; with twice as many the compiler for sm_90 spills registers in the backward pass


@triton.jit
@no_type_check
def _softmax(best, chosen, top_k: tl.constexpr):
    """Of the first ``top_k`` columns; 0 in the others."""
    best = tl.where(chosen[None, :] < top_k, best, float("-inf"))
    share = tl.exp(best - tl.max(best, 1)[:, None])
    return share / tl.sum(share, 1)[:, None]


@triton.jit
@no_type_check
def _column(table, columns, n):
    """Column ``n`` of a table; there is no indexing of what is in registers."""
    return tl.sum(tl.where(columns[None, :] == n, table, 0), 1)


@triton.jit
@no_type_check
def _forward(
    query, key, value, displacement, weight, y, best_out, taps_out, count, height, width, groups, depth,
    db, dg, dk, step, dh, dw, wb, wg, wk, wh, ww,
    taps: tl.constexpr, top_k: tl.constexpr, block: tl.constexpr, lanes: tl.constexpr, slots: tl.constexpr,
    choices: tl.constexpr,
):  # fmt: skip
    pixel, live, image, row, column = _pixels(count, height, width, block)
    channels = groups * depth
    start = image * height * width * channels
    slot = tl.arange(0, slots)
    chosen = tl.arange(0, choices)
    used = tl.arange(0, lanes) < depth
    here = live[:, None] & used[None, :]
    relevance = tl.zeros([block, slots], tl.float32) + tl.where(slot < taps, 0.0, float("-inf"))[None, :]
    for g in range(groups):
        lane = g * depth + tl.arange(0, lanes)
        asked = tl.load(query + pixel[:, None] * channels + lane[None, :], mask=here, other=0.0).to(tl.float32)
        for k in range(taps):
            at = image * db + g * dg + k * dk + row * dh + column * dw
            inside, top, left, ty, tx = _locate(displacement, at, step, live, row, column, height, width)
            gain = tl.load(weight + image * wb + g * wg + k * wk + row * wh + column * ww, mask=live, other=0.0)
            seen = _sample(key + start, lane, used, inside, top, left, ty, tx, height, width, channels)
            relevance += tl.where(slot[None, :] == k, (gain * tl.sum(seen * asked, 1))[:, None], 0.0)

    # PyTorch's topk takes NaN for the greatest; the maximum here would pass over it, and hide that training diverged
    relevance = tl.where(relevance == relevance, relevance, float("inf"))
    best = tl.zeros([block, choices], tl.float32)
    which = tl.zeros([block, choices], tl.int32)
    for turn in tl.static_range(top_k):
        index = tl.argmax(relevance, 1)
        best = tl.where(chosen[None, :] == turn, tl.max(relevance, 1)[:, None], best)
        which = tl.where(chosen[None, :] == turn, index[:, None], which)
        relevance = tl.where(slot[None, :] == index[:, None], float("-inf"), relevance)
    share = _softmax(best, chosen, top_k)
    kept = live[:, None] & (chosen < top_k)[None, :]
    tl.store(best_out + pixel[:, None] * top_k + chosen[None, :], best, mask=kept)
    tl.store(taps_out + pixel[:, None] * top_k + chosen[None, :], which, mask=kept)

    for g in range(groups):
        lane = g * depth + tl.arange(0, lanes)
        total = tl.zeros([block, lanes], tl.float32)
        for n in range(top_k):
            k = _column(which, chosen, n)
            at = image * db + g * dg + k * dk + row * dh + column * dw
            inside, top, left, ty, tx = _locate(displacement, at, step, live, row, column, height, width)
            gain = tl.load(weight + image * wb + g * wg + k * wk + row * wh + column * ww, mask=live, other=0.0)
            seen = _sample(value + start, lane, used, inside, top, left, ty, tx, height, width, channels)
            total += (gain * _column(share, chosen, n))[:, None] * seen
        tl.store(y + pixel[:, None] * channels + lane[None, :], total, mask=here)


@triton.jit
@no_type_check
def _backward(
    query, key, value, displacement, weight, best_in, taps_in, gy, gbest,
    gquery, gkey, gvalue, gdisplacement, gweight, count, height, width, groups, depth,
    db, dg, dk, step, dh, dw, wb, wg, wk, wh, ww,
    top_k: tl.constexpr, block: tl.constexpr, lanes: tl.constexpr, choices: tl.constexpr,
):  # fmt: skip
    """Once over the values for what the softmax wants to know, then over keys and values together."""
    pixel, live, image, row, column = _pixels(count, height, width, block)
    channels = groups * depth
    start = image * height * width * channels
    chosen = tl.arange(0, choices)
    used = tl.arange(0, lanes) < depth
    here = live[:, None] & used[None, :]
    kept = live[:, None] & (chosen < top_k)[None, :]
    among = pixel[:, None] * top_k + chosen[None, :]
    which = tl.load(taps_in + among, mask=kept, other=0)
    share = _softmax(tl.load(best_in + among, mask=kept, other=0.0), chosen, top_k)

    gshare = tl.zeros([block, choices], tl.float32)
    for g in range(groups):
        lane = g * depth + tl.arange(0, lanes)
        grad = tl.load(gy + pixel[:, None] * channels + lane[None, :], mask=here, other=0.0).to(tl.float32)
        for n in range(top_k):
            k = _column(which, chosen, n)
            at = image * db + g * dg + k * dk + row * dh + column * dw
            inside, top, left, ty, tx = _locate(displacement, at, step, live, row, column, height, width)
            gain = tl.load(weight + image * wb + g * wg + k * wk + row * wh + column * ww, mask=live, other=0.0)
            seen = _sample(value + start, lane, used, inside, top, left, ty, tx, height, width, channels)
            gshare += tl.where(chosen[None, :] == n, (gain * tl.sum(seen * grad, 1))[:, None], 0.0)
    grelevance = share * (gshare - tl.sum(share * gshare, 1)[:, None])
    grelevance += tl.load(gbest + among, mask=kept, other=0.0)

    for g in range(groups):
        lane = g * depth + tl.arange(0, lanes)
        own = pixel[:, None] * channels + lane[None, :]
        asked = tl.load(query + own, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(gy + own, mask=here, other=0.0).to(tl.float32)
        gasked = tl.zeros([block, lanes], tl.float32)
        for n in range(top_k):
            k = _column(which, chosen, n)
            at = image * db + g * dg + k * dk + row * dh + column * dw
            at_weight = image * wb + g * wg + k * wk + row * wh + column * ww
            inside, top, left, ty, tx = _locate(displacement, at, step, live, row, column, height, width)
            gain = tl.load(weight + at_weight, mask=live, other=0.0)
            wanted = _column(grelevance, chosen, n)
            gasked += (gain * wanted)[:, None] * _sample(
                key + start, lane, used, inside, top, left, ty, tx, height, width, channels
            )
            key_y, key_x, key_gain = _sample_backward(
                key + start, gkey + start, wanted[:, None] * asked, gain, lane, used, inside, top, left, ty, tx,
                height, width, channels,
            )  # fmt: skip
            value_y, value_x, value_gain = _sample_backward(
                value + start, gvalue + start, _column(share, chosen, n)[:, None] * grad, gain, lane, used, inside,
                top, left, ty, tx, height, width, channels,
            )  # fmt: skip
            tl.store(gdisplacement + at, key_y + value_y, mask=live)
            tl.store(gdisplacement + at + step, key_x + value_x, mask=live)
            tl.store(gweight + at_weight, key_gain + value_gain, mask=live)
        tl.store(gquery + own, gasked, mask=here)


def _outputs(value: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    best = torch.empty(*value.shape[:3], top_k, device=value.device, dtype=torch.float32)
    return value.new_empty(value.shape), best, torch.empty_like(best, dtype=torch.int64)


@torch.library.custom_op("restore_archs::deform_attend_triton", mutates_args=())
def attend_triton(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The answer (B, H, W, C), the best relevances (B, H, W, top_k) float32, falling, and whose taps they are, int64.

    query, key, value: (B, H, W, C); displacement (B, G, K, 2, H, W) and weight (B, G, K, H, W) float32, strided as
    they like.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    answer = _outputs(value, top_k)
    groups, taps = weight.shape[1:3]
    programs, block, lanes = blocks(value, groups, VALUES)
    with torch.cuda.device_of(value):
        _forward[(programs,)](
            query, key, value, displacement, weight, *answer, *sizes(value, groups), *displacement.stride(),
            *weight.stride(), taps=taps, top_k=top_k, block=block, lanes=lanes, slots=triton.next_power_of_2(taps),
            choices=triton.next_power_of_2(top_k),
        )  # fmt: skip
    return answer


@attend_triton.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(value, top_k)


@torch.library.custom_op("restore_archs::deform_attend_triton_backward", mutates_args=())
def _gradients(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, best: Tensor, taps: Tensor,
    gy: Tensor, gbest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value, gy, gbest = (tensor.contiguous() for tensor in (query, key, value, gy, gbest))
    displacement, weight = dense(displacement), dense(weight)
    gquery = torch.empty_like(query)
    images = [torch.zeros_like(image, dtype=torch.float32) for image in (key, value)]  # sums: not in bf16
    places = torch.zeros_like(displacement), torch.zeros_like(weight)  # most taps were not chosen
    groups, top_k = weight.shape[1], best.shape[3]
    programs, block, lanes = blocks(value, groups, VALUES)
    with torch.cuda.device_of(value):
        _backward[(programs,)](
            query, key, value, displacement, weight, best, taps, gy, gbest, gquery, *images, *places,
            *sizes(value, groups), *displacement.stride(), *weight.stride(), top_k=top_k, block=block, lanes=lanes,
            choices=triton.next_power_of_2(top_k),
        )  # fmt: skip
    return gquery, images[0].to(key.dtype), images[1].to(value.dtype), *places


@_gradients.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, best: Tensor, taps: Tensor,
    gy: Tensor, gbest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    images = (torch.empty_like(image.contiguous()) for image in (query, key, value))
    gquery, gkey, gvalue = images
    return gquery, gkey, gvalue, torch.empty_like(dense(displacement)), torch.empty_like(dense(weight))


def _save(ctx, inputs, output) -> None:
    _, best, taps = output
    ctx.mark_non_differentiable(taps)
    ctx.save_for_backward(*inputs[:5], best, taps)


def _autograd(ctx, gy: Tensor, gbest: Tensor, _taps: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(*ctx.saved_tensors, gy, gbest), None


attend_triton.register_autograd(_autograd, setup_context=_save)


def attend(
    query: Tensor, key: Tensor, value: Tensor, displacement: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`deform_torch.attend` by these kernels."""
    images = (channels_last(image) for image in (query, key, value))
    y, best, taps = attend_triton(*images, displacement, weight, top_k)
    return y.permute(0, 3, 1, 2).to(value.dtype), best.permute(0, 3, 1, 2), taps.permute(0, 3, 1, 2)
