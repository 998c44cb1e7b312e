import math

import numpy as np
import pytest
import torch
from referees import basicsr

from restore.degrade import quantize
from restore.metric_table import METRICS
from restore.metrics import PSNR, SSIM, Metric, psnr, rgb_to_y, ssim
from restore.schema import Component, OptionError, construct

FUNCTIONS = {"psnr": psnr, "ssim": ssim}


def _pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth random scene and a noisy copy, both on the 8-bit grid."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape[:-2], shape[-2] // 4, shape[-1] // 4, generator=generator).flatten(0, -4)
    truth = torch.nn.functional.interpolate(coarse, size=shape[-2:], mode="bicubic").view(shape)
    return quantize(truth + 0.05 * torch.randn(shape, generator=generator)), quantize(truth)


def _bgr8(x: torch.Tensor) -> np.ndarray:
    return (x.flip(-3).permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().numpy()


@pytest.mark.parametrize("crop_border", [0, 4])
@pytest.mark.parametrize("y_channel", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_basicsr(name, y_channel, crop_border):
    reference = getattr(basicsr("metrics"), f"calculate_{name}")
    for a, b in zip(*_pair(2, 3, 68, 84), strict=True):
        expected = reference(_bgr8(a), _bgr8(b), crop_border, test_y_channel=y_channel)
        value = FUNCTIONS[name](a, b, y_channel=y_channel, crop_border=crop_border).item()
        assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("crop_border", [0, 3])
@pytest.mark.parametrize("y_channel", [True, False])
def test_equals_skimage(y_channel, crop_border):
    reference = pytest.importorskip("skimage.metrics")
    restored, truth = _pair(1, 3, 64, 80)
    inner = (..., slice(crop_border, 64 - crop_border), slice(crop_border, 80 - crop_border))
    planes = [(rgb_to_y(x.double()) if y_channel else 255 * x.double())[0][inner].numpy() for x in (restored, truth)]
    keys = {"y_channel": y_channel, "crop_border": crop_border}
    expected = reference.structural_similarity(
        *planes, data_range=255, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(restored, truth, **keys).item() == pytest.approx(expected, abs=1e-9)
    expected = reference.peak_signal_noise_ratio(*planes, data_range=255)
    assert psnr(restored, truth, **keys).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("y_channel", [True, False])
@pytest.mark.parametrize("metric", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_gpu_gives_the_same(metric, y_channel):
    restored, truth = _pair(2, 2, 3, 64, 80)
    values = metric(restored.cuda(), truth.cuda(), y_channel=y_channel, crop_border=2)
    assert values.device.type == "cuda"
    torch.testing.assert_close(
        values.cpu(), metric(restored, truth, y_channel=y_channel, crop_border=2), rtol=0, atol=1e-9
    )


def test_luma_of_known_colours():
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    luma = rgb_to_y(colours.view(5, 3, 1, 1)).flatten()
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966], dtype=torch.float64)
    torch.testing.assert_close(luma, expected, rtol=0, atol=1e-12)


def test_constant_difference_has_a_closed_form():
    truth = torch.rand(3, 16, 20, dtype=torch.float64) * 0.5
    restored = truth + 0.1
    assert psnr(restored, truth, y_channel=False).item() == pytest.approx(20, abs=1e-9)
    assert psnr(restored, truth).item() == pytest.approx(20 * math.log10(255 / 21.9), abs=1e-9)
    flat, other = torch.full((3, 12, 12), 0.2), torch.full((3, 12, 12), 0.6)
    c1, a, b = (0.01 * 255) ** 2, 51, 153
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    assert ssim(flat, other, y_channel=False).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("y_channel", [True, False])
def test_identical_frames(y_channel):
    x = _pair(2, 3, 24, 28)[0]
    assert psnr(x, x.clone(), y_channel=y_channel).tolist() == [math.inf, math.inf]
    assert ssim(x, x.clone(), y_channel=y_channel).tolist() == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize("y_channel", [True, False])
@pytest.mark.parametrize("metric", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_batch_equals_a_loop(metric, y_channel):
    restored, truth = _pair(2, 3, 3, 16, 24)
    keys = {"y_channel": y_channel, "crop_border": 2}
    values = metric(restored, truth, **keys)
    assert values.shape == (2, 3)
    assert values.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            assert values[i, j] == metric(restored[i, j], truth[i, j], **keys)
    assert metric(restored[:0], truth[:0], y_channel=y_channel).shape == (0, 3)


@pytest.mark.parametrize("metric", FUNCTIONS.values(), ids=FUNCTIONS)
def test_arguments_are_left_alone_and_borders_ignored(metric):
    restored, truth = _pair(1, 3, 32, 32)
    before = restored.clone(), truth.clone()
    value = metric(restored, truth, crop_border=4)
    assert torch.equal(restored, before[0])
    assert torch.equal(truth, before[1])
    restored[..., :4, :] = 0
    assert metric(restored, truth, crop_border=4) == value
    assert metric(restored, truth) != value


@pytest.mark.parametrize("metric", FUNCTIONS.values(), ids=FUNCTIONS)
def test_bad_frames(metric):
    x = torch.rand(2, 3, 24, 24)
    with pytest.raises(ValueError, match=r"\(2, 3, 24, 24\).*\(2, 3, 24, 23\)"):
        metric(x, x[..., :23])
    with pytest.raises(ValueError, match="crop_border=12"):
        metric(x, x, crop_border=12)
    with pytest.raises(ValueError, match="crop_border=-1"):
        metric(x, x, crop_border=-1)
    with pytest.raises((ValueError, TypeError)):  # TypeError where shape annotations are enforced
        metric(x[:, :1], x[:, :1])


def test_ssim_needs_a_window():
    x = torch.rand(3, 18, 40)
    assert ssim(x[:, :11], x[:, :11]).shape == ()
    with pytest.raises(ValueError, match="10x40"):
        ssim(x[:, :10], x[:, :10])
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(x, x, crop_border=4)


@pytest.mark.parametrize("keys", [{}, {"y_channel": False, "crop_border": 4}], ids=["published", "rgb"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_metrics_they_give_the_same(name, keys):
    metric = construct(METRICS, Component(name, keys), "val.metrics")
    restored, truth = _pair(2, 3, 24, 28)
    assert isinstance(metric, Metric)
    assert metric.frames == 1 and metric.higher_is_better
    assert torch.equal(metric(restored, truth), FUNCTIONS[name](restored, truth, **keys))


def test_what_stands_beside_the_figure():
    assert (PSNR().label, PSNR().unit, PSNR(y_channel=False).label) == ("PSNR-Y", "dB", "PSNR-RGB")
    assert (SSIM().label, SSIM().unit, SSIM(y_channel=False).label) == ("SSIM-Y", "", "SSIM-RGB")
    assert len({metric(**keys).describe() for metric in (PSNR, SSIM) for keys in _CHOICES}) == 2 * len(_CHOICES)


_CHOICES = [{"y_channel": y_channel, "crop_border": border} for y_channel in (True, False) for border in (0, 4)]


@pytest.mark.parametrize("name", ["psnr", "ssim", "flicker"])
def test_a_bad_border_is_told_before_the_first_frame(name):
    with pytest.raises(OptionError, match=r"val\.metrics: crop_border=-1 must be at least 0"):
        construct(METRICS, Component(name, {"crop_border": -1}), "val.metrics")
