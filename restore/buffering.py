"""Threads around the network: frames are read ahead of it and written behind it, so that it need not wait.

    with read_ahead(clip, 4) as frames, write_behind(writer.write, 6) as write:
        for frame in restore_clip(net, frames):
            write(frame)

Both hold a bounded number of frames, hand on every error, and leave no thread when their block ends.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

# PyTorch would give each of these threads a team of its own, and they would take the cores from the network.
_pool = partial(ThreadPoolExecutor, initializer=torch.set_num_threads, initargs=(1,))


@contextmanager
def read_ahead(items: Iterable[Item], size: int) -> Iterator[Iterator[Item]]:
    """The same ``items`` in the same order, of which a thread takes up to ``size`` before they are asked for.

    It begins when the first is asked for. What ``items`` raises is raised here, after the items before it. When the
    block ends, the item being read is waited for, and ``items`` is closed if it is a generator.
    """
    source = iter(items)
    with _pool(1, "read_ahead") as pool:
        try:
            yield _taken(source, pool, size)
        finally:
            pool.shutdown(cancel_futures=True)
            if isinstance(source, Generator):
                source.close()


def _taken(source: Iterator[Item], pool: ThreadPoolExecutor, size: int) -> Iterator[Item]:
    end = object()
    pending: deque[Future[Any]] = deque(pool.submit(next, source, end) for _ in range(size))
    while (item := pending.popleft().result()) is not end:
        pending.append(pool.submit(next, source, end))
        yield item


@contextmanager
def write_behind(
    write: Callable[..., object], size: int, *, threads: int = 1, finish: bool = True
) -> Iterator[Callable[..., None]]:
    """A function that hands its arguments to ``write`` in other threads, waiting while ``size`` calls are not done.

    One thread keeps the order; several are for calls that do not depend on each other. What a call raises is raised by
    the next one, or when the block ends, which is after all calls are done. If the block itself raises, calls that
    have not begun are still made with ``finish``, and dropped without; an interruption while waiting drops them too.
    """
    pending: deque[Future[Any]] = deque()

    def put(*arguments: object) -> None:
        while pending and (len(pending) >= size or pending[0].done()):
            pending.popleft().result()
        pending.append(pool.submit(write, *arguments))

    with _pool(threads, "write_behind") as pool:
        try:
            yield put
            while pending:
                pending.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=not finish)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
