"""Promises of mor.data.hub: names, streamed rows, one line for whatever fails; no network.

`datasets` takes a local folder for a name that is one, so ./owner/name stands in for the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mor.cli import main
from mor.data.config import PrepareConfig
from mor.data.hub import HubDataset
from mor.data.prepare import prepare
from mor.data.sources import Document, find_sources, iterate_documents

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"Document {n} is about {n * n} things.\n" for n in range(150)]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that holds owner/name (Parquet, two splits) and owner/lines (JSONL)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("owner/name", "owner/lines"):
        (tmp_path / name).mkdir(parents=True)
    for split, texts in (("train", TEXTS), ("validation", ["one", "two"])):
        table = pa.table({"text": texts, "n": list(range(len(texts)))})
        pq.write_table(table, tmp_path / "owner/name" / f"{split}.parquet", row_group_size=40)
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "owner/lines/a.jsonl").write_text(lines)
    return tmp_path


def read(name: str, **settings: Any) -> list[Document]:
    return list(iterate_documents(find_sources([name]), **settings))


def test_names_have_a_configuration_and_a_split() -> None:
    parse = HubDataset.parse
    assert parse("hf://a/b") == HubDataset("a/b", None, "train")
    assert parse("hf://squad") == HubDataset("squad", None, "train")
    assert parse("hf://a/b.c:20220301.en@val") == HubDataset("a/b.c", "20220301.en", "val")
    assert [str(parse(f"hf://a/b{end}")) for end in ("", ":c", "@d", ":c@d")] == [
        *("hf://a/b@train", "hf://a/b:c@train", "hf://a/b@d", "hf://a/b:c@d")
    ]
    assert find_sources(["hf://a/b", "hf://a/b@train"]) == [HubDataset("a/b")]


@pytest.mark.parametrize("end", ["", "a/b/c", "datasets/a/b", "a/b@", "a/b:", "a/b@c:d", "a b"])
def test_other_names_are_refused(end: str) -> None:
    with pytest.raises(ValueError, match="is no dataset's name; write hf://OWNER/NAME"):
        find_sources([f"hf://{end}"])


def test_rows_are_documents_in_order() -> None:
    assert read("hf://owner/name@validation") == [
        Document("one", "hf://owner/name@validation:1"),
        Document("two", "hf://owner/name@validation:2"),
    ]
    assert [document.text for document in read("hf://owner/name")] == TEXTS
    assert [document.text for document in read("hf://owner/lines", text_field="body")] == TEXTS


def test_a_dataset_gives_the_shards_of_its_files(hub: Path) -> None:
    made = [
        prepare(
            PrepareConfig(
                input=(f"{kind}owner/name{end}",),
                val=(f"{kind}owner/name{val}",),
                out=hub / f"out{len(kind)}",
                vocab_size=300,
            )
        )
        for kind, end, val in (
            ("hf://", "", "@validation"),
            ("", "/train.parquet", "/validation.parquet"),
        )
    ]
    assert made[0].splits == made[1].splits
    assert made[0].source == "hf://owner/name"


def test_a_row_without_text_is_an_error_or_skipped(hub: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "", "b"]}), hub / "owner/name/train.parquet")
    with pytest.raises(ValueError, match="owner/name@train:2: field 'text' is null; use --skip"):
        read("hf://owner/name")
    skipped: list[str] = []
    empty: list[str] = []
    found = read("hf://owner/name", skip_bad=True, on_skip=skipped.append, on_empty=empty.append)
    assert [document.text for document in found] == ["a", "b"]
    assert len(skipped) == 1 and empty == ["hf://owner/name@train:3"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("owner/nobody", "owner/nobody@train: Couldn't reach .*; check the network and HF_HUB_OFF"),
        ("owner/name@valid", "split 'valid' is unknown; did you mean validation"),
        ("owner/name:en", "BuilderConfig 'en' not found. Available: .*; write hf://OWNER/NAME"),
        ("owner/lines", r"owner/lines@train: no field 'text' \(fields: body\); set --text-field"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_is_not_there_is_said_in_one_line(
    name: str, says: str, skip_bad: bool, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with --skip-bad: a dataset that cannot be had is not left out in silence."""
    args = ["prepare", "--input", f"hf://{name}", "--out", f"{hub}/out"]
    assert main([*args, *(["--skip-bad"] if skip_bad else [])]) == 2
    said = capsys.readouterr()
    *others, last = said.err.splitlines()
    assert said.out == "" and "Traceback" not in said.err
    assert last.startswith("mor: hf://") and not [x for x in others if x.startswith("mor:")]
    with pytest.raises(ValueError, match=says):
        raise ValueError(last)
    assert not (hub / "out").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist."), "HF_TOKEN"),
        (ConnectionError("no route"), "no route; check the network"),
        (TimeoutError(), "TimeoutError; check the network"),
        (RuntimeError("Dataset scripts are no longer supported\nmore"), "no longer supported; "),
    ],
)
@pytest.mark.parametrize("at", ["opening", "reading"])
def test_failures_of_the_library_become_one_line(
    error: Exception, says: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rows:
        column_names = None

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "a"}
            raise error

    def load_dataset(name: str, config: str | None, **settings: Any) -> dict[str, Rows]:
        assert settings == {"streaming": True}  # nothing else, trust_remote_code least of all
        if at == "opening":
            raise error
        return {"train": Rows()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=says) as caught:
        read("hf://a/b", skip_bad=True)
    assert str(caught.value).startswith("hf://a/b@train: ")
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"@train needs datasets; pip install 'mixture.*\[hf\]'"):
        read("hf://owner/name")
