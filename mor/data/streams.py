"""Bytes of a plain, gz, xz or zst file, piece by piece; damage is said in one line."""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
CHUNK_BYTES = 1 << 18
# Few: 4 bytes of zst can stand for 128 KiB, and all output of a read comes at once.
ZST_READ_BYTES = 1 << 7


class BadInput(ValueError):
    """Something in a user's file is broken; the reader can go on behind it."""


def content_suffix(path: Path) -> str:
    """Return the suffix in lower case, looking through a compression suffix."""
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def read_chunks(path: Path, *, on_read: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the decompressed content in pieces of bounded size.

    on_read  told the bytes taken from the file, before decompression
    Raises   BadInput when the file cannot be read, is damaged or ends early
    """
    suffix = path.suffix.lower()
    taken = 0
    try:
        with path.open("rb") as raw:
            if not os.fstat(raw.fileno()).st_size:
                return
            for chunk in _decompressed(raw, suffix):
                position = raw.tell()
                on_read(position - taken)
                taken = position
                yield chunk
    except EOFError as error:
        raise BadInput(f"{path} is cut off: its {suffix} stream has no end") from error
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BadInput(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from error


def _decompressed(raw: IO[bytes], suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        yield from _zst_chunks(raw)
        return
    openers = {".gz": gzip.open, ".xz": lzma.open}
    stream: Any = openers[suffix](raw) if suffix in openers else raw
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _zst_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """Decompress frame after frame; EOFError when the last one has no end."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    while data := raw.read(ZST_READ_BYTES):
        while data:
            if frame is None:
                frame = decompressor.decompressobj()
            try:
                chunk = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise OSError(f"damaged zst stream ({error})") from error
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
            if chunk:
                yield chunk
    if frame is not None:
        raise EOFError
