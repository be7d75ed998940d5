"""Promises of mor.data.parquet: rows in order, little memory, what broken files say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mor.data.config import PrepareConfig
from mor.data.prepare import prepare
from mor.data.sources import Document, iterate_documents

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MESSAGES = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], []]


def write(path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **settings)
    return path


def read(*files: Path, **settings: Any) -> list[Document]:
    return list(iterate_documents(files, **settings))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_rows_are_documents_in_order(tmp_path: Path, compression: str) -> None:
    columns = {"n": list(range(700)), "body": [f"text {n}" for n in range(700)]}
    file = write(tmp_path / "a.parquet", columns, compression=compression, row_group_size=300)
    taken: list[int] = []
    assert read(file, text_field="body", on_read=taken.append) == [
        Document(f"text {n}", f"{file}:{n + 1}") for n in range(700)
    ]
    assert len(taken) == 3 and sum(taken) == file.stat().st_size


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_every_type_of_text_is_read(tmp_path: Path, kind: Any) -> None:
    file = write(tmp_path / "a.parquet", {"text": pa.array(["å", "b", "å"]).cast(kind)})
    assert [document.text for document in read(file)] == ["å", "b", "å"]


def test_messages_are_rendered_as_those_of_jsonl(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"messages": MESSAGES})
    empty: list[str] = []
    assert read(file, on_empty=empty.append) == [Document("user: Hi\nassistant: Ho\n", f"{file}:1")]
    assert empty == [f"{file}:2"]
    assert read(write(file, {"text": pa.array([], pa.string())}), on_empty=empty.append) == []
    assert empty[1:] == [str(file)]


def test_memory_does_not_grow_with_the_file_or_its_row_groups(tmp_path: Path) -> None:
    texts = [f"{n} " * 200 for n in range(30_000)]  # 33 MB in one row group
    file = write(tmp_path / "a.parquet", {"text": texts}, compression="none", use_dictionary=False)
    assert file.stat().st_size > 30_000_000
    held = [0]
    before_bytes = pa.total_allocated_bytes()
    for document in iterate_documents([file]):
        held.append(pa.total_allocated_bytes() - before_bytes)
        del document
    assert 0 < max(held) < 6_000_000


def not_utf8(path: Path) -> Path:
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffa")
    return write(path, {"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])})


def damaged(path: Path) -> Path:
    write(path, {"text": [f"text {n}" for n in range(50_000)]}, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = b"\xaa" * 4000
    path.write_bytes(data)
    return path


def cut(path: Path) -> Path:
    data = damaged(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def of_bytes(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def of_columns(columns: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda path: write(path, columns)


BAD_FILES = {
    "no parquet": (of_bytes(b"plain text, long enough"), "is damaged or no Parquet file"),
    "nothing": (of_bytes(b""), "is damaged or no Parquet file"),
    "cut": (cut, "is damaged or no Parquet file"),
    "damaged": (damaged, "cannot read .*: Corrupt snappy"),
    "no column": (
        of_columns({"texts": ["a"], "id": [1]}),
        r"no field 'text' \(fields: texts, id\); did you mean --text-field texts\?",
    ),
    "no columns": (of_columns({}), r"no field 'text' \(fields: none\); set --text-field"),
    "numbers": (of_columns({"text": [1]}), "column 'text' is int64, not text; set --text-field"),
    "bytes": (of_columns({"text": [b"a"]}), "column 'text' is binary, not text"),
    "no messages": (of_columns({"messages": ["a"]}), "column 'messages' is string, not a list"),
    "null": (of_columns({"text": ["a", None]}), ":2: field 'text' is null"),
    "utf-8": (not_utf8, ":1: invalid UTF-8 at byte 0"),
    "message": (
        of_columns({"messages": [[{"role": "x"}]]}),
        ":1: a message needs role and content",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_line_or_skipped(tmp_path: Path, case: str) -> None:
    make, message = BAD_FILES[case]
    bad, good = make(tmp_path / "bad.parquet"), tmp_path / "good.parquet"
    write(good, {"text": ["good"]})
    with pytest.raises(ValueError, match=message) as caught:
        read(bad, good)
    assert "\n" not in str(caught.value)
    assert str(bad) in str(caught.value)
    assert str(caught.value).endswith("; use --skip-bad to go on without it")
    skipped: list[str] = []
    assert read(bad, good, skip_bad=True, on_skip=skipped.append)[-1].text == "good"
    assert len(skipped) == 1


def test_only_the_bad_row_is_skipped(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"text": ["a", None, "b"]})
    assert [document.text for document in read(file, skip_bad=True)] == ["a", "b"]


def test_an_unreadable_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", {"text": ["a"]})

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet: Permission denied; use"):
        read(file)


def test_parquet_and_jsonl_of_the_same_texts_give_the_same_shards(tmp_path: Path) -> None:
    import json

    texts = [f"Document {n} is about {n * n} things.\n" for n in range(200)]
    write(tmp_path / "in" / "a.parquet", {"text": texts[:120]})
    write(tmp_path / "in" / "b.parquet", {"text": texts[120:]})
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    made = [
        prepare(
            PrepareConfig(input=(tmp_path / name,), out=tmp_path / f"out-{name}", vocab_size=300)
        )
        for name in ("in", "a.jsonl")
    ]
    assert made[0].splits == made[1].splits
    assert made[0].corpus_sha256 == made[1].corpus_sha256


def test_a_missing_pyarrow_is_said_before_any_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.parquet", {"text": ["a"]})
    (tmp_path / "a.txt").write_bytes(b"\xff would be refused")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow; pip install 'mixture.*\[data\]'"):
        prepare(PrepareConfig(input=(tmp_path / "a.txt",), val=(file,), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
