"""Engines on small models, and what the plain model says of their answers."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support_model import KINDS, OPTIONS, random_ids
from test_contracts import THRESHOLDED, routed_model

from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams
from mor.model.mor import MoR

NEAR = 1e-4
"""two best logits, or a score and its threshold, closer than this are a near tie"""
SERVED = [
    *(kind for kind in (*KINDS, *OPTIONS) if "hybrid" not in str(kind[1])),
    ("fixed", {"sharing": "sequence", "num_hidden_layers": 6}),
    ("fixed", {"sharing": "middle_sequence"}),
    ("expert_choice", {"qk_norm": True, "attention_bias": True}),
]
CAPTURED = [
    index
    for index, (_, fields) in enumerate(SERVED)
    if not isinstance(fields, dict) or not ({"lora_rank", "sharing"} & fields.keys())
]
"""models that ticks on the device serve"""
SOME_SERVED = [0, *(pytest.param(index, marks=pytest.mark.slow) for index in (6, 12, 28))]
"""which of them Triton's interpreter runs: fifteen seconds each"""


@functools.cache
def served_model(index: int, dtype: torch.dtype = torch.float64) -> MoR:
    """One of SERVED, with thresholds that make all depths occur."""
    # Seed 1: few scores of what the tests ask lie so near to a threshold that fp32 may err.
    return routed_model(*SERVED[index], dtype, seed=1)


def greedy(max_tokens: int, **fields) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **fields)


def prompt_of(length: int, seed: int) -> list[int]:
    return random_ids(length, seed=seed).tolist()


def new_engine(model: MoR, **settings: Any) -> Engine:
    values: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4}
    values["backend"] = "torch"
    return Engine(model, EngineConfig(**values | settings))


def pages_for(model: MoR, tokens: int, block_size: int, times: float) -> int:
    """Bytes of a pool that holds so many times what one request of full depth needs."""
    from mor.engine.blocks import Layout

    layout = Layout.of(model.config, block_size)
    pages = layout.worst_pages(tokens, model.config.num_recursions)
    size = model.model.embed_tokens.weight.element_size()
    return int(layout.page_elements * size * pages * times)


@torch.no_grad()
def assert_exact(model: MoR, output: RequestOutput) -> None:
    """Hold an answer to the plain model over the whole sequence: tokens and depths."""
    (answer,) = output.outputs
    prompt = output.prompt_token_ids
    out = model(torch.tensor([prompt + answer.token_ids]), rule="causal")
    assert out.logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer.token_ids
    depths = out.depth[0].tolist()
    assert output.prompt_depths == depths[: len(prompt)]
    assert answer.depths == depths[len(prompt) : -1], "the last token is never run"


@torch.no_grad()
def first_near_tie(model: MoR, output: RequestOutput) -> int:
    """Return the position from which the plain model's answer may differ by rounding."""
    prompt, (answer,) = output.prompt_token_ids, output.outputs
    out = model(torch.tensor([prompt + answer.token_ids]), rule="causal")
    best = out.logits[0].topk(2).values
    near = best[:, 0] - best[:, 1] < NEAR
    if model.config.router in THRESHOLDED:
        rows = torch.arange(len(near))
        for r, stats in enumerate(out.recursions):
            rows = rows[out.depth[0, rows] >= r] if r else rows
            if r:
                near[rows] |= (stats.score_N - model.model.router(r).threshold).abs() < NEAR
    return int(near.nonzero()[0]) if near.any() else len(near)


@torch.no_grad()
def assert_same_up_to_ties(model: MoR, output: RequestOutput) -> int:
    """Hold tokens and depths to the plain model before the first near tie; returns tokens held."""
    prompt, (answer,) = output.prompt_token_ids, output.outputs
    out = model(torch.tensor([prompt + answer.token_ids]), rule="causal")
    stop = first_near_tie(model, output)
    depths = output.prompt_depths + answer.depths
    assert depths[:stop] == out.depth[0].tolist()[: min(stop, len(depths))]
    drawn = out.logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    held = max(stop - len(prompt) + 1, 0)
    assert answer.token_ids[:held] == drawn[:held]
    return min(held, len(drawn))


def mixed_prompts(seed: int) -> list[list[int]]:
    """Prompts of all lengths, some that begin alike and one that comes twice."""
    draw = random.Random(seed)
    prompts = [prompt_of(draw.randint(1, 40), seed=seed * 10 + i) for i in range(6)]
    prompts[3] = [*prompts[1], 5]
    prompts[5] = list(prompts[1])
    return prompts


def run_twice_and_check(engine: Engine, seed: int, *, oracle: MoR | None = None) -> list[int]:
    """Run prompts, then the same ones on what the cache keeps; returns tokens that it gave."""
    prompts = mixed_prompts(seed)
    for _ in range(2):
        outputs = engine.generate(prompts, greedy(9))
        engine.check_integrity()
        for output in outputs:
            assert_exact(oracle or engine.model, output)
    return [output.num_cached_tokens for output in outputs]


def play_any_mix(
    data: st.DataObject, model: MoR, new: Callable[..., Engine] = new_engine, *, max_new: int = 9
) -> Engine:
    """Let requests of all sizes come and go as hypothesis draws it, and check every tick."""
    block_size = data.draw(st.sampled_from([2, 4, 6, 16]))
    seqs = data.draw(st.integers(1, 5))
    room = pages_for(model, 36 + max_new, block_size, data.draw(st.sampled_from([1.0, 1.5, 4])))
    engine = new(
        model,
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + data.draw(st.integers(1, 30)),
        kv_cache_bytes=room,
        enable_prefix_caching=data.draw(st.booleans()),
        coda_period=data.draw(st.integers(0, 3)),
    )
    shared = prompt_of(24, seed=3)
    waiting = []
    for i in range(data.draw(st.integers(1, 7))):
        length = data.draw(st.integers(1, 36))
        prompt = shared[:length] if data.draw(st.booleans()) else prompt_of(length, seed=i)
        waiting.append((data.draw(st.integers(0, 12)), prompt, data.draw(st.integers(1, max_new))))
    abort_at = data.draw(st.lists(st.integers(0, 20), max_size=2))
    tick, running, done = 0, [], []
    while waiting or engine.has_work:
        for arrival in [w for w in waiting if w[0] <= tick]:
            waiting.remove(arrival)
            running.append(engine.add(arrival[1], greedy(arrival[2])))
        if tick in abort_at and running:
            engine.forget(running.pop(data.draw(st.integers(0, len(running) - 1))))
        engine.step()
        engine.check_integrity()
        finished = [r for r in running if engine.is_done(r)]
        running = [r for r in running if r not in finished]
        done += [engine.result(r) for r in finished]
        tick += 1
        assert tick < 2000, "not everyone finishes"
    for output in done:
        assert output.outputs[0].finish_reason == "length"
        assert_exact(model, output)
    return engine


def assert_pages_hold_what_is_active(engine: Engine) -> None:
    """Tokens stored are the (token, depth) pairs that ran, exactly."""
    shared = engine.model.config.kv_strategy == "shared"
    own = block = 0
    for request in engine.scheduler.running:
        own += request.num_started
        block += sum(1 if shared else d for d in request.depths[: request.num_done])
    for flight in (*engine.scheduler.in_block, *engine.scheduler.ready):
        depths = engine.runner.depth[flight.rows]
        block += int(depths.clip(max=1).sum() if shared else depths.sum())
    stored = engine.blocks.tokens_stored
    assert (stored[0], stored[1:].sum()) == (own, block)
    config, size = engine.model.config, engine.model.model.embed_tokens.weight.element_size()
    layers = config.num_own_layers * own + config.num_block_layers * block
    assert engine.kv_bytes == layers * 2 * config.num_key_value_heads * config.head_dim * size
