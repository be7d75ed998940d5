"""Promises of mor.data.threads: the order stays, threads end, what breaks off is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mor.data.threads import feed, map_ahead


class Panic(BaseException):
    """What a fault in Rust code comes as."""


def test_results_come_in_order_and_work_runs_ahead() -> None:
    started: list[int] = []
    barrier = threading.Barrier(2, timeout=5)

    def work(item: int) -> int:
        started.append(item)
        if item in (1, 2):
            barrier.wait()  # passes only if both are in work
        time.sleep(0.01 * (item % 3))
        return item * item

    results = map_ahead(work, range(9))
    assert next(results) == (0, 0)
    assert 3 not in started
    assert list(results) == [(item, item * item) for item in range(1, 9)]


def test_an_error_ends_the_threads() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise ValueError("one")
        return item

    before = threading.active_count()
    results = map_ahead(work, range(1000))
    with pytest.raises(ValueError, match="one"):
        list(results)
    assert threading.active_count() == before


def test_a_panic_of_the_library_is_said() -> None:
    def work(item: object) -> int:
        raise Panic("index out of bounds")

    with pytest.raises(RuntimeError, match="tokenizers library broke off: index out of bounds"):
        list(map_ahead(work, [1]))
    with pytest.raises(RuntimeError, match="tokenizers library broke off: index out of bounds"):
        feed(work, [1])


def test_an_interrupt_stops_what_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes to the main thread while another one learns a tokenizer."""
    taken: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(1)
            time.sleep(0.001)
            yield 1

    def interrupt(*_: object) -> None:
        while not taken:
            time.sleep(0.001)
        raise KeyboardInterrupt

    before = threading.active_count()
    monkeypatch.setattr("mor.data.threads._result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(sum, endless())
    assert threading.active_count() == before
