"""Promises of mor.data.sources: what is read, how it is cut, what broken input says."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mor.data import sources, streams
from mor.data.sources import Document, find_sources, iterate_documents, stdlib_files

zstandard = pytest.importorskip("zstandard")

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(*files: Path, **settings) -> list[Document]:
    return list(iterate_documents(files, **settings))


def texts(*files: Path, **settings) -> list[str]:
    return [document.text for document in read(*files, **settings)]


def test_folders_give_text_code_and_jsonl_in_order(tmp_path: Path) -> None:
    taken = [
        "B.PY",
        "a.txt",
        "a/x.md",
        "a/y.jsonl.zst",
        "b/z.rs",
        "c.txt.gz",
        "d.jsonl",
        "e.parquet",
    ]
    for name in [
        *taken,
        "pic.png",
        ".hidden.txt",
        ".git/x.txt",
        "data.json",
        "a/noext",
        "t.tar.gz",
    ]:
        write(tmp_path / name, "x")
    others: list[Path] = []
    found = find_sources([tmp_path], on_other=others.append)
    assert found == [tmp_path / name for name in sorted(taken)]
    assert {path.name for path in others} == {"pic.png", "data.json", "noext", "t.tar.gz"}
    named = find_sources([tmp_path / "pic.png", tmp_path, tmp_path / "a.txt"])
    assert named == [tmp_path / "pic.png", *found]


def test_missing_and_empty_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_sources([tmp_path / "nothing"])
    write(tmp_path / "pic.png", "x")
    with pytest.raises(ValueError, match="holds no text, code, JSONL or Parquet"):
        find_sources([tmp_path])
    with pytest.raises(ValueError, match="no input"):
        find_sources([])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders on this system")
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        find_sources([tmp_path / "pipe"])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl_lines_are_documents(tmp_path: Path, suffix: str) -> None:
    records = [
        {"text": "one\u2028still one\x85\x0b"},
        {"text": "två", "messages": 3},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    content = "\ufeff" + lines[0] + "\r\n\n  \n" + "\n".join(lines[1:])  # no newline at the end
    file = write(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](content.encode()))
    assert read(file) == [
        Document("one\u2028still one\x85\x0b", f"{file}:1"),
        Document("två", f"{file}:4"),
        Document("user: Hi\nassistant: Ho\n", f"{file}:5"),
    ]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_is_one_document_or_cut_at_line_ends(tmp_path: Path, suffix: str) -> None:
    content = "".join(f"line {number} é\u2028\n" for number in range(40_000))
    file = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](content.encode()))
    pieces = read(file, max_document_bytes=1000)
    assert "".join(piece.text for piece in pieces) == content
    assert all(len(piece.text.encode()) <= 1000 for piece in pieces)
    assert all(piece.text.endswith("\n") for piece in pieces)
    line = pieces[0].text.count("\n") + 1
    assert [pieces[0].source, pieces[1].source] == [str(file), f"{file}:{line}"]
    assert texts(file, max_document_bytes=10**9) == [content]


def test_a_line_without_end_is_cut_between_characters(tmp_path: Path) -> None:
    for char in ("é", "漢", "😀"):
        file = write(tmp_path / "a.txt", "x" + char * 5000)
        pieces = texts(file, max_document_bytes=17)
        assert "".join(pieces) == "x" + char * 5000
        assert max(len(piece.encode()) for piece in pieces) <= 17


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "a.txt.gz", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    line = b'{"text": "' + b"word " * 40 + b'"}\n'
    content = line * 75_000  # 16 MB
    suffix = Path(name).suffix
    file = write(tmp_path / name, COMPRESS.get(suffix, COMPRESS[""])(content))
    count = len(content)
    del content
    tracemalloc.start()
    total = sum(len(document.text) for document in iterate_documents([file]))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0.9 * count
    assert peak_bytes < 6_000_000


def test_zst_frames_in_a_row_are_one_stream(tmp_path: Path) -> None:
    frames = b"".join(COMPRESS[".zst"](f"part {n}\n".encode() * 900) for n in range(5))
    file = write(tmp_path / "a.txt.zst", frames)
    assert "".join(texts(file)) == "".join(f"part {n}\n" * 900 for n in range(5))


def test_empty_files_and_texts_are_told_apart_from_broken_ones(tmp_path: Path) -> None:
    files = [write(tmp_path / name, "") for name in ("a.txt", "b.jsonl", "c.zst", "d.gz", "e.xz")]
    files.append(write(tmp_path / "f.jsonl", '{"text": ""}\n'))
    files.append(write(tmp_path / "g.txt", "\ufeff"))
    empty: list[str] = []
    assert read(*files, on_empty=empty.append) == []
    assert empty == [*map(str, files[:5]), f"{files[5]}:1", str(files[6])]


LONG = "".join(f"a fine line number {n}\n" for n in range(9000)).encode()
ZST = COMPRESS[".zst"](LONG)
BAD_INPUTS = {
    "binary": ("a.bin", b"ab\0c", "a.bin is binary: a NUL byte at offset 2"),
    "binary jsonl": ("a.jsonl", b'{"text": "ok"}\n\0\n', "a.jsonl:2: a NUL byte at offset 15"),
    "utf-8": ("a.txt", b"abc\xff", "invalid UTF-8 at byte offset 3"),
    "utf-8 jsonl": (
        "a.jsonl",
        b'{"text": "ok"}\n{"text": "\xc3("}\n',
        "a.jsonl:2: invalid UTF-8 at",
    ),
    "late utf-8": ("a.txt", LONG + b"\xe4", f"invalid UTF-8 at byte offset {len(LONG)}"),
    "json": ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "a.jsonl:2: broken JSON, Expecting value"),
    "deep json": ("a.jsonl", b"[" * 200_000, "a.jsonl:1: broken JSON, nested too deep"),
    "no object": ("a.jsonl", b"[1]\n", "a.jsonl:1: a line holds one JSON object, this is list"),
    "no field": ("a.jsonl", b'{"body": "x"}\n', "no field 'text' .fields: body.; set --text-field"),
    "not text": ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: field 'text' is int, not text"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
    "messages": ("a.jsonl", b'{"messages": "x"}\n', "'messages' is str, not a list"),
    "message": ("a.jsonl", b'{"messages": [{"role": "x"}]}\n', "a message needs role and content"),
    "cut gz": ("a.txt.gz", gzip.compress(LONG)[:-9], "a.txt.gz is cut off: its .gz stream"),
    "cut xz": ("a.txt.xz", lzma.compress(LONG)[:-40], "a.txt.xz is cut off: its .xz stream"),
    "cut zst": ("a.txt.zst", ZST[: len(ZST) // 2], "a.txt.zst is cut off: its .zst stream"),
    "cut zst end": ("a.txt.zst", ZST[:-1], "a.txt.zst is cut off"),
    "cut zst frame": ("a.txt.zst", ZST + ZST[:40], "a.txt.zst is cut off"),
    "no gz": ("a.txt.gz", b"plain text", "a.txt.gz is damaged"),
    "no xz": ("a.txt.xz", b"plain text that is long enough", "a.txt.xz is damaged"),
    "no zst": ("a.txt.zst", b"plain text", "cannot read .*a.txt.zst: damaged zst stream"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_or_skipped(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_INPUTS[case]
    bad = write(tmp_path / name, content)
    good = write(tmp_path / "good.txt", "good")
    with pytest.raises(ValueError, match=message) as caught:
        read(bad, good)
    assert "\n" not in str(caught.value)
    assert str(bad) in str(caught.value)
    assert str(caught.value).endswith("use --skip-bad to go on without it")
    skipped: list[str] = []
    assert texts(bad, good, skip_bad=True, on_skip=skipped.append)[-1] == "good"
    assert len(skipped) == 1


def test_only_the_broken_line_or_piece_is_skipped(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", b'{"text": "1"}\n{\n\xff\n{"text": "2"}\n')
    assert texts(lines, skip_bad=True) == ["1", "2"]
    pieces = write(tmp_path / "a.txt", b"a fine line of it\n" + b"\xff" * 15 + b"\nthe last line\n")
    assert texts(pieces, skip_bad=True, max_document_bytes=18) == [
        "a fine line of it\n",
        "the last line\n",
    ]


def test_an_unreadable_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt", "x")

    def refuse(*_, **__) -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        ValueError, match=r"cannot read .*a\.txt: Permission denied; use --skip-bad"
    ):
        read(file)


def test_an_endless_json_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 20)
    file = write(tmp_path / "a.jsonl", b"x" * (3 << 20))
    with pytest.raises(ValueError, match=r"a\.jsonl:1 is a line of more than 1 MiB"):
        read(file)


def test_what_follows_a_broken_line_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 10)
    lines = [b'{"text": "%d"}' % number for number in range(6)]
    lines[2], lines[4] = b'{"text": "\0"}', b'{"text": "%s"}' % (b"x" * 5000)
    file = write(tmp_path / "a.jsonl", b"\n".join(lines))
    skipped: list[str] = []
    assert texts(file, skip_bad=True, on_skip=skipped.append) == ["0", "1", "3", "5"]
    assert [problem.partition("a.jsonl:")[2] for problem in skipped] == [
        "3: a NUL byte at offset 38",
        "5 is a line of more than 0 MiB; cut it",
    ]


def test_linked_folders_are_read_and_a_loop_ends(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.txt", "b")
    write(tmp_path / "in" / "a.txt", "a")
    (tmp_path / "in" / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    found = find_sources([tmp_path / "in"])
    assert [Path(str(one)).relative_to(tmp_path / "in").as_posix() for one in found] == [
        "a.txt",
        "part/b.txt",
    ]


def test_missing_zstandard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt.zst", ZST)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"pip install 'mixture-of-recursions\[data\]'"):
        read(file, skip_bad=True)


def test_bytes_taken_from_disk_are_told(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        file = write(tmp_path / f"a.txt{suffix}", compress(LONG))
        taken: list[int] = []
        read(file, on_read=taken.append)
        assert sum(taken) == file.stat().st_size
    assert streams.is_compressed(Path("A.GZ"))
    with pytest.raises(ValueError, match="max_document_bytes is 3"):
        read(tmp_path / "a.txt", max_document_bytes=3)


def test_the_standard_library_is_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = stdlib_files(limit_bytes=2_000_000)
    assert files == stdlib_files(limit_bytes=2_000_000)
    assert 1_000_000 < sum(file.stat().st_size for file in files) <= 2_000_000
    parts = {part for file in files for part in file.parts[:-1]}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    assert all(read(file) for file in files[:20])
    for name in ("b.py", "a/c.py", "test/t.py", "site-packages/p.py"):
        write(tmp_path / name, "x = 1\n")
    write(tmp_path / "latin.py", b"# \xe9\n")
    write(tmp_path / "empty.py", "")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    assert stdlib_files() == [tmp_path / "a/c.py", tmp_path / "b.py"]
    assert stdlib_files(limit_bytes=7) == [tmp_path / "a/c.py"]
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    with pytest.raises(ValueError, match="give your own text with --input"):
        stdlib_files()
