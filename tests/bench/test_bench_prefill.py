"""Promises of `mor bench prefill`: prompts of each length, both sides, one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support_bench import tiny_shapes

from mor.bench import verify
from mor.cli import main

FLAGS = ["bench", "prefill", "--shape", "small", "--rounds", "3", "--dtype", "float32"]
FLAGS += ["--batch-tokens", "64", "--max-num-batched-tokens", "32", "--prompt-lens"]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_shapes():
        yield


def test_every_length_is_timed_on_both_sides(capsys):
    assert main([*FLAGS, "16", "40", "--json"]) == 0
    said = capsys.readouterr()
    result: dict[str, Any] = json.loads(said.out)
    first, second = result["cells"]
    assert (first["prompt_len"], first["prompts"]) == (16, 4)
    assert (second["prompt_len"], second["prompts"]) == (40, 1)
    for cell in result["cells"]:
        assert cell["speedup_q1"] <= cell["speedup"] <= cell["speedup_q3"]
        assert min(cell["tokens_per_s"], cell["twin_tokens_per_s"], cell["ttft_ms"]) > 0
        assert cell["verified"]["num_tokens"] > 0
    assert result["efficiency"] == min(cell["efficiency"] for cell in result["cells"])
    assert "small mor3" in said.err and "…" not in said.err


def test_a_wrong_engine_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(verify.TOLERANCE, torch.float32, -1.0)
    assert main([*FLAGS, "16"]) == 1
    assert "off the plain model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["0"], "prompt_lens is [0]; give numbers of 1 or more"),
        (["64"], "prompts of 64 tokens exceed the context of 64"),
        (["8", "--batch-tokens", "0"], "batch_tokens is 0; give 1 or more"),
    ],
)
def test_bad_settings_are_refused_with_one_line(flags, said, capsys):
    assert main([*FLAGS, *flags]) == 2
    assert f"mor: {said}" in capsys.readouterr().err
