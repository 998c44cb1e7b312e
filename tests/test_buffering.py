"""Reading ahead and writing behind: the same items in the same order, bounded, with every error and no thread left."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from restore.buffering import read_ahead, write_behind


@pytest.fixture(autouse=True)
def no_threads_left():
    before, cores = set(threading.enumerate()), torch.get_num_threads()
    yield
    assert set(threading.enumerate()) == before
    assert torch.get_num_threads() == cores


class Source:
    """Counts what was taken of it, and notes that it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.taken, self.closed, self.count, self.error = 0, False, count, error

    def __iter__(self) -> Iterator[int]:
        try:
            for n in range(self.count):
                self.taken += 1
                yield n
            if self.error:
                raise self.error
        finally:
            self.closed = True


def until(happens, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.002)
    return happens()


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_items_in_order(count, size):
    with read_ahead(range(count), size) as items:
        assert list(items) == list(range(count))


def test_items_are_read_before_they_are_asked_for_but_not_many():
    source = Source(20)
    with read_ahead(source, 3) as items:
        time.sleep(0.02)
        assert source.taken == 0  # nothing before the first is asked for
        for given in items:
            assert until(lambda given=given: source.taken == min(given + 4, 20))
            assert source.taken <= given + 4


def test_an_error_comes_after_the_items_before_it():
    seen = []
    with pytest.raises(KeyError, match="broken"), read_ahead(Source(3, KeyError("broken")), 8) as items:
        for item in items:
            seen.append(item)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaving_early_closes_the_source(error):
    source = Source(100)
    with pytest.raises(error), read_ahead(source, 4) as items:
        next(items)
        raise error
    assert source.closed and source.taken < 7


def test_one_thread_writes_in_order_and_all_at_the_end():
    written = []

    def write(number: int, text: str) -> None:
        time.sleep(0.001)
        written.append((number, text))

    with write_behind(write, 3) as put:
        for n in range(10):
            put(n, str(n))
        assert len(written) < 10
    assert written == [(n, str(n)) for n in range(10)]


@pytest.mark.parametrize(("size", "threads"), [(1, 1), (4, 1), (4, 3)])
def test_no_more_than_size_are_under_way(size, threads):
    lock, begun, done, most = threading.Lock(), 0, 0, 0

    def write(_: int) -> None:
        nonlocal done
        time.sleep(0.002)
        with lock:
            done += 1

    with write_behind(write, size, threads=threads) as put:
        for n in range(12):
            put(n)
            begun += 1
            most = max(most, begun - done)
    assert done == 12
    assert 1 <= most <= size


def test_several_threads_write_at_once():
    meeting = threading.Barrier(2)
    with write_behind(lambda _: meeting.wait(5), 2, threads=2) as put:
        put(0)
        put(1)


def failing(number: int) -> None:
    if number == 2:
        raise OSError("disk full")


def test_what_a_call_raises_is_raised_by_the_next_or_at_the_end():
    with pytest.raises(OSError, match="disk full"), write_behind(failing, 1) as put:
        for n in range(100):
            put(n)
    assert n == 3
    with pytest.raises(OSError, match="disk full"), write_behind(failing, 8) as put:
        for n in range(3):
            put(n)
    assert n == 2


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_left_after_an_error_is_finished_or_dropped(error, finish):
    began, go, written = threading.Event(), threading.Event(), []

    def write(number: int) -> None:
        began.set()
        assert go.wait(5)
        written.append(number)

    with pytest.raises(error), write_behind(write, 4, finish=finish) as put:
        for n in range(4):
            put(n)
        assert began.wait(5)
        threading.Timer(0.02, go.set).start()
        raise error
    assert written == ([0, 1, 2, 3] if finish else [0])
    assert until(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()))


def test_the_error_of_the_block_wins():
    with pytest.raises(KeyError, match="mine"), write_behind(failing, 8) as put:
        for n in range(4):
            put(n)
        raise KeyError("mine")


def test_each_thread_has_one_core_and_the_network_the_rest():
    cores, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with write_behind(lambda: cores.append(torch.get_num_threads()), 1) as put:
            put()
        assert (cores, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
