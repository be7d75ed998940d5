"""Documents out of files and datasets, one at a time: memory does not grow with either."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mor.data.hub import HubDataset, read_hub
from mor.data.parquet import PARQUET_SUFFIX, read_parquet
from mor.data.records import Row, text_of
from mor.data.streams import BadInput, content_suffix, read_chunks

JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PROSE_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm"}
)
# fmt: off
CODE_SUFFIXES = frozenset({
    ".c", ".cc", ".cpp", ".cs", ".css", ".cxx", ".go", ".h", ".hpp", ".hs", ".java", ".jl", ".js",
    ".jsx", ".kt", ".lua", ".mjs", ".php", ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".scala",
    ".sh", ".sql", ".swift", ".toml", ".ts", ".tsx", ".yaml", ".yml",
})
# fmt: on
KNOWN_SUFFIXES = JSON_LINES_SUFFIXES | PROSE_SUFFIXES | CODE_SUFFIXES | {PARQUET_SUFFIX}
STDLIB_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
MIN_DOCUMENT_BYTES = 16
MAX_LINE_BYTES = 1 << 25
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


Source = Path | HubDataset
"""What documents come out of."""


class Document(NamedTuple):
    """A text and where it stands: `path`, or `path:line` behind the first line."""

    text: str
    source: str


class Package(NamedTuple):
    """A package that not every installation has, and the extra that brings it."""

    name: str
    extra: str


def _ignore(_: Any) -> None:
    pass


def find_sources(
    names: Sequence[str | Path], *, on_other: Callable[[Path], None] = _ignore
) -> list[Source]:
    """List what to read: each name that is a file or a dataset, and what folders hold, sorted.

    A named file is always taken. From folders come text, code, JSONL and Parquet by suffix, also
    compressed; hidden files and folders are left out. What is named twice is read once.

    on_other  told every file of a folder that was left out for its suffix
    Raises    ValueError for a path that is missing or holds nothing to read, and for a name that
              begins like a dataset's and is none
    """
    found: dict[Source, Source] = {}
    for name in names:
        sources: Sequence[Source] = (
            [HubDataset.parse(str(name))]
            if str(name).startswith("hf:")
            else _find_files(Path(name), on_other)
        )
        for source in sources:
            found.setdefault(identity(source), source)
    if not found:
        raise ValueError("no input; give files or folders with --input, or --corpus stdlib")
    return list(found.values())


def identity(source: Source) -> Source:
    """Return what is the same for two ways to name a source."""
    return source.resolve() if isinstance(source, Path) else source


def check_readers(sources: Sequence[Source]) -> None:
    """Raise ValueError when a source needs a package that is not installed."""
    for source in sources:
        needed = _package_for(source)
        if needed is not None and find_spec(needed.name) is None:
            raise ValueError(
                f"{source} needs {needed.name}; pip install 'mixture-of-recursions[{needed.extra}]'"
            )


def _package_for(source: Source) -> Package | None:
    if isinstance(source, HubDataset):
        return Package("datasets", extra="hf")
    if content_suffix(source) == PARQUET_SUFFIX:
        return Package("pyarrow", extra="data")
    return Package("zstandard", extra="data") if source.suffix.lower() == ".zst" else None


def _find_files(path: Path, on_other: Callable[[Path], None]) -> list[Path]:
    if path.is_dir():
        files = _walk(path, on_other)
        if not files:
            raise ValueError(
                f"{path} holds no text, code, JSONL or Parquet files; "
                "name a file itself to read it whatever its suffix"
            )
        return files
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(f"{path} is not a regular file; give files or folders")
    raise ValueError(f"{path} does not exist; give files or folders that do")


def _walk(folder: Path, on_other: Callable[[Path], None]) -> list[Path]:
    files: list[Path] = []
    seen: set[Path] = set()  # links may lead back
    for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        place = Path(root).resolve()
        if place in seen:
            folders[:] = []
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(root, name)
            if name.startswith(".") or not path.is_file():
                continue
            if content_suffix(path) in KNOWN_SUFFIXES:
                files.append(path)
            else:
                on_other(path)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise error


def iterate_documents(
    sources: Sequence[Source],
    *,
    text_field: str = "text",
    max_document_bytes: int = 65536,
    skip_bad: bool = False,
    on_skip: Callable[[str], None] = _ignore,
    on_empty: Callable[[str], None] = _ignore,
    on_read: Callable[[int], None] = _ignore,
) -> Iterator[Document]:
    """Yield the documents of sources in order.

    A JSONL line, a row of a Parquet file and one of a dataset is one document: its text_field,
    or its `messages` as "role: content" lines. Any other file is one document, cut at line ends
    (else between characters) into documents of at most max_document_bytes.

    on_skip   told, in one line, what was left out because it is broken (with skip_bad)
    on_empty  told the place of every file, line or row that holds no text
    on_read   told the bytes taken from disk
    Raises    ValueError naming file and line, row or byte offset, unless skip_bad; also with it
              for a missing package and for a dataset that cannot be had whole
    """
    if max_document_bytes < MIN_DOCUMENT_BYTES:
        raise ValueError(
            f"max_document_bytes is {max_document_bytes}; give {MIN_DOCUMENT_BYTES} or more"
        )
    check_readers(sources)

    def report(problem: str) -> None:
        if not skip_bad:
            raise BadInput(problem)
        on_skip(problem)

    for source in sources:
        if isinstance(source, HubDataset):
            rows = read_hub(source, text_field, report=report)
            documents = _row_documents(source, rows, on_empty)
        elif content_suffix(source) == PARQUET_SUFFIX:
            rows = read_parquet(source, text_field, report=report, on_read=on_read)
            documents = _row_documents(source, rows, on_empty)
        elif content_suffix(source) in JSON_LINES_SUFFIXES:
            chunks = read_chunks(source, on_read=on_read)
            documents = _json_documents(source, chunks, text_field, report, on_empty)
        else:
            chunks = read_chunks(source, on_read=on_read)
            documents = _text_documents(source, chunks, max_document_bytes, report, on_empty)
        try:
            yield from documents
        except BadInput as error:
            if not skip_bad:
                raise ValueError(f"{error}; use --skip-bad to go on without it") from error
            on_skip(str(error))


def _row_documents(
    source: Source, rows: Iterator[Row], on_empty: Callable[[str], None]
) -> Iterator[Document]:
    number = 0
    for text, number in rows:
        if text:
            yield Document(text, f"{source}:{number}")
        else:
            on_empty(f"{source}:{number}")
    if number == 0:
        on_empty(str(source))


def _text_documents(
    path: Path,
    chunks: Iterator[bytes],
    max_bytes: int,
    report: Callable[[str], None],
    on_empty: Callable[[str], None],
) -> Iterator[Document]:
    offset, line = 0, 1
    for piece in _cut(chunks, max_bytes):
        start, source = offset, str(path) if line == 1 else f"{path}:{line}"
        offset += len(piece)
        line += piece.count(b"\n")
        _refuse_binary(path, piece, start)
        text = _decode(path, piece, start, report)
        if text:
            yield Document(text, source)
        elif text is not None:
            on_empty(source)
    if offset == 0:
        on_empty(str(path))


def _cut(chunks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """Cut a stream into pieces of 1 to max_bytes that end with a line, else with a character."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > max_bytes:
            end = buffer.rfind(b"\n", 0, max_bytes) + 1 or _character_end(buffer, max_bytes)
            yield bytes(buffer[:end])
            del buffer[:end]
    if buffer:
        yield bytes(buffer)


def _character_end(buffer: bytearray, end: int) -> int:
    """Return the last character boundary at or before end; end itself in broken UTF-8."""
    for boundary in range(end, end - 4, -1):
        if buffer[boundary] & 0xC0 != 0x80:
            return boundary
    return end


def _json_documents(
    path: Path,
    chunks: Iterator[bytes],
    text_field: str,
    report: Callable[[str], None],
    on_empty: Callable[[str], None],
) -> Iterator[Document]:
    offset = number = 0
    for number, data in enumerate(_lines(chunks), start=1):
        source, start = f"{path}:{number}", offset
        if isinstance(data, int):
            offset += data + 1
            report(f"{source} is a line of more than {MAX_LINE_BYTES >> 20} MiB; cut it")
            continue
        offset += len(data) + 1
        if number == 1:
            _refuse_binary(path, data, start)
        elif b"\0" in data:
            report(f"{source}: a NUL byte at offset {start + data.index(0)}")
            continue
        line = _decode(source, data, start, report)
        if line is None or not line.strip():
            continue
        try:
            text = text_of(json.loads(line), text_field)
        except (ValueError, RecursionError) as error:
            report(f"{source}: {_json_problem(error)}")
            continue
        if text:
            yield Document(text, source)
        else:
            on_empty(source)
    if number == 0:
        on_empty(str(path))


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | int]:
    """Yield lines without their newline, of one that is too long its bytes; only \\n ends one."""
    parts: list[bytes] = []
    size = 0

    def whole() -> bytes | int:
        return size if size > MAX_LINE_BYTES else b"".join(parts)

    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            size += len(line)
            parts.append(line)
            yield whole()
            parts, size = [], 0
        if rest:
            size += len(rest)
            parts.append(rest)
        if size > MAX_LINE_BYTES:
            parts = []
    if size:
        yield whole()


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON, {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "broken JSON, nested too deep"
    return str(error)


def _refuse_binary(path: Path, data: bytes, start: int) -> None:
    at = data.find(b"\0")
    if at >= 0:
        raise BadInput(f"{path} is binary: a NUL byte at offset {start + at}")


def _decode(
    where: str | Path, data: bytes, start: int, report: Callable[[str], None]
) -> str | None:
    """Return data as text, or None after a report of its first invalid byte."""
    if start == 0:
        data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        report(f"{where}: invalid UTF-8 at byte offset {start + error.start}")
        return None


def stdlib_files(*, limit_bytes: int = 20_000_000) -> list[Path]:
    """List the standard library's Python files, tests left out, up to limit_bytes of text.

    The order is that of their relative path; files that are not UTF-8 or empty are left out.
    Raises ValueError when this Python carries its library in another form.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    total_bytes = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if STDLIB_EXCLUDED.intersection(path.relative_to(root).parts[:-1]):
            continue
        try:
            data = path.read_bytes()
            data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not data or b"\0" in data:
            continue
        total_bytes += len(data)
        if total_bytes > limit_bytes:
            break
        files.append(path)
    if not files:
        raise ValueError(f"no Python files in {root}; give your own text with --input")
    return files
