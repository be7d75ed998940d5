"""Every row is sampled as its readable twin says, whatever is beside it in the batch."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mor.engine.params import SamplingParams
from mor.engine.sampler import Sampler, SampleRow, TokenLogprobs, token_logprobs
from mor.engine.sampler_reference import sample_reference

V = 11


def some_row(params: SamplingParams | None = None, **values: Any) -> SampleRow:
    defaults: dict[str, Any] = {"seed": 0, "prompt_ids": [1, 2], "output_ids": []}
    return SampleRow(params=params or SamplingParams(), **{**defaults, **values})


def fresh(row: SampleRow) -> SampleRow:
    """The same row as if its request had just come back from preemption."""
    return dataclasses.replace(row, output_ids=list(row.output_ids))


IDS = st.lists(st.integers(0, V - 1), max_size=8)
OFF_OR = {
    "top_k": st.just(0) | st.integers(1, V + 2),
    "top_p": st.just(1.0) | st.floats(0.01, 1),
    "min_p": st.just(0.0) | st.floats(0, 1),
    "repetition_penalty": st.just(1.0) | st.floats(0.1, 5),
    "presence_penalty": st.just(0.0) | st.floats(-2, 2),
    "frequency_penalty": st.just(0.0) | st.floats(-2, 2),
    "temperature": st.sampled_from([0.0, 1e-300, 1e-3, 1.0, 100.0, 1e300]) | st.floats(0.2, 3),
    "min_tokens": st.integers(0, 4),
    "stop_token_ids": IDS,
    "logit_bias": st.none() | st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100)),
    "logprobs": st.none() | st.integers(0, 20),
}
ROWS = st.builds(
    SampleRow,
    params=st.builds(SamplingParams, **OFF_OR),
    seed=st.integers(-(2**63), 2**63 - 1),
    sample=st.integers(0, 3),
    prompt_ids=IDS,
    output_ids=IDS,
    eos_id=st.none() | st.integers(0, V - 1),
)
LOGITS = st.lists(
    st.integers(-3, 3).map(float)  # equal ones are common
    | st.floats(-20, 20, width=32)
    | st.sampled_from([-math.inf, -0.0, 0.5, 1e30]),
    min_size=V,
    max_size=V,
)
BROKEN = st.sampled_from(
    [[math.nan] * V, [0.0] * (V - 1) + [math.nan], [-math.inf] * V, [math.inf] + [0.0] * (V - 1)]
)
BATCHES = st.lists(st.tuples(ROWS, LOGITS | LOGITS | LOGITS | BROKEN), min_size=1, max_size=5)


def outcome(
    logit_NV: Tensor, rows: list[SampleRow]
) -> list[tuple[int, bool, TokenLogprobs | None]]:
    sampled = Sampler().sample(logit_NV, rows)
    tokens, failed = sampled.token_N.tolist(), sampled.failed_N.tolist()
    return [(tokens[i], failed[i], sampled.logprobs.get(i)) for i in range(len(rows))]


@given(BATCHES)
@settings(max_examples=80)
def test_sampler_equals_its_readable_twin(batch):
    rows, logits = [row for row, _ in batch], torch.tensor([logit for _, logit in batch])
    before = logits.clone()
    for i, (token, failed, logprobs) in enumerate(outcome(logits, rows)):
        twin = sample_reference(logits[i], rows[i])
        assert (token, failed) == (twin.token, twin.token == -1)
        if logprobs is None or twin.logprobs is None:
            assert logprobs is twin.logprobs
        else:
            assert logprobs.token == token and logprobs.rank == twin.logprobs.rank
            assert logprobs.logprob == pytest.approx(twin.logprobs.logprob, abs=1e-5)
            assert [t for t, _ in logprobs.top] == [t for t, _ in twin.logprobs.top]
            tops = [[value for _, value in each.top] for each in (logprobs, twin.logprobs)]
            assert tops[0] == pytest.approx(tops[1], abs=1e-5)
    torch.testing.assert_close(logits, before, equal_nan=True, rtol=0, atol=0)


@given(BATCHES, st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_neighbours_nor_on_preemption(batch, shuffle):
    rows, logits = [row for row, _ in batch], torch.tensor([logit for _, logit in batch])
    together = outcome(logits, rows)
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    again = outcome(logits[order], [fresh(rows[i]) for i in order])
    assert again == [together[i] for i in order]
    for i, row in enumerate(rows):
        assert outcome(logits[i : i + 1], [fresh(row)]) == [together[i]]


def test_large_vocabularies_are_sampled_in_parts_as_in_one(monkeypatch):
    draw = random.Random(0)
    choices: dict[str, list[Any]] = {
        "temperature": [0, 0.7, 1.5],
        "top_k": [0, 40, 2000],
        "top_p": [1.0, 0.5, 0.95],
        "min_p": [0.0, 0.02],
        "repetition_penalty": [1.0, 1.3],
        "logprobs": [None, 5],
    }
    logits = torch.randn(20, 3000) * 3
    rows = []
    for i in range(20):
        params = SamplingParams(**{name: draw.choice(each) for name, each in choices.items()})
        ids = [draw.randrange(3000) for _ in range(50)]
        rows.append(some_row(params, seed=i, prompt_ids=ids[:25], output_ids=ids[25:]))
    whole = outcome(logits, rows)
    assert [token for token, _, _ in whole] == [
        sample_reference(logits[i], row).token for i, row in enumerate(rows)
    ]
    monkeypatch.setattr("mor.engine.sampler._chunks", lambda rows, _: ([row] for row in rows))
    assert outcome(logits, [fresh(row) for row in rows]) == whole


DISTRIBUTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"logit_bias": {0: 2.0, 3: -1.0}, "min_tokens": 5, "stop_token_ids": [1]},
]


CASES = [
    *((values, varied) for values in DISTRIBUTIONS for varied in ("seed", "sample")),
    # these do not change with the output
    *((values, "step") for values in DISTRIBUTIONS[:6]),
]


@pytest.mark.parametrize(("values", "varied"), CASES)
def test_frequencies_are_those_of_the_distribution(values: dict[str, Any], varied: str) -> None:
    """Pearson's chi-square over 4000 draws; the bound is passed by chance once in 1000."""
    params, draws = SamplingParams(**values), 4000
    logit_V = torch.tensor([1.0, 0.5, 0.0, -0.5, 1.5, -1.0, 0.2, 0.8])
    if varied == "step":
        rows = [some_row(params, output_ids=range(i)) for i in range(draws)]
    else:
        ids = {"prompt_ids": [0, 2], "output_ids": [2, 4, 4]}
        rows = [some_row(params, **{varied: i}, **ids) for i in range(draws)]
    tokens = Sampler().sample(logit_V.repeat(draws, 1), rows).token_N
    share_V = torch.tensor(sample_reference(logit_V, rows[0]).share_V)
    share_V /= share_V.sum()
    seen_V = torch.bincount(tokens, minlength=len(logit_V))
    assert seen_V[share_V == 0].sum() == 0
    kept = share_V > 0
    expected = share_V[kept] * draws
    chi_square = float(((seen_V[kept] - expected) ** 2 / expected).sum())
    bound = [0.0, 10.9, 13.9, 16.3, 18.5, 20.6, 22.5, 24.4]  # by degrees of freedom, p = 0.001
    assert chi_square <= bound[int(kept.sum()) - 1]


def test_equal_tokens_at_the_edge_of_the_kept_set():
    """Each case with the tokens that may be drawn out of four equal ones and a poor one."""
    logits = torch.tensor([0.0, 0.0, -1e9, 0.0, 0.0])
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({"top_p": 0.5}, {0, 1}),  # the half is reached exactly
        ({"top_p": 0.51}, {0, 1, 3}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 1}, {0, 1, 3, 4}),
        ({"min_p": 1.0}, {0, 1, 3, 4}),
        ({"top_k": 2, "top_p": 0.75}, {0, 1, 3}),
    ]
    for values, kept in cases:
        rows = [some_row(SamplingParams(**values), seed=i) for i in range(100)]
        drawn = Sampler().sample(logits.repeat(100, 1), rows).token_N
        assert set(drawn.tolist()) == kept


def test_no_temperature_is_too_low_or_too_high():
    logits = torch.tensor([1e10, 0.0, 1e10, -math.inf]).repeat(100, 1)
    for temperature, kept in ((1e-300, {0, 2}), (1e-20, {0, 2}), (1e300, {0, 1, 2})):
        params = SamplingParams(temperature=temperature)
        rows = [some_row(params, seed=i) for i in range(100)]
        assert set(Sampler().sample(logits, rows).token_N.tolist()) == kept


def test_repetition_makes_positive_and_negative_logits_less_likely():
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    for best, other in ((0.5, 0.4), (-0.4, -0.5), (1.5, 1.0)):
        for ids in ({"prompt_ids": [0]}, {"output_ids": [0], "prompt_ids": []}):
            logits = torch.tensor([[best, other]])
            assert Sampler().sample(logits, [some_row(params, **ids)]).token_N.tolist() == [1]


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (1 - 2**-53, 2)])
def test_the_smallest_and_the_largest_draw_stay_in_the_kept_set(monkeypatch, draw, token):
    monkeypatch.setattr(
        "mor.engine.sampler.hash_draw",
        lambda seed_N, *_: torch.full(seed_N.shape, draw, dtype=torch.float64),
    )
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    assert Sampler().sample(logits, [some_row()]).token_N.tolist() == [token]


def test_steps_and_samples_of_one_seed_draw_differently():
    logits = torch.zeros(40, 1000)
    rows = [some_row(sample=i % 2, output_ids=[3] * (i // 2)) for i in range(40)]
    assert len(set(Sampler().sample(logits, rows).token_N.tolist())) > 30


def test_plain_greedy_rows_cost_one_argmax_and_never_read_their_ids():
    calls = []

    def argmax(logit_NV):
        calls.append(len(logit_NV))
        return logit_NV.argmax(1)

    rows = [
        some_row(SamplingParams(temperature=0), prompt_ids=None, output_ids=None) for _ in range(3)
    ]
    sampled = Sampler(argmax=argmax).sample(torch.eye(3), rows)
    assert calls == [3]
    assert sampled.token_N.tolist() == [0, 1, 2]
    assert not sampled.failed_N.any() and sampled.logprobs == {}


def test_failed_rows_are_told_and_the_others_are_unharmed():
    nan, inf = math.nan, math.inf
    broken = [[nan] * 3, [0, nan, 1], [-inf] * 3, [0, inf, 1]]
    logits = torch.tensor([*broken, [0.0, 1.0, -inf]])
    for params in (
        SamplingParams(temperature=0),
        SamplingParams(logprobs=2),
        SamplingParams(top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.2),
    ):
        rows = [some_row(params, prompt_ids=[0], seed=i) for i in range(5)]

        def argmax(logit_NV: Tensor) -> Tensor:
            """As a kernel does it: -1 where the best is not finite."""
            return logit_NV.argmax(1).masked_fill(~logit_NV.amax(1).isfinite(), -1)

        for sampler in (Sampler(), Sampler(argmax=argmax)):
            sampled = sampler.sample(logits, rows)
            assert sampled.failed_N.tolist() == [True] * 4 + [False]
            assert sampled.token_N[:4].tolist() == [-1] * 4
            assert sampled.token_N[4] in (0, 1)
            assert set(sampled.logprobs) <= {4}


def test_a_row_with_nothing_left_to_choose_fails():
    params = SamplingParams(min_tokens=1, stop_token_ids=[0, 1])
    rows = [some_row(params, eos_id=2), some_row(params, eos_id=2, output_ids=[1])]
    assert Sampler().sample(torch.zeros(2, 3), rows).failed_N.tolist() == [True, False]


def test_min_tokens_keeps_ends_away_until_it_is_reached():
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[1])
    output: list[int] = []
    row = some_row(params, output_ids=output, eos_id=0)
    logits, tokens = torch.tensor([[9.0, 8.0, 7.0, 6.0]]), []
    for _ in range(4):
        tokens.append(int(Sampler().sample(logits, [row]).token_N))
        output.append(tokens[-1])
    assert tokens == [2, 2, 0, 0]


def test_penalties_follow_an_output_that_grows():
    params = SamplingParams(temperature=0, frequency_penalty=1.0)
    output: list[int] = []
    row, logits = some_row(params, output_ids=output), torch.tensor([[5.0, 4.5, 0.0]])
    for _ in range(6):
        token = int(Sampler().sample(logits, [row]).token_N)
        assert token == sample_reference(logits[0], fresh(row)).token
        output.append(token)
    assert output == [0, 1, 0, 1, 0, 1]


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.tensor([[2.0, 1.0, 2.0, -0.0, 0.0]])
    row = some_row(SamplingParams(temperature=0.1, logit_bias={3: 100}, logprobs=20))
    told = Sampler().sample(logits, [row]).logprobs[0]
    expected = logits[0].log_softmax(0).tolist()
    assert (told.token, told.rank) == (3, 4)
    assert told.logprob == pytest.approx(expected[3])
    assert [token for token, _ in told.top] == [0, 2, 1, 3, 4]
    assert [value for _, value in told.top] == pytest.approx([expected[i] for i in (0, 2, 1, 3, 4)])
    half = token_logprobs(logits.bfloat16(), torch.tensor([1]), [0])
    assert half[0].top == [] and half[0].logprob == pytest.approx(expected[1])
