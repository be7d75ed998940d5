"""Documents out of files, one at a time: memory does not grow with the corpus or a file."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mor.data.streams import BadInput, check_readers, content_suffix, read_chunks

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
KNOWN_SUFFIXES = JSON_LINES_SUFFIXES | PROSE_SUFFIXES | CODE_SUFFIXES
STDLIB_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
MIN_DOCUMENT_BYTES = 16
MAX_LINE_BYTES = 1 << 25
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A text and where it stands: `path`, or `path:line` behind the first line."""

    text: str
    source: str


def _ignore(_: Any) -> None:
    pass


def find_files(paths: Sequence[Path], *, on_other: Callable[[Path], None] = _ignore) -> list[Path]:
    """List the files to read: each path that is a file, and what folders hold, sorted.

    A named file is always taken. From folders come text, code and JSONL by suffix, also
    compressed; hidden files and folders are left out. A file named twice is read once.

    on_other  told every file of a folder that was left out for its suffix
    Raises    ValueError for a path that is missing or holds nothing to read
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            files = _walk(path, on_other)
            if not files:
                raise ValueError(
                    f"{path} holds no text, code or JSONL files; "
                    "name a file itself to read it whatever its suffix"
                )
        elif path.is_file():
            files = [path]
        elif path.exists():
            raise ValueError(f"{path} is not a regular file; give files or folders")
        else:
            raise ValueError(f"{path} does not exist; give files or folders that do")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise ValueError("no input; give files or folders with --input, or --corpus stdlib")
    return list(found.values())


def _walk(folder: Path, on_other: Callable[[Path], None]) -> list[Path]:
    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
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
    files: Sequence[Path],
    *,
    text_field: str = "text",
    max_document_bytes: int = 65536,
    skip_bad: bool = False,
    on_skip: Callable[[str], None] = _ignore,
    on_empty: Callable[[str], None] = _ignore,
    on_read: Callable[[int], None] = _ignore,
) -> Iterator[Document]:
    """Yield the documents of files in order.

    A JSONL line is one document: its text_field, or its `messages` as "role: content" lines.
    Any other file is one document, cut at line ends (else between characters) into documents
    of at most max_document_bytes.

    on_skip   told, in one line, what was left out because it is broken (with skip_bad)
    on_empty  told the place of every file or line that holds no text
    on_read   told the bytes taken from disk
    Raises    ValueError naming file and line or byte offset, unless skip_bad
    """
    if max_document_bytes < MIN_DOCUMENT_BYTES:
        raise ValueError(
            f"max_document_bytes is {max_document_bytes}; give {MIN_DOCUMENT_BYTES} or more"
        )
    check_readers(list(files))

    def report(problem: str) -> None:
        if not skip_bad:
            raise BadInput(problem)
        on_skip(problem)

    for path in files:
        chunks = read_chunks(path, on_read=on_read)
        if content_suffix(path) in JSON_LINES_SUFFIXES:
            documents = _json_documents(path, chunks, text_field, report, on_empty)
        else:
            documents = _text_documents(path, chunks, max_document_bytes, report, on_empty)
        try:
            yield from documents
        except BadInput as error:
            if not skip_bad:
                raise ValueError(f"{error}; use --skip-bad to go on without it") from error
            on_skip(str(error))


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
    for number, data in enumerate(_lines(path, chunks), start=1):
        source, start = f"{path}:{number}", offset
        offset += len(data) + 1
        _refuse_binary(path, data, start)
        line = _decode(source, data, start, report)
        if line is None or not line.strip():
            continue
        try:
            text = _text_of(json.loads(line), text_field)
        except (ValueError, RecursionError) as error:
            report(f"{source}: {_json_problem(error)}")
            continue
        if text:
            yield Document(text, source)
        else:
            on_empty(source)
    if number == 0:
        on_empty(str(path))


def _lines(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield lines without their newline; only \\n ends one."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*parts, line])
            parts, size = [], 0
        if rest:
            parts.append(rest)
            size += len(rest)
        if size > MAX_LINE_BYTES:
            raise BadInput(f"{path} has a line of more than {MAX_LINE_BYTES >> 20} MiB; cut it")
    if parts:
        yield b"".join(parts)


def _text_of(record: Any, text_field: str) -> str:
    """Return the text of a JSON record; BadInput says what is missing."""
    if not isinstance(record, dict):
        raise BadInput(f"a line holds one JSON object, this is {type(record).__name__}")
    if text_field in record:
        text = record[text_field]
        if not isinstance(text, str):
            raise BadInput(f"field {text_field!r} is {type(text).__name__}, not text")
    elif "messages" in record:
        text = _render_messages(record["messages"])
    else:
        near = ", ".join(list(record)[:8]) or "none"
        raise BadInput(f"no field {text_field!r} (fields: {near}); set --text-field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"the text holds half a surrogate pair at {error.start}") from error
    return text


def _render_messages(messages: Any) -> str:
    if not isinstance(messages, list):
        raise BadInput(f"field 'messages' is {type(messages).__name__}, not a list")
    lines = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadInput("a message needs role and content as text")
        lines.append(f"{role}: {content}\n")
    return "".join(lines)


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
