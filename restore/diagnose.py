"""Recognises the classic mistakes behind "my PSNR is not the paper's", from results beside their truth.

Each mistake is mended and the figure looked at again: what raises it is reported, with both figures. The mistakes are
those of the field's question threads: other frames compared (off by one), another sub-pixel phase of down-sampling,
BGR read as RGB, studio range read as full range, borders that are no result, input made by another "bicubic", and RGB
figures beside luma figures. Blur, noise, ghosts and other honest weaknesses of a network are none of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from restore.conventions import PROTOCOL, figures_by_convention, matching_conventions
from restore.degrade import bd_shift
from restore.degrade_match import BICUBIC, likeness
from restore.metrics import check_pair, psnr, rgb_to_y
from restore.registration import NO_SHIFT, Shift, inside, register, shifted

LEAST_SIDE = 64  # pixels of a frame
_CROP = 256  # side of the middle that is looked at
_CEILING = 60.0  # dB; better figures count as this, since 8 bits cannot hold them
_LEAST_SHIFT = 0.1  # pixels
_TIE = 0.1  # dB
_BLOCK = 8  # side of the block means that tell colour and levels, free of blur and noise
_NEARER = 0.6  # of the distance from the truth's levels, at most, lie others; honest results have 1.2 and more
_DEEPEST_BORDER = 32  # pixels
_BORDER_CONTRAST = 4.0  # error of a garbage row over that of its neighbours
_EQUAL = 55.0  # dB between inputs; rounding twice, as MATLAB does for 8-bit images, leaves 56
_LEAST_LEAD = 1.0  # dB that another degradation must be more alike than bicubic


@dataclass(frozen=True)
class Finding:
    """A mistake that the data shows.

    mistake: "time_shift", "spatial_shift", "swapped_channels", "range", "border", "input" or "protocol".
    message: one sentence with the figures.
    gain_db: what mending it brings: in PSNR of the results (all other mistakes mended), for "input" in likeness
        (PSNR) of the given input to what it was made by, for "protocol" claimed minus PSNR-Y.
    amount: frames for "time_shift", pixels (down, right) for "spatial_shift", pixels for "border", else empty.
    """

    mistake: str
    message: str
    gain_db: float
    amount: tuple[float, ...] = ()


def diagnose(
    restored: Float[Tensor, "t 3 H W"],
    truth: Float[Tensor, "_ 3 _ _"],
    *,
    lq: Float[Tensor, "n 3 h w"] | None = None,
    scale: int = 4,
    claimed_psnr: float | None = None,
    least_gain_db: float = 0.2,
) -> list[Finding]:
    """Say which classic mistakes explain the error of results: the most expensive first, none for honest results.

    Looks at the middle 256x256 px of at most four frames, whole frames for borders, so that a clip takes less than a
    second; figures are means over these frames and above 60 dB count as 60. Shifts are found up to 2 frames and 5 px;
    one in time needs 4 frames (6 for two) and motion, one in space detail. What is wrong with the input and with the
    claimed figure comes last.

    Args:
        restored: results, RGB in [0, 1], rounded to 8 bits.
        truth: the frames that they are compared with.
        lq: the network's input, RGB in [0, 1], every frame of truth or every second (third, ...), if it is to be
            checked for having been made by MATLAB's bicubic.
        scale: of truth over lq.
        claimed_psnr: a figure that is published for exactly these frames; "protocol" tells which convention meets it.
        least_gain_db: what mending must bring to be reported.

    Raises:
        ValueError: shapes that do not fit each other, frames smaller than 64x64, or results that are not finite.
    """
    _check(restored, truth)
    probe = _probe(restored, truth)
    if not probe.restored.isfinite().all():
        raise ValueError("restored frames hold values that are no finite numbers; nothing can be learnt from them")
    mending, figures = _justified(probe, _suspected(probe, least_gain_db), least_gain_db)
    findings = _reported(mending, figures, scale, f"middle of {len(probe.numbers)} frames")
    if mending.shift == NO_SHIFT:  # moved frames have another border than they are judged by
        findings += _border(restored, truth, probe.numbers, mending.time, least_gain_db)
    findings.sort(key=lambda finding: -finding.gain_db)
    if lq is not None:
        findings += _input(lq, truth, scale)
    if claimed_psnr is not None:
        findings += _protocol(figures_by_convention(restored, truth, crop_border=scale), claimed_psnr)
    return findings


@dataclass(frozen=True)
class _Probe:
    """The middle of a few frames, and of the true frames around them in time."""

    numbers: Sequence[int]
    restored: Tensor  # (n, 3, h, w)
    truth: Mapping[int, Tensor]  # the same by distance in time, 0 and on both sides of it


@dataclass(frozen=True)
class _Mending:
    """What is done to compare results rightly; the default is nothing."""

    time: int = 0  # result n is truth n + time
    shift: Shift = NO_SHIFT  # results lie there
    swapped: bool = False
    levels: str = ""  # of `_LEVELS`


# What results show of a level x in [0, 1] -> (factor, summand): levels = factor * x + summand.
_LEVELS = {
    "squeezed into 16..235 (studio range taken for full range)": (219 / 255, 16 / 255),
    "stretched from 16..235 to 0..255 (full range taken for studio range)": (255 / 219, -16 / 219),
}
_Figures = dict[str, tuple[float, float]]  # name -> PSNR in dB with the mistake left in, and with all mended
_MISTAKES: dict[str, dict[str, Any]] = {  # name -> what leaves it in
    "time_shift": {"time": 0},
    "spatial_shift": {"shift": NO_SHIFT},
    "swapped_channels": {"swapped": False},
    "range": {"levels": ""},
}


def _check(restored: Tensor, truth: Tensor) -> None:
    check_pair(restored, truth)
    if len(truth) == 0 or min(truth.shape[-2:]) < LEAST_SIDE:
        raise ValueError(f"diagnose needs frames of at least {LEAST_SIDE}x{LEAST_SIDE} px, got {tuple(truth.shape)}")


def _probe(restored: Tensor, truth: Tensor) -> _Probe:
    """Pairs of neighbours in time, at a quarter and three quarters of the clip.

    Pairs, since every second frame of space-time results is synthesised: such a frame alone, the mean of its
    neighbours at worst, may well be more like one of them than like the truth.
    """
    count, (height, width) = len(truth), truth.shape[-2:]
    reach = min(2, max(count - 2, 0) // 2)
    first, room = reach, max(count - 2 - 2 * reach, 0)
    starts = {first + room // 4, first + room - room // 4} if room > 1 else {first}
    numbers = sorted({n for start in starts for n in (start, start + 1) if n < count})
    top, left = max(height - _CROP, 0) // 2, max(width - _CROP, 0) // 2

    def middle(frames: Tensor, time: int) -> Tensor:
        kept = frames[[n + time for n in numbers]]
        return kept[..., top : top + _CROP, left : left + _CROP].float().cpu()

    return _Probe(numbers, middle(restored, 0), {time: middle(truth, time) for time in range(-reach, reach + 1)})


def _suspected(probe: _Probe, least_gain_db: float) -> _Mending:
    """Every mistake that its own trace in the data speaks for."""
    mending = _Mending(*_alignment(probe, least_gain_db))
    results, truth = _compared(probe, mending)
    restored, clean = avg_pool2d(results, _BLOCK), avg_pool2d(truth, _BLOCK)
    difference, true_difference = (x[:, 0] - x[:, 2] for x in (restored, clean))
    alike = (difference * true_difference).sum() / (difference.norm() * true_difference.norm()).clamp(min=1e-6)
    if alike < -0.5:
        mending, restored = replace(mending, swapped=True), restored.flip(-3)
    for name, (factor, summand) in _LEVELS.items():
        expected = avg_pool2d((factor * truth + summand).clamp(0, 1), _BLOCK)
        if (restored - expected).norm() < _NEARER * (restored - clean).norm():
            mending = replace(mending, levels=name)
    return mending


def _alignment(probe: _Probe, least_gain_db: float) -> tuple[int, Shift]:
    """Which true frames, and where, results are most like; two mistakes only if one alone explains less.

    Under a camera that pans, a shift in time and one in space look alike: both are tried.
    """
    restored, truth = _plane(probe.restored), {time: _plane(x) for time, x in probe.truth.items()}
    unmoved = {time: _likeness(inside(restored), inside(x)) for time, x in truth.items()}
    alone = [(float(score.mean()), time, NO_SHIFT) for time, score in unmoved.items() if time]
    together: list[tuple[float, int, Shift]] = []
    for time, x in truth.items():
        shift = register(restored, x)
        score = _likeness(inside(restored), shifted(x, shift))
        # Repeated frames lie behind by half a step on average; a shift in space is in every frame.
        if shift.length >= _LEAST_SHIFT and bool((score >= unmoved[time]).all()):
            (together if time else alone).append((float(score.mean()), time, shift))
    best = (float(unmoved[0].mean()), 0, NO_SHIFT)
    for candidates in (alone, together):
        # Of equals the one in time: a shift in space would have to be the camera's speed by chance.
        top = max(candidates, key=lambda c: c[0] + _TIE * (c[2] == NO_SHIFT), default=best)
        if top[0] >= best[0] + least_gain_db:
            best = top
    return best[1:]


def _likeness(restored: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of each frame's plane (n, h, w), at the contrast and brightness that fit all of them best."""
    deviation, true_deviation = restored - restored.mean(), truth - truth.mean()
    gain = (deviation * true_deviation).sum() / true_deviation.square().sum().clamp(min=1e-6)
    error = (deviation - gain * true_deviation).square().mean((-2, -1))
    return -10 * error.clamp(min=10 ** (-_CEILING / 10)).log10()


def _plane(frames: Tensor) -> Tensor:
    """(n, h, w), near luma, but the same if red and blue are swapped."""
    return (frames[:, 0] + 2 * frames[:, 1] + frames[:, 2]) / 4


def _compared(probe: _Probe, mending: _Mending) -> tuple[Tensor, Tensor]:
    """Results mended, and the true frames moved to where they lie; (n, 3, h, w)."""
    return _mended(inside(probe.restored), mending), shifted(probe.truth[mending.time], mending.shift)


def _mended(restored: Tensor, mending: _Mending) -> Tensor:
    if mending.swapped:
        restored = restored.flip(-3)
    if mending.levels:
        factor, summand = _LEVELS[mending.levels]
        restored = ((restored - summand) / factor).clamp(0, 1)
    return restored


def _figure(probe: _Probe, mending: _Mending, y_channel: bool) -> float:
    return float(psnr(*_compared(probe, mending), y_channel=y_channel).clamp(max=_CEILING).mean())


def _found(mending: _Mending) -> list[str]:
    return [name for name, nothing in _MISTAKES.items() if replace(mending, **nothing) != mending]


def _justified(probe: _Probe, mending: _Mending, least_gain_db: float) -> tuple[_Mending, _Figures]:
    """Only what raises the figure itself, each given the others; and the figures of what remains."""
    while names := _found(mending):
        figures: _Figures = {}
        for name in names:
            y_channel = name != "swapped_channels"
            left = replace(mending, **_MISTAKES[name])
            figures[name] = _figure(probe, left, y_channel), _figure(probe, mending, y_channel)
        worst = min(names, key=lambda name: figures[name][1] - figures[name][0])
        if figures[worst][1] - figures[worst][0] >= least_gain_db:
            return mending, figures
        mending = replace(mending, **_MISTAKES[worst])
    return mending, {}


def _reported(mending: _Mending, figures: _Figures, scale: int, part: str) -> list[Finding]:
    findings = []
    for name, (before, after) in figures.items():
        plane = "RGB" if name == "swapped_channels" else "Y"
        rise = f"PSNR-{plane} ({part}) rises from {before:.1f} to {after:.1f} dB"
        if len(figures) > 1:
            rise = "with the other mistakes mended, " + rise
        what, mended, amount = _described(name, mending, scale)
        findings.append(Finding(name, f"{what}: {rise} {mended}", after - before, amount))
    return findings


def _described(name: str, mending: _Mending, scale: int) -> tuple[str, str, tuple[float, ...]]:
    """What is wrong, how it is mended, and the amount."""
    if name == "time_shift":
        time = mending.time
        return f"frames are shifted in time by {abs(time)}", f"when result n is truth n{time:+d}", (float(time),)
    if name == "swapped_channels":
        return "red and blue are swapped (BGR read as RGB)", "when they are swapped back", ()
    if name == "range":
        return f"levels are {mending.levels}", "when this is undone", ()
    down, right = mending.shift
    parts = [(right, "right of", "left of"), (down, "below", "above")]
    where = " and ".join(f"{abs(d):.2f} px {late if d > 0 else early}" for d, late, early in parts if abs(d) >= 0.05)
    hint = ""
    for taps, phase in ((13, "first"), (7, "centre")):
        # A network takes input sampled early for input sampled in the middle, so its results lie late.
        late = -bd_shift(scale, taps=taps, phase=phase)
        if max(abs(down - late), abs(right - late)) < 0.15:
            hint = f", the sub-pixel phase of BD input with {taps} taps and phase {phase!r} in place of bicubic"
    return f"results lie {where} the truth{hint}", "when they are moved back", (down, right)


def _border(restored: Tensor, truth: Tensor, numbers: Sequence[int], time: int, least_gain_db: float) -> list[Finding]:
    """Look for rows and columns at the edge that are no result."""
    pair = restored[list(numbers)], truth[[n + time for n in numbers]]
    luma, true_luma = (rgb_to_y(x.float().cpu()).squeeze(-3) for x in pair)
    error = (luma - true_luma).square()
    down, right = torch.gradient(true_luma, dim=(-2, -1))
    maps = error.mean(0), (down.square() + right.square()).mean(0)
    height, columns = error.shape[-2:]
    width = max(_garbage_rows(*(x.rot90(turns) for x in maps)) for turns in range(4))
    width = min(width, min(height, columns) // 4)
    kept = error[:, width : height - width, width : columns - width]
    before, after = (
        float((10 * torch.log10(255**2 / part.mean((-2, -1)))).clamp(max=_CEILING).mean()) for part in (error, kept)
    )
    if after - before < least_gain_db:
        return []
    rise = f"PSNR-Y ({len(numbers)} frames) rises from {before:.1f} to {after:.1f} dB with crop_border={width}"
    return [Finding("border", f"the outermost {width} px are no result: {rise}", after - before, (float(width),))]


def _garbage_rows(error: Tensor, detail: Tensor) -> int:
    """Leading rows whose error stands out, both as such and relative to the detail that there is to restore."""
    rows, quarter = slice(2 * _DEEPEST_BORDER), error.shape[1] // 4
    error, detail = (x[rows, quarter:-quarter].mean(1) for x in (error, detail))  # borders at the sides left out
    garbage = [x > _BORDER_CONTRAST * x.median().clamp(min=1e-2) for x in (error, error / (detail + 1))]
    count = int((garbage[0] & garbage[1]).long().cumprod(0).sum())
    return count if count <= _DEEPEST_BORDER else 0


def _input(lq: Tensor, truth: Tensor, scale: int) -> list[Finding]:
    alike = likeness(lq, truth, scale)
    nearest = max(alike, key=lambda name: alike[name])
    bicubic, best = alike[BICUBIC], alike[nearest]
    if bicubic >= _EQUAL:
        steps = lq.float() * 255
        if bool(((steps - steps.round()).abs() < 1e-2).all()):
            return []
        return [Finding("input", "input is MATLAB bicubic, but not rounded to 8 bits as the protocol has it", 0.0)]
    if best - bicubic < _LEAST_LEAD:
        message = f"input is no clean MATLAB bicubic ({bicubic:.1f} dB alike): noisy, compressed or of other frames"
        return [Finding("input", message, 0.0)]
    verb = "made by" if best >= _EQUAL else "most like"
    message = f"input is not MATLAB bicubic ({bicubic:.1f} dB alike) but {verb} {nearest} ({best:.1f} dB)"
    return [Finding("input", message, best - bicubic)]


def _protocol(figures: Mapping[str, float], claimed: float) -> list[Finding]:
    met = matching_conventions(figures, claimed)
    if not met or PROTOCOL in met:
        return []
    others = f"{met[0]} ({figures[met[0]]:.2f} dB), not {PROTOCOL} ({figures[PROTOCOL]:.2f} dB)"
    return [Finding("protocol", f"the claimed {claimed:.2f} dB is {others}", claimed - figures[PROTOCOL])]
