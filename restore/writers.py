"""Frames out: image files, folders of them and video files, each of which appears whole or not at all.

A frame is float RGB, (3, H, W), in [0, 1]; what is outside is clamped, and rounding is half to even. Everything is
written to a hidden file beside the target, brought to the disk and renamed, so that a file under its final name is
complete whatever happens. What a person can cause is a ClipError.
"""

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import cv2
import numpy as np
import torch
from av.container import OutputContainer
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from torch import Tensor

from restore.audio import AudioTracks
from restore.frames import IMAGE_SUFFIXES
from restore.video import DEEP_WHITE, SCALING, ClipError, matrix_for

log = logging.getLogger(__name__)

_DEEP_SUFFIXES = (".png", ".tif", ".tiff")  # formats that hold 16 bits
_IMAGE_OPTIONS = {
    ".jpg": [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
    ".webp": [cv2.IMWRITE_WEBP_QUALITY, 101],  # above 100: lossless
}
_IMAGE_OPTIONS[".jpeg"] = _IMAGE_OPTIONS[".jpg"]
_DEFAULT_CODECS = {".mp4": "libx264", ".mkv": "libx264", ".mov": "libx264", ".m4v": "libx264", ".webm": "libvpx-vp9"}
_QUICKTIME = (".mp4", ".mov", ".m4v")
_CODEC_OPTIONS = {"libvpx-vp9": {"row-mt": "1"}, "libx265": {"x265-params": "log-level=error"}}
_TAKE_ODD_SIZES = ("ffv1", "libvpx", "libvpx-vp9")  # with halved chroma


def default_codec(suffix: str) -> str:
    """The codec that plays everywhere in a container, by file suffix. Raises ClipError for a container without one."""
    try:
        return _DEFAULT_CODECS[suffix.lower()]
    except KeyError:
        known = " ".join(_DEFAULT_CODECS)
        raise ClipError(f"no default codec for '{suffix}' files: name a codec, or write one of {known}") from None


def write_image(path: str | Path, frame: Tensor, bits: int = 8) -> None:
    """Write `frame` (3, H, W), float in [0, 1], as an image file; lossless but for .jpg (quality 95, full chroma).

    `bits` is 8, or 16 for PNG and TIFF. The folder must exist. Raises ClipError for a format or depth that cannot be
    written and a place that cannot be written to, ValueError for what is no frame.
    """
    path = Path(path)
    suffix = _image_suffix(path, path.suffix, bits)
    pixels = cv2.cvtColor(_quantised(frame, 2**bits - 1), cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(suffix, pixels, _IMAGE_OPTIONS.get(suffix, []))
    if not done:
        raise ClipError(f"{path}: {frame.shape[2]}x{frame.shape[1]} cannot be encoded as {suffix}: use .png")
    with _published(path) as temporary, _blaming(path, "see that the disk has room"):
        temporary.write_bytes(data.tobytes())


class FrameFolderWriter:
    """Writes frames as image files into `folder`, made if missing. Each file appears complete under its name.

        with FrameFolderWriter("out", ".png", bits=16) as writer:
            writer.write("00000001", frame)

    Raises ClipError for a format or depth that cannot be written and a folder that cannot be made.
    """

    def __init__(self, folder: str | Path, suffix: str = ".png", bits: int = 8) -> None:
        """Check the format; the folder is made on entering."""
        self.folder = Path(folder)
        self.suffix = _image_suffix(self.folder, suffix, bits)
        self.bits = bits

    def __enter__(self) -> "FrameFolderWriter":
        """Make the folder."""
        _make_folder(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do: every frame is on the disk already."""

    def write(self, name: str, frame: Tensor) -> None:
        """Write `frame` (3, H, W), float in [0, 1], as the file `name` + suffix, in place of one of that name."""
        if not name or Path(name).name != name:
            raise ClipError(f"{self.folder}: '{name}' cannot name a frame: give a plain file name without a folder")
        write_image(self.folder / (name + self.suffix), frame, self.bits)


class VideoWriter:
    """Writes frames as a video file, which appears under its name when the block is left without an exception.

        with VideoWriter("out.mp4", fps=25, crf=16, audio_from=source) as writer:
            for frame in frames:
                writer.write(frame)

    `codec` is an encoder of FFmpeg, by default the container's; `crf` (0 is the best) goes to encoders that know it,
    `preset` likewise. A `pix_fmt` of more than 8 bits is fed from 16-bit RGB. From 720 lines on the video is coded and
    tagged BT.709, below BT.601, in limited range. If an encoder cannot halve the chroma of an odd size, the 4:4:4
    sibling of `pix_fmt` is written. `audio_from` names a file whose audio tracks are copied untouched or, with
    `audio_stretch` (slow motion: output over input duration) other than 1, stretched and encoded anew; a track that
    the container cannot hold is left out with a warning. Frames are spaced evenly, 1 / fps apart.

    Raises ClipError for settings that do not go together (on construction and entering), for a target that cannot be
    written, and for a block that is left without a frame written.
    """

    def __init__(
        self,
        path: str | Path,
        fps: Fraction | float,
        *,
        codec: str | None = None,
        crf: int = 18,
        pix_fmt: str = "yuv420p",
        preset: str | None = None,
        audio_from: str | Path | None = None,
        audio_stretch: Fraction | float = 1,
    ) -> None:
        """Check all that can be checked without a frame; nothing is written before entering."""
        self.path = Path(path)
        if fps <= 0 or audio_stretch <= 0:
            raise ClipError(f"{path}: fps={fps} and audio_stretch={audio_stretch} must be positive")
        self.fps = Fraction(fps).limit_denominator(65535)
        self.codec = codec or default_codec(self.path.suffix)
        self._format = av.VideoFormat(_pixel_format(self.path, self.codec, pix_fmt))
        self._options = _encoder_options(self.path, self.codec, pix_fmt, crf, preset)
        self._audio_from = None if audio_from is None else Path(audio_from)
        self._audio_stretch = Fraction(audio_stretch).limit_denominator(65535)
        self._deep = max(component.bits for component in self._format.components) > 8
        self._layout = "rgb48le" if self._deep else "rgb24"
        self._stack = ExitStack()
        self._audio: AudioTracks | None = None
        self._size: tuple[int, int] | None = None
        self._to_format = Graph()
        self._written = 0

    def __enter__(self) -> "VideoWriter":
        """Open the hidden file; its header is written with the first frame."""
        _make_folder(self.path.parent)
        suffix = self.path.suffix.lower()
        with ExitStack() as stack:
            temporary = stack.enter_context(_published(self.path))
            try:
                flags = {"movflags": "faststart"} if suffix in _QUICKTIME else {}
                self._container = av.open(f"file:{temporary}", mode="w", container_options=flags)
                stack.callback(_close_quietly, self._container)
                stream = self._container.add_stream(self.codec, rate=self.fps, options=self._options)
            except (av.error.FFmpegError, ValueError) as err:
                raise ClipError(f"{self.path}: {self.codec} does not go into a '{suffix}' file: use .mkv") from err
            assert isinstance(stream, VideoStream)
            self._stream = stream
            if self._audio_from is not None:
                self._audio = AudioTracks(self._audio_from, self._container, temporary, stretch=self._audio_stretch)
                stack.callback(self._audio.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file and give it its name; after an exception remove it."""
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()

    def write(self, frame: Tensor) -> None:
        """Append `frame` (3, H, W), float in [0, 1]. Raises ClipError if its size is not that of the first frame."""
        white = 255 if not self._deep else 65535 if self._format.is_rgb else DEEP_WHITE
        pixels = _quantised(frame, white)
        height, width, _ = pixels.shape
        if self._size is None:
            self._begin(height, width)
        elif self._size != (height, width):
            raise ClipError(
                f"{self.path}: frame {self._written} is {width}x{height}, but the first is "
                f"{self._size[1]}x{self._size[0]}: all frames of a video have one size"
            )
        self._to_format.vpush(VideoFrame.from_ndarray(pixels, format=self._layout))
        picture = self._to_format.vpull()
        picture.pts, picture.time_base = self._written, 1 / self.fps
        with self._encoding():
            self._container.mux(self._stream.encode(picture))
        self._written += 1
        if self._audio is not None:
            self._audio.advance(self._written / self.fps)

    def _begin(self, height: int, width: int) -> None:
        """Settle what depends on the size of the frames: layout of chroma and colour tags."""
        self._size = (height, width)
        self._format = av.VideoFormat(_fitting(self.path, self.codec, self._format.name, height, width))
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, self._format.name
        context.time_base = 1 / self.fps
        if self.codec == "libx265" and self.path.suffix.lower() in _QUICKTIME:
            context.codec_tag = "hvc1"  # Apple's players know HEVC by this tag only
        matrix, tag = ("bt709", 1) if matrix_for(height) == Colorspace.ITU709 else ("bt601", 6)
        full = self._format.name.startswith("yuvj")
        if not self._format.is_rgb:
            # AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic share these numbers.
            context.colorspace = context.color_primaries = context.color_trc = tag
            context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        self._to_format = _conversion(self._layout, self._format, height, width, matrix, full=full)

    def _finish(self) -> None:
        if not self._written:
            raise ClipError(f"{self.path}: no frame was written: a video needs one at least")
        with self._encoding():
            self._container.mux(self._stream.encode(None))
            if self._audio is not None:
                self._audio.advance()
            self._container.close()

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        try:
            yield
        except av.error.FFmpegError as err:
            height, width = self._size or (0, 0)
            raise ClipError(
                f"{self.path}: {self.codec} failed at frame {self._written} of {width}x{height} {self._format.name} "
                f"({err.strerror}): see that the disk has room, or try another codec or pix_fmt"
            ) from err


def _quantised(frame: Tensor, white: int) -> np.ndarray:
    """Frame (3, H, W) -> integer RGB (H, W, 3), 1.0 -> `white`; uint8 up to 255, else uint16."""
    if frame.ndim != 3 or frame.shape[0] != 3 or not frame.is_floating_point():
        raise ValueError(f"a frame is a float tensor of shape (3, H, W), not {frame.dtype} {tuple(frame.shape)}")
    if not all(torch.isfinite(level) for level in frame.aminmax()):  # nan propagates
        raise ValueError("the frame holds nan or infinite values: what made it is broken, or its precision too low")
    levels = frame.detach().float().clamp(0, 1).mul_(white).round_().cpu().numpy()
    return cv2.merge(list(levels.astype(np.uint8 if white <= 255 else np.uint16)))  # interleaves quicker than NumPy


def _image_suffix(path: Path, suffix: str, bits: int) -> str:
    suffix = suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise ClipError(f"{path}: no image format '{suffix}': use one of {' '.join(IMAGE_SUFFIXES)}")
    if bits not in (8, 16) or (bits == 16 and suffix not in _DEEP_SUFFIXES):
        raise ClipError(f"{path}: no {suffix} of {bits} bits: 8 bits, or 16 in {' '.join(_DEEP_SUFFIXES)}")
    return suffix


def _pixel_format(path: Path, codec: str, pix_fmt: str) -> str:
    """`pix_fmt`, if there is such an encoder and it takes it."""
    try:
        encoder = av.Codec(codec, "w")
        formats = [known.name for known in encoder.video_formats or [] if len(known.components) > 2]  # no grey
    except ValueError:
        formats = []
    if not formats:
        raise ClipError(f"{path}: no video encoder '{codec}' here: use e.g. libx264, libx265, libvpx-vp9 or ffv1")
    if pix_fmt not in formats:
        raise ClipError(f"{path}: {codec} does not write {pix_fmt}: use one of {' '.join(formats[:12])}")
    return pix_fmt


def _encoder_options(path: Path, codec: str, pix_fmt: str, crf: int, preset: str | None) -> dict[str, str]:
    """Options for the encoder, which is opened once for trial: what it leaves over it does not know."""
    best, worst = 0, 51 if codec.startswith("libx26") else 63
    if not best <= crf <= worst:
        raise ClipError(f"{path}: crf={crf} is outside {best} .. {worst} of {codec}")
    options = {"crf": str(crf), "chroma_sample_location": "left", **_CODEC_OPTIONS.get(codec, {})}
    if preset is not None:
        options["preset"] = preset
    trial = av.CodecContext.create(codec, "w")
    assert isinstance(trial, VideoCodecContext)
    trial.width, trial.height, trial.pix_fmt, trial.time_base = 256, 256, pix_fmt, Fraction(1, 25)
    trial.options = dict(options)
    try:
        trial.open()
    except av.error.FFmpegError as err:
        raise ClipError(f"{path}: {codec} refuses {pix_fmt}, crf={crf}, preset={preset} ({err.strerror})") from err
    if preset is not None and "preset" in trial.options:
        raise ClipError(f"{path}: {codec} has no presets: leave preset out")
    return {key: value for key, value in options.items() if key not in trial.options}


def _fitting(path: Path, codec: str, pix_fmt: str, height: int, width: int) -> str:
    """`pix_fmt`, or its sibling of full chroma where the encoder cannot halve an odd size."""
    shape = av.VideoFormat(pix_fmt, width, height)
    halved = (width % 2 and shape.chroma_width() < width) or (height % 2 and shape.chroma_height() < height)
    if not halved or codec in _TAKE_ODD_SIZES:
        return pix_fmt
    whole = re.sub("4[24][0-2]", "444", pix_fmt)
    if whole == pix_fmt or whole not in [known.name for known in av.Codec(codec, "w").video_formats or []]:
        raise ClipError(
            f"{path}: {codec} with {pix_fmt} takes no odd size {width}x{height}: crop the frames or use libx264 or ffv1"
        )
    log.info("%s: %dx%d is odd, so %s is written instead of %s", path, width, height, whole, pix_fmt)
    return whole


def _conversion(layout: str, target: av.VideoFormat, height: int, width: int, matrix: str, *, full: bool) -> Graph:
    """Filters from RGB of `layout` to the encoder's format.

    `VideoFrame.reformat` would put chroma into the middle between luma samples, where H.264 and HEVC expect it on the
    left ones: half a pixel of colour shift in every player.
    """
    yuv = {"out_color_matrix": matrix, "out_range": "pc" if full else "tv", "out_chroma_loc": "left"}
    graph = Graph()
    graph.link_nodes(
        graph.add_buffer(width=width, height=height, format=av.VideoFormat(layout), time_base=Fraction(1)),
        graph.add("scale", flags=str(int(SCALING)), **({} if target.is_rgb else yuv)),
        graph.add("format", pix_fmts=target.name),
        graph.add("buffersink"),
    ).configure()
    return graph


def _make_folder(folder: Path) -> None:
    with _blaming(folder, "make the folder elsewhere or check its permissions"):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` that takes its name when the block ends, and goes when the block raises."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        with _blaming(path, "choose a folder that exists and may be written to"):
            temporary.touch()
        yield temporary
        with _blaming(path, "see that the disk has room and that no folder has this name"):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _blaming(path: Path, way_out: str) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise ClipError(f"{path}: cannot be written ({err.strerror}): {way_out}") from err


def _close_quietly(container: OutputContainer) -> None:
    with suppress(av.error.FFmpegError):  # of a file that is thrown away; a good one was closed before
        container.close()
