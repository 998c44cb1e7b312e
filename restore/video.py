"""One video file in: its frames as float RGB tensors, in order or by number.

Colours. A decoded picture becomes RGB with the matrix and the range that the stream is tagged with; untagged video is
BT.709 from 720 lines on and BT.601 below, in limited range. More than 8 bits are converted through 16-bit RGB.
Primaries and transfer curves stay as they are coded (HDR is not mapped to SDR), and a rotation tag is ignored.

Numbers. The number of a frame is the rank of its presentation time. One pass over the packets, without decoding, gives
all times and key frames; `VideoFile.read` then decodes from the key frame before the range. Where times cannot number
the frames (missing or equal times, packets that show nothing) it counts from the beginning: slower, equally exact.

Damage. A frame that cannot be decoded and a file that is shorter than its own header says are errors. What the
decoder conceals is a warning. A transport stream (.ts) does not say how long it is, so its missing end goes unnoticed.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

log = logging.getLogger(__name__)

# Without these flags libswscale doubles chroma samples instead of interpolating them and rounds loosely: 7 levels of
# mean error on smooth colour instead of 0.7.
SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)
# Between YUV of limited range and 16-bit RGB libswscale has white at 255 * 256, not at 65535.
DEEP_WHITE = 255 * 256

# AVColorSpace of a stream -> matrix for libswscale. Others (unspecified, YCgCo, ...) are decided by the height.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_HDR_CURVES = (16, 18)  # AVColorTransferCharacteristic: PQ and HLG
_NOT_FILM = ("tty", "image2")  # libavformat reads any .txt as a terminal recording, and pictures as films of one frame


class ClipError(ValueError):
    """A clip that cannot be read or written; one line that names the file, what is wrong and the way out."""


class VideoFile:
    """A video file as a sequence of frames. Opening reads the header; nothing is decoded before frames are asked for.

    Attributes: `path`; `size` (height, width); `fps` (mean frame rate, None if unknown).
    Raises ClipError where the file is no video, holds no video stream or cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        """Read the header of `path`."""
        self.path = path
        self._index: _Index | None = None
        self._scanned = False
        self._count: int | None = None  # exact, as soon as it is known
        with _opened(path) as (container, stream):
            context = stream.codec_context
            if not context.width or not context.height:
                raise ClipError(f"{path}: its header gives no picture size: the file is damaged; copy it again")
            if context.color_trc in _HDR_CURVES:
                log.warning("%s: HDR video; its coded values are used as they are, without mapping to SDR", path)
            self.size = (context.height, context.width)
            self.fps: Fraction | None = stream.average_rate or stream.guessed_rate or None
            self._estimate = _estimated_count(container, stream, self.fps)

    @property
    def count(self) -> int | None:
        """Number of frames: the container's estimate (None if it has none), exact after `read` or a full iteration."""
        return self._estimate if self._count is None else self._count

    def __iter__(self) -> Iterator[Tensor]:
        """Stream all frames in order, (3, H, W) float32 in [0, 1]; memory does not grow with the length."""
        total = 0
        with _opened(self.path) as (container, stream):
            convert = _Converter(self)
            for picture in self._decode(container, stream, before=0):
                total += 1
                yield convert(picture)
        if not total:
            raise ClipError(f"{self.path}: no frame could be decoded: the file is damaged; copy it again")
        self._count = total

    def read(self, start: int, stop: int) -> Tensor:
        """Frames start .. stop - 1, (T, 3, H, W) float32 in [0, 1], decoded from the key frame before the range."""
        return self.pick(range(start, stop))

    def pick(self, numbers: Sequence[int]) -> Tensor:
        """Frames of these numbers, which increase; those between are decoded, but neither converted nor kept."""
        start, stop = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
        if not self._scanned:
            self._index, self._scanned = self._scan(), True
            self._count = self._count if self._index is None else len(self._index.times)
        self._check_range(start, stop, self._count)
        frames = None if self._index is None else self._read_indexed(self._index, numbers)
        if frames is None:
            if self._index is not None:  # the decoder gives other frames than the packets announce
                self._index = self._count = None
            stretch = list(islice(self, start, stop))
            self._check_range(start, stop, start + len(stretch))
            frames = [stretch[number - start] for number in numbers]
        return torch.stack(frames)

    def _check_range(self, start: int, stop: int, count: int | None) -> None:
        if start < 0 or stop <= start or (count is not None and stop > count):
            has = "" if count is None else f" (the video has {count})"
            raise ClipError(f"{self.path}: no frames {start} to {stop}{has}: ask for 0 <= start < stop <= count")

    def _read_indexed(self, index: "_Index", numbers: Sequence[int]) -> list[Tensor] | None:
        """Frames found by their times, or None where seeking fails or the decoder does not follow the index."""
        number, wanted = numbers[0], set(numbers)
        frames: list[Tensor] = []
        with _opened(self.path) as (container, stream):
            before = _seek(container, stream, index, index.times[number])
            if before is None:
                return None
            convert = _Converter(self)
            for picture in self._decode(container, stream, before):
                if picture.pts is not None and picture.pts < index.times[numbers[0]]:
                    continue
                if picture.pts != index.times[number]:
                    return None
                if number in wanted:
                    frames.append(convert(picture))
                if number == numbers[-1]:
                    return frames
                number += 1
        return None

    def _decode(self, container: InputContainer, stream: VideoStream, before: int) -> Iterator[VideoFrame]:
        """Decode on from where `container` stands, which is after `before` frames; damage is a ClipError."""
        frames, warned = before, False
        try:
            for packet in _packets(self.path, container, stream):
                for picture in stream.decode(packet):
                    if picture.is_corrupt and not warned:
                        log.warning("%s: frame %d is damaged; the decoder conceals it", self.path, frames)
                        warned = True
                    frames += 1
                    yield picture
        except (av.error.FFmpegError, _IncompleteError) as err:
            raise self._damaged(err, frames) from err

    def _damaged(self, why: Exception, frames: int) -> ClipError:
        reason = why.strerror if isinstance(why, av.error.FFmpegError) else why
        of = f" of about {self._estimate}" if self._estimate else ""
        rescue = f", or keep the intact part: ffmpeg -i INPUT -frames:v {frames} OUTPUT" if frames else ""
        return ClipError(
            f"{self.path}: the video is damaged or incomplete ({reason}): only {frames}{of} frames could be read; "
            f"copy the file again{rescue}"
        )

    def _scan(self) -> "_Index | None":
        """Index the packets in one pass without decoding, or None where their times cannot number the frames."""
        shown: list[_Shown] = []
        with _opened(self.path) as (container, stream):
            try:
                for packet in _packets(self.path, container, stream):
                    if packet is not None and not packet.is_discard:
                        shown.append(_Shown(packet.pts, packet.dts, packet.is_keyframe))
            except (av.error.FFmpegError, _IncompleteError) as err:
                raise self._damaged(err, len(shown)) from err
            # Some packets of VP8 hold a reference that is never shown; only decoding tells which.
            return None if stream.codec_context.name == "vp8" else _indexed(shown)


class _Shown(NamedTuple):
    """The times of a packet that becomes a frame, in units of the stream, and whether decoding can begin there."""

    pts: int | None
    dts: int | None
    key: bool


class _Index(NamedTuple):
    """Presentation times in order (a frame's number is its rank) and the key frames in the same order."""

    times: list[int]
    keys: list[tuple[int, int | None]]  # (pts, dts)


class _IncompleteError(Exception):
    """The stream has ended, and the file says that there should be more of it."""


class _Converter:
    """Turns decoded pictures of one video into frames, (3, H, W) float32 RGB in [0, 1]."""

    def __init__(self, file: VideoFile) -> None:
        self._file = file
        self._reformatter = VideoReformatter()  # one for the whole video: its tables are costly to build

    def __call__(self, picture: VideoFrame) -> Tensor:
        height, width = self._file.size
        if (picture.height, picture.width) != (height, width):
            raise ClipError(
                f"{self._file.path}: {picture.width}x{picture.height}, but this video begins with {width}x{height}: "
                "split it where its size changes"
            )
        black, white = _levels(picture)
        rgb = self._to_rgb(picture, "rgb48le" if white > 255 else "rgb24")
        planes = np.ascontiguousarray(rgb.to_ndarray().transpose(2, 0, 1), dtype=np.float32)
        return torch.from_numpy(planes).sub_(black).div_(white - black).clamp_(0, 1)

    def _to_rgb(self, picture: VideoFrame, layout: str) -> VideoFrame:
        if picture.format.is_rgb or picture.format.has_palette:
            return self._reformatter.reformat(picture, format=layout, interpolation=SCALING)
        matrix = _MATRICES.get(picture.colorspace, matrix_for(picture.height))
        full = picture.color_range == ColorRange.JPEG
        return self._reformatter.reformat(
            picture,
            format=layout,
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=SCALING,
        )


def _levels(picture: VideoFrame) -> tuple[int, int]:
    """Where libswscale puts black and white of `picture` in RGB, of 16 bits if white is above 255."""
    bits = max(component.bits for component in picture.format.components)
    unit, peak = (1, 255) if bits <= 8 else (256, (2**bits - 1) << (16 - bits))
    if len(picture.format.components) == 1 and picture.color_range == ColorRange.MPEG:
        return 16 * unit, 235 * unit  # the codes of grey are handed through; without a tag their range is full
    if picture.format.is_rgb:
        return 0, 255 if bits <= 8 else 65535
    full = picture.color_range == ColorRange.JPEG or len(picture.format.components) == 1
    return 0, peak if full or bits <= 8 else DEEP_WHITE


def matrix_for(height: int) -> Colorspace:
    """The YUV matrix of video without a tag: BT.709 from 720 lines on, BT.601 below."""
    return Colorspace.ITU709 if height >= 720 else Colorspace.ITU601


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its film; what keeps the file from being opened is a ClipError."""
    try:
        # A playlist may name other files, but nothing is fetched from a network.
        container = av.open(f"file:{path}", mode="r", options={"protocol_whitelist": "file"})
    except av.error.FFmpegError as err:
        raise ClipError(
            f"{path}: cannot be opened as a video ({err.strerror}): it is incomplete or another kind of file; "
            "copy it again, or give a folder of frames or a video file"
        ) from err
    with container:
        yield container, _film(path, container)


def _film(path: Path, container: InputContainer) -> VideoStream:
    kind = container.format.name
    films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # no cover pictures
    if not films or kind in _NOT_FILM or kind.endswith("_pipe"):
        raise ClipError(f"{path}: no video stream in it (read as {kind}): give a folder of frames or a video file")
    if films[0].codec_context is None:
        raise ClipError(f"{path}: no decoder for its video codec: convert it first, e.g. to H.264")
    films[0].thread_type = "AUTO"
    return films[0]


def _estimated_count(container: InputContainer, stream: VideoStream, fps: Fraction | None) -> int | None:
    if stream.frames:
        return stream.frames
    if stream.duration and stream.time_base:
        seconds = stream.duration * stream.time_base
    else:
        seconds = Fraction(container.duration or 0, av.time_base)
    return round(seconds * fps) or None if fps else None


def _packets(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[Packet | None]:
    """The packets of the stream, then None, which makes a decoder give up the frames that it still holds."""
    seen, reason = 0, ""
    for packet in container.demux(stream):
        if packet.is_corrupt and container.format.name != "mpegts":  # there it means a gap in the reception
            reason = "a frame is cut off"
            break
        seen += packet.size > 0 or packet.dts is not None  # the demuxer's last word is an empty packet without times
        if packet.size:
            yield packet
    yield None
    entries = len(stream.index_entries) if "mov" in container.format.name else 0
    if not reason and seen < entries:
        reason = f"{entries - seen} frames that its index lists are missing"
    if not reason and _declared_bytes(path) > path.stat().st_size:
        reason = "the file ends early"
    if reason:
        raise _IncompleteError(reason)


def _declared_bytes(path: Path) -> int:
    """Length that a Matroska, WebM or AVI file claims to have, 0 where it claims nothing."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        return 0 if size == 0xFFFFFFFF else size + 8
    at = head.find(b"\x18\x53\x80\x67") + 4 if head[:4] == b"\x1a\x45\xdf\xa3" else 0  # the segment of an EBML file
    if at < 5 or not head[at]:
        return 0
    digits = 9 - head[at].bit_length()  # leading zero bits of an EBML size give its length in bytes
    size = int.from_bytes(head[at : at + digits], "big") - (1 << 7 * digits)
    unknown = (1 << 7 * digits) - 1  # a recording that was never finished
    return 0 if size == unknown else at + digits + size


def _indexed(shown: list[_Shown]) -> _Index | None:
    first = next((n for n, packet in enumerate(shown) if packet.key), len(shown))
    begin = shown[first].pts if first < len(shown) else None
    # Frames that are shown before the first key frame refer to frames cut away before it: decoders drop them.
    kept = [p for p in shown[first:] if p.pts is None or begin is None or p.pts >= begin]
    times = sorted(p.pts for p in kept if p.pts is not None)
    if not times or len(set(times)) < len(kept):
        return None
    return _Index(times, sorted((p.pts, p.dts) for p in kept if p.key and p.pts is not None))


def _seek(container: InputContainer, stream: VideoStream, index: _Index, time: int) -> int | None:
    """Stand before the last key frame shown at or before `time`; its number, or None if no seek leads there."""
    nth = bisect_right(index.keys, time, key=lambda key: key[0]) - 1
    if nth == 0:
        return 0  # a container that was just opened stands there
    pts, dts = index.keys[nth]
    for target in (pts, dts):  # some containers seek by presentation time, others by decoding time
        if target is None:
            continue
        with suppress(av.error.FFmpegError):
            container.seek(target, stream=stream)
            packet = next(container.demux(stream), None)
            if packet is not None and packet.is_keyframe and packet.pts is not None and packet.pts <= pts:
                container.seek(target, stream=stream)  # the look at the packet has consumed it
                return bisect_left(index.times, packet.pts)
    return None
