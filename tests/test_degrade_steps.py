import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from restore.degrade_steps import (
    KERNELS,
    RESIZE_MODES,
    blur,
    blur_kernel,
    gaussian_noise,
    motion_blur,
    motion_kernel,
    poisson_noise,
    resize,
    sinc,
    sinc_kernel,
)


def _clip(frames=3, height=20, width=26):
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def _blurred(clip, sigma=1.5, **changes):
    many = {"sigma_x": sigma, "sigma_y": 0.7, "angle": 0.4, "beta": 1.3}
    tracks = {name: [value] * len(clip) for name, value in many.items()}
    return blur(clip, **{"kernel": "aniso", "size": 11, **tracks, **changes})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1, 7, 21])
def test_a_blur_kernel_is_an_even_weighting(kernel, size):
    weights = blur_kernel(kernel, size, sigma_x=2.0, sigma_y=0.8, angle=0.7, beta=1.6)
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights, weights.flip(0, 1))
    if not kernel.endswith("aniso"):
        torch.testing.assert_close(weights, weights.flip(0))
        torch.testing.assert_close(weights, weights.mT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tiny_sigma_changes_nothing(kernel):
    weights = blur_kernel(kernel, 7, sigma_x=1e-3, sigma_y=1e-3, beta=1.0)
    delta = torch.zeros(7, 7)
    delta[3, 3] = 1
    torch.testing.assert_close(weights, delta, rtol=0, atol=1e-4)


def test_sigma_and_angle_are_those_asked_for():
    axis = torch.arange(41).double() - 20
    weights = blur_kernel("aniso", 41, sigma_x=3.0, sigma_y=1.5).double()
    variance = [(weights.sum(dim) * axis**2).sum().item() for dim in (0, 1)]
    assert variance == pytest.approx([9.0, 2.25], rel=1e-3)
    turned = blur_kernel("aniso", 41, sigma_x=3.0, sigma_y=1.5, angle=math.pi / 2)
    torch.testing.assert_close(turned.double(), weights.mT)
    quarter = blur_kernel("aniso", 41, sigma_x=3.0, sigma_y=1.5, angle=math.pi / 4).double()
    assert (quarter * torch.outer(axis, axis)).sum().item() == pytest.approx((9 - 2.25) / 2, rel=1e-3)


def test_shapes_of_kernels():
    plain = blur_kernel("iso", 21, sigma_x=2.0, sigma_y=2.0)
    assert torch.equal(plain, blur_kernel("generalized_iso", 21, sigma_x=2.0, sigma_y=2.0, beta=1.0))
    flat = blur_kernel("generalized_iso", 21, sigma_x=3.0, sigma_y=3.0, beta=4.0)
    assert flat[10, 11] / flat[10, 10] > 0.999
    heavy = blur_kernel("plateau_iso", 21, sigma_x=2.0, sigma_y=2.0, beta=1.0)
    assert heavy[10, 20] > plain[10, 20]


def test_sinc_is_a_low_pass_filter():
    weights = sinc_kernel(21, math.pi / 3)
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert weights.min() < 0
    torch.testing.assert_close(weights, weights.mT)
    response = torch.fft.rfft2(weights, s=(64, 64)).abs()
    assert response[0, 8] > 0.9 and response[0, 16] < 0.1  # pi / 4 passes, pi / 2 does not


@pytest.mark.parametrize("shape", [(20, 26), (9, 31), (3, 4), (1, 1)])
def test_blur_equals_a_convolution(shape):
    clip = _clip(2, *shape).double()
    weights = blur_kernel("aniso", 11, sigma_x=1.5, sigma_y=0.7, angle=0.4)
    padded = torch.from_numpy(np.pad(clip.numpy(), [(0, 0), (0, 0), (5, 5), (5, 5)], mode="reflect"))
    expected = F.conv2d(padded.flatten(0, 1).unsqueeze(1), weights[None, None].double()).view_as(clip)
    torch.testing.assert_close(_blurred(clip.float()), expected.float(), rtol=0, atol=3e-6)


def test_filters_keep_a_constant_and_treat_frames_alone():
    still = torch.full((2, 3, 9, 12), 0.25)
    torch.testing.assert_close(_blurred(still), still)
    torch.testing.assert_close(sinc(still, size=9, omega=[2.0, 1.2]), still)
    clip = _clip()
    one = _blurred(clip[1:2])
    assert torch.equal(_blurred(clip)[1:2], one)


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_resize(mode):
    clip = _clip()
    assert resize(clip, size=[7, 40], mode=mode).shape == (3, 3, 7, 40)
    assert torch.equal(resize(clip, size=[20, 26], mode=mode), clip)
    ramp = torch.linspace(0.1, 0.9, 32).expand(1, 3, 32, 32)
    small = resize(ramp, size=[16, 16], mode=mode)
    torch.testing.assert_close(small[..., 2:-2], F.avg_pool2d(ramp, 2)[..., 2:-2], rtol=0, atol=1e-3)  # no shift


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_the_sigma_asked_for(gray):
    clip = torch.full((2, 3, 200, 200), 0.5)
    noise = gaussian_noise(clip, sigma=[5.0, 20.0], gray=gray, seed=1) - clip
    assert noise.mean((1, 2, 3)).abs().max() < 4 * 20 / 255 / 200
    assert (noise.std((2, 3)) * 255 / torch.tensor([[5.0], [20.0]]) - 1).abs().max() < 0.03
    assert torch.equal(noise[:, 0], noise[:, 1]) is gray
    correlation = torch.corrcoef(noise[:, 0].flatten(1))[0, 1]
    assert abs(correlation) < 0.03  # from frame to frame


@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_grows_with_the_signal(gray):
    levels = torch.tensor([0.1, 0.2, 0.4, 0.8])
    clip = levels.view(4, 1, 1, 1).expand(4, 3, 200, 200)
    noise = poisson_noise(clip, scale=[1.0] * 4, gray=gray, seed=1) - clip
    assert noise.mean((1, 2, 3)).abs().max() < 2e-3
    assert (noise.var((2, 3)).mean(1) * 255 / levels - 1).abs().max() < 0.05
    doubled = poisson_noise(clip, scale=[2.0] * 4, gray=gray, seed=1) - clip
    assert (doubled[1].std() / noise[1].std()).item() == pytest.approx(2, rel=0.01)
    assert torch.equal(noise[:, 0], noise[:, 1]) is gray
    assert torch.equal(poisson_noise(torch.zeros(1, 3, 4, 4), scale=[3.0], gray=gray, seed=0), torch.zeros(1, 3, 4, 4))


def test_noise_depends_on_its_seed_alone():
    clip = _clip()
    torch.manual_seed(0)
    first = gaussian_noise(clip, sigma=[9.0] * 3, gray=False, seed=5)
    assert torch.equal(first, gaussian_noise(clip, sigma=[9.0] * 3, gray=False, seed=5))
    assert not torch.equal(first, gaussian_noise(clip, sigma=[9.0] * 3, gray=False, seed=6))


def test_bad_settings():
    clip = _clip()
    with pytest.raises(ValueError, match="kernel='box'"):
        _blurred(clip, kernel="box")
    with pytest.raises(ValueError, match="size=8"):
        _blurred(clip, size=8)
    with pytest.raises(ValueError, match="sigma_x=0"):
        _blurred(clip, sigma=0.0)
    with pytest.raises(ValueError, match="omega=4"):
        sinc_kernel(7, 4.0)
    with pytest.raises(ValueError, match="mode='lanczos'"):
        resize(clip, size=[4, 4], mode="lanczos")
    with pytest.raises(ValueError, match="0x4"):
        resize(clip, size=[0, 4], mode="area")
    with pytest.raises(ValueError, match="zip"):
        gaussian_noise(clip, sigma=[1.0], gray=False, seed=0)


@pytest.mark.parametrize("angle", [0.0, 0.6, math.pi / 2, 2.5])
def test_a_motion_kernel_is_a_line_through_the_middle(angle):
    weights = motion_kernel(9.0, angle)
    reach = weights.shape[0] // 2
    assert weights.sum().item() == pytest.approx(1) and weights.min() >= 0
    assert torch.allclose(weights, weights.flip(0, 1), atol=1e-7)
    axis = torch.arange(-reach, reach + 1.0)
    along = math.cos(angle) * axis + math.sin(angle) * axis[:, None]
    across = math.cos(angle) * axis[:, None] - math.sin(angle) * axis
    assert (weights * along**2).sum().item() == pytest.approx(9**2 / 12, rel=0.12)  # of a line, and of sharing pixels
    assert (weights * across**2).sum().item() < 0.4


def test_motion_blur_is_of_each_frame():
    clip = _clip()
    blurred = motion_blur(clip, length=[0.0, 6.0, 6.0], angle=[0.0, 0.0, math.pi / 2])
    assert torch.allclose(blurred[0], clip[0], atol=1e-5)
    smooth = [x.diff(dim=dim).abs().mean() for x, dim in ((blurred[1], 2), (blurred[1], 1))]
    assert smooth[0] < 0.5 * smooth[1]
    turned = motion_blur(clip[2:].transpose(2, 3), length=[6.0], angle=[0.0]).transpose(2, 3)
    assert torch.allclose(blurred[2:], turned, atol=1e-5)
