"""The engine gives what the plain model gives, whatever runs beside a request, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_engine import (
    SERVED,
    assert_exact,
    greedy,
    new_engine,
    pages_for,
    play_any_mix,
    prompt_of,
    run_twice_and_check,
    served_model,
)
from support_model import small_model

from mor.engine.config import Backend, EngineConfig
from mor.engine.engine import Engine

MAX_NEW = 9


@pytest.mark.parametrize("index", range(len(SERVED)))
def test_chunked_prompts_and_a_prefix_cache_change_nothing(index: int) -> None:
    """The test that breaks others: the same prompt twice."""
    cached = run_twice_and_check(new_engine(served_model(index), max_num_batched_tokens=9), 1)
    assert sum(cached) > 60


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_pages_fit_a_small_block_between_many_layers(backend: Backend) -> None:
    """One layer that two recursions share, seventeen of their own: no page of 16 tokens fits."""
    sizes = {"num_recursions": 2, "prelude_layers": 8, "coda_layers": 9, "num_hidden_layers": 19}
    model = small_model(gating="none", head_dim=8, **sizes)
    model = model.float() if backend == "auto" else model
    engine = Engine(model, EngineConfig(max_num_seqs=2, max_num_batched_tokens=24, backend=backend))
    assert engine.config.block_size == 17
    for output in engine.generate([prompt_of(20, seed=1), prompt_of(20, seed=1)], greedy(9)):
        assert_exact(model, output)
    engine.check_integrity()
    with pytest.raises(ValueError, match=r"block_size is 16; .* give a multiple of 17"):
        Engine(model, EngineConfig(block_size=16))


@pytest.mark.parametrize("index", range(len(SERVED)))
def test_preemption_replays_depths_and_changes_nothing(index: int) -> None:
    model = served_model(index)
    room = pages_for(model, 38, 4, 1.0)
    engine = new_engine(model, kv_cache_bytes=room, max_num_seqs=5, coda_period=2)
    prompts = [prompt_of(3 + i, seed=i) for i in range(5)]
    for output in engine.generate(prompts, greedy(30)):
        assert_exact(model, output)
    engine.check_integrity()
    assert engine.scheduler.num_preemptions > 0, "the test would prove nothing"


@settings(max_examples=40)
@given(data=st.data())
def test_any_mix_of_arrivals_aborts_and_sizes_is_exact(data: st.DataObject) -> None:
    """And nothing leaks in any tick, no page is given twice, everyone finishes."""
    play_any_mix(data, served_model(data.draw(st.integers(0, len(SERVED) - 1))))


@pytest.mark.parametrize("limit", [1, 2])
def test_a_request_may_ask_for_less_depth_beside_others(limit: int) -> None:
    model = served_model(0)
    engine = new_engine(model)
    prompt = prompt_of(20, seed=1)
    both = [greedy(MAX_NEW), greedy(MAX_NEW, max_recursions=limit)]
    full, less = engine.generate([prompt, prompt], both)
    again_full, again_less = engine.generate([prompt, prompt], both)
    engine.check_integrity()
    assert_exact(model, full)
    assert again_full.outputs == full.outputs and again_less.outputs == less.outputs
    assert again_less.num_cached_tokens == 16, "each policy has its own entries"
    assert max(less.prompt_depths) == limit and max(full.prompt_depths) == 3
    assert less.flops_saved > full.flops_saved


@pytest.mark.parametrize("index", [0, 4, 6, 9, 12])
def test_prompt_logprobs_are_those_of_the_plain_model(index: int) -> None:
    model = served_model(index)
    engine = new_engine(model, max_num_batched_tokens=7)
    prompt = prompt_of(17, seed=4)
    (output,) = engine.generate([prompt], greedy(3, prompt_logprobs=2, logprobs=3))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output.outputs[0].token_ids]), rule="causal").logits
    expected = logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    for place, told in enumerate(output.prompt_logprobs[1:], start=1):
        assert told is not None and told.token == prompt[place] and len(told.top) == 2
        assert told.logprob == pytest.approx(float(expected[place - 1, prompt[place]]), abs=1e-5)
    assert output.outputs[0].logprobs is not None and len(output.outputs[0].logprobs) == 3
    for place, told in enumerate(output.outputs[0].logprobs, start=len(prompt) - 1):
        assert told.logprob == pytest.approx(float(expected[place].max()), abs=1e-5)


def test_samples_of_a_request_do_not_depend_on_the_batch() -> None:
    """Nor on chunks, preemption or the cache: the draw is a hash of seed, answer and place."""
    model = served_model(0)
    from mor.engine.params import SamplingParams

    params = SamplingParams(max_tokens=12, temperature=1.3, top_p=0.9, seed=7, n=3)
    prompt = prompt_of(11, seed=2)
    alone = new_engine(model).generate([prompt], params)[0]
    room = pages_for(model, 50, 4, 1.5)
    engine = new_engine(model, kv_cache_bytes=room, max_num_batched_tokens=5)
    others = [prompt_of(30, seed=s) for s in range(3)]
    beside = engine.generate([*others, prompt], [greedy(20)] * 3 + [params])[-1]
    tokens = [answer.token_ids for answer in alone.outputs]
    assert tokens == [answer.token_ids for answer in beside.outputs]
    assert len({tuple(t) for t in tokens}) == 3


def test_pieces_tell_every_depth_once_and_in_order() -> None:
    """Those of tokens that the prefix cache had, too."""
    engine = new_engine(served_model(0), max_num_batched_tokens=7)
    prompt = prompt_of(22, seed=6)
    for _ in range(2):
        request_id = engine.add(prompt, greedy(8))
        depths, tokens = [], []
        while not engine.is_done(request_id):
            for piece in engine.step():
                depths += piece.depths
                tokens += piece.token_ids
        output = engine.result(request_id)
        assert depths == output.prompt_depths + output.outputs[0].depths
        assert tokens == output.outputs[0].token_ids
    assert output.num_cached_tokens == 20
