"""Promises of the thresholds: held-out active shares equal the capacities at every recursion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.config import ModelConfig
from mor.data.loader import Batch
from mor.model.mor import MoR
from mor.train.heldout import _threshold, measure_loss, set_thresholds


def model_of(router: Any, capacity: tuple[float, ...] = (), **fields: Any) -> MoR:
    torch.manual_seed(1)
    return MoR(
        ModelConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            num_recursions=4,
            router=router,
            capacity=capacity,
            initializer_range=0.5,
            **fields,
        )
    )


def batches_of(count: int = 3) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 50, (4, 49), generator=draw) for _ in range(count)]
    return [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None) for ids in tokens]


@pytest.mark.parametrize("capacity", [(), (1.0, 0.5, 0.5, 0.1)])
@pytest.mark.parametrize("gating", ["weighted", "residual"])
def test_active_shares_on_that_text_equal_the_capacities(
    capacity: tuple[float, ...], gating: str
) -> None:
    model = model_of("expert_choice", capacity, gating=gating)
    batches = batches_of()
    calibration = set_thresholds(model, batches).kept
    measured = measure_loss(model, batches)
    tokens = measured.tokens
    assert tokens == 3 * 4 * 48
    for share, wanted in zip(measured.active, model.config.capacity, strict=True):
        assert abs(share - wanted) * tokens <= 1.5
    assert measured.mean_depth == pytest.approx(sum(model.config.capacity), abs=0.01)
    assert sum(measured.depth_shares) == pytest.approx(1)
    assert calibration["active"] == list(measured.active)
    assert calibration["thresholds"][1:] == [
        float(model.model.router(r).threshold) for r in range(1, 4)
    ]
    for quantiles in calibration["logit_quantiles"]:
        assert len(quantiles) == 201
        assert quantiles == sorted(quantiles)


def test_setting_thresholds_twice_changes_nothing() -> None:
    model = model_of("expert_choice")
    assert set_thresholds(model, batches_of()) == set_thresholds(model, batches_of())


def test_training_mode_and_weights_stay_as_they_were() -> None:
    model = model_of("expert_choice").train()
    before = [p.clone() for p in model.parameters()]
    set_thresholds(model, batches_of())
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_random_router_keeps_its_rates_and_fixed_has_no_thresholds() -> None:
    model = model_of("random")
    before = measure_loss(model, batches_of())
    set_thresholds(model, batches_of())
    assert [float(model.model.router(r).threshold) for r in range(4)] == [0.5] * 4
    assert measure_loss(model, batches_of()) == before
    fixed = model_of("fixed", gating="auto")
    assert set_thresholds(fixed, batches_of()).kept == {}
    assert measure_loss(fixed, batches_of()).active == (1.0,) * 4


@pytest.mark.parametrize(
    ("scores", "kept", "passing"),
    [
        ([0.9, 0.7, 0.5, 0.3], 2, 2),
        ([0.9, 0.7, 0.5, 0.3], 4, 4),
        ([0.9, 0.7, 0.5, 0.3], 9, 4),
        ([0.9, 0.7, 0.5, 0.3], 0, 0),
        ([0.9, 0.5, 0.5, 0.3], 2, 3),  # equal scores cannot be told apart: both go on
        ([1.0, 1.0, 1.0], 1, 3),  # a threshold of 1 would let nobody through, for good
        ([1.0, 1.0], 0, 0),
        ([1.0, 1.0, 1 - 2**-24], 2, 2),  # neighbours: their mean rounds to the upper one
        ([], 3, 0),
    ],
)
def test_a_threshold_lets_the_wanted_number_through(
    scores: list[float], kept: int, passing: int
) -> None:
    score_N = torch.tensor(scores)
    assert int((score_N > torch.tensor(_threshold(score_N, kept))).sum()) == passing


def test_no_heldout_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no held-out text"):
        measure_loss(model_of("fixed", gating="auto"), [])
