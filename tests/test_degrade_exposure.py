"""Blur of an exposure: what physics says of light, motion and time, whatever the clip."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from tiny import unchecked
from torch import Tensor
from torch.utils.data import DataLoader

from restore.degrade import imresize, quantize
from restore.degrade_exposure import MARGIN, Exposure, HighRate, to_light, to_signal
from restore.metrics import psnr
from restore.registration import register
from restore.sample import sample_clip as render

sample_clip = functools.cache(render)  # never changed here
RESPONSES = ("gamma", "srgb", "linear")
INSIDE = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))


def exposed(clip: Tensor, length: float, *, seed: int = 0, step: int = 1, **settings) -> Tensor:
    """Blurred by one exposure, as large as it was."""
    fixed = Exposure(**{"scale": 1, "exposure_range": (length, length), **settings})
    return fixed(clip, np.random.default_rng(seed), step)


def texture(height: int = 96, width: int = 112, seed: int = 0) -> Tensor:
    """Soft noise on 8-bit levels that continues at its borders, (3, height, width)."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    distance = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    soft = torch.fft.irfft2(torch.fft.rfft2(noise - 0.5) * torch.exp(-0.5 * (distance / 0.12) ** 2), s=(height, width))
    return quantize(0.5 + soft / soft.abs().max() * 0.5)


def moving(down: int, right: int, frames: int = 5) -> Tensor:
    """The texture, moving by whole pixels."""
    return torch.stack([texture().roll((t * down, t * right), (1, 2)) for t in range(frames)])


def box(frame: Tensor, down: int, right: int, length: float, response: str) -> Tensor:
    """The mean of the light over a straight path of length * (down, right), read bilinearly at a tenth of a pixel."""
    light, total = to_light(frame, response), torch.zeros_like(frame)
    times = (torch.arange(100) + 0.5) / 100 - 0.5
    for time in times.tolist():
        y, x = time * length * down, time * length * right
        for rows, share in ((math.floor(y), 1 - y % 1), (math.floor(y) + 1, y % 1)):
            for columns, part in ((math.floor(x), 1 - x % 1), (math.floor(x) + 1, x % 1)):
                total += share * part / len(times) * light.roll((rows, columns), (1, 2))
    return to_signal(total, response)


@pytest.mark.parametrize("response", RESPONSES)
def test_without_exposure_the_frame_is_the_sharp_one(response):
    clip = sample_clip(3, 48, 64)
    assert torch.equal(exposed(clip, 0.0, response=response), clip)
    assert torch.equal(exposed(clip, 0.0, response=response, scale=4), quantize(imresize(clip, 0.25)))


@pytest.mark.parametrize("response", RESPONSES)
def test_what_stands_still_stays_sharp(response):
    clip = sample_clip(3, 48, 64)[:1].expand(4, -1, -1, -1)
    assert torch.equal(exposed(clip, 2.0, response=response), clip)
    assert torch.equal(exposed(clip[:1], 1.0, response=response), clip[:1])  # a single frame has no motion


@pytest.mark.parametrize(
    ("down", "right", "length"), [(0, 4, 1.0), (3, 0, 1.0), (-2, 3, 0.5), (0, -6, 0.7), (0, 2, 2.0)]
)
def test_a_translation_blurs_over_its_path(down, right, length):
    clip = moving(down, right)
    blurred = exposed(clip, length)
    for frame, result in zip(clip, blurred, strict=True):
        expected = box(frame, down, right, length, "gamma")[INSIDE]
        assert psnr(result[INSIDE], expected) > max(52, psnr(frame[INSIDE], expected) + 10)


def test_light_is_averaged_and_not_the_signal():
    """As much light falls on the sensor as before; with a gamma the signal's mean rises."""
    clip = moving(0, 6)
    for response in RESPONSES:
        sharp, blurred = (x[INSIDE] for x in (clip[2], exposed(clip, 1.5, response=response)[2]))
        before, after = (to_light(x, response).mean().item() for x in (sharp, blurred))
        assert after == pytest.approx(before, rel=1e-3)
        rise = (blurred.mean() - sharp.mean()).item()
        assert abs(rise) < 3e-4 if response == "linear" else rise > 2e-3


def test_responses():
    """Inverses of each other, at known values."""
    signal = torch.linspace(0, 1, 256)
    for response in RESPONSES:
        assert torch.allclose(to_signal(to_light(signal, response), response), signal, atol=1e-6)
    assert to_light(torch.tensor(0.5), "srgb") == pytest.approx(0.21404, abs=1e-5)
    assert to_light(torch.tensor(0.5), "gamma") == pytest.approx(0.5**2.2)


def test_time_has_no_direction():
    clip = sample_clip(5, 64, 80, seed=1)
    there, back = exposed(clip, 0.8), exposed(clip.flip(0), 0.8).flip(0)
    assert (there - back).abs().max() <= 1.01 / 255


def test_nothing_is_shifted():
    for clip in (moving(2, 5), moving(0, -7)):
        blurred = exposed(clip, 1.0)
        for sharp, result in zip(clip, blurred, strict=True):
            assert register(result.mean(0, keepdim=True), sharp.mean(0, keepdim=True)).length < 0.05


def sharpness(frames: Tensor) -> float:
    """Energy of the differences between neighbouring pixels."""
    return float(frames.diff(dim=-1)[INSIDE].square().mean() + frames.diff(dim=-2)[INSIDE].square().mean())


def test_a_longer_exposure_is_less_sharp():
    clip = sample_clip(5, 64, 80, seed=1)[:3]
    energies = [sharpness(exposed(clip, length)) for length in (0.0, 0.3, 0.6, 1.0, 1.6)]
    assert all(less < 0.97 * more for more, less in itertools.pairwise(energies))


def test_neighbours_differ_in_sharpness():
    rng = np.random.default_rng(3)
    each, wave, same = (
        Exposure(exposure_range=(0.1, 2.0), vary=vary).lengths(200, rng) for vary in ("frame", "smooth", "clip")
    )
    assert all(0.1 <= value <= 2.0 for value in (*each, *wave, *same))
    assert np.abs(np.diff(each)).mean() > 0.4 and len(set(same)) == 1
    assert np.ptp(wave) > 0 and np.abs(np.diff(wave)).max() <= np.ptp(wave) * math.sin(math.pi / 4) + 1e-9
    clip = moving(0, 4, frames=7)
    blurred = Exposure(scale=1)(clip, np.random.default_rng(0))
    lengths = Exposure(scale=1).lengths(7, np.random.default_rng(0))
    assert np.corrcoef(lengths, [sharpness(frame) for frame in blurred])[0, 1] < -0.9


def test_frames_in_between_show_the_motion():
    """An exposure of half an interval between every second frame is one of a whole interval between all."""
    clip = sample_clip(5, 64, 80, seed=1)
    assert torch.equal(exposed(clip, 0.5, step=2), exposed(clip, 1.0)[::2])
    assert not torch.equal(exposed(clip, 0.5, step=2), exposed(clip[::2], 0.5))


def test_it_is_near_the_blur_of_true_frames_in_between():
    clip = sample_clip(9, 96, 128, seed=1)
    light = to_light(clip, "gamma")
    truth = to_signal(light[2:7].mean(0), "gamma")
    made = to_signal(HighRate(clip[::4], "gamma").mean(1, 1.25, 5), "gamma")  # at the same five times
    assert psnr(made[INSIDE], truth[INSIDE]) > max(30, psnr(clip[4][INSIDE], truth[INSIDE]) + 7)


def test_noise_grows_with_the_root_of_the_light():
    clip = torch.tensor([40.0, 200.0]).div(255).view(2, 1, 1, 1).expand(2, 3, 96, 96)
    noisy = to_light(exposed(clip, 0.0, noise_range=(8.0, 8.0)), "gamma")
    light = to_light(clip, "gamma")[:, 0, 0, 0]
    assert torch.allclose(noisy.std((1, 2, 3)), 8 / 255 * light.sqrt(), rtol=0.05)
    assert torch.allclose(noisy.mean((1, 2, 3)), light, rtol=0.01)
    quiet = exposed(clip, 0.0, noise_range=(0.0, 8.0), seed=1)
    assert 0 < (quiet - clip).std() < (exposed(clip, 0.0, noise_range=(8.0, 8.0)) - clip).std()


def _blurred(seed: int) -> Tensor:
    torch.set_num_threads(1)
    return Exposure(noise_range=(0.0, 4.0))(sample_clip(3, 48, 64), np.random.default_rng(seed))


def test_the_result_depends_on_the_seed_alone():
    expected = [_blurred(seed) for seed in (0, 1)]
    assert torch.equal(_blurred(0), expected[0]) and not torch.equal(*expected)
    in_workers = list(DataLoader([0, 1], batch_size=None, num_workers=2, collate_fn=_blurred))
    assert all(map(torch.equal, in_workers, expected))


@pytest.mark.parametrize("size", [(1, 1), (2, 90), (90, 3), (13, 40), (31, 200), (7, 7)])
def test_any_size_has_a_flow(size):
    """OpenCV's estimate crashes the process where a side is short; it is given more."""
    clip = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    out = exposed(clip, 1.0)
    assert out.shape == clip.shape and torch.equal(out, quantize(out))


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0},
        {"subframes": 0},
        {"exposure_range": (1.0, 0.5)},
        {"exposure_range": (-0.1, 0.5)},
        {"exposure_range": (0.0, 9.0)},
        {"noise_range": (0.0, 300.0)},
        {"vary": "often"},
        {"response": "gamma22"},
    ],
)
def test_bad_settings(wrong):
    key, value = next(iter(wrong.items()))
    shown = list(value) if isinstance(value, tuple) else value
    with unchecked(), pytest.raises(ValueError, match=f"^{key}=") as error:
        Exposure(**wrong)
    assert repr(shown) in str(error.value)
