"""Phase correlation: laws of shifts, accuracy on textures cut from larger ones, and as the start of block matching."""

import pytest
import torch
from seeded import SHARED
from tiny import seeded_clip, unchecked
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from archs.layers.deform import warp
from archs.layers.motion_prior import CorrelationMotion
from archs.layers.phase_correlation import (
    Shift,
    local_phase_correlation,
    phase_correlation,
    spectral_shift,
    spread,
    window_side,
)
from archs.layers.spectral import rfft2
from restore.frames import open_clips


def texture(size: int, shift: tuple[float, float] = (0, 0), channels: int = 3, seed: int = 0) -> Tensor:
    """A texture (C, size, size) with amplitudes of 1/f, moved by ``shift``; cut from one 48 px larger."""
    generator = torch.Generator().manual_seed(seed)
    n = size + 48
    fy, fx = torch.fft.fftfreq(n)[:, None], torch.fft.rfftfreq(n)
    spectrum = torch.fft.rfft2(torch.randn(channels, n, n, generator=generator))
    spectrum = spectrum / (fy.square() + fx.square()).sqrt().clamp_min(1 / n)
    phase = torch.exp(-6.283185307j * (fy * shift[0] + fx * shift[1]))
    picture = torch.fft.irfft2(spectrum * phase, s=(n, n))
    return (picture / picture.std())[:, 24:-24, 24:-24]


def noisy(picture: Tensor, seed: int) -> Tensor:
    return picture + 0.02 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))


def pairs(size: int, reach: float, count: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Textures, the same moved by up to ``reach`` px, and by how much; both with noise of their own."""
    generator = torch.Generator().manual_seed(1)
    shifts = (2 * torch.rand(count, 2, generator=generator) - 1) * reach
    first = torch.stack([noisy(texture(size, seed=i), 2 * i) for i in range(count)])
    moved = [noisy(texture(size, (dy, dx), seed=i), 2 * i + 1) for i, (dy, dx) in enumerate(shifts.tolist())]
    return first, torch.stack(moved), shifts


# ---- laws


@pytest.mark.parametrize("size", [(32, 32), (45, 79)])
@pytest.mark.parametrize("shift", [(0, 0), (3, -5), (-15, 12)])
def test_circular_shifts_are_exact(size, shift):
    a = seeded_clip(2, 3, *size) - 0.5
    found = spectral_shift(rfft2(a), rfft2(a.roll(shift, (-2, -1))), size[1])
    assert_close(found.vector, torch.tensor([shift, shift]).float(), atol=1e-3, rtol=0)
    assert found.confidence.min() > 0.98


@pytest.mark.parametrize(("size", "reach"), [(64, 8.0), (32, 1.5)])
def test_fractions_of_a_pixel(size, reach):
    first, second, shifts = pairs(size, reach)
    found = phase_correlation(first, second)
    error = (found.vector - shifts).norm(dim=1)
    assert error.median() < 0.06
    assert error.quantile(0.9) < 0.1
    assert found.confidence.min() > 0.6


def test_the_direction_of_the_shift():
    a, b = texture(48)[None], texture(48, (3.0, -2.0))[None]
    vector = phase_correlation(a, b).vector
    inside = (..., slice(8, -8), slice(8, -8))
    flow = vector[:, :, None, None].expand(1, 2, 48, 48)
    assert (warp(a, -flow) - b)[inside].abs().mean() < 0.1
    assert (warp(a, flow) - b)[inside].abs().mean() > 0.5


def test_antisymmetric():
    first, second, _ = pairs(32, 6.0, 8)
    there, back = phase_correlation(first, second), phase_correlation(second, first)
    assert_close(there.vector, -back.vector, atol=1e-4, rtol=0)
    assert_close(there.confidence, back.confidence, atol=1e-4, rtol=0)


def test_contrast_and_brightness_do_not_matter():
    first, second, _ = pairs(32, 4.0, 4)
    found, other = phase_correlation(first, second), phase_correlation(first, 0.05 * second + 3)
    assert_close(found.vector, other.vector, atol=2e-3, rtol=0)
    assert_close(found.confidence, other.confidence, atol=2e-3, rtol=0)


def test_unrelated_pictures_are_not_trusted():
    first = torch.stack([texture(64, seed=i) for i in range(12)])
    assert phase_correlation(first, first.roll(1, 0)).confidence.mean() < 0.2


def test_a_blurred_partner():
    """What whitening is for: a blur takes amplitudes, the peak stays in its place."""
    first, second, shifts = pairs(64, 4.0, 8)
    blurred = F.avg_pool2d(second, 3, stride=1, padding=1, count_include_pad=False)
    assert (phase_correlation(first, blurred).vector - shifts).norm(dim=1).median() < 0.1


@pytest.mark.parametrize(("value", "most"), [(0.0, 1e-6), (0.3, 0.05)])  # of 0.3 less its mean rounding is left
def test_nothing_to_see(value, most):
    blank = torch.full((1, 3, 32, 32), value)
    for a, b in ((blank, blank), (blank, texture(32)[None]), (texture(32)[None], blank)):
        found = phase_correlation(a, b)
        assert found.vector.isfinite().all()
        assert found.confidence.max() < most


def test_items_of_a_batch_are_independent():
    first, second, _ = pairs(32, 4.0, 3)
    together = phase_correlation(first, second)
    alone = phase_correlation(first[1:2], second[1:2])
    assert_close(together.vector[1:2], alone.vector, atol=1e-5, rtol=0)
    assert_close(together.confidence[1:2], alone.confidence, atol=1e-5, rtol=0)


def test_detached_and_float32_whatever_comes_in():
    a = texture(45)[None].bfloat16().requires_grad_()
    b = texture(45, (1.0, 2.0))[None].bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        vector, confidence = local_phase_correlation(a, b)
    assert not vector.requires_grad and not confidence.requires_grad
    assert vector.dtype == confidence.dtype == torch.float32
    assert_close(vector.mean((2, 3)), torch.tensor([[1.0, 2.0]]), atol=0.1, rtol=0)


# ---- windows


def test_one_window_is_the_whole_picture():
    first, second, _ = pairs(32, 4.0, 2)
    vector, confidence = local_phase_correlation(first, second)
    found = phase_correlation(first, second)
    assert_close(vector, found.vector[:, :, None, None].expand(2, 2, 32, 32))
    assert_close(confidence, found.confidence[:, None, None, None].expand(2, 1, 32, 32))


def test_two_motions():
    a, b, c = texture(80), texture(80, (2.0, 1.0)), texture(80, (-1.0, -3.0))
    moved = torch.cat([b[..., :40], c[..., 40:]], dim=-1)
    vector, confidence = local_phase_correlation(a[None], moved[None])
    left, right = vector[0, :, 16:-16, :18].mean((1, 2)), vector[0, :, 16:-16, -18:].mean((1, 2))
    assert_close(left, torch.tensor([2.0, 1.0]), atol=0.15, rtol=0)
    assert_close(right, torch.tensor([-1.0, -3.0]), atol=0.15, rtol=0)
    assert confidence[..., 38:42].mean() < confidence[..., :18].mean()


@pytest.mark.parametrize("size", [(45, 79), (16, 16), (8, 12), (24, 64), (17, 90), (180, 320)])
def test_any_size(size):
    a = texture(max(size))[None, :, : size[0], : size[1]]
    vector, confidence = local_phase_correlation(a, a)
    assert vector.shape == (1, 2, *size) and confidence.shape == (1, 1, *size)
    assert vector.abs().max() < 0.02
    assert confidence.min() > 0.9


def test_the_centre_of_a_window_has_its_shift():
    """Between centres shifts are mixed by confidence: a window that knows nothing leaves its neighbour's as it is."""
    vector = torch.tensor([[1.0, 2.0], [3.0, -4.0], [9.0, 9.0]])[None, None]
    field, trust = spread(Shift(vector, torch.tensor([[[0.5, 1.0, 0.0]]])), (32, 64))
    for x, expected in ((0, [1.0, 2.0]), (15, [1.0, 2.0]), (32, [3.0, -4.0]), (40, [3.0, -4.0])):
        assert_close(field[0, :, 5, x], torch.tensor(expected))
    half_way = (0.5 * vector[0, 0, 0] + vector[0, 0, 1]) / 1.5
    assert_close(field[0, :, 5, 23:25].mean(1), half_way, atol=0.02, rtol=0)
    assert_close(trust[0, 0, 5, [0, 63]], torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("size", [0, 6, 30])
def test_windows_that_do_not_divide(size):
    with pytest.raises(ValueError, match=f"windows of {size} px for phase correlation: a multiple of 4 is needed"):
        window_side((64, 64), size)


# ---- as the start of block matching


def moving(velocity: tuple[float, float], size: int = 160) -> Tensor:
    """A clip (1, 2, 3, size, size) of a smooth texture that moves by ``velocity``."""
    wide = F.avg_pool2d(texture(size + 160)[None], 5, stride=1, padding=2)[0]
    wide = 0.5 + 0.2 * wide / wide.std()
    dy, dx = (int(v) for v in velocity)
    return torch.stack([wide[:, 80 - y : 80 - y + size, 80 - x : 80 - x + size] for y, x in ((0, 0), (dy, dx))])[None]


def test_motion_beyond_the_reach_of_block_matching():
    clip = moving((-8, 42))
    truth = torch.tensor([-4.0, 21.0])[:, None, None]
    errors = {}
    for first in (None, "phase"):
        motion = CorrelationMotion(first=first).requires_grad_(False)(clip)
        inside = (0, 0, slice(None), slice(40, -40), slice(40, -40))
        errors[first] = float((motion.to_later[inside] - truth).norm(dim=0).mean())
        assert_close(motion.to_earlier, -motion.to_later)
    assert errors["phase"] < 1 < 5 < errors[None]


def test_what_stands_still_starts_still():
    for clip in (moving((0, 0), 64), torch.full((1, 2, 3, 32, 32), 0.3)):
        motion = CorrelationMotion(first="phase").requires_grad_(False)(clip)
        assert motion.to_later.abs().max() < 0.05


def test_the_start_is_off_by_default_and_has_no_weights():
    plain, phase = CorrelationMotion(), CorrelationMotion(first="phase")
    assert plain.first is None
    phase.load_state_dict(plain.state_dict())
    with unchecked(), pytest.raises(ValueError, match="first='flow' is neither 'phase' nor null"):
        CorrelationMotion(first="flow")


def test_neighbours_of_real_clips_fit_better():
    folder = SHARED / "data" / "train" / "davis"
    if not folder.is_dir():
        pytest.skip(f"no real clips: {folder} is missing")
    clips = {clip.name: clip for clip in open_clips(folder)}
    errors = {}
    for first in (None, "phase"):
        network = CorrelationMotion(first=first).requires_grad_(False)
        for name in ("drift-chicane", "scooter-black"):
            frames = F.avg_pool2d(clips[name].read(10, 12)[..., :240, :416], 2)
            motion = network(frames[None])
            moved = [warp(frames[i : i + 1], flow[0]) for i, flow in enumerate((motion.to_earlier, motion.to_later))]
            errors[first] = errors.get(first, 0) + float((moved[0] - moved[1]).abs().mean())
    assert errors["phase"] < 0.95 * errors[None]
