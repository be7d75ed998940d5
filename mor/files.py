"""Files that are whole or not there: everything is written under another name and renamed.

A final name never holds half a file, also after a kill or on a full disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is flushed to disk and takes the name `path`."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        yield part
        _sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it takes the name `path`, replacing a folder there.

    A link keeps its place, what it points to is replaced.
    Raises ValueError for a mount point, which nothing can be renamed to
    """
    path = path.resolve()
    if path.is_mount():
        raise ValueError(f"{path} is a mount point; give a folder inside it")
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path_in_part in (*part.rglob("*"), part):
            _sync(path_in_part)
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(part, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text to path, whole or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write data to path as indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file when it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return data


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left half-written in folder; no other process may be writing there."""
    for pattern in (".*.part-*", ".*.old-*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def claim_folder(path: Path, *, what: str) -> Path:
    """Make an empty folder for output, or say in one line why it cannot be.

    Raises ValueError when path is a file or a folder that already holds something.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a folder for {what}")
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise ValueError(f"{path} already holds files; give an empty or new folder for {what}")
    return path


def _sync(path: Path) -> None:
    """Flush a file or folder to disk; a full disk may show only here.

    Windows cannot open a folder, and some file systems refuse to sync one.
    """
    is_optional = path.is_dir() or os.name == "nt"
    with contextlib.suppress(OSError) if is_optional else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


LOCKED_BYTE = 2**30
"""the byte that is held on Windows: the same for all, behind the process's number"""


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold a folder for one run at a time, and its children; ValueError when another has it."""
    file = out / ".lock"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(file, wait=False, inherit=True))
        except BlockingIOError as error:
            pid = file.read_text().strip() or "unknown"
            raise ValueError(
                f"{out} is in use by another run (process {pid}); wait for it or give another --out"
            ) from error
        yield


@contextmanager
def locked(file: Path, *, wait: bool = True, inherit: bool = False) -> Iterator[None]:
    """Hold a file that names our process, until the end or that of the process.

    inherit  children that take open files hold it too
    Raises   BlockingIOError when another process holds it and we do not wait
    """
    with file.open("a+") as lock:
        os.set_inheritable(lock.fileno(), inherit)
        _lock(lock.fileno(), wait=wait)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _lock(handle: int, *, wait: bool) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
        while True:
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # pyrefly: ignore
                return
            except OSError as error:
                if not wait:
                    raise BlockingIOError from error
                time.sleep(0.1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
