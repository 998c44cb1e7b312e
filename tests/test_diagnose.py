"""Diagnosis: every injected mistake is found with its figures, honest results are left alone."""

import functools
import math
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, pad

from archs.layers.blocks import interleave
from restore.conventions import PROTOCOL, figures_by_convention, matching_conventions
from restore.degrade import bd, bd_shift, imresize, quantize
from restore.degrade_codec import jpeg
from restore.degrade_match import BICUBIC, likeness
from restore.diagnose import Finding, diagnose
from restore.frames import open_clips
from restore.metrics import psnr
from restore.registration import MARGIN, NO_SHIFT, REACH, Shift, inside, register, shifted
from restore.sample import low_resolution, sample_clip

VID4 = Path(os.environ.get("RESTORE_SHARED", Path(__file__).parents[2] / "shared")) / "data/eval/Vid4"
SEEDS = range(3)


@functools.cache
def truth(seed: int) -> torch.Tensor:
    return sample_clip(8, 112, 128, seed=seed)


def bicubic_average(lq: torch.Tensor) -> torch.Tensor:
    up = imresize(lq, 4)
    return quantize(interleave(up[None], ((up[:-1] + up[1:]) / 2)[None])[0])


@functools.cache
def good(seed: int) -> torch.Tensor:
    """Results of a good network: half the error of bicubic enlargement."""
    return (truth(seed) + imresize(imresize(truth(seed), 1 / 4), 4)) / 2


def moved(x: torch.Tensor, down: float, right: float) -> torch.Tensor:
    """Shift in the Fourier domain, exact but for the border."""
    rows, columns = torch.fft.fftfreq(x.shape[-2])[:, None], torch.fft.rfftfreq(x.shape[-1])
    turn = torch.exp(-2j * math.pi * (rows * down + columns * right))
    return torch.fft.irfft2(torch.fft.rfft2(x) * turn, s=x.shape[-2:])


def later(x: torch.Tensor, frames: int) -> torch.Tensor:
    """Result n is truth n + frames; the clip wraps, which nobody looks at."""
    return x.roll(-frames, 0)


def squeezed(x: torch.Tensor) -> torch.Tensor:
    return x * (219 / 255) + 16 / 255


def framed(x: torch.Tensor, width: int) -> torch.Tensor:
    return pad(x[..., width:-width, width:-width], (width,) * 4)


def found(restored: torch.Tensor, true: torch.Tensor, **options: object) -> dict[str, Finding]:
    findings = diagnose(quantize(restored), true, **options)
    assert len({finding.mistake for finding in findings}) == len(findings)
    return {finding.mistake: finding for finding in findings}


def middle_psnr(restored: torch.Tensor, true: torch.Tensor, y_channel: bool = True) -> float:
    """Figure of the frames and the part that diagnose looks at in a clip of 8 frames."""
    numbers = [2, 3, 4, 5]
    return float(psnr(inside(quantize(restored)[numbers]), inside(true[numbers]), y_channel=y_channel).mean())


# --- honest results


@pytest.mark.parametrize("seed", SEEDS)
def test_honest_results_are_left_alone(seed):
    true, noise = truth(seed), torch.randn(truth(seed).shape, generator=torch.Generator().manual_seed(seed))
    lq = low_resolution(true[:7])
    results = {
        "truth": true,
        "good": good(seed),
        "noisy": true + noise * 0.08,
        "blurred": avg_pool2d(pad(true, (2,) * 4, mode="reflect"), 5, 1),
        "sharpened": 2 * true - avg_pool2d(pad(true, (1,) * 4, mode="reflect"), 3, 1),
        "ghosts": (true + true.roll(1, 0) + true.roll(-1, 0)) / 3,
        "compressed": jpeg(true, quality=[30] * 8),
        "a bit dark": true * 0.95,
        "grey": true.mean(1, keepdim=True).expand_as(true),
    }
    assert {name: found(result, true) for name, result in results.items()} == {name: {} for name in results}
    assert found(bicubic_average(lq), true[:7], lq=lq) == {}


@pytest.mark.parametrize("seed", SEEDS)
def test_repeated_frames_are_no_shift(seed):
    true = truth(seed)
    repeated = imresize(imresize(true[::2], 1 / 4), 4).repeat_interleave(2, 0)
    assert found(repeated, true) == {}


def test_a_static_clip_has_no_shift_in_time():
    true = truth(0)[:1].expand(8, -1, -1, -1)
    assert found(good(0)[:1].expand_as(true), true) == {}


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_flat_frames(level):
    true = torch.full((8, 3, 64, 64), quantize(torch.tensor(level)).item())
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    assert found(true, true, lq=true[..., :16, :16], claimed_psnr=30.0) == {}
    assert found(true + noise, true) == {}


@pytest.mark.parametrize("frames", range(1, 8))
def test_short_clips(frames):
    true = truth(1)[:frames]
    assert found(good(1)[:frames], true) == {}
    assert set(found(moved(good(1)[:frames], 2, 0), true)) == {"spatial_shift"}


# --- one mistake


@pytest.mark.parametrize("frames", [-2, -1, 1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_shift_in_time(seed, frames):
    true, wrong = truth(seed), later(good(seed), frames)
    (finding,) = diagnose(quantize(wrong), true)
    assert (finding.mistake, finding.amount) == ("time_shift", (frames,))
    before, after = middle_psnr(wrong, true), middle_psnr(wrong, later(true, frames))
    assert finding.gain_db == pytest.approx(after - before, abs=1e-3)
    assert f"rises from {before:.1f} to {after:.1f} dB when result n is truth n{frames:+d}" in finding.message


@pytest.mark.parametrize("shift", [(1.5, 1.5), (-0.5, -0.5), (0.25, -0.25), (0, 2.75), (-1, 0), (-3.3, 1.2), (4, -4)])
@pytest.mark.parametrize("seed", SEEDS)
def test_shift_in_space(seed, shift):
    true = truth(seed)
    (finding,) = diagnose(quantize(moved(good(seed), *shift)), true)
    assert finding.mistake == "spatial_shift"
    assert finding.amount == pytest.approx(shift, abs=1 / 16)
    lost = middle_psnr(good(seed), true) - middle_psnr(moved(good(seed), *shift), true)
    assert finding.gain_db == pytest.approx(lost, abs=0.3)


@pytest.mark.parametrize("seed", SEEDS)
def test_shift_of_blurred_results_is_as_exact(seed):
    result = avg_pool2d(pad(truth(seed), (3,) * 4, mode="reflect"), 7, 1)
    findings = found(moved(result, 1.5, -2.25), truth(seed))
    assert list(findings) == ["spatial_shift"]
    assert findings["spatial_shift"].amount == pytest.approx((1.5, -2.25), abs=1 / 8)


def test_directions_are_said_right():
    true = truth(1)
    message = found(moved(good(1), 0, 2), true)["spatial_shift"].message
    assert re.match(r"results lie (2.0|1.9)\d px right of the truth: PSNR-Y", message)
    message = found(moved(good(1), -3, -2), true)["spatial_shift"].message
    assert re.match(r"results lie (2.0|1.9)\d px left of and (3.0|2.9)\d px above the truth: PSNR-Y", message)


@pytest.mark.parametrize("seed", SEEDS)
def test_swapped_channels(seed):
    true, wrong = truth(seed), good(seed).flip(1)
    (finding,) = diagnose(quantize(wrong), true)
    before, after = (middle_psnr(x, true, y_channel=False) for x in (wrong, good(seed)))
    assert finding.mistake == "swapped_channels"
    assert finding.gain_db == pytest.approx(after - before, abs=1e-3)
    assert f"PSNR-RGB (middle of 4 frames) rises from {before:.1f} to {after:.1f} dB" in finding.message


@pytest.mark.parametrize("seed", SEEDS)
def test_squeezed_levels(seed):
    (finding,) = diagnose(quantize(squeezed(good(seed))), truth(seed))
    assert finding.mistake == "range" and "squeezed into 16..235" in finding.message
    lost = middle_psnr(good(seed), truth(seed)) - middle_psnr(squeezed(good(seed)), truth(seed))
    assert finding.gain_db == pytest.approx(lost, abs=0.2)


@pytest.mark.parametrize("seed", SEEDS)
def test_stretched_levels(seed):
    # of a nearly perfect result: contrast that a blurred one lacks would be a gain
    result = truth(seed) * 0.95 + good(seed) * 0.05
    (finding,) = diagnose(quantize((result - 16 / 255) * (255 / 219)), truth(seed))
    assert finding.mistake == "range" and "stretched from 16..235" in finding.message


@pytest.mark.parametrize("width", [1, 4, 8, 16])
@pytest.mark.parametrize("seed", SEEDS)
def test_border(seed, width):
    true, wrong = truth(seed), framed(good(seed), width)
    (finding,) = diagnose(quantize(wrong), true)
    assert (finding.mistake, finding.amount) == ("border", (width,))
    figures = [float(psnr(quantize(wrong)[2:6], true[2:6], crop_border=c).mean()) for c in (0, width)]
    assert finding.gain_db == pytest.approx(figures[1] - figures[0], abs=1e-3)


def test_garbage_at_one_side():
    wrong = good(1).clone()
    wrong[..., -3:, :] = 1 - wrong[..., -3:, :]
    assert found(wrong, truth(1))["border"].amount == (3,)


# --- several


@pytest.mark.parametrize("seed", SEEDS)
def test_several_mistakes_are_all_found(seed):
    true, result = truth(seed), good(seed)
    cases = {
        ("swapped_channels", "time_shift"): later(result.flip(1), 1),
        ("spatial_shift", "time_shift"): later(moved(result, 1.5, 1.5), 1),
        ("range", "spatial_shift"): moved(squeezed(result), -0.5, 1),
        ("border", "swapped_channels"): framed(result.flip(1), 8),
        ("range", "swapped_channels"): squeezed(result.flip(1)),
        ("range", "spatial_shift", "swapped_channels", "time_shift"): later(
            moved(squeezed(result), 1.5, 1.5).flip(1), -1
        ),
    }
    for mistakes, wrong in cases.items():
        findings = found(wrong, true)
        assert tuple(sorted(findings)) == mistakes
        gains = [finding.gain_db for finding in findings.values()]
        assert gains == sorted(gains, reverse=True)
    assert findings["time_shift"].amount == (-1,)
    assert findings["spatial_shift"].amount == pytest.approx((1.5, 1.5), abs=1 / 8)
    assert "with the other mistakes mended" in findings["range"].message


# --- the input


def _cv2(frames: torch.Tensor, interpolation: int) -> torch.Tensor:
    images = (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    small = [cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=interpolation) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255


INPUTS = {
    "cv2.INTER_CUBIC": lambda x: _cv2(x, cv2.INTER_CUBIC),
    "cv2.INTER_LINEAR": lambda x: _cv2(x, cv2.INTER_LINEAR),
    "cv2.INTER_AREA": lambda x: _cv2(x, cv2.INTER_AREA),
    "the first pixel of each block": lambda x: _cv2(x, cv2.INTER_NEAREST),
    "BD with 13 taps, phase 'first'": lambda x: quantize(bd(x)),
    "BD with 12 taps": lambda x: quantize(bd(x, taps=12, phase="centre", border="replicate")),
    "BD with 7 taps": lambda x: quantize(bd(x, taps=7, phase="centre", border="replicate")),
    "red and blue swapped": lambda x: low_resolution(x, time_scale=1).flip(1),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", INPUTS)
def test_input_by_another_degradation(seed, name):
    true = truth(seed)
    for step in (1, 2):
        findings = found(true, true, lq=INPUTS[name](true[::step]))
        assert list(findings) == ["input"]
        assert re.match(f"input is not MATLAB bicubic .* but made by .*{name}", findings["input"].message)
        assert findings["input"].gain_db > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_inputs_by_bicubic(seed):
    true = truth(seed)
    assert found(true, true, lq=low_resolution(true)) == found(true, true, lq=low_resolution(true, time_scale=1)) == {}
    twice = quantize(quantize(imresize(imresize(true, 1 / 4), 1)))
    assert found(true, true, lq=twice) == {}
    unrounded = found(true, true, lq=imresize(true, 1 / 4))["input"]
    assert "not rounded to 8 bits" in unrounded.message and unrounded.gain_db == 0
    compressed = jpeg(low_resolution(true), quality=[80] * 4)
    assert "no clean MATLAB bicubic" in found(true, true, lq=compressed)["input"].message
    other = torch.cat([low_resolution(true[1:]), low_resolution(true[-1:])])[:4]
    assert "of the frames one later" in found(true, true, lq=other)["input"].message


def test_phase_of_bd_in_results_of_a_bicubic_network():
    true = truth(1)[:7]
    for settings in ({}, {"taps": 7, "phase": "centre", "border": "replicate"}):
        lq = quantize(bd(true[::2], **settings))
        findings = found(bicubic_average(lq), true, lq=lq)
        late = -bd_shift(4, **{key: value for key, value in settings.items() if key != "border"})
        assert list(findings) == ["spatial_shift", "input"]
        assert findings["spatial_shift"].amount == pytest.approx((late, late), abs=1 / 8)
        assert f"BD input with {settings.get('taps', 13)} taps" in findings["spatial_shift"].message


@pytest.mark.parametrize("size", [(126, 157), (130, 162), (64, 300)])
def test_sizes_that_scale_does_not_divide(size):
    true = sample_clip(3, *size, seed=1)
    assert likeness(quantize(imresize(true, 1 / 4)), true)[BICUBIC] > 58
    cut = true[..., : size[0] // 4 * 4, : size[1] // 4 * 4]
    assert likeness(quantize(imresize(cut, 1 / 4)), true)[BICUBIC] > 58


# --- figures


def test_claimed_figures():
    true, result = truth(1), quantize(good(1))
    figures = figures_by_convention(result, true)
    settings = {" with 4 px of border cropped": {"crop_border": 4}, "": {}}
    for suffix, options in settings.items():
        assert figures[PROTOCOL + suffix] == pytest.approx(float(psnr(result, true, **options).mean()))
        expected = float(psnr(result, true, y_channel=False, **options).mean())
        assert figures["PSNR of RGB" + suffix] == pytest.approx(expected)
    assert figures["PSNR of full-range Y"] == pytest.approx(figures[PROTOCOL] - 20 * math.log10(255 / 219), abs=1e-6)
    assert figures["PSNR of rounded Y"] < figures[PROTOCOL]
    for name in figures:
        assert matching_conventions(figures, figures[name] + 0.001)[0] == name
    assert matching_conventions(figures, 3.0) == []
    assert found(result, true, claimed_psnr=figures[PROTOCOL] + 0.04) == found(result, true, claimed_psnr=3.0) == {}
    claimed = figures["PSNR of RGB"]
    finding = found(result, true, claimed_psnr=claimed)["protocol"]
    assert finding.message.startswith(f"the claimed {claimed:.2f} dB is PSNR of RGB")
    assert finding.gain_db == pytest.approx(claimed - figures[PROTOCOL])


def test_frames_equal_to_the_truth_are_left_out_of_figures():
    true, result = truth(1)[:2], quantize(good(1))[:2].clone()
    result[0] = true[0]
    assert figures_by_convention(result, true)[PROTOCOL] == pytest.approx(float(psnr(result[1], true[1])))
    assert math.isnan(figures_by_convention(true, true)[PROTOCOL])


# --- registration


@pytest.mark.parametrize("shift", [NO_SHIFT, Shift(2.0, -3.0), Shift(0.3, -4.9), Shift(-0.5, 0.125)])
def test_shifted_is_a_shift(shift):
    x = truth(1)[:2, 0]
    smooth = imresize(imresize(x, 1 / 2), 2)
    middle = (..., slice(20, -20), slice(20, -20))
    expected = inside(moved(smooth, *shift))[middle]
    torch.testing.assert_close(shifted(smooth, shift)[middle], expected, rtol=0, atol=0.01)
    if shift == Shift(*map(round, shift)):
        expected = x.roll([int(d) for d in shift], (1, 2))
        torch.testing.assert_close(shifted(x, shift), inside(expected), rtol=0, atol=1e-6)
    assert shifted(x, shift).shape == (2, 112 - 2 * MARGIN, 128 - 2 * MARGIN)


def test_registration_of_contrast_noise_and_nothing():
    x, noise = truth(2)[:2, 1], torch.randn(2, 112, 128, generator=torch.Generator().manual_seed(0))
    shift = register(0.6 * moved(x, 0.7, -2.2) + 0.3 + 0.05 * noise, x)
    assert shift == pytest.approx((0.7, -2.2), abs=0.05)
    assert register(x, torch.full_like(x, 0.5)) == register(torch.zeros_like(x), x) == NO_SHIFT
    assert max(map(abs, register(noise, x))) <= REACH
    stripes = torch.sin(torch.arange(128) / 9).expand(2, 112, 128)  # nothing tells how far down they are
    assert register(moved(stripes, 0, 1), stripes) == pytest.approx((0, 1), abs=0.1)


# --- what people do


def test_errors():
    true = truth(0)
    with pytest.raises(ValueError, match="differ in shape"):
        diagnose(true[:4], true)
    with pytest.raises(ValueError, match="leave pixels of a 112x128 frame"):
        figures_by_convention(true, true, crop_border=56)
    with pytest.raises(ValueError, match="no frames"):
        figures_by_convention(true[:0], true[:0])
    with pytest.raises(ValueError, match="at least 64x64 px"):
        diagnose(true[..., :60], true[..., :60])
    with pytest.raises(ValueError, match="no finite numbers"):
        diagnose(true * math.nan, true)
    with pytest.raises(ValueError, match="4 input frames are not every 1st, 2nd"):
        diagnose(true[:5], true[:5], lq=low_resolution(true))
    with pytest.raises(ValueError, match="input of 28x32 px is not truth of 112x128 px reduced by 2"):
        diagnose(true, true, lq=low_resolution(true), scale=2)


@pytest.mark.parametrize("clip", ["calendar", "city", "foliage", "walk"])
def test_on_vid4(clip):
    if not (VID4 / clip).is_dir():
        pytest.skip(f"no clip at {VID4 / clip}; set RESTORE_SHARED")
    true = open_clips(VID4 / clip)[0].read(0, 7)
    lq = low_resolution(true)
    result = bicubic_average(lq)
    assert found(result, true, lq=lq) == {}
    better = (result + true) / 2
    assert found(later(better, 1), true)["time_shift"].amount == (1,)
    findings = found(moved(better.flip(1), 1.5, 1.5), true)
    assert set(findings) == {"spatial_shift", "swapped_channels"}
    assert findings["spatial_shift"].amount == pytest.approx((1.5, 1.5), abs=1 / 8)
