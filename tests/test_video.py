"""Video files in: colours, random access and damage, on files made here with PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from av.video.reformatter import ColorRange

from restore.video import ClipError, VideoFile, _indexed, _Shown

RATE = Fraction(25)


def scene(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Moving gradients with a mark that differs in every frame, (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    pictures = []
    for n in range(count):
        picture = np.stack([x * 3 + n * 4, y * 4 + n * 2, (x + y) * 2 + 255 - n * 5], -1) % 256
        picture[:8, :8] = (n * 37) % 256
        pictures.append(picture.astype(np.uint8))
    return pictures


def noise(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Pictures that take up room in a file."""
    return list(np.random.default_rng(1).integers(0, 255, (count, height, width, 3), dtype=np.uint8))


def encode(path: Path, pictures: list[np.ndarray], codec="libx264", options=None, container=None, pts=None) -> Path:
    """Encode pictures, (H, W, 3) uint8, without any tag."""
    with av.open(str(path), "w", container_options=container or {}) as out:
        stream = out.add_stream(codec, rate=RATE, options=options or {})
        stream.codec_context.time_base = 1 / RATE
        stream.height, stream.width, _ = pictures[0].shape
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = pts[n] if pts else n, 1 / RATE
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


B_FRAMES = {"g": "8", "bf": "3", "b-adapt": "0", "sc_threshold": "0", "crf": "20"}
CASES = {
    "closed groups, mp4": ("a.mp4", "libx264", B_FRAMES, {}),
    "open groups, mp4": ("a.mp4", "libx264", {**B_FRAMES, "x264-params": "open-gop=1"}, {}),
    "groups shorter than the reordering": ("a.avi", "mpeg4", {"g": "2", "bf": "2", "qscale": "3"}, {}),
    "fragmented mp4": ("a.mp4", "libx264", B_FRAMES, {"movflags": "frag_keyframe+empty_moov"}),
    "mkv": ("a.mkv", "libx264", {**B_FRAMES, "x264-params": "open-gop=1"}, {}),
    "transport stream, times from 1.4 s": ("a.ts", "libx264", {**B_FRAMES, "x264-params": "open-gop=1"}, {}),
    "avi with reordered frames": ("a.avi", "mpeg4", {"g": "6", "bf": "2", "qscale": "3"}, {}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "8", "cpu-used": "8", "deadline": "realtime"}, {}),
    "vp8 with hidden frames": ("a.webm", "libvpx", {"g": "9", "auto-alt-ref": "1", "lag-in-frames": "8"}, {}),
    "ffv1": ("a.mkv", "ffv1", {"g": "5"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_random_access_equals_streaming(case, tmp_path):
    name, codec, options, container = CASES[case]
    count = 26
    file = VideoFile(encode(tmp_path / name, scene(count), codec, options=options, container=container))
    streamed = torch.stack(list(file))
    assert streamed.shape == (count, 3, 48, 64)
    fresh = VideoFile(file.path)
    for start in range(count):
        stop = min(count, start + 2)
        assert torch.equal(fresh.read(start, stop), streamed[start:stop]), (start, fresh._index is not None)
    assert torch.equal(fresh.read(0, count), streamed)
    assert fresh.count == count
    assert (fresh._index is None) == (case == "vp8 with hidden frames")  # otherwise the index was trusted throughout


@pytest.mark.parametrize(("name", "most"), [("a.mp4", 8), ("a.mkv", 8), ("a.ts", 16)])
def test_random_access_decodes_one_group(name, most, tmp_path, monkeypatch):
    decoded = []
    whole = VideoFile._decode

    def counting(*args):
        for picture in whole(*args):
            decoded.append(picture.pts)
            yield picture

    monkeypatch.setattr(VideoFile, "_decode", counting)
    file = VideoFile(encode(tmp_path / name, scene(64), options=B_FRAMES))
    file.read(60, 62)
    assert len(decoded) <= most  # groups are of 8; a transport stream is entered one earlier


def test_an_index_that_the_decoder_does_not_follow_is_given_up(tmp_path):
    file = VideoFile(encode(tmp_path / "a.mp4", scene(12), options=B_FRAMES))
    streamed = torch.stack(list(file))
    file.read(0, 1)
    file._index.times.insert(5, file._index.times[5] - 1)  # a time at which nothing is shown
    assert torch.equal(file.read(4, 8), streamed[4:8])
    assert file._index is None
    assert torch.equal(file.read(10, 12), streamed[10:12])


@pytest.mark.parametrize(
    ("packets", "times"),
    [
        ([(0, 0, True), (3, 1, False), (1, 2, False)], [0, 1, 3]),
        ([(-2, -4, True), (0, -3, False), (-1, -2, False)], [-2, -1, 0]),
        ([(7, 0, False), (8, 1, True), (6, 2, False), (9, 3, False)], [8, 9]),  # cut in the middle of a group
        ([(0, 0, True), (1, 1, False), (1, 2, False)], None),
        ([(0, 0, True), (None, 1, False)], None),
        ([(0, 0, False)], None),
        ([], None),
    ],
)
def test_index_of_packet_times(packets, times):
    index = _indexed([_Shown(*packet) for packet in packets])
    assert (index and index.times) == times


def test_irregular_times_number_frames_by_rank(tmp_path):
    pictures, pts = scene(9), [0, 1, 2, 10, 11, 30, 31, 40, 99]
    file = VideoFile(encode(tmp_path / "a.mp4", pictures, options=B_FRAMES, pts=pts))
    streamed = torch.stack(list(file))
    assert file.count == 9
    assert torch.equal(file.read(3, 6), streamed[3:6])


def test_range_is_checked(tmp_path):
    file = VideoFile(encode(tmp_path / "a.mp4", scene(5)))
    for start, stop in ((-1, 2), (2, 2), (3, 6), (5, 6)):
        with pytest.raises(ClipError, match=r"a\.mp4: no frames .* has 5.*ask for"):
            file.read(start, stop)


def test_header_facts_need_no_decoding(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mkv", scene(10, 30, 44))
    monkeypatch.setattr(VideoFile, "_decode", None)
    file = VideoFile(path)
    assert (file.size, file.fps, file.count) == ((30, 44), 25, 10)


RGB = (0.8, 0.35, 0.1)
WEIGHTS = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}


def yuv(rgb, matrix: str, *, full: bool, bits: int = 8) -> list[float]:
    """Y, Cb, Cr code values of an RGB colour, from the definition of the matrices."""
    (r, g, b), (kr, kb) = rgb, WEIGHTS[matrix]
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    one = 2 ** (bits - 8)
    if full:
        return [y * (256 * one - 1), cb * (256 * one - 1) + 128 * one, cr * (256 * one - 1) + 128 * one]
    return [(16 + 219 * y) * one, (128 + 224 * cb) * one, (128 + 224 * cr) * one]


def flat_video(path: Path, codes: list[float], height: int, pix_fmt: str, tag=None, full=None) -> VideoFile:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, height, pix_fmt
        if tag:
            stream.codec_context.colorspace = tag
        if full is not None:
            stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        frame = av.VideoFrame(32, height, pix_fmt)
        for plane, code in zip(frame.planes, codes, strict=True):
            kind = np.uint16 if "10" in pix_fmt else np.uint8
            plane.update(np.full(plane.buffer_size // kind().itemsize, round(code), kind).tobytes())
        frame.pts, frame.time_base = 0, 1 / RATE
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return VideoFile(path)


@pytest.mark.parametrize(
    ("height", "tag", "full", "matrix"),
    [
        (48, None, None, "601"),
        (720, None, None, "709"),
        (48, 1, None, "709"),
        (720, 6, None, "601"),
        (720, 5, False, "601"),
        (48, 9, None, "2020"),
        (48, 6, True, "601"),
        (48, 1, True, "709"),
        (720, None, True, "709"),
    ],
)
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le"])
def test_colour_tags_are_honoured(height, tag, full, matrix, pix_fmt, tmp_path):
    bits = 10 if "10" in pix_fmt else 8
    codes = yuv(RGB, matrix, full=bool(full), bits=bits)
    (frame,) = flat_video(tmp_path / "a.mkv", codes, height, pix_fmt, tag, full)
    levels = 1.6 if bits == 8 else 0.5  # the rounding of the codes, and of the conversion to 8 bits
    assert frame.shape == (3, height, 32)
    assert ((frame - torch.tensor(RGB)[:, None, None]).abs().amax() * 255) < levels


@pytest.mark.parametrize("luma", [64, 65, 66, 333, 334, 939, 940])
def test_ten_bits_are_not_read_through_eight(luma, tmp_path):
    (frame,) = flat_video(tmp_path / "a.mkv", [luma, 512, 512], 48, "yuv444p10le")
    torch.testing.assert_close(frame, torch.full_like(frame, (luma - 64) / 876), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("pix_fmt", "unit"), [("gray", 1), ("gray10le", 4)])
@pytest.mark.parametrize("full", [False, True])
def test_grey_is_read_in_its_range(pix_fmt, unit, full, tmp_path):
    black, white = (0, 256 * unit - 1) if full else (16 * unit, 235 * unit)
    for code in (black, 100 * unit, white):
        (frame,) = flat_video(tmp_path / "a.mkv", [code], 48, pix_fmt, None, full)
        expected = torch.full_like(frame, (code - black) / (white - black))
        torch.testing.assert_close(frame, expected, atol=0.5 / 255, rtol=0)


def cut(path: Path, share: float) -> VideoFile:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return VideoFile(path)


def stream_to_the_end(file: VideoFile) -> tuple[int, str]:
    frames = 0
    with pytest.raises(ClipError) as caught:
        for _ in file:
            frames += 1
    return frames, str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_a_missing_end_is_an_error_that_counts_the_frames(name, codec, container, share, tmp_path):
    count, options = 40, {"g": "10"} | ({} if codec != "libvpx-vp9" else {"cpu-used": "8", "deadline": "realtime"})
    path = encode(tmp_path / name, noise(count), codec, options=options, container=container)
    assert len(list(VideoFile(path))) == count  # whole, it makes no complaint
    frames, message = stream_to_the_end(cut(path, share))
    assert 0 < frames < count
    assert message.startswith(f"{path}: the video is damaged or incomplete (")
    assert f"only {frames} " in message
    assert "\n" not in message
    with pytest.raises(ClipError, match="damaged or incomplete"):
        VideoFile(path).read(0, 1)


@pytest.mark.parametrize("inside", [0, 1])
def test_the_last_frame_alone_is_missed(inside, tmp_path):
    """The file ends where the last frame begins, or one byte before it ends."""
    path = encode(tmp_path / "a.mp4", noise(6), options={"bf": "0"}, container={"movflags": "faststart"})
    with av.open(str(path)) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1]
        end = last.pos + (last.size - 1) * inside
    path.write_bytes(path.read_bytes()[:end])
    frames, message = stream_to_the_end(VideoFile(path))
    assert frames == 5
    assert "only 5 of about 6 frames could be read" in message


def test_an_mp4_whose_index_is_lost_is_refused_at_once(tmp_path):
    path = encode(tmp_path / "a.mp4", scene(20))
    with pytest.raises(ClipError, match=r"a\.mp4: cannot be opened as a video .*incomplete"):
        cut(path, 0.9)


def overwrite_packet(path: Path, number: int, skip: int) -> None:
    """Put noise over a packet but for its first `skip` bytes."""
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
        place, size = packet.pos + skip, packet.size - skip
    data = bytearray(path.read_bytes())
    data[place : place + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)


def test_a_frame_that_cannot_be_decoded_is_an_error(tmp_path):
    path = encode(tmp_path / "a.mp4", scene(20), options={"bf": "0"})
    overwrite_packet(path, 12, 0)
    frames, message = stream_to_the_end(VideoFile(path))
    assert f"only {frames} of about 20 frames could be read" in message
    assert frames <= 12
    with pytest.raises(ClipError, match="only"):
        VideoFile(path).read(10, 20)


def test_concealed_damage_is_a_warning(tmp_path, caplog):
    path = encode(tmp_path / "a.mp4", noise(20, 96, 128), options={"bf": "0", "crf": "30"})
    overwrite_packet(path, 12, 300)
    assert len(list(VideoFile(path))) == 20
    assert len(caplog.records) == 1
    assert "a.mp4: frame 12 is damaged" in caplog.text


def test_a_change_of_size_is_an_error(tmp_path):
    first = encode(tmp_path / "a.ts", scene(5, 48, 64)).read_bytes()
    second = encode(tmp_path / "b.ts", scene(5, 32, 80)).read_bytes()
    (tmp_path / "both.ts").write_bytes(first + second)
    _, message = stream_to_the_end(VideoFile(tmp_path / "both.ts"))
    assert "both.ts: 80x32, but this video begins with 64x48" in message


def make_text(path):
    path.write_text("not a film\n" * 100)


def make_noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def make_picture(path):
    path.write_bytes(b"P6 4 4 255\n" + bytes(48))


def make_sound(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 48000, 0
        out.mux(stream.encode(frame))


def make_sound_with_cover(path):
    with av.open(str(path), "w", format="mp4") as out:
        cover = out.add_stream("mjpeg", rate=1, width=32, height=32, pix_fmt="yuvj420p")
        cover.disposition = Disposition.attached_pic
        sound = out.add_stream("aac", rate=48000, layout="mono")
        out.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        out.mux(sound.encode(frame))


@pytest.mark.parametrize(
    ("name", "make", "match"),
    [
        ("a.mp4", make_noise, "cannot be opened as a video"),
        ("a.mp4", Path.touch, "cannot be opened as a video"),
        ("a.txt", make_text, "no video stream in it"),
        ("a.ppm", make_picture, "no video stream in it"),
        ("a.wav", make_sound, "no video stream in it"),
        ("a.mkv", make_sound, "no video stream in it"),
        ("a.m4a", make_sound_with_cover, "no video stream in it"),
        ("missing.mp4", lambda path: None, r"missing\.mp4: cannot be opened .*No such file"),
    ],
)
def test_what_is_no_video_is_refused(name, make, match, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ClipError, match=match) as caught:
        VideoFile(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)
