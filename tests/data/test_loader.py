"""Promises of mor.data.loader: rows, segments, order as a function of the sample number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mor.data.config import PrepareConfig
from mor.data.loader import (
    MIN_SPAN,
    Batch,
    PreparedData,
    TokenSplit,
    TrainLoader,
    repeat_rows,
    sequential_batches,
)
from mor.data.manifest import Manifest, Shard, SplitInfo
from mor.data.prepare import prepare

EOS = 0


def make_split(folder: Path, tokens: list[int], shard_tokens: int = 7) -> TokenSplit:
    """Write tokens as shards of one split and open it."""
    shards = []
    for index, start in enumerate(range(0, len(tokens), shard_tokens)):
        part = np.array(tokens[start : start + shard_tokens], dtype="<u2")
        name = f"train-{index:05d}.bin"
        part.tofile(folder / name)
        shards.append(Shard(file=name, tokens=len(part), sha256=""))
    info = SplitInfo(documents=1, tokens=len(tokens), bytes=len(tokens), shards=tuple(shards))
    manifest = Manifest(
        dtype="uint16",
        vocab_size=1000,
        eos_token_id=EOS,
        tokenizer_sha256="",
        corpus_sha256="",
        documents=1,
        skipped=0,
        empty=0,
        source="test",
        splits={"train": info},
    )
    manifest.save(folder)
    return PreparedData.open(folder).split("train")


def make_loader(split: TokenSplit, seed: int = 0, row_tokens: int = 4) -> TrainLoader:
    return TrainLoader(split, row_tokens=row_tokens, seed=seed, eos_token_id=EOS)


def equal(a: Batch, b: Batch) -> bool:
    if (a.segment_BT is None) != (b.segment_BT is None):
        return False
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) for x, y in pairs if x is not None and y is not None)


def test_reads_cross_shards(tmp_path: Path) -> None:
    tokens = list(range(1, 31))
    split = make_split(tmp_path, tokens)
    assert (split.tokens, split.bytes) == (30, 30)
    for start in range(30):
        for count in range(30 - start + 1):
            assert split.read(start, count).tolist() == tokens[start : start + count]
    assert split.read(3, 2).dtype == np.int64
    for start, count in ((-1, 2), (0, 31), (30, 1), (2, -1)):
        with pytest.raises(ValueError, match="outside the split train"):
            split.read(start, count)


def test_rows_need_one_token_more_than_they_have(tmp_path: Path) -> None:
    split = make_split(tmp_path, list(range(1, 10)))
    assert [split.rows(n) for n in (1, 2, 4, 8, 9)] == [8, 4, 2, 1, 0]
    with pytest.raises(
        ValueError, match=r"split train has 9 tokens, fewer than context 9 \+ 1; prepare more text"
    ):
        make_loader(split, row_tokens=9)
    with pytest.raises(ValueError, match="fewer than context"):
        list(sequential_batches(split, row_tokens=9, batch_rows=1, eos_token_id=EOS))
    with pytest.raises(ValueError, match="a row has 0 tokens"):
        make_loader(split, row_tokens=0)


def test_sequential_batches_go_in_order(tmp_path: Path) -> None:
    split = make_split(tmp_path, list(range(1, 30)))
    batches = list(sequential_batches(split, row_tokens=4, batch_rows=3, eos_token_id=EOS))
    assert [len(batch.input_ids_BT) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.input_ids_BT for batch in batches]).flatten().tolist() == [
        *range(1, 29)
    ]
    assert torch.cat([batch.labels_BT for batch in batches]).flatten().tolist() == [*range(2, 30)]
    assert all(
        batch.input_ids_BT.dtype == batch.labels_BT.dtype == torch.int64 for batch in batches
    )
    limited = sequential_batches(split, row_tokens=4, batch_rows=3, eos_token_id=EOS, limit_rows=4)
    assert [len(batch.input_ids_BT) for batch in limited] == [3, 1]
    with pytest.raises(ValueError, match="give 1 or more"):
        list(sequential_batches(split, row_tokens=4, batch_rows=0, eos_token_id=EOS))


def test_segments_begin_at_the_end_token_and_are_left_out_where_useless(tmp_path: Path) -> None:
    tokens = [5, 6, EOS, 7, EOS, EOS, 8, 9, EOS, 1, 2, 3, 4, 5, 6, 7, EOS]
    split = make_split(tmp_path, tokens)
    first, second, third, fourth = sequential_batches(
        split, row_tokens=4, batch_rows=1, eos_token_id=EOS
    )
    assert first.segment_BT is not None
    assert first.segment_BT.tolist() == [[0, 0, 1, 1]]
    assert first.segment_BT.dtype == torch.int64
    assert second.segment_BT is not None
    assert second.segment_BT.tolist() == [[1, 2, 2, 2]]
    assert third.segment_BT is None  # the end token stands in column 0
    assert fourth.segment_BT is None  # it is a label only
    assert fourth.labels_BT.tolist() == [[5, 6, 7, EOS]]
    (both,) = sequential_batches(split, row_tokens=4, batch_rows=4, eos_token_id=EOS)
    assert both.segment_BT is not None
    assert both.segment_BT[2].tolist() == [1, 1, 1, 1]


def test_an_epoch_takes_every_row_once_in_a_new_order(tmp_path: Path) -> None:
    split = make_split(tmp_path, list(range(1, 402)))
    loader = make_loader(split)
    assert loader.rows == 100
    epochs = [loader.batch(100 * n, 100).input_ids_BT for n in range(3)]
    rows = {tuple(row) for row in epochs[0].tolist()}
    assert len(rows) == 100
    for epoch in epochs[1:]:
        assert {tuple(row) for row in epoch.tolist()} == rows
        assert not torch.equal(epoch, epochs[0])
    assert not torch.equal(make_loader(split, seed=1).batch(0, 100).input_ids_BT, epochs[0])


def test_a_batch_depends_on_the_sample_number_alone(tmp_path: Path) -> None:
    split = make_split(tmp_path, [n % 13 for n in range(402)])
    straight = make_loader(split)
    batches = [straight.batch(8 * n, 8) for n in range(60)]
    for n in (59, 3, 25, 12, 13, 0):  # a fresh loader at any point, epoch ends inside a batch
        assert equal(make_loader(split).batch(8 * n, 8), batches[n])
        assert equal(straight.batch(8 * n, 8), batches[n])
    halves = [make_loader(split).batch(96 + first, 4).input_ids_BT for first in (0, 4)]
    assert torch.equal(torch.cat(halves), batches[12].input_ids_BT)
    for first, count in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="start at 0 or later"):
            straight.batch(first, count)


def span_of(row: torch.Tensor) -> int:
    """Return after how many tokens a row begins again; its length where it does not."""
    return next(n for n in range(1, len(row) + 1) if torch.equal(row[n:], row[: len(row) - n]))


def test_every_other_row_repeats_its_beginning(tmp_path: Path) -> None:
    T = 64
    split = make_split(tmp_path, [n % 999 + 1 for n in range(20 * T + 1)], shard_tokens=500)
    loader = make_loader(split, row_tokens=T)
    batch, first = loader.batch(3, 9), 3
    made = repeat_rows(batch, seed=5, first_sample=first)
    rows = torch.cat((made.input_ids_BT, made.labels_BT[:, -1:]), 1)
    assert torch.equal(made.input_ids_BT[:, 1:], made.labels_BT[:, :-1])
    spans = [span_of(row) for row in rows]
    assert spans[0::2] == [T + 1] * 5, "samples 3, 5, 7, 9 and 11 stay as drawn"
    assert torch.equal(made.input_ids_BT[0::2], batch.input_ids_BT[0::2])
    assert all(MIN_SPAN <= span <= T // 2 for span in spans[1::2])
    assert len(set(spans[1::2])) > 1
    for row, span in zip(range(1, 9, 2), spans[1::2], strict=True):
        assert torch.equal(rows[row, :span], batch.input_ids_BT[row, :span])
    parts = [repeat_rows(loader.batch(n, 1), seed=5, first_sample=n) for n in range(3, 12)]
    assert torch.equal(torch.cat([part.input_ids_BT for part in parts]), made.input_ids_BT)
    assert not equal(repeat_rows(batch, seed=6, first_sample=first), made)


def test_a_row_that_repeats_is_one_document(tmp_path: Path) -> None:
    split = make_split(tmp_path, [n % 5 for n in range(4 * 64 + 1)], shard_tokens=500)
    batch = make_loader(split, row_tokens=64).batch(0, 4)
    made = repeat_rows(batch, seed=0, first_sample=0)
    assert batch.segment_BT is not None and made.segment_BT is not None
    assert not made.segment_BT[0::2].any()
    assert torch.equal(made.segment_BT[1::2], batch.segment_BT[1::2])


@pytest.mark.parametrize("T", [1, 2, 5])
def test_rows_of_few_tokens_can_repeat(tmp_path: Path, T: int) -> None:
    split = make_split(tmp_path, list(range(1, 40)))
    made = repeat_rows(make_loader(split, row_tokens=T).batch(0, 2), seed=0, first_sample=0)
    assert made.input_ids_BT.shape == (2, T)
    assert span_of(torch.cat((made.input_ids_BT[0], made.labels_BT[0, -1:]))) <= max(1, T // 2)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    split = make_split(tmp_path, [1, 2, 1000, 3, 4])
    with pytest.raises(ValueError, match="token id 1000, but the vocabulary has 1000 entries"):
        make_loader(split).batch(0, 1)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    corpus = tmp_path / "a.txt"
    corpus.write_text("".join(f"line {n}\n" for n in range(2000)))
    config = PrepareConfig(
        input=(corpus,), out=tmp_path / "out", vocab_size=300, max_document_bytes=200
    )
    prepare(config)
    return config.out


def test_prepared_data_opens_and_knows_its_tokenizer(prepared: Path) -> None:
    data = PreparedData.open(prepared)
    tokenizer = data.tokenizer()
    assert tokenizer.eos_token_id == data.manifest.eos_token_id
    split = data.split("train")
    assert split.tokens == data.manifest.splits["train"].tokens
    ids = split.read(0, 50)
    assert "line" in tokenizer.decode(ids.tolist())
    with pytest.raises(ValueError, match="no split 'test'; it has train, heldout, val"):
        data.split("test")


def test_a_changed_tokenizer_is_noticed(prepared: Path) -> None:
    file = prepared / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["merges"].pop()
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="is not the one that the shards were made with"):
        PreparedData.open(prepared).tokenizer()


def change_manifest(folder: Path, **changes) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
    "not JSON": (lambda f: cut(f / "manifest.json", 50), "manifest.json is not JSON"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "does not hold a JSON object"),
    "foreign": (lambda f: (f / "manifest.json").write_text("{}"), "is not of mor prepare"),
    "version": (lambda f: change_manifest(f, format_version=9), "format version is 9, this mor"),
    "dtype": (lambda f: change_manifest(f, dtype="int7"), "dtype 'int7'"),
    "no splits": (lambda f: change_manifest(f, splits={"train": {}}), "is not whole"),
    "unknown key": (lambda f: change_manifest(f, colour="red"), "is not whole"),
    "no shard": (lambda f: (f / "val-00000.bin").unlink(), "val-00000.bin is missing"),
    "short shard": (lambda f: cut(f / "train-00000.bin", 100), "has 100 bytes, the manifest says"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_said_in_one_line(prepared: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(prepared)
    with pytest.raises(ValueError, match=message) as caught:
        PreparedData.open(prepared)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder; make it with mor prepare"):
        PreparedData.open(tmp_path / "none")


def test_a_manifest_that_miscounts_is_refused(prepared: Path) -> None:
    splits = json.loads((prepared / "manifest.json").read_text())["splits"]
    splits["train"]["tokens"] += 1
    change_manifest(prepared, splits=splits)
    with pytest.raises(ValueError, match="the shards of train hold"):
        PreparedData.open(prepared)
    splits["train"]["tokens"] = "many"
    change_manifest(prepared, splits=splits)
    with pytest.raises(ValueError, match="'many' is not a count"):
        PreparedData.open(prepared)
