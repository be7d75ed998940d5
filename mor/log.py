"""What the user sees: log lines and progress bars on stderr, one JSON object on stdout."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("mor")


class _ToStderr(logging.Handler):
    """Writes to what is stderr at that moment, so that lines stand above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def setup_logging(*, verbose: bool = False) -> None:
    """Send the package's log lines to stderr, once."""
    if not logger.handlers:
        logger.addHandler(_ToStderr())
        logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def print_json(data: dict[str, Any]) -> None:
    """Print data as the last line of stdout; NaN and infinity become null."""
    sys.stdout.flush()
    print(json.dumps(finite(data)), flush=True)


def finite(value: Any) -> Any:
    """Turn numbers that JSON cannot hold into None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


class Progress:
    """One line of progress: a live bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, label: str, total: float | None, *, every_s: float = 10.0) -> None:
        self.label = label
        self.total = total
        self.done = 0.0
        self.note = ""
        self._every_s = every_s
        self._last_s = self._start_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Move on by amount and show note (such as the loss) beside the bar."""
        self.done += amount
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note)
        elif time.monotonic() - self._last_s >= self._every_s:
            self._last_s = time.monotonic()
            self._print_line()

    def _print_line(self) -> None:
        share = f"{100 * self.done / self.total:3.0f}%" if self.total else human_count(self.done)
        seconds = time.monotonic() - self._start_s
        print(
            f"{self.label}: {share} {seconds:.0f}s {self.note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def progress(label: str, total: float | None, *, show: bool = True) -> Iterator[Progress]:
    """Yield a Progress; on a terminal it draws a rich bar that ends with the block."""
    state = Progress(label, total)
    if not show:
        state._every_s = float("inf")
        yield state
        return
    if not sys.stderr.isatty():
        yield state
        state._print_line()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        state._bar = bar
        state._task = bar.add_task(label, total=total, note="")
        yield state


def human_bytes(count: float) -> str:
    """Return count as a short text such as 3.2 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_count(count: float) -> str:
    """Return count as a short text such as 1.3 M."""
    for unit in ("", " k", " M", " G", " T", " P", " E"):
        if abs(count) < 1000 or unit == " E":
            return f"{count:.0f}" if unit == "" else f"{count:.2f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")
