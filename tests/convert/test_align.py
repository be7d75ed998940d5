"""Layers in the order of another: the same layer, and found where it was shuffled."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_convert import PLAIN, go

from mor.checkpoint import save_model
from mor.config import ModelConfig
from mor.convert.align import COLUMNS_OF, ROWS_OF, Heads, aligned, matched, order_like
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer

HEADS = Heads(PLAIN.num_attention_heads, PLAIN.num_key_value_heads, PLAIN.head_dim)


def shuffled_twice(config: ModelConfig) -> MoR:
    """Return a model whose odd layers are the even ones before them with all places shuffled."""
    torch.manual_seed(1)
    model = MoR(config)
    state = model.state_dict()
    group, size = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    for layer in range(0, config.num_hidden_layers, 2):
        groups = torch.randperm(config.num_key_value_heads)
        queries = torch.cat([i * group + torch.randperm(group) for i in groups.tolist()])
        orders = {
            "heads": (queries[:, None] * size + torch.arange(size)).flatten(),
            "kv_heads": (groups[:, None] * size + torch.arange(size)).flatten(),
            "neurons": torch.randperm(config.intermediate_size),
        }
        for name in list(state):
            head, _, part = name.partition(f"model.layers.{layer}.")
            if head:
                continue
            if part.endswith("bias"):
                state[name].normal_()
            value, projection = state[name], part.rpartition(".")[0]
            if projection in ROWS_OF:
                value = value[orders[ROWS_OF[projection]]]
            elif projection in COLUMNS_OF:
                value = value[:, orders[COLUMNS_OF[projection]]]
            state[f"model.layers.{layer + 1}.{part}"] = value
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("init", ["average", "svd"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_shuffled_layers_become_one_again(tmp_path: Path, tiny_data: Path, init: str, kind: str):
    more: dict[str, Any] = {"attention_bias": True} if kind == "qwen2" else {}
    config = dataclasses.replace(PLAIN, num_hidden_layers=2, **more)
    tokenizer = Tokenizer.load(tiny_data)
    save_model(shuffled_twice(config), tmp_path / "parent", tokenizer=tokenizer)
    ends: dict[str, Any] = {"prelude_layers": 0, "coda_layers": 0}
    rank: dict[str, Any] = {"lora_rank": 2} if init == "svd" else {}
    result = go(tmp_path / "parent", tmp_path / "out", init=init, **ends, **rank)
    assert result["max_logit_difference"] < 1e-4
    far = go(tmp_path / "parent", tmp_path / "far", init="random", **ends)
    assert far["max_logit_difference"] > 0.1


def test_another_order_is_the_same_layer():
    torch.manual_seed(0)
    model = MoR(PLAIN)
    read = model.state_dict().__getitem__
    before = model(torch.arange(20)[None]).logits
    order = order_like(read, HEADS, 2, 5)
    assert not torch.equal(order.neurons, torch.arange(PLAIN.intermediate_size))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            head, _, part = name.partition("model.layers.5.")
            if not head:
                weight.copy_(aligned(read, HEADS, 2, 5, part))
    torch.testing.assert_close(model(torch.arange(20)[None]).logits, before, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from(["real", "tied", "nan"]))
def test_every_row_gets_a_column_of_its_own(count: int, seed: int, kind: str):
    torch.manual_seed(seed)
    score = torch.randn(count, count)
    if kind == "tied":
        score = score.round()
    if kind == "nan":
        score[torch.rand_like(score) < 0.2] = float("nan")
    assert sorted(matched(score).tolist()) == list(range(count))


def test_matches_are_worth_half_of_the_best_at_least():
    torch.manual_seed(0)
    for _ in range(10):
        score = torch.rand(6, 6)
        orders = itertools.permutations(range(6))
        best = max(float(score[torch.arange(6), list(order)].sum()) for order in orders)
        assert float(score[torch.arange(6), matched(score)].sum()) >= 0.5 * best
