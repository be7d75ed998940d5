"""Threads for the tokenizers library, which takes every core and holds no lock of Python.

Beside it the main thread reads, writes and hears Ctrl-C.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def map_ahead(
    work: Callable[[In], Out], items: Iterable[In], *, ahead: int = 2
) -> Generator[tuple[In, Out], None, None]:
    """Yield every item with work(item), in order, while `ahead` items behind it are in work.

    Two, so that the last long text of one batch leaves no core idle.
    Raises what work raises; RuntimeError when the library breaks off
    """
    waiting: deque[tuple[In, Future[Out]]] = deque()
    pool = ThreadPoolExecutor(ahead)
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, _result(future)
        for done, future in waiting:
            yield done, _result(future)
    finally:
        pool.shutdown(cancel_futures=True)


def feed(work: Callable[[Iterator[In]], Out], items: Iterable[In]) -> Out:
    """Return work(items), done in a thread; Ctrl-C ends it at the next item.

    Raises what work raises; RuntimeError when the library breaks off
    """
    is_over = threading.Event()

    def until_over() -> Iterator[In]:
        for item in items:
            if is_over.is_set():
                raise InterruptedError
            yield item

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, until_over())
        try:
            return _result(future)
        finally:
            is_over.set()


def _result(future: Future[Out]) -> Out:
    try:
        return future.result()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of the library's Rust code
        raise RuntimeError(f"the tokenizers library broke off: {error}") from error
