"""A request's depth fields become fixed thresholds, or one clear line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support_engine import greedy, new_engine, prompt_of, served_model
from support_model import small_config

from mor.engine.config import EngineConfig
from mor.engine.depth import EVERYONE, NOBODY, depth_policy, logit
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams

CALIBRATION: dict[str, Any] = {
    "active": [1.0, 2 / 3, 1 / 3],
    # Scores of these would nearly all round to 0 or 1.
    "logit_quantiles": [[float(x) for x in range(-100, 101)]] * 3,
}


def policy(calibration: dict[str, Any] | None = None, router: str = "expert_choice", **fields: Any):
    thresholds = (0.5, 0.4, 0.3)
    params = SamplingParams(**fields)
    return depth_policy(
        params, small_config(router), thresholds=thresholds, calibration=calibration
    )


def test_the_models_own_thresholds_are_taken_as_logits() -> None:
    assert policy().thresholds == (0.0, pytest.approx(math.log(0.4 / 0.6)), logit(0.3))
    shifted = policy(threshold_shift=0.1).thresholds
    assert shifted[1] == pytest.approx(logit(0.5)) and shifted[2] == pytest.approx(logit(0.4))
    assert set(policy(threshold_shift=2.0).thresholds) == {NOBODY}
    assert set(policy(threshold_shift=-2.0).thresholds) == {EVERYONE}


@pytest.mark.parametrize("target", [1.0, 1.2, 1.5, 2.0, 2.4, 2.9, 3.0])
def test_a_target_depth_lets_the_right_shares_through(target: float) -> None:
    thresholds = policy(CALIBRATION, target_depth=target).thresholds
    passed = [sum(q > t for q in CALIBRATION["logit_quantiles"][0]) / 201 for t in thresholds[1:]]
    assert 1 + passed[0] + passed[0] * passed[1] == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_recursions": 4}, "max_recursions is 4, the model has 3"),
        ({"target_depth": 3.5, "calibration": CALIBRATION}, "give a mean depth from 1 to 3"),
        ({"target_depth": 2.0}, "has logit quantiles"),
        ({"router": "random", "threshold_shift": 0.1}, "use max_recursions"),
        ({"router": "token_choice", "target_depth": 2.0}, "use max_recursions"),
    ],
)
def test_what_cannot_be_is_one_clear_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        policy(**fields)


def test_a_trained_models_target_is_reached_on_text_like_its_own(tiny_run: Path) -> None:
    engine = Engine.load(tiny_run / "model", EngineConfig(max_num_seqs=4))
    assert engine.tokenizer is not None
    prompts = [engine.tokenizer.encode("the old cat sees a red house and " * 2)] * 3
    means = []
    for target in (1.0, 2.0, 3.0):
        params = SamplingParams(max_tokens=2, temperature=0, target_depth=target)
        outputs = engine.generate(prompts, params)
        means.append(sum(outputs[0].prompt_depths) / len(outputs[0].prompt_depths))
    assert means[0] == 1.0 < means[1] < means[2] == 3.0


def test_shifting_thresholds_changes_depths_and_nothing_of_others() -> None:
    model = served_model(0)
    engine = new_engine(model)
    prompt = prompt_of(20, seed=1)
    usual, less = engine.generate([prompt] * 2, [greedy(5), greedy(5, threshold_shift=1.0)])
    assert set(less.prompt_depths) == {1}
    with torch.no_grad():
        expected = model(torch.tensor([prompt]), rule="causal").depth[0].tolist()
    assert usual.prompt_depths == expected
