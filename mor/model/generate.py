"""Plain generation on the plain cache: token ids in, token ids and depths out.

No scheduler, no pages: the oracle that faster engines are held against. It really skips: a token
that leaves costs no compute, keys or values at later recursions; a finished sequence costs nothing.
Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mor.model.mor import MoR


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
    *,
    max_tokens: int,
    eos_token_id: int | None = None,
) -> Iterator[Prefill | GeneratedToken]:
    """Yield one Prefill, then every new token in the order of generation. Greedy.

    prompts       token ids of each sequence, at least one each
    eos_token_id  token that ends a sequence; it is not yielded
    Raises        ValueError for an empty prompt, an id outside the vocabulary, or more tokens than
                  the model's context
    """
    _check_prompts(model, prompts, max_tokens)
    return _generate(model, prompts, max_tokens, eos_token_id)


@torch.inference_mode()
def _generate(
    model: MoR, prompts: Sequence[Sequence[int]], max_tokens: int, eos_token_id: int | None
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

    running = [True] * B
    for _ in range(max_tokens):
        tokens = out.logits[:, 0].argmax(-1).tolist()
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


def _check_prompts(model: MoR, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty; give at least one token")
    for prompt in prompts:
        outside = [token for token in prompt if not 0 <= token < vocab]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {vocab} entries")
        if len(prompt) + max_tokens > context:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the context "
                f"of {context}; shorten the prompt or lower the number of new tokens"
            )
