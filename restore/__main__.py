"""`python -m restore INPUT -o OUTPUT`: restore a video file, a folder of frames, or a folder of these.

Says `restore: error: ...` in one line on stderr for what can be put right, and exits with 2; 130 after Ctrl-C. Where
results go is the matter of `restore.jobs`, the way through the network that of `restore.stream`.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from shutil import get_terminal_size
from threading import Lock
from time import perf_counter
from typing import Any

from tqdm import tqdm

from archs import VideoNet
from archs.layers import deform_backends
from restore.budget import Cut, MemoryModel, fit, writing_bytes
from restore.buffering import read_ahead
from restore.device import pick_device, resolve_precision
from restore.explain import explain
from restore.explain_watch import Seen, watching
from restore.flags import command_parser
from restore.jobs import WRITERS, Job, Output, plan
from restore.memory import keep_freed_memory, limit_memory, out_of_memory
from restore.models import described_factors, listing, load_for_task
from restore.stream import restore_clip
from restore.video import ClipError

_WINDOWS = (4, 3, 2)  # what --max-memory chooses from; the first is the default


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (those of the process if None); the exit status."""
    with _warnings_on_stderr():
        try:
            args = command_parser().parse_args(argv)
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
    sampling = deform_backends.choice(device.type)  # here, since RESTORE_DEFORM may name what cannot be used
    keep_freed_memory()
    args.model, net = load_for_task(args.task, args.model, device=device)
    settings = {
        "window": args.window or _WINDOWS[0],
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
    budget = _Budget(net, args, precision) if args.max_memory else None
    if args.dry_run:
        return _dry_run(jobs, net, args, f"{device}, {precision}; sampling by {sampling}", budget)
    return _restore_all(jobs, net, settings, budget, bar=sys.stderr.isatty() and not args.no_progress)


def _restore_all(
    jobs: list[Job], net: VideoNet, settings: dict[str, Any], budget: "_Budget | None", *, bar: bool
) -> int:
    """Restore one clip after the other; what is wrong with one does not keep the others from it."""
    failures = 0
    for job in jobs:
        progress = _Progress()
        try:
            if budget is not None:
                cut = budget.cut(job)
                settings |= {"window": cut.window, "tile": cut.tile}
                print(f"{job.clip.name}: {cut}", flush=True)
            with watching(net) if job.explain else nullcontext() as seen:
                _restore(job, net, settings, progress, bar=bar)
            if seen is not None:
                _explain(job, net, seen, progress)
        except KeyboardInterrupt:
            _complain(f"interrupted at {job.clip.name}{_kept(job, progress)}")
            return 130
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            _complain(f"error: {_reason(error, job)}{_kept(job, progress)}")
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


class _Budget:
    """What `--max-memory` allows."""

    def __init__(self, net: VideoNet, args: argparse.Namespace, precision: str) -> None:
        limit_memory(next(net.parameters()).device, args.max_memory)
        self._model, self._args = MemoryModel(net, precision), args

    def cut(self, job: Job) -> Cut:
        """The window and the tile that fit; ValueError if none do."""
        args, scale = self._args, self._model.net.scale
        height, width = job.clip.size
        return fit(
            self._model,
            (height, width),
            args.max_memory,
            windows=(args.window,) if args.window else _WINDOWS,
            temporal_overlap=args.temporal_overlap,
            tile=args.tile or None,
            tile_overlap=args.tile_overlap,
            writing=writing_bytes(height * width * scale**2, threads=None if job.is_video else WRITERS),
        )


@dataclass
class _Progress:
    """How far a clip has come."""

    written: int = 0
    height: int = 0
    width: int = 0
    finished: bool = False  # the file or folder is complete
    lock: Lock = field(default_factory=Lock)

    def step(self, bar: tqdm) -> None:
        """One frame more; called by the threads that write."""
        with self.lock:
            self.written += 1
            bar.update()


def _restore(job: Job, net: VideoNet, settings: dict[str, Any], progress: _Progress, *, bar: bool) -> None:
    began = perf_counter()
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
        read_ahead(job.inputs(), settings["window"]) as frames,
        # As many as a window gives, so that all are out of the way while the next is restored.
        job.sink(net.frames_out(settings["window"]), lambda: progress.step(shown)) as write,
    ):
        for frame in restore_clip(net, frames, **settings):
            _, progress.height, progress.width = frame.shape
            write(frame)
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


def _reason(error: Exception, job: Job) -> str:
    """One line on an error that a person can do something about; others are raised again."""
    if out_of_memory(error):
        what = error if isinstance(error, MemoryError) and str(error) else "out of memory"
        return f"{job.clip.path}: {what}: use a smaller --window, or a smaller --tile-overlap for smaller tiles"
    if isinstance(error, ClipError):
        return str(error)
    if isinstance(error, (ValueError, OSError)):
        return f"{job.clip.path}: {error}"
    raise error


def _kept(job: Job, progress: _Progress) -> str:
    if progress.finished:
        return f"; {job.target} is complete"
    if job.is_video or not progress.written:
        return "; nothing was written"
    return f"; the {progress.written} finished frames stay in {job.target}"


def _dry_run(jobs: list[Job], net: VideoNet, args: argparse.Namespace, device: str, budget: _Budget | None) -> int:
    """Say what would be done; 2 if some of it could not."""
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(f"model    {args.model} ({type(net).__name__}, {parameters:,} parameters, {described_factors(net)})")
    print(f"device   {device}")
    if budget is None:
        tiles = f"tiles of {args.tile} pixels, {args.tile_overlap} shared" if args.tile else "whole frames"
        print(f"windows  {args.window or _WINDOWS[0]} frames, {args.temporal_overlap} shared; {tiles}")
    if args.explain:
        print(f"explain  the first window of each clip, in {args.explain}")
    failures = 0
    for job in jobs:
        try:
            print(_described(job, net) + (f"; {budget.cut(job)}" if budget else ""))
        except ValueError as error:
            _complain(f"error: {_reason(error, job)}")
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
    text, faults = listing(min(get_terminal_size((100, 24)).columns, 100))
    print(text)
    for fault in faults:
        _complain(f"error: {fault}")
    return 2 if faults else 0


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
