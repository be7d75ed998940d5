"""The compiled draws are those of the sampler in torch, up to rounding at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.engine.params import SamplingParams
from mor.engine.sampler import Sampler, SampleRow
from mor.ops.native import compiled
from mor.ops.native.sampling import Draws

KERNELS = compiled.load()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no compiler here")


def samplers() -> tuple[Sampler, Sampler]:
    assert KERNELS is not None
    return Sampler(draws=Draws(KERNELS)), Sampler()


def rows_of(count: int, *, seed: int = 0, **fields: Any) -> list[SampleRow]:
    params = SamplingParams(**fields)
    return [
        SampleRow(params=params, seed=seed + i, prompt_ids=[0], output_ids=[]) for i in range(count)
    ]


MIXES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-6, 0.3, 0.8, 1.0, 1.7, 50.0]),
        "top_k": st.sampled_from([0, 1, 3, 40, 2000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    }
)


@given(mix=MIXES, scale=st.sampled_from([0.1, 3.0, 20.0]), seed=st.integers(0, 2**40))
def test_both_draw_the_same_tokens(mix: dict[str, Any], scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 1003, generator=generator) * scale
    fast, plain = (s.sample(logits, rows_of(64, seed=seed, **mix)).token_N for s in samplers())
    # A draw on an edge, or a top-p reached but for rounding, may go either way.
    assert int((fast != plain).sum()) <= 1


def test_ties_are_kept_and_cut_alike() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(300, 1)
    mixes: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.4}, {"min_p": 1.0}]
    mixes.append({"top_k": 1, "top_p": 0.5})
    for mix in mixes:
        fast, plain = (s.sample(logits, rows_of(300, **mix)).token_N for s in samplers())
        assert torch.equal(fast, plain)


@pytest.mark.parametrize(
    ("scores", "temperature"), [([1e-8, 0.0, 5e-9], 1.0), ([1.0, 0.0, 0.5], 1e30)]
)
def test_scores_that_differ_are_no_ties_though_their_weights_are_equal(
    scores: list[float], temperature: float
) -> None:
    logits = torch.tensor([scores]).repeat(100, 1)
    for k, kept in ((1, {0}), (2, {0, 2})):
        rows = rows_of(100, top_k=k, temperature=temperature)
        for sampler in samplers():
            assert set(sampler.sample(logits, rows).token_N.tolist()) == kept


def test_what_is_masked_is_never_drawn_and_broken_rows_are_told() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, 1.0], [math.nan, 0, 0], [-inf] * 3, [0, inf, 0]])
    mixes: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 2}, {"temperature": 1e30}]
    for mix in mixes:
        fast, plain = (s.sample(logits, rows_of(4, **mix)) for s in samplers())
        assert torch.equal(fast.token_N, plain.token_N)
        assert fast.token_N[1:].tolist() == [-1] * 3
    masked = logits[:1].repeat(2000, 1)
    assert 1 not in samplers()[0].sample(masked, rows_of(2000)).token_N.tolist()


def test_frequencies_are_those_of_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    count = 20000
    drawn = samplers()[0].sample(logits.repeat(count, 1), rows_of(count, top_k=4)).token_N
    share = logits.masked_fill(logits < 0, -math.inf).softmax(0)
    seen = torch.bincount(drawn, minlength=5)
    kept = share > 0
    chi = ((seen - count * share)[kept] ** 2 / (count * share)[kept]).sum()
    assert float(chi) < 16.3, "p = 0.001 at 3 degrees of freedom"
    assert seen[2] == 0


def test_rows_and_threads_do_not_matter() -> None:
    logits = torch.randn(33, 5000) * 3
    rows = rows_of(33, temperature=0.9, top_p=0.9)
    fast = samplers()[0]
    together = fast.sample(logits, rows).token_N
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    again = fast.sample(logits, rows).token_N
    torch.set_num_threads(before)
    alone = [int(fast.sample(logits[i : i + 1], rows[i : i + 1]).token_N) for i in range(33)]
    assert together.tolist() == again.tolist() == alone
