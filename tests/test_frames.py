"""Clips and images in, on real files made here."""

import random
import weakref
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from restore.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES, ClipError, natural_key, open_clips, read_image


def picture(seed: int = 0, height: int = 20, width: int = 24, bits: int = 8, channels: int = 3) -> np.ndarray:
    """Noise, (H, W, C) unsigned integers in OpenCV's channel order."""
    kind = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**bits, (height, width, channels), dtype=kind)


def put(path: Path, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = [cv2.IMWRITE_WEBP_QUALITY, 101] if path.suffix == ".webp" else []
    cv2.imwrite(str(path), picture() if pixels is None else pixels, lossless)
    return path


def put_video(path: Path, count: int = 6, height: int = 20, width: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=Fraction(30000, 1001))
        stream.height, stream.width = height, width
        for n in range(count):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(n, height, width), "rgb24")))
        out.mux(stream.encode(None))
    return path


def one_line(error: pytest.ExceptionInfo, *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_natural_key():
    for ordered in (
        ["f1", "f1_5", "f1_10", "f2", "f10"],
        ["00000004", "00000004_5", "00000006"],
        ["", "1", "1clip", "clip", "clip1"],
        ["2", "F1", "f1", "f02", "f2", "F3", "f10a", "g1"],
    ):
        shuffled = random.Random(0).sample(ordered, len(ordered))
        assert shuffled != ordered
        assert sorted(shuffled, key=natural_key) == ordered


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".tiff", ".bmp"])
def test_lossless_formats_are_read_exactly(suffix, tmp_path):
    pixels = picture()
    frame = read_image(put(tmp_path / f"a{suffix}", pixels))
    assert (frame.dtype, frame.shape) == (torch.float32, (3, 20, 24))
    assert frame.is_contiguous()
    rgb = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)
    torch.testing.assert_close(frame, rgb / 255, atol=1e-7, rtol=0)
    assert torch.equal((frame * 255).round().byte(), rgb)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_jpeg(suffix, tmp_path):
    smooth = cv2.resize(picture(0, 4, 4), (24, 20), interpolation=cv2.INTER_LINEAR)
    frame = read_image(put(tmp_path / f"a{suffix.upper()}", smooth))
    rgb = torch.from_numpy(smooth[..., ::-1].copy()).permute(2, 0, 1) / 255
    assert (frame - rgb).abs().mean() < 0.02


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_kept(suffix, tmp_path):
    pixels = picture(bits=16)
    frame = read_image(put(tmp_path / f"a{suffix}", pixels))
    levels = (frame.double() * 65535).round().permute(1, 2, 0).numpy()
    assert np.array_equal(levels, pixels[..., ::-1])


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_is_repeated_and_alpha_dropped(bits, tmp_path):
    grey, alpha = picture(1, bits=bits, channels=1), picture(2, bits=bits, channels=4)
    frame = read_image(put(tmp_path / "grey.png", grey))
    assert frame.shape == (3, 20, 24)
    assert torch.equal(frame[0], frame[1]) and torch.equal(frame[0], frame[2])
    assert np.array_equal((frame[0].double() * (2**bits - 1)).round().numpy(), grey[..., 0])
    opaque = put(tmp_path / "opaque.png", alpha[..., :3])
    assert torch.equal(read_image(put(tmp_path / "alpha.png", alpha)), read_image(opaque))


def write_bytes(data: bytes):
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (write_bytes(np.random.default_rng(0).bytes(500)), "not an image that can be decoded"),
        (write_bytes(b""), "not an image that can be decoded"),
        (write_bytes(cv2.imencode(".png", picture())[1].tobytes()[:700]), "not an image that can be decoded"),
        (write_bytes(cv2.imencode(".tif", picture().astype(np.float32))[1].tobytes()), "float32: save it with 8 or 16"),
        (lambda path: None, "cannot be read (No such file or directory)"),
        (Path.mkdir, "cannot be read"),
    ],
)
def test_files_that_are_no_image(make, words, tmp_path):
    make(tmp_path / "a.png")
    with pytest.raises(ClipError) as error:
        read_image(tmp_path / "a.png")
    one_line(error, tmp_path / "a.png", words)


def test_a_folder_of_frames_is_one_clip(tmp_path):
    names = ["f10", "f2", "f1_5", "f1"]
    for seed, name in enumerate(names):
        put(tmp_path / "shot" / f"{name}.png", picture(seed))
    for side in (".hidden.png", "Thumbs.db", "notes.txt"):
        (tmp_path / "shot" / side).write_bytes(b"no image")
    (tmp_path / "shot" / ".cache").mkdir()
    (clip,) = open_clips(tmp_path / "shot")
    assert (clip.name, clip.path, clip.is_video) == ("shot", tmp_path / "shot", False)
    assert (clip.size, clip.count) == ((20, 24), 4)
    assert clip.fps is None
    assert clip.frame_names == ["f1", "f1_5", "f2", "f10"]
    frames = torch.stack(list(clip))
    expected = [read_image(tmp_path / "shot" / f"{name}.png") for name in ("f1", "f1_5", "f2", "f10")]
    assert torch.equal(frames, torch.stack(expected))
    assert torch.equal(clip.read(1, 3), frames[1:3])


def test_a_video_is_one_clip(tmp_path):
    path = put_video(tmp_path / "film.mkv")
    (clip,) = open_clips(str(path))
    assert (clip.name, clip.path, clip.is_video, clip.size, clip.count) == ("film", path, True, (20, 24), 6)
    assert clip.fps == Fraction(30000, 1001)
    assert clip.frame_names is None
    frames = torch.stack(list(clip))
    assert (frames.shape, frames.dtype) == ((6, 3, 20, 24), torch.float32)
    assert torch.equal(clip.read(2, 5), frames[2:5])


def test_a_folder_of_clips(tmp_path):
    for name in ("shot10", "shot2"):
        put(tmp_path / name / "0.png")
    put_video(tmp_path / "shot3.MP4")
    (tmp_path / "README.txt").write_text("side file")
    (tmp_path / ".hidden").mkdir()
    clips = open_clips(tmp_path)
    assert [clip.name for clip in clips] == ["shot2", "shot3", "shot10"]
    assert [clip.is_video for clip in clips] == [False, True, False]
    assert [clip.size for clip in clips] == [(20, 24)] * 3


def test_an_unknown_suffix_is_tried_as_a_video(tmp_path):
    path = put_video(tmp_path / "film.mkv").rename(tmp_path / "film.footage")
    assert open_clips(path)[0].count == 6


def test_the_name_of_a_folder(tmp_path, monkeypatch):
    put(tmp_path / "take.1" / "0.png")
    (tmp_path / "link").symlink_to(tmp_path / "take.1")
    assert open_clips(tmp_path / "take.1")[0].name == "take.1"
    assert open_clips(tmp_path / "link")[0].name == "link"
    monkeypatch.chdir(tmp_path / "take.1")
    assert open_clips(".")[0].name == "take.1"


def build(root: Path, *names: str) -> None:
    """Make folders (name/), images and, for other names, files of text."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        elif Path(name).suffix in IMAGE_SUFFIXES:
            put(root / name)
        elif Path(name).suffix in VIDEO_SUFFIXES:
            put_video(root / name)
        else:
            (root / name).write_text("text")


@pytest.mark.parametrize(
    ("names", "path", "words"),
    [
        ([], "missing", ["no such file or folder", "give a folder of frames"]),
        (["a.png"], "a.png", ["a single image", "at least two frames"]),
        (["empty/"], "empty", ["the folder is empty", ".png", ".tiff", ".mp4"]),
        (["a.txt", "b.dat", "c.md", "d.csv"], "", ["holds only a.txt, b.dat, c.md, ...", ".png", ".mp4"]),
        (["a.png", "inner/"], "", ["both frames (a.png, ...) and inner/", "folder of their own"]),
        (["a.png", "film.mp4"], "", ["both frames (a.png, ...) and film.mp4"]),
        (["a.png", "a.jpg"], "", ["a.jpg and a.png", "one frame name 'a'", "rename"]),
        (["film.mp4", "film.mkv"], "", ["film.mkv and film.mp4", "one clip name 'film'", "rename"]),
        (["x/", "y/0.png"], "", ["x: the folder is empty, but a folder inside a folder of clips", ".png"]),
        (["x/y/", "y/0.png"], "", ["x: holds y/, but"]),
        (["notes.txt"], "notes.txt", ["cannot be opened as a video", "give a folder of frames or a video file"]),
    ],
)
def test_bad_places_are_refused_in_one_line(names, path, words, tmp_path):
    build(tmp_path, *names)
    with pytest.raises(ClipError) as error:
        open_clips(tmp_path / path)
    one_line(error, tmp_path / path, *words)


def test_frames_of_different_sizes(tmp_path):
    put(tmp_path / "0.png", picture(0, 180, 320))
    put(tmp_path / "1.png", picture(0, 360, 640))
    (clip,) = open_clips(tmp_path)
    frames = iter(clip)
    next(frames)
    with pytest.raises(ClipError) as error:
        next(frames)
    one_line(error, tmp_path / "1.png", "640x360, but the first frame of this folder is 320x180: put")
    with pytest.raises(ClipError, match="640x360"):
        clip.read(0, 2)


def test_a_damaged_frame_is_named(tmp_path):
    put(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(np.random.default_rng(0).bytes(300))
    (clip,) = open_clips(tmp_path)
    with pytest.raises(ClipError) as error:
        list(clip)
    one_line(error, tmp_path / "1.png")


def test_random_access_reads_only_its_files(tmp_path):
    put(tmp_path / "5.png", picture(5))
    for name in ("4", "6"):
        (tmp_path / f"{name}.png").write_bytes(b"damaged")
    (clip,) = open_clips(tmp_path)
    assert torch.equal(clip.read(1, 2)[0], read_image(tmp_path / "5.png"))
    for start, stop in ((-1, 1), (1, 1), (2, 4)):
        with pytest.raises(ClipError, match="the folder has 3"):
            clip.read(start, stop)


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_iterating_holds_no_frames(kind, tmp_path):
    if kind == "video":
        put_video(tmp_path / "film.mp4")
    else:
        for n in range(6):
            put(tmp_path / "film" / f"{n}.png")
    (clip,) = open_clips(tmp_path)
    seen = []
    for frame in clip:
        seen.append(weakref.ref(frame))
        del frame  # from here on only the clip itself could hold it
        assert [ref() for ref in seen] == [None] * len(seen)
    assert len(seen) == 6
