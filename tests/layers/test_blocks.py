"""Small parts of networks: pyramids, upsamplers, the order of frames."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from archs.layers.blocks import (
    BicubicUpsample,
    FeaturePyramid,
    LightUpsampler,
    PixelShuffleUpsampler,
    conv3x3,
    interleave,
    lrelu,
    per_frame,
    upsample2x,
    zero,
)
from restore.degrade import imresize


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_imresize_but_for_the_border(scale):
    x = noise(2, 3, 9, 11)
    result, referee = BicubicUpsample(scale)(x), imresize(x.double(), scale).float()
    assert result.shape == referee.shape == (2, 3, 9 * scale, 11 * scale)
    inside = slice(2 * scale, -2 * scale)
    assert_close(result[..., inside, inside], referee[..., inside, inside], atol=1e-5, rtol=0)
    assert (result - referee).abs().max() > 1e-3  # repeated here, mirrored there


def test_bicubic_keeps_planes_apart_and_constants():
    upsample = BicubicUpsample(4)
    x = torch.zeros(1, 3, 6, 6)
    x[:, 1] = 0.7
    assert_close(upsample(x), x[:, :, :1, :1].expand(1, 3, 24, 24), atol=1e-6, rtol=0)
    assert not list(upsample.state_dict())


def test_bicubic_is_float32_whatever_comes_in():
    x = noise(1, 3, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(BicubicUpsample(4)(x), BicubicUpsample(4)(x.clone()))
    assert BicubicUpsample(4)(x.bfloat16()).dtype == torch.float32
    assert_close(BicubicUpsample(4)(x.bfloat16()), BicubicUpsample(4)(x.bfloat16().float()), atol=0, rtol=0)


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_frames_interleave_in_time(frames):
    times = torch.arange(2 * frames - 1.0).view(1, -1, 1, 1, 1).expand(2, -1, 3, 2, 2)
    assert torch.equal(interleave(times[:, ::2], times[:, 1::2]), times)


def test_per_frame_keeps_frames_apart():
    clip, module = noise(2, 3, 4, 5, 6), conv3x3(4, 7)
    result = per_frame(module, clip)
    assert result.shape == (2, 3, 7, 5, 6)
    assert_close(result[1, 2], module(clip[1, 2]), atol=1e-6, rtol=1e-5)


def test_upsample2x_has_half_pixel_centres():
    ramp = torch.arange(4.0).expand(1, 1, 2, 4)
    assert_close(upsample2x(ramp)[0, 0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


def test_lrelu_and_zero():
    assert_close(lrelu(torch.tensor([-2.0, 3.0])), torch.tensor([-0.2, 3.0]))
    conv = conv3x3(2, 3)
    assert zero(conv) is conv and not any(parameter.any() for parameter in conv.parameters())


@pytest.mark.parametrize(("levels", "size"), [(1, (3, 5)), (2, (8, 6)), (3, (8, 16)), (4, (8, 8))])
def test_pyramid_halves(levels, size):
    x = noise(2, 4, *size)
    pyramid = FeaturePyramid(4, levels)(x)
    assert pyramid[0] is x
    assert [tuple(level.shape) for level in pyramid] == [(2, 4, size[0] >> i, size[1] >> i) for i in range(levels)]


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_pixel_shuffle_upsampler(scale, width):
    upsampler = PixelShuffleUpsampler(6, scale, width)
    assert upsampler(noise(2, 6, 3, 5)).shape == (2, 3, 3 * scale, 5 * scale)
    assert len(upsampler.widen) == scale.bit_length() - 1


def test_pixel_shuffle_upsampler_as_published():
    """One activation, of slope 0.01, after the first convolution."""
    upsampler, x = PixelShuffleUpsampler(6, 4), noise(1, 6, 3, 5)
    first, second = upsampler.widen
    expected = F.leaky_relu(upsampler.before(x), 0.01)
    expected = upsampler.last(F.pixel_shuffle(second(F.pixel_shuffle(first(expected), 2)), 2))
    assert_close(upsampler(x), expected)


@pytest.mark.parametrize("scale", [0, -2, 3, 6])
def test_pixel_shuffle_upsampler_takes_powers_of_two(scale):
    with pytest.raises(ValueError, match=f"scale={scale} is not a power of two"):
        PixelShuffleUpsampler(6, scale)


@pytest.mark.parametrize("width", [None, 3])
def test_light_upsampler(width):
    upsampler = LightUpsampler(6, 4, width)
    assert upsampler(noise(2, 6, 3, 5)).shape == (2, 3, 12, 20)
    with pytest.raises(ValueError, match="the light upsampler has scale 2 or 4, not 3"):
        LightUpsampler(6, 3)


def test_light_upsampler_of_half_a_grid():
    """One halving to undo: the last convolution gives the pixels of a feature, whatever the width."""
    upsampler, x = LightUpsampler(6, 2, 3), noise(2, 6, 3, 5)
    expected = F.pixel_shuffle(upsampler.last(F.leaky_relu(upsampler.before(x), 0.1)), 2)
    assert_close(upsampler(x), expected)
