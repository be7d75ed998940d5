"""Promises of mor.data.prepare: splits, shards, whole folders, the same bytes every time."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mor.data import prepare as module
from mor.data.config import PrepareConfig
from mor.data.manifest import Manifest
from mor.data.prepare import SplitRule, prepare
from mor.data.writer import SplitWriter
from mor.files import sha256_file
from mor.tokenizer import Tokenizer, train_bpe


def write_corpus(path: Path, count: int = 300, start: int = 0) -> Path:
    rows = [
        {"text": f"Document {n} is about {n * n} things.\n"} for n in range(start, start + count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "in" / "a.jsonl")


def texts_of(folder: Path, split: str) -> list[str]:
    """Decode a split back into its documents, straight from the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer = Tokenizer.load(folder)
    shards = [folder / shard["file"] for shard in manifest["splits"][split]["shards"]]
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    ids = np.concatenate([np.fromfile(shard, dtype=dtype) for shard in shards])
    ends = np.flatnonzero(ids == manifest["eos_token_id"])
    assert ends[-1] == len(ids) - 1, "the last document ends too"
    return [
        tokenizer.decode(part[part != manifest["eos_token_id"]].tolist())
        for part in np.split(ids, ends[:-1] + 1)
    ]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_lands_whole_in_one_split(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(PrepareConfig(input=(corpus,), out=out, vocab_size=300, val_fraction=0.2))
    texts = {name: texts_of(out, name) for name in ("train", "heldout", "val")}
    wanted = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert sorted(itertools.chain(*texts.values())) == sorted(wanted)
    assert texts["train"] == [text for text in wanted if text in set(texts["train"])]
    assert 30 < len(texts["val"]) < 90
    assert manifest.documents == 300
    for name, split in manifest.splits.items():
        assert split.documents == len(texts[name])
        assert split.bytes == len("".join(texts[name]).encode())
        assert all(sha256_file(out / shard.file) == shard.sha256 for shard in split.shards)
    assert Manifest.load(out) == manifest
    assert manifest.tokenizer_sha256 == Tokenizer.load(out).fingerprint()
    names = {"manifest.json", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == names | {
        f"{split}-00000.bin" for split in texts
    }


def test_the_same_input_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(PrepareConfig(input=(corpus.parent,), out=tmp_path / name, vocab_size=320))
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_a_document_keeps_its_split_when_the_corpus_grows(corpus: Path, tmp_path: Path) -> None:
    more = write_corpus(tmp_path / "in" / "b.jsonl", start=1000)
    for name, files in (("small", (corpus,)), ("large", (corpus, more))):
        prepare(PrepareConfig(input=files, out=tmp_path / name, vocab_size=300))
    small, large = (set(texts_of(tmp_path / name, "train")) for name in ("small", "large"))
    assert len(small - large) <= 2  # the extremes of each corpus are assigned
    assert len(large) > len(small) + 250


def test_three_documents_fill_three_splits(tmp_path: Path) -> None:
    for n in range(20):
        corpus = write_corpus(tmp_path / f"{n}.jsonl", count=3, start=10 * n)
        out = tmp_path / f"out-{n}"
        config = PrepareConfig(input=(corpus,), out=out, vocab_size=257)
        val, heldout = (0.5, 0.4) if n % 2 else (0.0, 0.0)
        manifest = prepare(replace(config, val_fraction=val, heldout_fraction=heldout))
        assert [split.documents for split in manifest.splits.values()] == [1, 1, 1]


def test_split_shares_follow_the_hash() -> None:
    rule = SplitRule(0.25, 0.25, {2**63: "val"})
    assert [rule.split_of(n << 61) for n in (0, 1, 2, 3, 4, 5)] == [
        *("val", "val", "heldout", "heldout", "val", "train")
    ]


def test_own_validation_files_are_the_validation_split(corpus: Path, tmp_path: Path) -> None:
    val = write_corpus(corpus.parent / "val.jsonl", count=5, start=5000)
    out = tmp_path / "out"
    # val stands inside the input folder: it is not trained on
    manifest = prepare(PrepareConfig(input=(corpus.parent,), val=(val,), out=out, vocab_size=300))
    lines = val.read_text().splitlines()
    assert texts_of(out, "val") == [json.loads(line)["text"] for line in lines]
    assert manifest.splits["val"].documents == 5
    assert manifest.splits["heldout"].documents >= 1
    assert manifest.documents == 305
    with pytest.raises(ValueError, match="every input file is also given as --val"):
        prepare(PrepareConfig(input=(val,), val=(val,), out=tmp_path / "no"))


def test_shards_are_cut_at_their_size(corpus: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    prepare(PrepareConfig(input=(corpus,), out=whole, vocab_size=300))
    manifest = prepare(PrepareConfig(input=(corpus,), out=cut, vocab_size=300, shard_tokens=1000))
    shards = manifest.splits["train"].shards
    assert len(shards) > 3
    assert [shard.tokens for shard in shards[:-1]] == [1000] * (len(shards) - 1)
    joined = b"".join((cut / shard.file).read_bytes() for shard in shards)
    assert joined == (whole / "train-00000.bin").read_bytes()


def test_batches_do_not_change_the_result(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(PrepareConfig(input=(corpus,), out=tmp_path / "one", vocab_size=300))
    monkeypatch.setattr(module, "BATCH_BYTES", 100)
    prepare(PrepareConfig(input=(corpus,), out=tmp_path / "two", vocab_size=300))
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_large_vocabularies_take_four_bytes(corpus: Path, tmp_path: Path) -> None:
    raw = train_bpe(iter(["abc"]), vocab_size=257)._raw
    raw.add_tokens([f"extra{n}" for n in range(2**16)])
    Tokenizer(raw).save(tmp_path)
    out = tmp_path / "out"
    manifest = prepare(PrepareConfig(input=(corpus,), tokenizer=tmp_path, out=out))
    assert manifest.dtype == "uint32"
    assert texts_of(out, "train")[0].startswith("Document")


def test_one_token_documents_work_and_empty_ones_are_counted(tmp_path: Path) -> None:
    corpus = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in ("a", "b", "", "c", "d")]
    corpus.write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("")
    manifest = prepare(PrepareConfig(input=(tmp_path,), out=tmp_path / "out", vocab_size=257))
    assert sum(split.tokens for split in manifest.splits.values()) == 8
    assert (manifest.documents, manifest.empty, manifest.skipped) == (4, 2, 0)


def test_bad_input_is_refused_or_counted(
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (corpus.parent / "b.txt").write_bytes(b"abc\xff")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"b\.txt: invalid UTF-8 at byte offset 3; use --skip-bad"):
        prepare(PrepareConfig(input=(corpus.parent,), out=out, vocab_size=300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    monkeypatch.setattr(logging.getLogger("mor"), "propagate", True)
    manifest = prepare(
        PrepareConfig(input=(corpus.parent,), out=out, vocab_size=300, skip_bad=True)
    )
    assert (manifest.documents, manifest.skipped) == (300, 1)
    assert [r.message for r in caplog.records if "invalid UTF-8" in r.message] != []


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_an_empty_corpus_is_said(tmp_path: Path, texts: list[str]) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(ValueError, match="empty corpus"):
        prepare(PrepareConfig(input=(corpus,), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_too_few_distinct_documents_are_said(tmp_path: Path) -> None:
    corpus, val = tmp_path / "a.jsonl", write_corpus(tmp_path / "val.jsonl", count=1)
    corpus.write_text('{"text": "same"}\n{"text": "other"}\n' * 5)
    config = PrepareConfig(input=(corpus,), out=tmp_path / "out", vocab_size=257)
    with pytest.raises(ValueError, match=r"2 distinct documents, its splits need 3; .*cut finer"):
        prepare(config)
    prepare(PrepareConfig(input=(corpus,), val=(val,), out=tmp_path / "out", vocab_size=257))
    corpus.write_text('{"text": "same"}\n' * 5)
    with pytest.raises(ValueError, match="1 distinct documents, its splits need 2"):
        prepare(PrepareConfig(input=(corpus,), val=(val,), out=tmp_path / "no", vocab_size=257))
    val.write_text("")
    with pytest.raises(ValueError, match="no text in what --val names"):
        prepare(PrepareConfig(input=(corpus,), val=(val,), out=tmp_path / "no", vocab_size=257))


def test_an_output_folder_in_use_is_refused_before_the_work(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        prepare(PrepareConfig(input=(corpus,), out=tmp_path / "file"))
    with pytest.raises(ValueError, match="already holds files"):
        prepare(PrepareConfig(input=(corpus,), out=corpus.parent))
    with pytest.raises(NotADirectoryError):
        prepare(PrepareConfig(input=(corpus,), out=tmp_path / "file" / "out"))
    (tmp_path / "empty").mkdir()
    prepare(PrepareConfig(input=(corpus,), out=tmp_path / "empty", vocab_size=257))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("at", ["tokenizer", "shard", "manifest"])
def test_a_stopped_run_leaves_nothing(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    at: str,
) -> None:
    def stop(*_, **__) -> None:
        raise error

    if at == "tokenizer":
        monkeypatch.setattr(module, "train_bpe", stop)
    elif at == "shard":
        monkeypatch.setattr(SplitWriter, "write_pending", stop)
    else:
        monkeypatch.setattr(Manifest, "save", stop)
    with pytest.raises(type(error)):
        prepare(PrepareConfig(input=(corpus,), out=tmp_path / "out", vocab_size=257))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_input_that_changes_between_the_passes_is_noticed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_and_change(texts, *, vocab_size: int) -> Tokenizer:
        tokenizer = train_bpe(texts, vocab_size=vocab_size)
        write_corpus(corpus, count=200)
        return tokenizer

    monkeypatch.setattr(module, "train_bpe", train_and_change)
    with pytest.raises(ValueError, match="the input changed"):
        prepare(PrepareConfig(input=(corpus,), out=tmp_path / "out", vocab_size=257))


def test_limit_stops_the_input(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(
        PrepareConfig(input=(corpus,), out=tmp_path / "out", vocab_size=257, limit_bytes=1000)
    )
    total = sum(split.bytes for split in manifest.splits.values())
    assert 1000 <= total < 1050


def test_the_tokenizer_sees_a_bounded_sample_of_training_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record(texts, *, vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_bpe(iter(seen), vocab_size=vocab_size)

    monkeypatch.setattr(module, "train_bpe", record)
    out = tmp_path / "all"
    prepare(PrepareConfig(input=(corpus,), out=out, vocab_size=257, val_fraction=0.2))
    assert len(seen) > 200
    assert not set(seen) & set(texts_of(out, "val")[1:])  # but for the assigned extreme
    seen.clear()
    monkeypatch.setattr(module, "SAMPLE_BYTES", 2000)
    prepare(PrepareConfig(input=(corpus,), out=tmp_path / "some", vocab_size=257))
    assert 500 < len("".join(seen)) <= 2000
    assert "Document 29" in "".join(seen)  # drawn from everywhere, not from the beginning


def test_the_standard_library_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PrepareConfig(
        corpus="stdlib", out=tmp_path / "out", vocab_size=400, limit_bytes=300_000
    )
    manifest = prepare(config)
    assert "standard library of Python 3." in manifest.source
    assert all(split.tokens for split in manifest.splits.values())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either --input or --corpus stdlib"),
        ({"input": (Path("a"),), "corpus": "stdlib"}, "give either --input or --corpus stdlib"),
        ({"corpus": "wiki"}, "corpus 'wiki' is unknown"),
        ({"corpus": "stdlib", "val_fraction": 1.0}, r"val_fraction is 1.0; give a share in"),
        ({"corpus": "stdlib", "heldout_fraction": -0.1}, "heldout_fraction is -0.1"),
        ({"corpus": "stdlib", "val_fraction": 0.6, "heldout_fraction": 0.5}, "nothing to train on"),
        ({"corpus": "stdlib", "vocab_size": 256}, "vocab_size is 256; give 257 or more"),
        ({"corpus": "stdlib", "max_document_bytes": 3}, "max_document_bytes is 3"),
        ({"corpus": "stdlib", "shard_tokens": 0}, "shard_tokens is 0"),
        ({"corpus": "stdlib", "limit_bytes": 0}, "limit_bytes is 0"),
        ({"corpus": "stdlib", "eos_token": "</s>"}, "'</s>' needs --tokenizer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(out=Path("out"), **settings)


def test_one_core_and_all_cores_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name, settings in (
        ("one", {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}),
        ("all", {"RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true"}),
    ):
        args = ["--input", str(corpus), "--out", str(tmp_path / name), "--vocab-size", "320"]
        subprocess.run(
            [sys.executable, "-m", "mor", "prepare", *args],
            env=os.environ | settings,
            check=True,
            capture_output=True,
        )
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "all")


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for a process on Windows")
def test_ctrl_c_stops_soon_and_leaves_nothing(tmp_path: Path) -> None:
    """Also while the tokenizer is learnt, all in a library that hears no signal."""
    write_corpus(tmp_path / "in" / "a.jsonl", count=200_000)
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "mor: interrupted")
    assert float(done.stdout) < 5000, "it went on reading"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


STOPPED = """
import os, signal, sys
from mor.cli import main
from mor.data import prepare

counted = [0]
add = prepare.Census.add

def count(self, item):
    counted[0] += 1
    if counted[0] == 1000:
        os.kill(os.getpid(), signal.SIGINT)
    add(self, item)

prepare.Census.add = count
code = main(["prepare", "--input", sys.argv[1], "--out", sys.argv[2]])
print(counted[0])
sys.exit(code)
"""


def test_a_limit_does_not_thin_out_the_tokenizers_sample(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record(texts, *, vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_bpe(iter(seen), vocab_size=vocab_size)

    monkeypatch.setattr(module, "train_bpe", record)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 2000)
    prepare(PrepareConfig(input=(corpus,), out=tmp_path / "out", vocab_size=257, limit_bytes=1500))
    assert 1200 < len("".join(seen)) <= 1550


def test_what_val_holds_too_is_not_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 60)
    val = write_corpus(tmp_path / "val.jsonl", 5, start=10)
    with caplog.at_level(logging.WARNING):
        prepare(PrepareConfig(input=(corpus,), val=(val,), out=tmp_path / "out", vocab_size=300))
    held = texts_of(tmp_path / "out", "val")
    trained = [t for name in ("train", "heldout") for t in texts_of(tmp_path / "out", name)]
    assert len(held) == 5 and len(trained) == 55 and not set(held) & set(trained)
    assert "left out of the training text: 5 documents that --val holds too" in caplog.text
    everything = hashlib.sha256()
    for line in (corpus.read_text() + val.read_text()).splitlines():
        everything.update(json.loads(line)["text"].encode() + b"\0")
    assert Manifest.load(tmp_path / "out").corpus_sha256 != everything.hexdigest()
    copy = write_corpus(tmp_path / "copy.jsonl", 60)
    with pytest.raises(ValueError, match="--val holds all that"):
        prepare(PrepareConfig(input=(corpus,), val=(copy,), out=tmp_path / "x", vocab_size=300))


def test_documents_larger_than_the_sample_still_teach_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLE_BYTES", 40)
    corpus = tmp_path / "in.jsonl"
    corpus.write_text("".join(json.dumps({"text": "the " * 50 + str(n)}) + "\n" for n in range(9)))
    manifest = prepare(PrepareConfig(input=(corpus,), out=tmp_path / "out", vocab_size=262))
    assert manifest.vocab_size > 257
