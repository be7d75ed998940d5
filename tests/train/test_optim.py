"""Promises of the optimizer: the schedules' shape, and which weights decay."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mor.config import ModelConfig
from mor.model.mor import MoR
from mor.train.config import TrainConfig
from mor.train.optim import build_optimizer, learning_rate


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(budget_tokens=1, lr=1.0, **fields)


def test_trapezoid_warms_up_holds_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 100, config(warmup_share=0.1)) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    assert 0 < rates[-1] <= 0.05  # the step after the last would have 0


def test_cosine_warms_up_and_falls_to_a_tenth() -> None:
    rates = [
        learning_rate(step, 1000, config(schedule="cosine", warmup_share=0.05))
        for step in range(1000)
    ]
    assert rates[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert max(rates) == 1.0
    assert rates[525] == pytest.approx(0.55, abs=1e-3)  # half-way down
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[50:]))


@pytest.mark.parametrize("schedule", ["trapezoid", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_runs_have_a_rate_above_zero(schedule: Any, num_steps: int) -> None:
    rates = [learning_rate(s, num_steps, config(schedule=schedule)) for s in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_norm_gains_do_not_decay() -> None:
    model = MoR(
        ModelConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_recursions=2,
            router="expert_choice",
        )
    )
    matrices, vectors = build_optimizer(model, config(weight_decay=0.3)).param_groups
    assert matrices["weight_decay"] == 0.3
    assert vectors["weight_decay"] == 0.0
    gains = {id(p) for name, p in model.named_parameters() if "norm" in name}
    assert {id(p) for p in vectors["params"]} == gains
    assert len(matrices["params"]) + len(gains) == len(list(model.parameters()))
