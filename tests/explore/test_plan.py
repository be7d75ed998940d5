"""Promises of `mor plan`: the counts of the paper's models, honest costs, the twin beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mor.cli import main
from mor.config import ModelConfig
from mor.explore.plan import ROWS, plan
from mor.train.config import TrainConfig

SMOLLM_360M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "num_hidden_layers": 32,
}
TRAIN = TrainConfig(budget_tokens=1e6, context=512, batch_tokens=16384)


@pytest.mark.parametrize(
    ("recursions", "layers", "millions"), [(1, 32, 315), (2, 32, 167), (3, 32, 118), (4, 34, 98)]
)
def test_parameters_are_those_that_the_paper_prints(
    recursions: int, layers: int, millions: float
) -> None:
    fields: dict[str, Any] = {"num_hidden_layers": layers, "num_recursions": recursions}
    if recursions > 1:
        fields["router"] = "expert_choice"
    model = ModelConfig(**SMOLLM_360M | fields)
    assert plan(model, TRAIN)["params_nonembedding"] / 1e6 == pytest.approx(millions, abs=0.5)


def test_a_token_is_cheaper_and_the_twin_is_the_same_vanilla_model() -> None:
    model = ModelConfig(**SMOLLM_360M, num_recursions=3, router="expert_choice")
    result = plan(model, TRAIN)
    vanilla = plan(ModelConfig(**SMOLLM_360M), TRAIN)
    for _, key, _ in ROWS:
        assert result[f"twin_{key}"] == vanilla[key] == vanilla[f"twin_{key}"], key
        if key != "params_effective":  # a token of full depth passes as many, and the routers
            assert result[key] < result[f"twin_{key}"], key
    assert result["mean_depth"] == pytest.approx(2)
    # 2 own layers and a block of 10 taken twice on average; 2 x 5 heads x 64 x 2 bytes a layer
    assert result["kv_bytes_per_token"] == pytest.approx(22 * 1280)
    assert result["twin_kv_bytes_per_token"] == 32 * 1280
    assert result["train_flops_per_token"] == pytest.approx(3 * result["flops_per_token"])
    assert result["steps"] == 61 and result["tokens"] == 61 * 16384


def test_what_training_refuses_has_no_plan() -> None:
    model = ModelConfig(num_recursions=2, router="token_choice")
    with pytest.raises(ValueError, match="token_choice decides every depth at once"):
        plan(model, TrainConfig(budget_tokens=1e6, shallow_share=0.5))


def test_a_budget_of_flops_buys_the_mor_more_tokens_than_its_twin() -> None:
    train = TrainConfig(budget_flops=1e15, context=512, batch_tokens=16384)
    model = ModelConfig(**SMOLLM_360M, num_recursions=3, router="expert_choice")
    own, twin = plan(model, train), plan(model.twin(), train)
    assert own["tokens"] > twin["tokens"]
    assert own["train_flops"] == pytest.approx(1e15, rel=0.05)
    assert twin["train_flops"] == pytest.approx(1e15, rel=0.05)


def test_json_has_the_promised_keys_and_flags_win(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_recipe), "--json", "--model.num-key-value-heads", "2"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert {
        "params_unique",
        "params_nonembedding",
        "twin_params_nonembedding",
        "flops_per_token",
        "twin_flops_per_token",
        "kv_bytes_per_token",
        "twin_kv_bytes_per_token",
    } <= result.keys()
    assert result["twin_kv_bytes_per_token"] == 5 * 2 * 2 * 16 * 2  # layers, k and v, heads, size
    assert main(["plan", str(tiny_recipe)]) == 0
    table = capsys.readouterr().out
    for label, _, _ in ROWS:
        assert label in table
