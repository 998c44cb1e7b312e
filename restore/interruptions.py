"""What ends a run before its time: signals, and workers of the data loader that die or fail."""

import atexit
import contextlib
import logging
import multiprocessing
import re
import signal
import time
from collections.abc import Iterator

log = logging.getLogger("restore")

ONE_REQUEST = 5.0  # seconds: torchrun passes on the signal that Slurm has sent to every process as well
CONTINUES = "the same command continues from the last saved state"


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state."""


class LoaderError(RuntimeError):
    """A worker process of the data loader has died, or has met an error that is not about the data."""


class StopRequests:
    """Whether SIGTERM or Ctrl-C has come."""

    def __init__(self) -> None:
        self.since: float | None = None  # on the clock of time.monotonic

    @property
    def requested(self) -> bool:
        """Whether one has."""
        return self.since is not None

    def __call__(self, number: int, frame: object) -> None:
        """The signal handler; a second signal that is no echo of the first ends the process at once."""
        if self.since is None:
            self.since = time.monotonic()
            log.info("%s: finishing the iteration and saving", signal.Signals(number).name)
        elif time.monotonic() - self.since > ONE_REQUEST:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Within the block signals that end a process are only noted."""
    stop = StopRequests()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def loader_errors() -> Iterator[None]:
    """Within the block whatever goes wrong in the data loader's workers is one line: `LoaderError`, or ValueError.

    PyTorch has no class for it: a worker's death is a RuntimeError at any place of the main program, and a worker's
    own error is raised anew with its traceback as its message.
    """
    try:
        yield
    except Exception as error:
        dead = [link for link in _chain(error) if str(link).startswith("DataLoader worker (pid")]
        if dead:
            fate = str(dead[0]).strip().partition(". ")[0].removesuffix(".")
            raise LoaderError(f"{fate}, perhaps for want of memory; {CONTINUES}") from error
        text = str(error).strip()
        if "in DataLoader worker process" not in text.partition("\n")[0]:
            raise
        last, places = text.splitlines()[-1], re.findall(r'^  File "(.+)", line (\d+)', text, re.MULTILINE)
        if isinstance(error, ValueError):  # of the data: as if there were no worker
            raise ValueError(last.partition(": ")[2]) from error
        raise LoaderError(f"a worker of the data loader met {last} ({':'.join(places[-1])}); {CONTINUES}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that have led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def end_workers_at_exit() -> None:
    """See to it that the data loader's workers end with the program, in whatever way it ends.

    They leave SIGTERM to the loop (`restore.data.training_batches`), but it is by SIGTERM that Python ends them before
    it waits for them: without this, a program that stops by an error would wait for ever.
    """
    atexit.unregister(_kill_workers)  # once is enough
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report their death
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
