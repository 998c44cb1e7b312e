"""Frames out: round trips through real files, and that nothing half-written ever has a final name."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from restore import writers
from restore.frames import ClipError, open_clips, read_image
from restore.writers import FrameFolderWriter, VideoWriter, default_codec, write_image


def scene(count: int = 3, height: int = 48, width: int = 64, cell: int = 12) -> list[Tensor]:
    """Smooth saturated colours that move a pixel a frame, (3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(1, 3, height // cell + 2, width // cell + 2, generator=generator)
    size = (height + count, width + count)
    wide = torch.nn.functional.interpolate(cells, size=size, mode="bicubic").clamp(0, 1)[0]
    return [wide[:, n : n + height, n : n + width].contiguous() for n in range(count)]


def write(path: Path, frames: list[Tensor], **options) -> Tensor:
    """Write a video and read it back, (T, 3, H, W)."""
    with VideoWriter(path, **{"fps": 25, **options}) as writer:
        for frame in frames:
            writer.write(frame)
    (clip,) = open_clips(path)
    return torch.stack(list(clip))


def error_levels(restored: Tensor, frames: list[Tensor]) -> float:
    """Mean absolute error in levels of 255."""
    truth = torch.stack(frames)
    assert restored.shape == truth.shape
    return float((restored - truth).abs().mean() * 255)


def tags(path: Path) -> tuple[int, int, int, int, str]:
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        return (context.colorspace, context.color_primaries, context.color_trc, context.color_range, context.pix_fmt)


# ---- images


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".tiff", ".bmp", ".PNG"])
def test_lossless_images_hold_the_nearest_level(suffix, tmp_path):
    frame = torch.rand(3, 17, 21, generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / f"a{suffix}", frame)
    back = read_image(tmp_path / f"a{suffix}")
    assert torch.equal((back * 255).round(), (frame * 255).round())


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_jpeg_is_close_and_keeps_full_chroma(suffix, tmp_path):
    (frame,) = scene(1)
    write_image(tmp_path / f"a{suffix}", frame)
    assert (read_image(tmp_path / f"a{suffix}") - frame).abs().mean() * 255 < 1.5


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits(suffix, tmp_path):
    frame = torch.rand(3, 17, 21, generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / f"a{suffix}", frame, bits=16)
    assert cv2.imread(str(tmp_path / f"a{suffix}"), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    back = read_image(tmp_path / f"a{suffix}")
    assert (back - frame).abs().max() <= 0.501 / 65535


def test_levels_are_clamped_and_halves_go_to_even(tmp_path):
    values = torch.tensor([-3.0, -0.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 0.5, 1.0, 7.0], dtype=torch.float64)
    assert ((values.float() * 255) % 1 == 0.5).sum() == 4  # in float32, too, they are halves
    write_image(tmp_path / "a.png", values.expand(3, 2, 8))
    assert (read_image(tmp_path / "a.png")[0, 0] * 255).round().tolist() == [0, 0, 0, 2, 2, 128, 255, 255]


def test_channels_keep_their_places(tmp_path):
    write_image(tmp_path / "a.png", torch.tensor([1.0, 0.5, 0.0])[:, None, None].expand(3, 4, 4))
    assert cv2.imread(str(tmp_path / "a.png"))[0, 0].tolist() == [0, 128, 255]  # BGR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_and_a_gradient_are_taken(dtype, tmp_path):
    write_image(tmp_path / "a.png", torch.full((3, 4, 4), 0.5, dtype=dtype, requires_grad=True))
    assert (read_image(tmp_path / "a.png") * 255).round().unique().tolist() == [128]


@pytest.mark.parametrize(
    "frame", [torch.zeros(4, 4), torch.zeros(1, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4)]
)
def test_what_is_no_frame_is_refused(frame, tmp_path):
    with pytest.raises(ValueError, match=r"float tensor of shape \(3, H, W\)"):
        write_image(tmp_path / "a.png", frame)


def test_a_frame_of_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        write_image(tmp_path / "a.png", torch.full((3, 4, 4), float("nan")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "bits", "words"),
    [
        ("a.xyz", 8, "no image format '.xyz': use one of .png"),
        ("a", 8, "no image format ''"),
        ("a.jpg", 16, "no .jpg of 16 bits"),
        ("a.png", 12, "no .png of 12 bits"),
        ("missing/a.png", 8, "cannot be written (No such file or directory)"),
        ("file/a.png", 8, "cannot be written (Not a directory)"),
        ("folder.png", 8, "cannot be written (Is a directory)"),
    ],
)
def test_images_that_cannot_be_written(name, bits, words, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ClipError) as error:
        write_image(tmp_path / name, torch.zeros(3, 4, 4), bits)
    assert str(tmp_path / name) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", torch.zeros(3, 4, 4))
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ClipError, match="No space left on device"):
        write_image(tmp_path / "a.png", torch.ones(3, 4, 4))
    assert (tmp_path / "a.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_frame_folder_writer(tmp_path):
    frames = scene(3)
    with FrameFolderWriter(tmp_path / "deep" / "out", ".tif", bits=16) as writer:
        for name, frame in zip(("0", "0_5", "1"), frames, strict=True):
            writer.write(name, frame)
            assert (tmp_path / "deep" / "out" / f"{name}.tif").exists()
    (clip,) = open_clips(tmp_path / "deep" / "out")
    assert clip.frame_names == ["0", "0_5", "1"]
    assert error_levels(torch.stack(list(clip)), frames) < 0.01


def test_frame_folder_writer_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ClipError, match=r"no \.jpg of 16 bits"):
        FrameFolderWriter(tmp_path, ".jpg", 16)
    with pytest.raises(ClipError, match=r"file.*cannot be written"), FrameFolderWriter(tmp_path / "file"):
        pass
    for name in ("", "a/b", "../a", "."):
        with FrameFolderWriter(tmp_path) as writer, pytest.raises(ClipError, match="cannot name a frame"):
            writer.write(name, torch.zeros(3, 4, 4))


# ---- videos


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".m4v", ".webm"])
def test_video_round_trip(suffix, size, tmp_path):
    frames = scene(4, *size)
    back = write(tmp_path / f"a{suffix}", frames, crf=0, fps=Fraction(30000, 1001))
    assert error_levels(back, frames) < 1.5
    (clip,) = open_clips(tmp_path / f"a{suffix}")
    assert (clip.size, clip.count) == (size, 4)
    assert abs(clip.fps - Fraction(30000, 1001)) < 0.01
    assert os.listdir(tmp_path) == [f"a{suffix}"]


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "levels"),
    [
        ("libx264", "yuv420p", 1.2),
        ("libx264", "yuv444p", 0.7),
        ("libx264", "yuv420p10le", 1.0),
        ("libx264", "yuvj420p", 1.4),
        ("libx265", "yuv420p10le", 1.5),
        ("ffv1", "yuv444p16le", 0.1),
        ("ffv1", "yuv444p10le", 0.2),
        ("ffv1", "bgr0", 0.3),
        ("ffv1", "gbrp16le", 0.01),
    ],
)
@pytest.mark.parametrize("height", [48, 720])
def test_colours_survive_each_pixel_format(codec, pix_fmt, levels, height, tmp_path):
    frames = scene(1, height, 64)
    back = write(tmp_path / "a.mkv", frames, codec=codec, pix_fmt=pix_fmt, crf=0, preset=None)
    assert error_levels(back, frames) < levels
    tag, rgb = (1 if height >= 720 else 6), pix_fmt in ("bgr0", "gbrp16le")
    if not rgb:
        assert tags(tmp_path / "a.mkv") == (tag, tag, tag, 2 if pix_fmt == "yuvj420p" else 1, pix_fmt)


@pytest.mark.parametrize("height", [48, 720])
@pytest.mark.parametrize(("pix_fmt", "unit"), [("yuv420p", 1), ("yuv444p10le", 4)])
def test_code_values_follow_the_standard(height, pix_fmt, unit, tmp_path):
    """White, black and a saturated blue, against the definition of the two matrices."""
    kr, kb = (0.2126, 0.0722) if height >= 720 else (0.299, 0.114)
    for rgb in ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.1, 0.3, 0.9)):
        write(tmp_path / "a.mkv", [torch.tensor(rgb)[:, None, None].expand(3, height, 64)], pix_fmt=pix_fmt, crf=0)
        y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
        chroma = [(rgb[2] - y) / (2 - 2 * kb), (rgb[0] - y) / (2 - 2 * kr)]
        expected = [(16 + 219 * y) * unit, *((128 + 224 * c) * unit for c in chroma)]
        with av.open(str(tmp_path / "a.mkv")) as container:
            planes = next(container.decode(video=0)).planes
            codes = [np.frombuffer(bytes(p), np.uint8 if unit == 1 else np.uint16)[5] for p in planes]
        assert np.abs(np.array(codes, float) - expected).max() <= 1.01, rgb


def test_chroma_lies_on_the_left_samples(tmp_path):
    """Chroma between the luma samples, as libswscale has it by default, costs four levels on such colours."""
    frames = scene(1, 96, 128, cell=8)
    assert error_levels(write(tmp_path / "a.mp4", frames, crf=0), frames) < 1.5


def test_ten_bits_are_not_fed_through_eight(tmp_path):
    ramp = torch.linspace(0.4, 0.6, 512)[None, None].expand(3, 16, 512)
    back = write(tmp_path / "a.mp4", [ramp], pix_fmt="yuv420p10le", crf=0)
    assert back[0, 0, 8].unique().numel() > 150  # 8 bits would have 52 levels here
    assert (back - ramp).abs().max() < 1.5 / 876


def test_odd_sizes_of_libx264_get_full_chroma(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path / "a.mp4", scene(2, 47, 64))
    assert tags(tmp_path / "a.mp4")[4] == "yuv444p"
    assert "64x47 is odd, so yuv444p is written instead of yuv420p" in caplog.text
    write(tmp_path / "b.mkv", scene(2, 48, 63), pix_fmt="yuv422p10le")
    assert tags(tmp_path / "b.mkv")[4] == "yuv444p10le"
    write(tmp_path / "c.mkv", scene(2, 47, 64), pix_fmt="yuv422p")  # 4:2:2 halves the width only
    assert tags(tmp_path / "c.mkv")[4] == "yuv422p"
    write(tmp_path / "d.webm", scene(2, 47, 63))
    assert tags(tmp_path / "d.webm")[4] == "yuv420p"
    with pytest.raises(ClipError, match=r"mpeg4 with yuv420p takes no odd size 63x48.*crop"):
        write(tmp_path / "e.mp4", scene(2, 48, 63), codec="mpeg4")


def test_default_codec():
    assert [default_codec(s) for s in (".mp4", ".MKV", ".mov", ".m4v")] == ["libx264"] * 4
    assert default_codec(".webm") == "libvpx-vp9"
    with pytest.raises(ClipError, match=r"'.avi' files.*\.mp4 \.mkv \.mov \.m4v \.webm"):
        default_codec(".avi")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.mp4", {"codec": "libx999"}, "no video encoder 'libx999'"),
        ("a.mp4", {"codec": "aac"}, "no video encoder 'aac'"),
        ("a.mp4", {"pix_fmt": "yuv999"}, "libx264 does not write yuv999: use one of yuv420p"),
        ("a.mp4", {"pix_fmt": "gray"}, "libx264 does not write gray"),
        ("a.mp4", {"crf": 52}, "crf=52 is outside 0 .. 51"),
        ("a.mp4", {"crf": -1}, "crf=-1 is outside"),
        ("a.mp4", {"preset": "brisk"}, "libx264 refuses yuv420p, crf=18, preset=brisk"),
        ("a.webm", {"preset": "slow"}, "libvpx-vp9 has no presets"),
        ("a.mp4", {"fps": 0}, "must be positive"),
        ("a.mp4", {"audio_stretch": -1}, "must be positive"),
        ("a.webm", {"codec": "libx264"}, "libx264 does not go into a '.webm' file: use .mkv"),
        ("a.xyz", {"codec": "libx264"}, "libx264 does not go into a '.xyz' file"),
        ("a.xyz", {}, "no default codec for '.xyz' files"),
        ("file/a.mp4", {}, "file: cannot be written"),
        ("a.mp4", {"audio_from": "missing.mkv"}, "missing.mkv: its audio cannot be read"),
    ],
)
def test_settings_that_do_not_go_together(name, options, words, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ClipError) as error:
        write(tmp_path / name, scene(1), **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["file"]


def test_a_video_of_no_frames_or_of_two_sizes(tmp_path):
    with pytest.raises(ClipError, match="no frame was written"):
        write(tmp_path / "a.mp4", [])
    with pytest.raises(ClipError, match="frame 2 is 32x48, but the first is 64x48"):
        write(tmp_path / "a.mp4", [*scene(2), *scene(1, 48, 32)])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(5, "of the caller"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_and_goes_through(error, tmp_path):
    with pytest.raises(type(error)) as caught, VideoWriter(tmp_path / "a.mp4", 25) as writer:
        for frame in scene(3):
            writer.write(frame)
        assert not (tmp_path / "a.mp4").exists()
        raise error
    assert caught.value is error
    assert not os.listdir(tmp_path)


def test_an_exception_leaves_the_old_video(tmp_path):
    write(tmp_path / "a.mp4", scene(2))
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 25) as writer:
        writer.write(scene(1)[0])
        raise RuntimeError
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.mp4"]


KILLED = """
import sys, time, torch
from restore.writers import VideoWriter
with VideoWriter(sys.argv[1], 25, codec="ffv1") as writer:
    for n in range(50):
        writer.write(torch.rand(3, 64, 64))
    sys.stdout.write("written"); sys.stdout.flush()
    time.sleep(60)
"""


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path):
    root = Path(writers.__file__).parents[1]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.mkv")]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout.read(7) == b"written"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.") and left != "a.mkv"  # hidden, so that it is never taken for a clip
    with pytest.raises(ClipError, match="the folder is empty"):
        open_clips(tmp_path)
