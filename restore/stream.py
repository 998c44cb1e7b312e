"""Windows in time, tiles in space: clips of any length and size through a network, in bounded memory.

    for frame in restore_clip(net, clip, tile=256): ...

In time, a network sees `window` frames, and neighbouring windows share some. In space, it sees a frame padded to sizes
that it takes, or tiles of that which overlap and are blended. Memory depends on window, tile and frame size, never on
the length of the clip; where it runs out, tiles are halved and the work goes on.

A frame is float32 RGB, (3, h, w), in [0, 1]. Letters in shapes: T frames in, U frames out, h w sizes in, H W sizes out.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from archs import VideoNet
from restore.device import autocast, check_precision
from restore.memory import give_back_memory, out_of_memory

log = logging.getLogger(__name__)

PADDINGS = ("reflect", "zero")


def restore_clip(
    net: VideoNet,
    frames: Iterable[Float[Tensor, "3 h w"]],
    *,
    window: int = 4,
    temporal_overlap: int = 1,
    tile: int | None = None,
    tile_overlap: int = 16,
    slowmo: int | None = None,
    padding: str = "reflect",
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> Iterator[Float[Tensor, "3 H W"]]:
    """Restored frames, float32 on the CPU, clamped to [0, 1], in order of time; T frames give `net.frames_out(T)`.

    `window` input frames go through `net` (in eval mode) at once, and neighbouring windows share `temporal_overlap`. Of
    one shared frame the first result stays, as in the published evaluation; several are cross-faded linearly. The last
    window moves back to end with the clip; results already given stay. `slowmo=1` leaves out the frames between the
    inputs. With `device`, the network is moved there first. The rest is as in `restore_window`. Where memory runs out,
    the tiles are halved from there on, with a warning, and the window is restored anew.

    ValueError at once for arguments that do not fit each other or the network. While iterating: ValueError for a clip
    shorter than `net.min_frames`, MemoryError where `least_tile` is too large. At most `window` frames are taken beyond
    those whose results have been given.
    """
    factor = net.time_scale if slowmo is None else slowmo
    _check_time(net, window, temporal_overlap, factor)
    _check_space(net, tile, tile_overlap, padding, precision)
    if device is not None:
        net = net.to(device)

    def restore(clip: Tensor) -> Tensor:
        nonlocal tile
        while True:
            try:
                restored = restore_window(
                    net, clip, tile=tile, tile_overlap=tile_overlap, padding=padding, precision=precision
                )
                return restored[:: net.time_scale // factor].clamp_(0, 1).cpu()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                tile = _halved(net, clip, tile, tile_overlap, error)
            give_back_memory(_device(net, clip))  # out of the handler, whose traceback holds tensors

    windows = _windows(frames, window, temporal_overlap, net.min_frames)
    return _joined(windows, restore, factor=factor, overlap=temporal_overlap)


def restore_window(
    net: VideoNet,
    frames: Float[Tensor, "t 3 h w"],
    *,
    tile: int | None = None,
    tile_overlap: int = 16,
    padding: str = "reflect",
    precision: str = "fp32",
) -> Float[Tensor, "u 3 H W"]:
    """One network call on frames of any size: pad, cut into tiles, restore, blend, crop; float32, not clamped.

    `tile` is the side of a tile in input pixels (rounded up to `net.multiple_of`), None for whole frames; neighbours
    share `tile_overlap` pixels, over which they are blended. `padding` ("reflect" or "zero") is what is put at the
    bottom and the right of sizes that the network does not take. `precision` is "fp32", or "bf16" or "fp16" for
    autocast. Tiles are moved to the device of `net` one at a time; the result is where `frames` are. ValueError for
    arguments that do not fit.
    """
    _check_space(net, tile, tile_overlap, padding, precision)
    padded, crop = pad_to(frames, net.multiple_of, padding)
    height, width = padded.shape[-2:]
    side = max(height, width) if tile is None else round_up(tile, net.multiple_of)
    rows, columns = spans(height, side, tile_overlap), spans(width, side, tile_overlap)
    # Made outside inference mode, so that whoever gets it may do with it what they like.
    restored = padded.new_zeros(
        net.frames_out(len(frames)), 3, height * net.scale, width * net.scale, dtype=torch.float32
    )
    for (top, bottom), down in zip(rows, _feathers(rows, tile_overlap, net.scale), strict=True):
        for (left, right), across in zip(columns, _feathers(columns, tile_overlap, net.scale), strict=True):
            weight = (down[:, None] * across).to(restored.device)  # (H, W) of the tile
            part = _call(net, padded[..., top:bottom, left:right], precision).to(restored.device)
            area = restored[..., top * net.scale : bottom * net.scale, left * net.scale : right * net.scale]
            area.addcmul_(part, weight)  # no copy in between: these are the largest tensors there are
    return crop(restored, net.scale)


def least_tile(net: VideoNet, tile_overlap: int) -> int:
    """Side of the smallest tile, in pixels, that is cut by itself: 32 or more, and at most half of it shared."""
    return round_up(max(32, 2 * tile_overlap), net.multiple_of)


def spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Pieces (start, stop) of `size` that cover 0 .. length, neighbours sharing `overlap`.

    The last one is moved back to end at `length`, so that it shares more; a short length is one piece. ValueError
    unless 0 <= overlap < size, which a single piece does not need.
    """
    if length <= size:
        return [(0, length)]
    if not 0 <= overlap < size:
        raise ValueError(f"pieces of {size} cannot share {overlap}: the overlap must be at least 0 and below the size")
    starts = [*range(0, length - size, size - overlap), length - size]
    return [(start, start + size) for start in starts]


def pad_to(
    x: Float[Tensor, "t c h w"], multiple: int, mode: str = "reflect"
) -> tuple[Float[Tensor, "t c h2 w2"], Callable[[Tensor, int], Tensor]]:
    """`x` padded at the bottom and the right until its sizes divide by `multiple`, and what undoes it.

    `crop(y, scale)` cuts the padding off a result that is `scale` times as large. `mode` is "reflect", which repeats
    the edge where a size is too small to be reflected, or "zero", as in the published evaluation; else ValueError.
    """
    _check_padding(mode)
    height, width = x.shape[-2:]
    padded = x
    for size, place in ((width, 0), (height, 2)):
        extra = -size % multiple
        if not extra:
            continue
        pads = [0, 0, 0, 0]
        pads[place + 1] = extra
        how = "constant" if mode == "zero" else "reflect" if extra < size else "replicate"
        padded = functional.pad(padded, pads, mode=how)

    def crop(y: Tensor, scale: int = 1) -> Tensor:
        return y[..., : height * scale, : width * scale]

    return padded, crop


def round_up(size: int, multiple: int) -> int:
    """The next multiple from `size` on."""
    return -(-size // multiple) * multiple


def _joined(
    windows: Iterable[tuple[int, Tensor]], restore: Callable[[Tensor], Tensor], *, factor: int, overlap: int
) -> Iterator[Tensor]:
    """The results of (first frame, window) pairs as one sequence; input frame n is result n * factor."""
    shared = (overlap - 1) * factor + 1 if overlap > 1 else 0  # results that are held back to be cross-faded
    held: Tensor | None = None
    known = 0  # results so far, those held back included
    for start, clip in windows:
        results = restore(clip)  # (U, 3, H, W)
        end = start * factor + len(results)
        results = results[known - start * factor - (shared if known else 0) :]
        if held is not None:
            results[:shared] = _cross_fade(held, results[:shared])
        known = end
        ready = max(len(results) - shared, 0)
        held = results[ready:].clone() if shared else None  # a view would keep all results of the window
        yield from results[:ready]
        del results  # not to be held while the next window is restored
    if held is not None:
        yield from held


def _cross_fade(old: Float[Tensor, "n 3 H W"], new: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
    weight = torch.arange(1, len(new) + 1, dtype=new.dtype) / (len(new) + 1)
    return torch.lerp(old, new, weight[:, None, None, None])


def _windows(frames: Iterable[Tensor], size: int, overlap: int, least: int) -> Iterator[tuple[int, Tensor]]:
    """(number of the first frame, (T, 3, h, w)), placed as `spans` places pieces, with no more read than is needed."""
    source = iter(frames)
    clip = list(islice(source, size))
    if len(clip) < least:
        raise ValueError(f"{len(clip)} frame{'s' * (len(clip) != 1)}, but the network needs at least {least}")
    start = 0
    if clip:
        yield start, torch.stack(clip)
    while fresh := list(islice(source, size - overlap)):
        clip = (clip + fresh)[-size:]
        start += len(fresh)
        yield start, torch.stack(clip)


def _halved(net: VideoNet, clip: Float[Tensor, "t 3 h w"], tile: int | None, overlap: int, error: Exception) -> int:
    """The side of the next smaller tiles after `error`; MemoryError if there are none."""
    frames, height, width = len(clip), *clip.shape[-2:]
    side = round_up(min(max(height, width), tile or max(height, width)), net.multiple_of)
    least = least_tile(net, overlap)
    if side <= least:
        raise MemoryError(f"out of memory even with tiles of {side} pixels, {frames} frames at once") from error
    smaller = max(round_up(-(-side // 2), net.multiple_of), least)
    log.warning("out of memory with tiles of %d pixels, %d frames at once: going on with %d", side, frames, smaller)
    return smaller


def _device(net: VideoNet, clip: Tensor) -> torch.device:
    parameter = next(net.parameters(), None)
    return clip.device if parameter is None else parameter.device


def _call(net: VideoNet, clip: Float[Tensor, "t 3 h w"], precision: str) -> Float[Tensor, "u 3 H W"]:
    device = _device(net, clip)
    with torch.inference_mode(), autocast(device, precision):
        return net(clip.to(device)[None])[0].float()


def _feathers(parts: list[tuple[int, int]], overlap: int, scale: int) -> list[Tensor]:
    """Weights of the pieces of one axis, `scale` times as long, that rise and fall over the overlaps and sum to 1."""
    end = parts[-1][1]
    total = torch.zeros(end * scale)
    weights = []
    for start, stop in parts:
        rise = torch.arange(1, (stop - start) * scale + 1) / (overlap * scale + 1)
        weight = torch.ones_like(rise)
        if start > 0:
            weight = torch.minimum(weight, rise)
        if stop < end:
            weight = torch.minimum(weight, rise.flip(0))
        total[start * scale : stop * scale] += weight
        weights.append(weight)
    return [weight / total[start * scale : stop * scale] for (start, stop), weight in zip(parts, weights, strict=True)]


def _check_time(net: VideoNet, window: int, overlap: int, factor: int) -> None:
    name = type(net).__name__
    if factor != 1 and net.time_scale == 1:
        raise ValueError(f"slowmo={factor}, but {name} makes no frames between those it is given: leave it out")
    if factor not in (1, net.time_scale):
        possible = " or ".join(str(n) for n in sorted({1, net.time_scale}))
        raise ValueError(f"slowmo={factor} is not what {name} gives: {possible}")
    if window < net.min_frames:
        raise ValueError(f"window={window}, but {name} needs at least {net.min_frames} frames at once")
    least = 1 if net.time_scale > 1 else 0  # without a shared frame nobody restores the gap between two windows
    if not least <= overlap < window:
        raise ValueError(
            f"temporal_overlap={overlap} does not fit: with {name} and window={window} it is {least} to {window - 1}"
        )


def _check_space(net: VideoNet, tile: int | None, overlap: int, padding: str, precision: str) -> None:
    _check_padding(padding)
    check_precision(precision)
    if tile is None:
        return
    if tile < 1:
        raise ValueError(f"tile={tile} is no size in pixels; None is for whole frames")
    side = round_up(tile, net.multiple_of)
    if not 0 <= overlap < side:
        raise ValueError(f"tile_overlap={overlap} does not fit: with tiles of {side} pixels it is 0 to {side - 1}")


def _check_padding(padding: str) -> None:
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r} is none of {', '.join(PADDINGS)}")
