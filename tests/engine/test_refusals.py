"""What a request asks in vain is one clear line, and harms nobody else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support_engine import assert_exact, greedy, new_engine, pages_for, prompt_of, served_model

from mor.engine.outputs import StepOutput
from mor.engine.params import SamplingParams


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], greedy(3), "the prompt is empty"),
        ([5, 61], greedy(3), "token id 61 is outside the vocabulary of 61 entries"),
        (prompt_of(64, seed=0), greedy(3), "shorten the prompt"),
        ("some text", greedy(3), "there is no tokenizer; give token ids"),
        ([5], SamplingParams(stop="a"), "there is no tokenizer to tell the text"),
        ([5], greedy(3, stop_token_ids=[99]), "stop_token_ids has token id 99"),
        (prompt_of(30, seed=0), greedy(10), "there are 16; ask for fewer or raise kv_cache_bytes"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_alone(
    prompt: Any, params: SamplingParams, says: str
) -> None:
    model = served_model(0)
    engine = new_engine(model, kv_cache_bytes=pages_for(model, 14, 4, 1.0))
    good = engine.add(prompt_of(6, seed=1), greedy(4))
    with pytest.raises(ValueError, match=says):
        engine.add(prompt, params)
    assert list(engine.requests) == [good]
    while engine.has_work:
        engine.step()
    assert_exact(model, engine.result(good))
    engine.check_integrity()


def test_logits_that_are_not_finite_end_their_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = served_model(0)
    engine = new_engine(model, enable_prefix_caching=False)
    bad = engine.add(prompt_of(5, seed=1), greedy(9))
    good = engine.add(prompt_of(7, seed=2), greedy(9))
    sample, calls = engine.sampler.sample, [0]

    def broken(logit_NV: torch.Tensor, rows: list[Any]) -> Any:
        calls[0] += 1
        ours = [i for i, row in enumerate(rows) if row is engine.requests[bad][0].sample_row]
        if calls[0] > 3:
            logit_NV = logit_NV.clone()
            logit_NV[ours] = math.nan
        return sample(logit_NV, rows)

    monkeypatch.setattr(engine.sampler, "sample", broken)
    while engine.has_work:
        engine.step()
    answer = engine.result(bad).outputs[0]
    assert answer.finish_reason == "error" and "not finite" in str(answer.error)
    assert_exact(model, engine.result(good))
    engine.check_integrity()


def test_a_callback_that_raises_ends_its_request_alone() -> None:
    model = served_model(0)
    engine = new_engine(model)

    def broken(piece: StepOutput) -> None:
        if piece.token_ids:
            raise KeyError("a bug of the caller")

    bad = engine.add(prompt_of(5, seed=1), greedy(9), on_output=broken)
    good = engine.add(prompt_of(7, seed=2), greedy(9))
    while engine.has_work:
        engine.step()
    answer = engine.result(bad).outputs[0]
    assert answer.finish_reason == "error" and "KeyError" in str(answer.error)
    assert_exact(model, engine.result(good))
    engine.check_integrity()
