import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from referees import basicsr, basicsr_imresize

from restore.degrade import bd, bd_shift, border_index, imresize, quantize
from restore.metrics import psnr
from restore.sample import sample_clip

FACTORS = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(2), Fraction(3), Fraction(4)]
VID4 = Path(os.environ.get("RESTORE_SHARED", Path(__file__).parents[2] / "shared")) / "data/eval/Vid4"


def _noise(height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _image(x: torch.Tensor) -> np.ndarray:
    return x.permute(1, 2, 0).contiguous().numpy()


@pytest.mark.parametrize(("size", "factors"), [((48, 64), FACTORS), ((51, 67), FACTORS), ((504, 480), FACTORS[:3])])
def test_equals_the_reference(size, factors):
    resize, x = basicsr_imresize(double=True), _noise(*size)
    for factor in factors:
        expected = resize(_image(x), float(factor))
        assert 255 * np.abs(_image(imresize(x, factor)) - expected).max() < 1e-9
        assert 255 * np.abs(_image(imresize(x.float(), float(factor))) - expected).max() < 1e-4


@pytest.mark.parametrize("factor", [f for f in FACTORS if f != 3])
def test_equals_the_reference_in_single_precision(factor):
    x = _noise(51, 67, torch.float32)
    expected = basicsr_imresize()(_image(x), float(factor))
    assert 255 * np.abs(_image(imresize(x, factor)) - expected).max() < 1e-4


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7)])
@pytest.mark.parametrize("factor", [*FACTORS, 0.37, 1.7, Fraction(5, 3)])
def test_small_images(size, factor):
    out = imresize(_noise(*size), factor)
    assert out.shape == (3, *(math.ceil(n * Fraction(factor)) for n in size))
    assert out.isfinite().all()


@pytest.mark.parametrize("factor", [*FACTORS, 0.37])
def test_a_constant_stays_constant(factor):
    out = imresize(torch.full((2, 1, 13, 17), 0.3, dtype=torch.float64), factor)
    torch.testing.assert_close(out, torch.full_like(out, 0.3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_ramp_stays_a_ramp_inside(factor):
    scale, size = float(factor), 96
    out = imresize(torch.arange(size, dtype=torch.float64).expand(size, size), factor)
    expected = (torch.arange(out.shape[-1], dtype=torch.float64) + 0.5) / scale - 0.5
    inside = (expected > 2 * max(1, 1 / scale)) & (expected < size - 1 - 2 * max(1, 1 / scale))
    assert inside.sum() > size * scale / 2
    torch.testing.assert_close(out[:, inside], expected[inside].expand(len(out), -1), rtol=0, atol=1e-9)


def test_output_size_is_not_fooled_by_rounding():
    assert imresize(torch.zeros(1, 30, 10), 0.1).shape == (1, 3, 1)
    assert imresize(torch.zeros(1, 10, 49), 1 / 49).shape == (1, 1, 1)


def test_factor_one_and_batches():
    x = _noise(20, 24)
    assert torch.equal(imresize(x, 1), x)
    batch = torch.stack([x, x.flip(-1)]).unsqueeze(1)
    assert torch.equal(imresize(batch, 0.25)[1, 0], imresize(x.flip(-1), 0.25))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    assert imresize(_noise(8, 8).to(dtype), 0.5).dtype == dtype


def test_autocast_changes_nothing():
    x = _noise(32, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(imresize(x, 0.25), imresize(x.clone(), 0.25).float())
        inside = imresize(x, 0.25)
    assert torch.equal(inside, imresize(x, 0.25))


def test_gradient():
    x = _noise(5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: imresize(v, 0.5), x)


@pytest.mark.parametrize("scale", [0, -0.5, math.inf, math.nan])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match="scale="):
        imresize(torch.zeros(1, 4, 4), scale)


def test_no_pixels():
    with pytest.raises(ValueError, match="at least one pixel"):
        imresize(torch.zeros(3, 0, 4), 2)


# The shift of the usual programs at factor 4, from the sampling positions that their code has.
@pytest.mark.parametrize(
    ("settings", "shift"),
    [
        ({"taps": 13, "phase": "first", "border": "reflect"}, -1.5),
        ({"taps": 12, "phase": "centre", "border": "replicate"}, 0.0),
        ({"taps": 7, "phase": "centre", "border": "replicate"}, 0.5),
    ],
)
def test_bd_phase_of_published_programs(settings, shift):
    assert _measured_shift(4, **settings) == pytest.approx(shift, abs=1e-9)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("taps", [1, 2, 7, 12, 13])
def test_bd_shift_is_what_a_ramp_shows(scale, taps):
    shifts = {phase: _measured_shift(scale, taps=taps, phase=phase) for phase in ("first", "centre")}
    for phase, shift in shifts.items():
        assert shift == pytest.approx(bd_shift(scale, taps=taps, phase=phase), abs=1e-9)
    assert abs(shifts["centre"]) < 0.5 + 1e-9


def _measured_shift(scale: int, **settings) -> float:
    """The value of a ramp tells where it was sampled; the same in both directions."""
    size = 24 * scale
    ramp = torch.arange(size, dtype=torch.float64).expand(1, size, size)
    inside = slice(8, 16)
    across, down = ((bd(x, scale, **settings) - imresize(x, 1 / scale))[0, inside, inside] for x in (ramp, ramp.mT))
    assert across.std() < 1e-9 and down.std() < 1e-9
    assert across.mean().item() == pytest.approx(down.mean().item())
    return across.mean().item()


def test_bd_equals_a_strided_convolution():
    x, bell = _noise(40, 44), torch.exp(-0.5 * (torch.arange(-6, 7).double() / 1.6) ** 2)
    kernel = torch.outer(bell, bell) / bell.sum() ** 2
    padded = torch.nn.functional.pad(x.unsqueeze(1), [6] * 4, "reflect")
    expected = torch.nn.functional.conv2d(padded, kernel[None, None], stride=4).squeeze(1)
    torch.testing.assert_close(bd(x), expected, rtol=0, atol=1e-12)


def test_bd_phases_are_far_apart():
    x = sample_clip(1, 128, 160)
    torch_ports, matlab = bd(x), bd(x, taps=12, phase="centre", border="replicate")
    shifted = imresize(x, 0.25)
    assert psnr(matlab, shifted).item() > psnr(torch_ports, shifted).item() + 3


@pytest.mark.parametrize("border", ["reflect", "replicate", "symmetric"])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (17, 30)])
def test_bd_of_any_size(size, border):
    out = bd(torch.full((2, 3, *size), 0.3, dtype=torch.float64), 4, border=border)
    assert out.shape == (2, 3, *(math.ceil(n / 4) for n in size))
    torch.testing.assert_close(out, torch.full_like(out, 0.3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["reflect", "edge", "symmetric"])
def test_border_index_equals_numpy(mode):
    index = torch.arange(-11, 16)
    ours = border_index(index, 5, {"edge": "replicate"}.get(mode, mode))
    assert np.array_equal(ours.numpy(), np.pad(np.arange(5), 11, mode=mode))


@pytest.mark.parametrize(
    "wrong", [{"scale": 0}, {"taps": 0}, {"sigma": 0.0}, {"sigma": math.nan}, {"phase": "last"}, {"border": "zero"}]
)
def test_bd_bad_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bd(torch.zeros(1, 8, 8), **wrong)


def test_quantize_equals_a_write_and_a_read():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantize(levels.float() / 255), torch.from_numpy(levels.numpy().astype(np.float32) / 255))
    x = torch.tensor([-0.2, 0.5 / 255, 1.5 / 255, 2.5 / 255, 1.3], dtype=torch.float64)
    assert (quantize(x) * 255).round().tolist() == [0, 0, 2, 2, 255]


def _as_written(image: np.ndarray) -> np.ndarray:
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def test_bicubic_figures_of_real_video():
    if not VID4.is_dir():
        pytest.skip(f"no Vid4 frames at {VID4}; RESTORE_SHARED names the folder that holds data/eval/Vid4")
    import cv2

    resize, metrics = basicsr_imresize(), basicsr("metrics")
    for path in sorted((VID4 / "city").glob("*.webp"))[:3]:
        truth = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        small = _as_written(resize(truth.astype(np.float32) / 255, 0.25)).astype(np.float32) / 255
        large = _as_written(resize(small, 4))
        expected = metrics.calculate_psnr(large[..., ::-1], truth[..., ::-1], 0, test_y_channel=True)
        x = torch.from_numpy(truth).permute(2, 0, 1) / 255
        ours = quantize(imresize(quantize(imresize(x, 0.25)), 4))
        assert psnr(ours, x).item() == pytest.approx(expected, abs=0.01)
