"""What a request asks in vain is one clear line, and harms nobody else."""

from __future__ import annotations

import dataclasses
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

    both = dataclasses.replace(greedy(9), n=2, temperature=1.0, seed=1)
    bad = engine.add(prompt_of(5, seed=1), both, on_output=broken)
    good = engine.add(prompt_of(7, seed=2), greedy(9))
    last = []
    while engine.has_work:
        last += [(p.index, p.finish_reason) for p in engine.step() if p.request_id == bad]
    assert sorted(one for one in last if one[1]) == [(0, "error"), (1, "error")]
    answer = engine.result(bad).outputs[0]
    assert answer.finish_reason == "error" and "KeyError" in str(answer.error)
    assert_exact(model, engine.result(good))
    engine.check_integrity()


def test_ctrl_c_before_the_coda_loses_no_rows() -> None:
    model = served_model(0)
    engine = new_engine(model)
    finish, calls = engine.runner.finish, []

    def interrupted(due):
        calls.append(len(due))
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return finish(due)

    engine.runner.finish = interrupted  # pyrefly: ignore
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.generate([prompt_of(9, seed=1), prompt_of(5, seed=2)], greedy(6))
        engine.check_integrity()
    (output,) = engine.generate([prompt_of(7, seed=3)], greedy(6))
    assert_exact(model, output)
    engine.check_integrity()


def test_a_constraint_that_raises_ends_its_request_alone() -> None:
    model = served_model(0)
    engine = new_engine(model)

    class Broken:
        def start(self) -> Any:
            raise KeyError("a bug of the grammar")

    params = dataclasses.replace(greedy(6), constraint=Broken())
    bad = engine.add(prompt_of(5, seed=1), params)
    good = engine.add(prompt_of(7, seed=2), greedy(6))
    while engine.has_work:
        engine.step()
    answer = engine.result(bad).outputs[0]
    assert answer.finish_reason == "error" and "constraint allows no token" in str(answer.error)
    assert_exact(model, engine.result(good))


@pytest.mark.parametrize("prompt", [[1.7, 2], [["a"]], ["a", "b"]])
def test_what_is_no_token_id_is_said(prompt: list[object]) -> None:
    with pytest.raises(ValueError, match="holds what is no token id"):
        new_engine(served_model(0)).add(prompt, greedy(2))  # pyrefly: ignore


def test_a_stretch_with_other_depths_is_not_taken_for_ones_own() -> None:
    """A score near its threshold may fall on either side in batches of other shapes."""
    engine = new_engine(served_model(0))
    engine.generate([prompt_of(24, seed=1)], greedy(4))
    prefix = engine.prefix
    assert prefix is not None
    (entry, *_) = prefix.entries.values()
    policy, tokens = entry.key
    assert isinstance(tokens, tuple)
    other = [3 - depth if depth < 3 else 1 for depth in entry.depths]
    assert prefix.extend(policy, None, tokens, other, 0, entry.counts) is None
    assert prefix.extend(policy, None, tokens, list(entry.depths), 0, entry.counts) is entry
