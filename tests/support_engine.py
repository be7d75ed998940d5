"""Engines on small models, and what the plain model says of their answers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from support_model import KINDS, OPTIONS, random_ids
from test_contracts import routed_model

from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams
from mor.model.mor import MoR

SERVED = [kind for kind in (*KINDS, *OPTIONS) if "hybrid" not in str(kind[1])]


@functools.cache
def served_model(index: int, dtype: torch.dtype = torch.float64) -> MoR:
    """One of SERVED, with thresholds that make all depths occur."""
    return routed_model(*SERVED[index], dtype)


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
