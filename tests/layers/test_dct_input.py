"""Pictures as DCT coefficients: colours, blocks, statistics, the way back, published selections."""

import pytest
import torch
from tiny import seeded_clip, unchecked
from torch import Tensor
from torch.testing import assert_close

from archs.layers.dct_input import DCTInput, rgb_to_ycbcr, static_subset, ycbcr_to_rgb
from restore.metrics import rgb_to_y

SIZES = [(8, 8), (16, 24), (45, 79), (3, 5), (1, 1), (180, 320)]
every_size = pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)


def pictures(height: int, width: int) -> Tensor:
    return seeded_clip(2, 3, height, width)


# ---- colours


def test_corners_of_the_colour_cube():
    """White, grey, the primaries: JFIF's values less 128, full range."""
    colours = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).float()
    expected = torch.tensor(
        [
            [127, 0, 0], [-128, 0, 0], [0.299 * 255 - 128, -0.168736 * 255, 127.5],
            [0.587 * 255 - 128, -0.331264 * 255, -0.418688 * 255], [0.114 * 255 - 128, 127.5, -0.081312 * 255],
        ]
    )  # fmt: skip
    assert_close(rgb_to_ycbcr(colours[..., None, None])[..., 0, 0], expected, atol=1e-3, rtol=0)


def test_colours_come_back():
    x = 3 * seeded_clip(2, 4, 3, 7, 9) - 1
    assert_close(ycbcr_to_rgb(rgb_to_ycbcr(x)), x, atol=1e-6, rtol=0)
    assert rgb_to_ycbcr(x.double()).dtype == torch.float64


def test_luma_is_that_of_the_metrics_on_another_scale():
    x = pictures(9, 11)
    full = rgb_to_ycbcr(x)[:, :1] + 128
    assert_close(rgb_to_y(x), 16 + full * (219 / 255), atol=2e-3, rtol=0)


# ---- coefficients


def test_flat_200_has_576():
    coefficients = DCTInput(normalise="none")(torch.full((1, 3, 16, 24), 200 / 255))
    assert_close(coefficients[:, 0], torch.full((1, 2, 3), 576.0), atol=1e-3, rtol=0)
    assert coefficients[:, 1:].abs().max() < 1e-3


def test_channels_are_planes_then_rows_then_columns():
    """A wave down the picture in Y, one across it in Cr: one channel each."""
    t = torch.cos((torch.arange(8) + 0.5) * (torch.pi / 8))
    planes = torch.zeros(1, 3, 8, 8)
    planes[0, 0] = 10 * torch.cos(3 * t.acos())[:, None]
    planes[0, 2] = 10 * torch.cos(2 * t.acos())
    found = DCTInput(normalise="none")(ycbcr_to_rgb(planes)).flatten()
    assert set(found.abs().topk(2).indices.tolist()) == {3 * 8, 2 * 64 + 2}
    assert_close(found.square().sum(), planes.square().sum(), atol=0.01, rtol=1e-5)


@every_size
@pytest.mark.parametrize("options", [{}, {"normalise": "none"}, {"affine": True}], ids=str)
def test_the_picture_comes_back(size, options):
    x, transform = pictures(*size), DCTInput(**options).requires_grad_(False)
    if options.get("affine"):
        transform.gain.uniform_(0.5, 2)
        transform.shift.normal_()
    coefficients = transform(x)
    assert coefficients.shape == (2, 192, -(-size[0] // 8), -(-size[1] // 8))
    assert_close(transform.inverse(coefficients, size), x, atol=2e-6, rtol=0)


def test_statistics_are_close_to_the_published():
    """Of the authors' 192 means and deviations, some of every plane: row and column of frequency, published value."""
    transform = DCTInput()
    std, mean = transform.std.view(3, 8, 8), transform.mean.view(3, 8, 8)
    assert_close(std[:, 0, 0], torch.tensor([416.3, 79.12, 74.20]), atol=0.1, rtol=0)
    assert_close(mean[:, 0, 0], torch.tensor([-87.81, -58.41, 31.96]), atol=0.1, rtol=0)
    assert not mean.flatten(1)[:, 1:].any()
    published = {
        (0, 0, 1): 77.59, (0, 2, 1): 28.65, (0, 3, 3): 15.28, (0, 0, 7): 10.50, (0, 7, 7): 4.28,
        (1, 0, 1): 18.37, (1, 2, 2): 5.08, (1, 7, 7): 1.24, (2, 1, 0): 18.90, (2, 4, 4): 1.885,
    }  # fmt: skip
    for index, value in published.items():
        assert 0.8 < std[index] / value < 1.35, index


def test_affine_learns():
    transform = DCTInput(affine=True)
    (transform(pictures(9, 17)) * torch.randn(2, 192, 2, 3)).sum().backward()
    assert transform.gain.grad.all() and transform.shift.grad.all()
    assert not list(DCTInput().parameters()) and not DCTInput().state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = pictures(45, 79).to(dtype)
    result = DCTInput()(x)
    assert result.dtype == dtype
    assert_close(result.float(), DCTInput()(x.float()), atol=0.05, rtol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DCTInput()(x.float()), DCTInput()(x.float()))
        assert DCTInput()(x.float()).dtype == torch.float32


# ---- selections


@pytest.mark.parametrize("count, luma, chroma", [(24, 16, 4), (32, 22, 5), (48, 32, 8), (64, 44, 10), (192, 64, 64)])
def test_published_counts(count, luma, chroma):
    kept = static_subset(count)
    assert kept == sorted(set(kept)) and len(kept) == count
    planes = [[k - 64 * plane for k in kept if k // 64 == plane] for plane in range(3)]
    assert [len(plane) for plane in planes] == [luma, chroma, chroma]
    assert planes[1] == planes[2]
    for plane in planes:  # what is kept has all lower frequencies kept
        assert all(k - 8 in plane or k < 8 for k in plane) and all(k - 1 in plane or k % 8 == 0 for k in plane)


def test_24_keep_the_corner():
    assert static_subset(24)[:16] == [8 * u + v for u in range(4) for v in range(4)]


def test_mistakes_are_named():
    transform = DCTInput()
    with pytest.raises(ValueError, match="16 DCT coefficients: published selections have 24, 32, 48, 64 or 192"):
        static_subset(16)
    with pytest.raises(ValueError, match="2x3 blocks, but a picture of 16x25 px has 2x4"):
        transform.inverse(torch.zeros(1, 192, 2, 3), (16, 25))
    with unchecked():
        with pytest.raises(ValueError, match="expected RGB pictures"):
            rgb_to_ycbcr(torch.zeros(1, 4, 8, 8))
        with pytest.raises(ValueError, match="normalise='jpeg' is neither"):
            DCTInput(normalise="jpeg")
