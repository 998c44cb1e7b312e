"""Audio tracks carried into a written video, on files made here with PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from restore.audio import _tempos
from restore.writers import ClipError, VideoWriter

RATE = 48000


def put_source(path: Path, codec: str, seconds: int = 1, begin: int = 0, tone: int = 440, tracks: int = 1) -> Path:
    """A file with a little film, if the container takes one, and tracks of a sine; all begin at `begin` seconds."""
    with av.open(str(path), "w") as out:
        film = None if path.suffix in (".m4a", ".wav") else out.add_stream("ffv1", rate=25)
        sounds = [out.add_stream(codec, rate=RATE, layout="mono") for _ in range(tracks)]
        if film is not None:
            film.width, film.height = 16, 16
            for n in range(seconds * 25):
                picture = av.VideoFrame(16, 16, "yuv420p")
                picture.pts, picture.time_base = begin * 25 + n, Fraction(1, 25)
                out.mux(film.encode(picture))
            out.mux(film.encode(None))
        wave = 0.5 * np.sin(2 * np.pi * tone * np.arange(seconds * RATE) / RATE)
        for sound in sounds:
            for n in range(0, len(wave), 960):
                samples = (wave[None, n : n + 960] * 32767).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
                frame.sample_rate, frame.pts, frame.time_base = RATE, begin * RATE + n, Fraction(1, RATE)
                out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def write(path: Path, source: Path, frames: int = 25, **options) -> Path:
    with VideoWriter(path, 25, audio_from=source, **options) as writer:
        for n in range(frames):
            writer.write(torch.full((3, 32, 32), n / frames))
    return path


def payload(path: Path, track: int = 0) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=track) if packet.size]


def begins(path: Path, kind: str) -> float:
    with av.open(str(path)) as container:
        frame = next(container.decode(**{kind: 0}))
        return float(frame.pts * frame.time_base)


@pytest.mark.parametrize(
    ("source", "codec", "target"),
    [
        ("s.m4a", "aac", ".mp4"),
        ("s.m4a", "aac", ".mkv"),
        ("s.mkv", "aac", ".mov"),
        ("s.mkv", "libopus", ".webm"),
        ("s.mkv", "libopus", ".mp4"),
        ("s.wav", "pcm_s16le", ".mkv"),
    ],
)
def test_packets_are_copied_byte_by_byte(source, codec, target, tmp_path):
    source = put_source(tmp_path / source, codec)
    path = write(tmp_path / f"out{target}", source)
    assert len(payload(path)) > 3
    assert payload(path) == payload(source)
    assert abs(begins(path, "audio") - begins(path, "video")) < 0.03
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == 25


def test_all_tracks_are_taken(tmp_path):
    source = put_source(tmp_path / "s.mkv", "aac", tracks=2)
    path = write(tmp_path / "out.mp4", source)
    assert payload(path, 1) == payload(source, 1)


def test_the_sound_keeps_its_place_beside_the_pictures(tmp_path):
    """The film of the source begins at 3 s; that of the target at 0."""
    source = put_source(tmp_path / "s.mkv", "aac", begin=3)
    assert begins(source, "video") == 3
    path = write(tmp_path / "out.mp4", source)
    assert begins(path, "video") == 0
    assert abs(begins(path, "audio")) < 0.03


@pytest.mark.parametrize(("codec", "target"), [("aac", ".webm"), ("libopus", ".mov"), ("pcm_s16le", ".m4v")])
def test_a_codec_that_the_container_cannot_hold_is_one_warning(codec, target, tmp_path, caplog):
    source = put_source(tmp_path / ("s.wav" if codec == "pcm_s16le" else "s.mkv"), codec)
    path = write(tmp_path / f"out{target}", source, frames=4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{target} cannot hold its {codec.removeprefix('lib')} audio" in caplog.text
    with av.open(str(path)) as container:
        assert not container.streams.audio
        assert len(list(container.decode(video=0))) == 4


def test_packets_are_muxed_in_step(tmp_path):
    """The sound of a long film must neither wait in memory for the end of the pictures nor run ahead of them."""
    source = put_source(tmp_path / "s.mkv", "aac", seconds=2)
    with VideoWriter(tmp_path / "out.mkv", 25, codec="ffv1", audio_from=source) as writer:
        for n in range(45):
            writer.write(torch.full((3, 32, 32), n / 50))
            waiting = writer._audio._waiting
            assert 0 <= waiting.pts * waiting.time_base - Fraction(n + 1, 25) < 0.03


@pytest.mark.parametrize("stretch", [2, Fraction(5, 2), 0.5])
@pytest.mark.parametrize("target", [".mp4", ".webm"])
def test_stretched_sound_is_longer_and_keeps_its_pitch(stretch, target, tmp_path):
    source = put_source(tmp_path / "s.m4a", "aac", seconds=2, tone=440)
    path = write(tmp_path / f"out{target}", source, frames=5, audio_stretch=stretch)
    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert len(sound) / RATE == pytest.approx(2 * float(stretch), abs=0.08)
    middle = sound[len(sound) // 4 : len(sound) // 4 + 24000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert np.argmax(spectrum) * RATE / len(middle) == pytest.approx(440, abs=8)


@pytest.mark.parametrize("stretch", [Fraction(1, 7), Fraction(1, 2), Fraction(3, 2), Fraction(2), Fraction(9)])
def test_tempos_make_up_the_speed(stretch):
    tempos = _tempos(stretch)
    assert all(Fraction(1, 2) <= tempo <= 2 for tempo in tempos)
    assert np.prod([float(tempo) for tempo in tempos]) == pytest.approx(float(1 / stretch))


def test_a_file_without_sound_is_no_problem(tmp_path, caplog):
    source = put_source(tmp_path / "s.mkv", "aac", tracks=0)
    write(tmp_path / "out.mp4", source, frames=3)
    assert not caplog.records


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_bytes(b"x" * 999)])
def test_a_source_that_cannot_be_read(make, tmp_path):
    make(tmp_path / "s.mkv")
    with pytest.raises(ClipError, match=r"s\.mkv: its audio cannot be read"):
        write(tmp_path / "out.mp4", tmp_path / "s.mkv")
    assert not list(tmp_path.glob("*out*"))
