"""`mor` commands in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

LAST_LINES = 12
STOP_S = 120.0
"""how long a training that was asked to stop may take to write its checkpoint"""


class _Terminated(KeyboardInterrupt):
    """SIGTERM reached this process, and not the child, as a terminal's Ctrl-C does."""


class MemberFailed(Exception):
    """A member came to no result; the message says why."""


def run_mor(args: Sequence[str]) -> str:
    """Run a `mor` command in a process of its own and return its stdout; its stderr is shown.

    Raises MemberFailed with its last line, KeyboardInterrupt when it was interrupted or this
    process was terminated
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    # A file for stdout, since nobody reads it while stderr is followed.
    with tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, "-m", "mor", *args]
        # close_fds: the child holds the lock of `only_one` too, should this process be killed.
        with (
            _sigterm_interrupts(),
            subprocess.Popen(
                command, stdout=out, stderr=subprocess.PIPE, text=True, close_fds=False
            ) as child,
        ):
            assert child.stderr is not None
            try:
                for line in child.stderr:
                    print(f"  {line.rstrip()}", file=sys.stderr, flush=True)
                    last.append(line.strip())
                code = child.wait()
            except KeyboardInterrupt as stop:
                if isinstance(stop, _Terminated):
                    child.terminate()
                try:  # it heard it too, and writes its checkpoint
                    child.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                raise
        out.seek(0)
        printed = out.read()
    if code == 130 or code == -2:
        raise KeyboardInterrupt
    if code != 0:
        lines = [line for line in last if line]
        said = next((line for line in reversed(lines) if line.startswith("mor: ")), None)
        why = said.removeprefix("mor: ") if said else (lines[-1] if lines else "it said nothing")
        raise MemberFailed(f"exit code {code}: {why}")
    return printed


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Raise _Terminated on SIGTERM instead of ending at once, which would leave a child running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
