"""Which known degradation made a low-resolution input, found by trying all of them on the true frames."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from restore.degrade import bd, imresize
from restore.metrics import psnr

BICUBIC = "MATLAB bicubic"
BEST_LIKENESS = 80.0  # dB; better ones count as this
_CROP = 64  # side of the middle that is looked at, in pixels of the input
_BORDER = 4  # pixels of it that see beyond a crop
_FRAMES = 3


def likeness(lq: Float[Tensor, "n 3 h w"], truth: Float[Tensor, "t 3 H W"], scale: int = 4) -> dict[str, float]:
    """How like an input is to what each known degradation makes of the true frames, unrounded: PSNR in dB, of RGB.

    Input that one of them made is 58.9 dB like it after rounding to 8 bits, `BEST_LIKENESS` without. `BICUBIC` is
    the published protocol's and comes first. Three frames and the middle 64x64 pixels of the input are compared.

    Args:
        lq: RGB in [0, 1], of every frame of truth, or every second (third, ...) from the first on.
        truth: RGB in [0, 1]; H and W are those of lq times scale, or up to scale - 1 pixels off.
        scale: of truth over lq.

    Raises:
        ValueError: numbers of frames or sizes that do not fit.
    """
    step = _time_step(len(lq), len(truth))
    (height, width), sides = lq.shape[-2:], truth.shape[-2:]
    if any(abs(side - scale * low) >= scale for side, low in zip(sides, (height, width), strict=True)):
        raise ValueError(f"input of {height}x{width} px is not truth of {sides[0]}x{sides[1]} px reduced by {scale}")
    numbers = sorted({len(lq) * part // (_FRAMES + 1) for part in range(1, _FRAMES + 1)})
    (top, bottom), (left, right) = _middle(height), _middle(width)
    given = lq[numbers][..., top:bottom, left:right].float().cpu().clamp(0, 1)

    def true_frames(time: int) -> Tensor:
        kept = truth[[min(max(n * step + time, 0), len(truth) - 1) for n in numbers]]
        return kept[..., top * scale : bottom * scale, left * scale : right * scale].float().cpu()

    made = {name: way(true_frames(0), scale) for name, way in _WAYS.items()}
    for time, where in ((1, "later"), (-1, "earlier")):
        made[f"{BICUBIC} of the frames one {where}"] = _WAYS[BICUBIC](true_frames(time), scale)
    return {name: _psnr(given, frames.clamp(0, 1)) for name, frames in made.items()}


def _time_step(inputs: int, frames: int) -> int:
    """Of the true frames that inputs were made of."""
    step = -(-frames // inputs) if inputs else 0
    if inputs == 0 or -(-frames // step) != inputs:
        raise ValueError(f"{inputs} input frames are not every 1st, 2nd, ... of {frames} true frames")
    return step


def _middle(side: int) -> tuple[int, int]:
    first = max(side - _CROP, 0) // 2
    return first, min(first + _CROP, side)


def _psnr(given: Tensor, made: Tensor) -> float:
    sides = [min(pair) for pair in zip(given.shape[-2:], made.shape[-2:], strict=True)]
    rows, columns = (slice(_BORDER, side - _BORDER) if side > 4 * _BORDER else slice(side) for side in sides)
    figure = psnr(given[..., rows, columns], made[..., rows, columns], y_channel=False)
    return float(figure.clamp(max=BEST_LIKENESS).mean())


def _interpolated(frames: Tensor, scale: int, mode: str, antialias: bool = False) -> Tensor:
    aligned = None if mode == "area" else False
    size = [side // scale for side in frames.shape[-2:]]
    return interpolate(frames, size=size, mode=mode, align_corners=aligned, antialias=antialias)


def _matlab_bd(frames: Tensor, scale: int, taps: int) -> Tensor:
    return bd(frames, scale, taps=taps, phase="centre", border="replicate")


# What makes input of (frames, scale).
_WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    BICUBIC: lambda x, s: imresize(x, 1 / s),
    "bicubic without antialiasing (cv2.INTER_CUBIC, F.interpolate)": lambda x, s: _interpolated(x, s, "bicubic"),
    "bilinear without antialiasing (cv2.INTER_LINEAR, F.interpolate)": lambda x, s: _interpolated(x, s, "bilinear"),
    "bilinear with antialiasing (PIL)": lambda x, s: _interpolated(x, s, "bilinear", antialias=True),
    "means of blocks (cv2.INTER_AREA, average pooling)": lambda x, s: _interpolated(x, s, "area"),
    "the first pixel of each block (nearest, strided slicing)": lambda x, s: x[..., ::s, ::s],
    "BD with 13 taps, phase 'first' (DUF, EDVR)": lambda x, s: bd(x, s),
    "BD with 12 taps, phase 'centre' (BasicVSR)": lambda x, s: _matlab_bd(x, s, 12),
    "BD with 7 taps, phase 'centre' (RCAN)": lambda x, s: _matlab_bd(x, s, 7),
    f"{BICUBIC} with red and blue swapped": lambda x, s: imresize(x.flip(-3), 1 / s),
}
