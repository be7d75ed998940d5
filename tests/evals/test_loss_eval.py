"""Promises of `mor eval`: the causal figure, per byte, on the part of the text asked for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.checkpoint import load_model
from mor.data.loader import PreparedData
from mor.evals.loss import evaluate_folder


def test_bits_per_byte_are_those_counted_by_hand(tiny_run: Path, tiny_data: Path) -> None:
    """One row at a time, logits whole, the softmax written out."""
    report = evaluate_folder(tiny_run / "model", tiny_data, context=32)
    model, data = load_model(tiny_run / "model"), PreparedData.open(tiny_data)
    split = data.split("val")
    nats, depths, count = 0.0, 0, 0
    for row in range(split.rows(32)):
        tokens = torch.from_numpy(split.read(row * 32, 33))
        ids = tokens[:-1]
        segment = (ids == data.manifest.eos_token_id).cumsum(0)
        out = model(ids[None], segments=segment[None], implementation="reference", rule="causal")
        assert out.logits is not None
        shares = out.logits[0].detach().double().log_softmax(-1)
        nats -= float(shares[torch.arange(32), tokens[1:]].sum())
        depths += int(out.depth.sum())
        count += 32
    assert report["tokens"] == count
    assert report["loss"] == pytest.approx(nats / count, rel=1e-5)
    bits = nats / count / math.log(2) * split.tokens / split.bytes
    assert report["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert report["mean_depth"] == pytest.approx(depths / count)
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert report["routing"] == "causal"


def test_it_repeats_what_training_reported(tiny_run: Path, tiny_data: Path) -> None:
    summary = json.loads((tiny_run / "summary.json").read_text())
    report = evaluate_folder(tiny_run / "model", tiny_data, context=32)
    assert report["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-5)
    assert report["mean_depth"] == pytest.approx(summary["mean_depth"])


@pytest.mark.parametrize(("limit", "tokens"), [(1, 32), (32, 32), (70, 64), (10**9, None)])
def test_a_limit_is_kept_to_whole_rows(
    tiny_run: Path, tiny_data: Path, limit: int, tokens: int | None
) -> None:
    report = evaluate_folder(tiny_run / "model", tiny_data, context=32, limit_tokens=limit)
    if tokens is None:
        tokens = PreparedData.open(tiny_data).split("val").rows(32) * 32
    assert report["tokens"] == tokens


def test_the_context_is_what_the_model_allows(tiny_run: Path, tiny_data: Path) -> None:
    report = evaluate_folder(tiny_run / "model", tiny_data, split="heldout", limit_tokens=64)
    assert report["tokens"] == 64  # one row of 64, not two of the 32 it was trained on


def test_top_k_routing_stands_beside_and_is_named(
    tiny_run: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = evaluate_folder(tiny_run / "model", tiny_data, context=32)
    both = evaluate_folder(tiny_run / "model", tiny_data, context=32, also_top_k=True)
    peek: dict[str, Any] = {k: v for k, v in both.items() if k.startswith("top_k")}
    assert {k: v for k, v in both.items() if k not in peek} == plain
    assert peek["top_k_mean_depth"] == pytest.approx(1 + 21 / 32 + 10 / 32)


def test_a_model_folder_without_a_tokenizer_is_trusted(
    tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    report = evaluate_folder(tmp_path / "m", tiny_data, context=32)
    assert report["tokens"] > 0
