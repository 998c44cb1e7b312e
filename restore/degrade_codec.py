"""Compression and decompression of clips in memory: JPEG a frame, or a video codec over the whole clip.

A clip is float RGB in [0, 1], (T, 3, h, w), float32 on the CPU; both ways through a codec round it to 8 bits. Encoders
run in one thread, so that the result depends on the arguments alone and data loaders do not fight for cores.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from restore.video import SCALING

CODECS = ("libx264", "libx265", "mpeg4", "libvpx-vp9")
WORST_CRF = 51
_FPS = 25
_LEAST_RATE = 1000  # bits a second; libx265 counts in thousands and takes 0 for another mode
# Fast settings: an encoder must keep pace with training. The rest is for results that depend on the arguments alone:
# libx264's mbtree reads memory that it has not written, and frame threads of libx265 depend on the machine. Its cutree
# writes beyond its memory for pictures with sides of about 33 to 50 pixels, and the process dies; with B-frames the
# times of its packets are now and then out of order.
_SETTINGS = {
    "libx264": {"preset": "veryfast", "mbtree": "0"},
    "libx265": {"preset": "veryfast", "x265-params": "log-level=none:pools=none:frame-threads=1:cutree=0:bframes=0"},
    "mpeg4": {},
    "libvpx-vp9": {"deadline": "good", "cpu-used": "5"},
}
# libx265 refuses sides below 16 and below about 100 reads memory that it has not written: results differ from run to
# run. From 128 on no such case was found.
_LEAST_SIDE = {"libx264": 16, "libx265": 128, "mpeg4": 16, "libvpx-vp9": 16}


def jpeg(clip: Float[Tensor, "t 3 h w"], *, quality: Sequence[int]) -> Float[Tensor, "t 3 h w"]:
    """Compress each frame as JPEG with its quality, 1 to 100 (libjpeg's scale), chroma halved, and decompress it."""
    if not all(1 <= q <= 100 for q in quality):
        raise ValueError(f"quality={list(quality)} must lie within 1..100")
    frames = []
    for pixels, q in zip(_pixels(clip), quality, strict=True):
        _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(q)])  # OpenCV has BGR
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        assert decoded is not None
        frames.append(decoded[..., ::-1])
    return _clip(frames)


def compress_video(
    clip: Float[Tensor, "t 3 h w"],
    *,
    codec: str = "libx264",
    crf: float | None = None,
    bits_per_pixel: float | None = None,
    gop: int = 12,
) -> Float[Tensor, "t 3 h w"]:
    """Compress a clip with a video codec (4:2:0, 8 bits) and decompress it: same size, same number of frames.

    Args:
        clip: any size; what encoders do not take is padded with the border and cropped again.
        codec: one of `CODECS`.
        crf: constant quality, 0 (best) to 51, on H.264's scale: libx265 has the same, VP9's 0..63 is stretched over
            it, and MPEG-4 gets the quantiser with H.264's step size.
        bits_per_pixel: constant rate instead of crf; 0.1 at 1920x1080 and 25 frames a second is 5 Mbit/s.
        gop: frames from key frame to key frame, at most.

    Raises:
        ValueError: an unknown codec, one that this FFmpeg cannot encode (named), or not exactly one of crf and
            bits_per_pixel within its range.
    """
    check_codec(codec)
    if (crf is None) == (bits_per_pixel is None):
        raise ValueError(f"give either crf or bits_per_pixel, not crf={crf} and bits_per_pixel={bits_per_pixel}")
    if crf is not None and not 0 <= crf <= WORST_CRF:
        raise ValueError(f"crf={crf} is outside 0..{WORST_CRF}")
    if bits_per_pixel is not None and bits_per_pixel <= 0:
        raise ValueError(f"bits_per_pixel={bits_per_pixel} must be positive")
    if gop < 1:
        raise ValueError(f"gop={gop} must be at least 1")
    height, width = clip.shape[2:]
    missing = [max(side + side % 2, _LEAST_SIDE[codec]) - side for side in (width, height)]
    padded = F.pad(clip, (0, missing[0], 0, missing[1]), mode="replicate")
    options = _SETTINGS[codec] | ({} if crf is None else _quality(codec, crf))
    bit_rate = None if bits_per_pixel is None else max(round(bits_per_pixel * height * width * _FPS), _LEAST_RATE)
    file = _encoded(_pixels(padded), codec, options, bit_rate, gop)
    frames = _decoded(file)
    if len(frames) != len(clip):
        raise RuntimeError(f"{codec} gave {len(frames)} frames back for {len(clip)}")
    return _clip(frames)[:, :, :height, :width]


def check_codec(codec: str) -> None:
    """Raise ValueError, naming the codec, if it is not one of `CODECS` or this FFmpeg lacks its encoder."""
    if codec not in CODECS:
        raise ValueError(f"codec={codec!r} is none of {', '.join(CODECS)}")
    try:
        av.Codec(codec, "w")
    except ValueError as err:
        raise ValueError(f"this build of FFmpeg has no encoder {codec!r}: leave it out of the codecs") from err


def _quality(codec: str, crf: float) -> dict[str, str]:
    """Options for constant quality; crf on H.264's scale."""
    if codec == "mpeg4":
        # Step sizes: 0.625 * 2^(QP / 6) in H.264, twice the quantiser in MPEG-4.
        quantiser = str(min(max(round(0.3125 * 2 ** (crf / 6)), 1), 31))
        return {"qmin": quantiser, "qmax": quantiser}
    if codec == "libvpx-vp9":
        return {"crf": str(round(crf * 63 / WORST_CRF)), "b": "0"}
    return {"crf": f"{crf:.2f}"}


def _encoded(
    frames: UInt8[np.ndarray, "t h w 3"], codec: str, options: dict[str, str], bit_rate: int | None, gop: int
) -> io.BytesIO:
    """A Matroska file in memory."""
    file, convert = io.BytesIO(), VideoReformatter()
    with av.open(file, mode="w", format="matroska") as container:
        stream = container.add_stream(codec, rate=_FPS, options=options)
        assert isinstance(stream, VideoStream)
        context = stream.codec_context
        context.height, context.width, context.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        context.time_base, context.thread_count, context.gop_size = Fraction(1, _FPS), 1, gop
        if bit_rate is not None:
            context.bit_rate = bit_rate
        for number, pixels in enumerate(frames):
            picture = convert.reformat(VideoFrame.from_ndarray(pixels, format="rgb24"), **_yuv("yuv420p"))
            picture.pts, picture.time_base = number, Fraction(1, _FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    file.seek(0)
    return file


def _decoded(file: io.BytesIO) -> list[UInt8[np.ndarray, "h w 3"]]:
    convert = VideoReformatter()
    with av.open(file, mode="r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [convert.reformat(p, **_yuv("rgb24")).to_ndarray() for p in container.decode(video=0)]


def _yuv(target: str) -> dict[str, Any]:
    """Arguments for a conversion between full RGB and limited YUV of BT.601, the same in both directions."""
    ranges = (ColorRange.MPEG, ColorRange.JPEG) if target == "rgb24" else (ColorRange.JPEG, ColorRange.MPEG)
    return {
        "format": target,
        "src_colorspace": Colorspace.ITU601,
        "dst_colorspace": Colorspace.ITU601,
        "src_color_range": ranges[0],
        "dst_color_range": ranges[1],
        "interpolation": SCALING,
    }


def _pixels(clip: Tensor) -> UInt8[np.ndarray, "t h w 3"]:
    return np.ascontiguousarray(clip.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy())


def _clip(frames: Sequence[np.ndarray]) -> Float[Tensor, "t 3 h w"]:
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous().float() / 255
