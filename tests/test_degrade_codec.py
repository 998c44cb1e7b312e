import pytest
import torch
from torch.nn import functional as F

from restore import degrade_codec
from restore.degrade import quantize
from restore.degrade_codec import CODECS, compress_video, jpeg
from restore.metrics import psnr
from restore.sample import sample_clip


def _psnr(x, y):
    return psnr(x, y).mean().item()


@pytest.mark.parametrize("codec", CODECS)
def test_quality_falls_with_crf_and_rises_with_the_rate(codec):
    clip = sample_clip(4, 64, 80, seed=1)
    by_crf = [_psnr(compress_video(clip, codec=codec, crf=crf), clip) for crf in (8, 20, 28, 36)]
    assert by_crf == sorted(by_crf, reverse=True) and by_crf[0] > by_crf[-1] + 4
    by_rate = [_psnr(compress_video(clip, codec=codec, bits_per_pixel=rate), clip) for rate in (0.1, 0.5, 2.0)]
    assert by_rate == sorted(by_rate) and by_rate[0] < by_rate[-1]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(3, 33, 27), (1, 20, 18), (2, 1, 5)])
def test_size_and_number_of_frames_stay(codec, shape):
    frames, height, width = shape
    # shades that change slowly, so that any codec keeps them: a shift, a swap of frames or of colours would show
    shades = torch.linspace(0.2, 0.8, 3 * frames).view(frames, 3, 1, 1)
    clip = quantize(shades + 0.1 * torch.linspace(0, 1, width).expand(frames, 3, height, width))
    out = compress_video(clip, codec=codec, crf=5)
    assert out.shape == clip.shape
    assert torch.equal(out, quantize(out))
    assert (F.avg_pool2d(out, (1, 5), ceil_mode=True) - F.avg_pool2d(clip, (1, 5), ceil_mode=True)).abs().max() < 0.03


def test_the_result_depends_on_the_arguments_alone():
    clip = sample_clip(3, 40, 48)  # a size at which encoders were seen to read and write beyond their memory
    for codec in CODECS:
        assert torch.equal(
            compress_video(clip, codec=codec, bits_per_pixel=0.3, gop=2),
            compress_video(clip, codec=codec, bits_per_pixel=0.3, gop=2),
        )


def test_jpeg():
    clip = sample_clip(3, 41, 53)
    out = jpeg(clip, quality=[95, 50, 10])
    values = psnr(out, clip).tolist()
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 5
    assert torch.equal(out[1:2], jpeg(clip[1:2], quality=[50]))
    shades = torch.tensor([0.9, 0.5, 0.1]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(jpeg(shades, quality=[95]), shades, rtol=0, atol=0.02)


def test_bad_settings(monkeypatch):
    clip = torch.zeros(2, 3, 16, 16)
    for wrong, message in [
        ({"crf": 52.0}, "crf=52"),
        ({}, "either crf or bits_per_pixel"),
        ({"crf": 20.0, "bits_per_pixel": 0.1}, "either crf or bits_per_pixel"),
        ({"bits_per_pixel": 0.0}, "bits_per_pixel=0"),
        ({"crf": 20.0, "gop": 0}, "gop=0"),
        ({"crf": 20.0, "codec": "h264"}, "'h264' is none of libx264"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress_video(clip, **wrong)
    with pytest.raises(ValueError, match=r"1\.\.100"):
        jpeg(clip, quality=[0, 50])
    monkeypatch.setattr(degrade_codec, "CODECS", (*CODECS, "libmissing"))
    with pytest.raises(ValueError, match="no encoder 'libmissing'"):
        compress_video(clip, codec="libmissing", crf=20)
