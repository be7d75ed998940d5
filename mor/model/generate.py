"""Plain generation on the plain cache: token ids in, token ids and depths out.

No scheduler, no pages: the oracle that faster engines are held against. It really skips: a token
that leaves costs no compute, keys or values at later recursions; a finished sequence costs nothing.
Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mor.model.mor import MoR


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. temperature 0 is greedy."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; give 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a share in (0, 1]")


class GeneratedToken(NamedTuple):
    """One new token of one sequence of the batch, after it went through the model itself."""

    sequence: int
    token: int
    depth: int
    """recursions that the token took"""


class Prefill(NamedTuple):
    """What is known once the prompts are in the cache."""

    prompt_depths: list[list[int]]
    kv_bytes: int


def generate(
    model: MoR,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    eos_token_id: int | None = None,
) -> Iterator[Prefill | GeneratedToken]:
    """Yield one Prefill, then every new token in the order of generation.

    prompts       token ids of each sequence, at least one each
    eos_token_id  token that ends a sequence; it is not yielded
    Raises        ValueError for an empty prompt, an id outside the vocabulary, or more tokens than
                  the model's context
    """
    _check_prompts(model, prompts, params)
    return _generate(model, prompts, params, eos_token_id)


@torch.inference_mode()
def _generate(
    model: MoR, prompts: Sequence[Sequence[int]], params: SamplingParams, eos_token_id: int | None
) -> Iterator[Prefill | GeneratedToken]:
    B, device = len(prompts), model.device
    cache = model.new_cache(B)
    length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids_BT = torch.zeros(B, int(length_B.max()), dtype=torch.int64, device=device)
    for sequence, prompt in enumerate(prompts):
        ids_BT[sequence, : len(prompt)] = torch.tensor(prompt)
    lengths = None if B == 1 else length_B
    out = model(ids_BT, lengths=lengths, rule="causal", cache=cache, last_only=True)
    depths = [out.depth[b, : len(prompt)].tolist() for b, prompt in enumerate(prompts)]
    yield Prefill(depths, cache.kv_bytes)

    generators = [torch.Generator().manual_seed(params.seed + b) for b in range(B)]
    running = [True] * B
    for _ in range(params.max_tokens):
        tokens = _sample(out.logits[:, 0], params, generators, running)
        running = [go and token != eos_token_id for go, token in zip(running, tokens, strict=True)]
        if not any(running):
            return
        # A sequence that ended takes part with no rows.
        lengths = None if all(running) else torch.tensor(running, device=device).long()
        ids_B1 = torch.tensor(tokens, device=device)[:, None]
        out = model(ids_B1, lengths=lengths, rule="causal", cache=cache, last_only=True)
        depth_B = out.depth[:, 0].tolist()
        for b in range(B):
            if running[b]:
                yield GeneratedToken(b, tokens[b], depth_B[b])


def _sample(
    logit_BV: Tensor, params: SamplingParams, generators: list[torch.Generator], running: list[bool]
) -> list[int]:
    """Draw a token for every sequence; the draw of one does not depend on the others."""
    if params.temperature == 0:
        return logit_BV.argmax(-1).tolist()
    tokens = []
    for logit_V, generator, runs in zip(logit_BV.float().cpu(), generators, running, strict=True):
        if not runs:
            tokens.append(0)
            continue
        share_V = next_token_probabilities(logit_V, params)
        tokens.append(int(torch.multinomial(share_V, 1, generator=generator)))
    return tokens


def next_token_probabilities(logit_V: Tensor, params: SamplingParams) -> Tensor:
    """Turn logits into the distribution that temperature, top-k and top-p leave."""
    logit_V = logit_V / params.temperature
    if 0 < params.top_k < len(logit_V):
        kth = logit_V.topk(params.top_k).values[-1]
        logit_V = logit_V.masked_fill(logit_V < kth, -math.inf)
    share_V = logit_V.softmax(-1)
    if params.top_p < 1:
        sorted_V, order_V = share_V.sort(descending=True)
        # Keep the smallest set that reaches top_p: a token stays if those before it fall short.
        kept_V = sorted_V.cumsum(0) - sorted_V < params.top_p
        share_V = torch.zeros_like(share_V).scatter(0, order_V, sorted_V * kept_V)
        share_V = share_V / share_V.sum()
    return share_V


def _check_prompts(model: MoR, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty; give at least one token")
    for prompt in prompts:
        outside = [token for token in prompt if not 0 <= token < vocab]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {vocab} entries")
        if len(prompt) + params.max_tokens > context:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {params.max_tokens} new ones exceed the context "
                f"of {context}; shorten the prompt or lower the number of new tokens"
            )
