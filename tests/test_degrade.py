import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from referees import basicsr, basicsr_imresize

from restore.degrade import imresize, quantize
from restore.metrics import psnr

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
