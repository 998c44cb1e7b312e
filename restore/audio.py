"""Audio tracks on their way from one file into another: copied packet by packet, or stretched with the pictures.

Copying keeps every byte. Stretching changes duration and not pitch, and encodes anew: Opus in WebM, AAC elsewhere.
"""

import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.filter import Graph
from av.packet import Packet

from restore.video import ClipError

log = logging.getLogger(__name__)

_RATE = 48000  # samples a second of stretched tracks: Opus takes no 44100


class AudioTracks:
    """All audio tracks of the file `source`, muxed into `target` in step with its video, so that nothing piles up.

    Time 0 of `target` is where the video of `source` begins. `stretch` is duration in the target over duration in the
    source. A track that the container cannot hold is left out with a warning. Make this before the first packet of any
    stream is muxed. Raises ClipError if `source` cannot be read.
    """

    def __init__(self, source: Path, target: OutputContainer, trial: Path, *, stretch: Fraction = Fraction(1)) -> None:
        """Open `source` and add its tracks to `target`, which becomes the file `trial`, free until then."""
        self._source, self._target = source, target
        try:
            self._container = _opened(source)
        except av.error.FFmpegError as err:
            raise self._unreadable(err) from err
        begin = _begin(self._container)
        self._routes: dict[int, _Copy | _Stretch] = {}
        for number, track in enumerate(self._container.streams.audio):
            codec = track.codec_context.codec.canonical_name if track.codec_context else "unknown"
            fits = codec != "unknown" and (stretch != 1 or _can_hold(trial, source, number))
            if not fits:
                log.warning("%s: %s cannot hold its %s audio: the video goes without", source, trial.suffix, codec)
            elif stretch == 1:
                self._routes[track.index] = _Copy(track, target, begin)
            else:
                self._routes[track.index] = _Stretch(track, target, stretch, begin)
        self._packets = self._routed()
        self._waiting: Packet | None = None
        if not self._container.streams.audio:
            log.info("%s: no audio to take over", source)

    def advance(self, until: Fraction | None = None) -> None:
        """Mux what begins before `until` seconds of the target, or all that is left. Raises ClipError on damage."""
        try:
            while (packet := self._waiting or next(self._packets, None)) is not None:
                self._waiting = packet
                if until is not None and (packet.pts or 0) * packet.time_base >= until:
                    return
                self._target.mux(packet)
                self._waiting = None
        except av.error.FFmpegError as err:
            raise self._unreadable(err) from err

    def close(self) -> None:
        """Let go of the source."""
        self._container.close()

    def _routed(self) -> Iterator[Packet]:
        tracks = [track for track in self._container.streams.audio if track.index in self._routes]
        if tracks:
            for packet in self._container.demux(tuple(tracks)):
                yield from self._routes[packet.stream.index].packets(packet)

    def _unreadable(self, err: av.error.FFmpegError) -> ClipError:
        return ClipError(f"{self._source}: its audio cannot be read on ({err.strerror}): write the video without audio")


class _Copy:
    """A track whose packets are only moved in time."""

    def __init__(self, track: AudioStream, target: OutputContainer, begin: Fraction) -> None:
        self._begin = begin
        self._stream = target.add_stream_from_template(track)

    def packets(self, packet: Packet) -> list[Packet]:
        if not packet.size:
            return []
        shift = round(self._begin / packet.time_base)
        packet.pts = None if packet.pts is None else packet.pts - shift
        packet.dts = None if packet.dts is None else packet.dts - shift
        packet.stream = self._stream
        return [packet]


class _Stretch:
    """A track that is decoded, stretched and encoded."""

    def __init__(self, track: AudioStream, target: OutputContainer, stretch: Fraction, begin: Fraction) -> None:
        self._track, self._stretch, self._begin = track, stretch, begin
        codec = "libopus" if target.format.name == "webm" else "aac"
        layout = track.codec_context.layout
        named = {1: "mono", 2: "stereo"}.get(layout.nb_channels, layout.name)  # WAV may leave its layout unnamed
        stream = target.add_stream(codec, rate=_RATE, layout=named)
        assert isinstance(stream, AudioStream)
        self._stream = stream
        self._graph = Graph()
        nodes = [self._graph.add_abuffer(template=track)]
        nodes += [self._graph.add("atempo", f"{float(factor):.9f}") for factor in _tempos(stretch)]
        self._graph.link_nodes(*nodes, self._graph.add("abuffersink")).configure()
        self._samples: int | None = None  # on the target's clock, in samples of the track

    def packets(self, packet: Packet) -> list[Packet]:
        """Packets of the target for one of the source; the empty last one brings out all that is held back."""
        frames: list[AudioFrame | None] = list(self._track.decode(packet if packet.size else None))
        if not packet.size:
            frames.append(None)
        done: list[Packet] = []
        for frame in frames:
            if self._samples is None and frame is not None:
                time = (frame.pts or 0) * (frame.time_base or Fraction(0)) - self._begin
                self._samples = round(time * self._stretch * frame.sample_rate)
            self._graph.push(frame)
            for slow in self._pulled():
                done += self._stream.encode(slow)
        return done if packet.size else done + self._stream.encode(None)

    def _pulled(self) -> Iterator[AudioFrame]:
        while True:
            try:
                frame = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            assert isinstance(frame, AudioFrame)
            frame.pts, frame.time_base = self._samples, Fraction(1, frame.sample_rate)
            self._samples = (self._samples or 0) + frame.samples
            yield frame


def _tempos(stretch: Fraction) -> list[Fraction]:
    """Factors of the speed 1 / stretch between 1/2 and 2, the range in which the filter keeps every sample."""
    tempos, rest = [], 1 / stretch
    while not Fraction(1, 2) <= rest <= 2:
        step = Fraction(2) if rest > 2 else Fraction(1, 2)
        tempos.append(step)
        rest /= step
    return [*tempos, rest]


def _begin(container: InputContainer) -> Fraction:
    """Time in seconds at which the file's video begins, 0 for a file of audio alone."""
    film = next(iter(container.streams.video), None)
    if film is None or film.start_time is None or film.time_base is None:
        return Fraction(0)
    return film.start_time * film.time_base


def _opened(source: Path) -> InputContainer:
    return av.open(f"file:{source}", mode="r", options={"protocol_whitelist": "file"})


def _can_hold(trial: Path, source: Path, number: int) -> bool:
    """Whether the container that `trial` names takes the track: some say no only when they are closed."""
    try:
        with _opened(source) as inside, av.open(f"file:{trial}", mode="w") as outside:
            track = inside.streams.audio[number]
            outside.mux(_Copy(track, outside, Fraction(0)).packets(next(inside.demux(track))))
    except (av.error.FFmpegError, ValueError):
        return False
    return True
