"""`python -m restore INPUT -o OUTPUT`: restore a video file, a folder of frames, or a folder of these.

Says `restore: error: ...` in one line on stderr for what can be put right, and exits with 2; 130 after Ctrl-C. Where
results go is the matter of `restore.jobs`, the way through the network that of `restore.stream`.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from shutil import get_terminal_size
from time import perf_counter
from typing import NoReturn

import torch
from tqdm import tqdm

from archs import VideoNet
from restore.checkpoint import DEFAULT_MODEL, WEIGHTS, load_network, read_info, shipped_models
from restore.device import PRECISIONS, pick_device, resolve_precision
from restore.explain import explain
from restore.explain_watch import Seen, watching
from restore.jobs import Job, Output, plan
from restore.stream import restore_clip
from restore.video import ClipError

_SUFFIXES = ("png", "jpg", "webp", "tif", "mp4", "mkv", "mov", "webm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (those of the process if None); the exit status."""
    with _warnings_on_stderr():
        try:
            args = _parser().parse_args(argv)
            return _list_models() if args.list_models else _run(args)
        except KeyboardInterrupt:
            _complain("interrupted before anything was written")
            return 130
        except (ValueError, OSError) as error:
            _complain(f"error: {error}")
            return 2


def _run(args: argparse.Namespace) -> int:
    source = _source(args)
    device = pick_device(args.device)
    precision = resolve_precision(args.precision, device)
    net = load_network(args.model, device=device)
    settings = {
        "window": args.window,
        "temporal_overlap": args.temporal_overlap,
        "tile": args.tile or None,
        "tile_overlap": args.tile_overlap,
        "slowmo": args.slowmo,
        "precision": precision,
    }
    _check_settings(net, settings)
    slowmo = args.slowmo or net.time_scale
    jobs = plan(source, _output(args), slowmo=slowmo, start=args.start, limit=args.frames, explain=args.explain)
    for job in jobs:
        job.warn()
    if args.dry_run:
        return _dry_run(jobs, net, args, f"{device}, {precision}")
    bar = sys.stderr.isatty() and not args.no_progress
    failures = 0
    for job in jobs:
        progress = _Progress()
        try:
            with watching(net) if job.explain else nullcontext() as seen:
                _restore(job, net, settings, progress, bar=bar)
            if seen is not None:
                _explain(job, net, seen, progress)
        except KeyboardInterrupt:
            _complain(f"interrupted at {job.clip.name}{_kept(job, progress)}")
            return 130
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            _complain(f"error: {_reason(error, job, args.tile)}{_kept(job, progress)}")
            failures += 1
    return 2 if failures else 0


def _check_settings(net: VideoNet, settings: dict) -> None:
    """Refuse what does not fit the network, in the words of the flags."""
    try:
        restore_clip(net, [], **settings)  # checks its arguments at once and does nothing yet
    except ValueError as error:
        message = str(error)
        for name in settings:
            message = message.replace(f"{name}=", f"--{name.replace('_', '-')} ")
        raise ValueError(message) from error


@dataclass
class _Progress:
    """How far a clip has come."""

    written: int = 0
    height: int = 0
    width: int = 0
    finished: bool = False  # the file or folder is complete


def _restore(job: Job, net: VideoNet, settings: dict, progress: _Progress, *, bar: bool) -> None:
    began = perf_counter()
    results = restore_clip(net, job.inputs(), **settings)
    columns, lines = get_terminal_size()  # never 0, with which tqdm would show nothing
    with (
        tqdm(
            total=job.frames_out,
            desc=job.clip.name,
            unit=" frames",
            smoothing=0,  # results come in bursts, a window at a time: only the mean rate tells something
            ncols=columns,
            nrows=lines,
            disable=not bar,
        ) as shown,
        job.sink() as write,
    ):
        for frame in results:
            write(frame)
            progress.written += 1
            _, progress.height, progress.width = frame.shape
            shown.update()
    progress.finished = True
    if not bar:
        seconds = perf_counter() - began
        print(
            f"{job.clip.name}: {progress.written} frames {progress.width}x{progress.height} -> {job.target}, "
            f"{seconds:.1f} s ({progress.written / seconds:.1f} frames/s)",
            flush=True,
        )


def _explain(job: Job, net: VideoNet, seen: Seen, progress: _Progress) -> None:
    """Write pictures of what the network saw in the first window of a clip."""
    assert job.explain is not None and seen.clip is not None
    names = job.names(net.frames_out(len(seen.clip)), net.time_scale)
    size = progress.height // net.scale, progress.width // net.scale
    print(f"{job.clip.name}: {explain(seen, names, job.explain, title=job.clip.name, size=size)}", flush=True)


def _reason(error: Exception, job: Job, tile: int) -> str:
    """One line on an error that a person can do something about; others are raised again."""
    if _out_of_memory(error):
        smaller = f"--tile {max(tile // 2, 32)}" if tile else "--tile 256, or less"
        return f"{job.clip.path}: out of memory: use {smaller}, or a smaller --window"
    if isinstance(error, ClipError):
        return str(error)
    if isinstance(error, (ValueError, OSError)):
        return f"{job.clip.path}: {error}"
    raise error


def _out_of_memory(error: Exception) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _kept(job: Job, progress: _Progress) -> str:
    if progress.finished:
        return f"; {job.target} is complete"
    if job.is_video or not progress.written:
        return "; nothing was written"
    return f"; the {progress.written} finished frames stay in {job.target}"


def _dry_run(jobs: list[Job], net: VideoNet, args: argparse.Namespace, device: str) -> int:
    """Say what would be done; 2 if some of it could not."""
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(f"model    {args.model} ({type(net).__name__}, {parameters:,} parameters, {_factors(net)})")
    print(f"device   {device}")
    tiles = f"tiles of {args.tile} pixels, {args.tile_overlap} shared" if args.tile else "whole frames"
    print(f"windows  {args.window} frames, {args.temporal_overlap} shared; {tiles}")
    if args.explain:
        print(f"explain  the first window of each clip, in {args.explain}")
    failures = 0
    for job in jobs:
        try:
            print(_described(job, net))
        except ClipError as error:
            _complain(f"error: {error}")
            failures += 1
    return 2 if failures else 0


def _described(job: Job, net: VideoNet) -> str:
    height, width = job.clip.size
    about = "about " if job.clip.is_video else ""
    frames_in, frames_out = job.frames_in, job.frames_out
    if not job.clip.is_video and (frames_in or 0) < net.min_frames:
        raise ClipError(f"{job.clip.path}: only {frames_in} of the {net.min_frames} frames that the network needs")
    result = f"{job.target} at {float(job.fps):.6g} frames/s" if job.is_video else f"{job.target}"
    return (
        f"{job.clip.name}: {about}{frames_in or 'unknown'} frames {width}x{height} -> "
        f"{about}{frames_out or 'unknown'} frames {width * net.scale}x{height * net.scale} in {result}"
    )


def _list_models() -> int:
    names = shipped_models()
    if not names:
        print(f"no models in {WEIGHTS}: give a file with -m")
    for name in names:
        path = WEIGHTS / f"{name}.safetensors"
        net = load_network(name)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        info = {key: value for key, value in read_info(path).items() if key != "network"}
        default = " (default)" if name == DEFAULT_MODEL else ""
        print(f"{name}{default}: {parameters:,} parameters, {path.stat().st_size / 1e6:.1f} MB, {_factors(net)}")
        if summary := info.pop("summary", None):
            print(f"    {summary}")
        if info:
            print("    " + ", ".join(f"{key} {value}" for key, value in info.items()))
    return 0


def _factors(net: VideoNet) -> str:
    return f"x{net.scale} in space, x{net.time_scale} in time"


def _source(args: argparse.Namespace) -> Path:
    given = [path for path in (args.positional, args.input) if path is not None]
    if len(given) != 1:
        raise ValueError("give one INPUT, by itself or after -i: a video, a folder of frames or a folder of these")
    if args.output is None:
        raise ValueError("no output: say with -o where the result goes, e.g. -o restored or -o restored.mp4")
    return given[0]


def _output(args: argparse.Namespace) -> Output:
    return Output(
        path=args.output,
        suffix=None if args.suffix is None else f".{args.suffix}",
        overwrite=args.overwrite,
        bits=args.bits,
        fps=args.fps,
        codec=args.codec,
        crf=args.crf,
        preset=args.preset,
        pix_fmt=args.pix_fmt,
        audio=not args.no_audio,
        stretch_audio=args.stretch_audio,
    )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; python -m restore --help lists all flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m restore",
        usage="%(prog)s INPUT -o OUTPUT [flags]",
        description="Restore a video file, a folder of frames, or a folder of these.",
        epilog="Frames in a folder keep their names (inserted: 0004_5 after 0004). A video keeps duration and audio.",
        allow_abbrev=False,
    )
    parser.add_argument("positional", nargs="?", type=Path, metavar="INPUT", help="video, folder of frames or of clips")
    parser.add_argument("-i", "--input", type=Path, metavar="INPUT", help="the same as a flag")
    parser.add_argument("-o", "--output", type=Path, help="folder for frames, or a video such as out.mp4")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")
    parser.add_argument("--list-models", action="store_true", help="list the models that ship, and stop")
    parser.add_argument(
        "--explain", type=Path, metavar="DIR", help="pictures of what the network sees in each clip's first window"
    )
    parser.add_argument("--no-progress", action="store_true", help="a line a clip instead of a bar")
    _add_network_flags(parser.add_argument_group("network"))
    _add_frame_flags(parser.add_argument_group("frames"))
    _add_video_flags(parser.add_argument_group("video"))
    return parser


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-m", "--model", "--weights", default=DEFAULT_MODEL, help="name of a shipped model or file (%(default)s)"
    )
    group.add_argument("--slowmo", type=_positive, metavar="{1,2}", help="frames out per frame in (all it can)")
    group.add_argument("-t", "--tile", type=_natural, default=0, help="side of tiles in input pixels; 0: whole frames")
    group.add_argument("--tile-overlap", type=_natural, default=16, help="pixels that tiles share (%(default)s)")
    group.add_argument("--window", type=_positive, default=4, help="input frames at once (%(default)s)")
    group.add_argument("--temporal-overlap", type=_natural, default=1, help="frames windows share (%(default)s)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, mps (%(default)s)")
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="(%(default)s)")
    precision.add_argument("--half", dest="precision", action="store_const", const="fp16", help="--precision fp16")
    precision.add_argument("--fp32", dest="precision", action="store_const", const="fp32", help="--precision fp32")


def _add_frame_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--start", type=_natural, default=0, help="first frame to restore, counted from 0")
    group.add_argument("--frames", type=_positive, help="how many to restore (all)")
    group.add_argument(
        "--suffix",
        type=lambda text: text.removeprefix(".").lower(),
        choices=_SUFFIXES,
        help="format of the files in the output folder: images (png), or a video for each clip",
    )
    group.add_argument("--bits", type=int, choices=(8, 16), help="bits a channel, 16 for png and tif (8)")


def _add_video_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--fps", type=_rate, help="frame rate, e.g. 25 or 30000/1001 (the input's times --slowmo)")
    group.add_argument("--codec", help="encoder of FFmpeg (libx264; libvpx-vp9 in webm)")
    group.add_argument("--crf", type=_natural, help="quality, 0 is the best (18)")
    group.add_argument("--preset", help="the encoder's preset, e.g. slow")
    group.add_argument("--pix-fmt", help="e.g. yuv420p10le (yuv420p)")
    group.add_argument("--no-audio", action="store_true", help="leave the audio out")
    group.add_argument("--stretch-audio", action="store_true", help="fit the audio to a duration changed by --fps")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no frame rate such as 25, 23.976 or 30000/1001")
    return rate


def _complain(message: str) -> None:
    tqdm.write(f"restore: {' '.join(message.split())}", file=sys.stderr)


class _OnStderr(logging.Handler):
    """Warnings of the library in the form of the command's own words, not torn by a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        _complain(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("restore"), _OnStderr(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
