"""Before anything is timed: does the engine draw the tokens, and take the depths, that it should?

The plain model runs over prompt and answer at once, in float32. Every token of the engine must be
its best one, and the log-probabilities of the best ones must be its own, up to rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mor.bench.workload import RequestSpec
from mor.config import ModelConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.engine.sampler import TokenLogprobs
from mor.model.mor import MoR

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""error of a log-probability, and how far a token's logit may be below the best, both in standard
deviations of all logits"""
DEPTH_SLIPS = {torch.float32: 0.001, torch.bfloat16: 0.05}
"""share of tokens that may stand so near a threshold that rounding decides"""
MANY_SIGMA = 5.0
TOP_TOKENS = 5
"""whose log-probabilities are compared"""


class Verified(NamedTuple):
    """What was compared; gaps and errors are in standard deviations of all logits."""

    num_tokens: int
    largest_gap: float
    """from a drawn token's logit to the best"""
    largest_error: float
    """of the log-probabilities of the best tokens"""
    num_depth_slips: int
    mean_depth: float


class _Plain(NamedTuple):
    """What the plain model says of an answer: T drawn tokens, V vocabulary, S tokens that ran."""

    logits_TV: Tensor
    depth_S: Tensor

    @classmethod
    def of(cls, model: MoR, prompt: Sequence[int], drawn: Sequence[int]) -> _Plain:
        out = model(torch.tensor([[*prompt, *drawn]], device=model.device), rule="causal")
        assert out.logits is not None
        return cls(out.logits[0, len(prompt) - 1 : -1], out.depth[0, :-1])

    def gap(self, drawn: Sequence[int]) -> float:
        """Return how far a drawn token's logit is below the best."""
        logits_TV = self.logits_TV[: len(drawn)]
        logit_T = logits_TV.gather(-1, torch.tensor(drawn, device=logits_TV.device)[:, None])[:, 0]
        return ((logits_TV.max(-1).values - logit_T) / logits_TV.std(-1)).max().item()

    def error(self, logprobs: Sequence[TokenLogprobs]) -> float:
        """Return how far a log-probability is off."""
        off = [0.0]
        for logits_V, place in zip(self.logits_TV, logprobs, strict=False):
            mine_V, deviation = logits_V.log_softmax(-1), logits_V.std().item()
            off += [abs(mine_V[token].item() - theirs) / deviation for token, theirs in place.top]
        return max(off)


SHORT_PROMPT = 8
"""tokens of a prompt that is short enough to hold no depth that rounding turns"""


@torch.inference_mode()
def verify(engine: Engine, requests: Sequence[RequestSpec], *, name: str) -> Verified:
    """Run a few requests together, as they are timed and for log-probabilities, and compare.

    Tokens behind another depth count as none: other keys stand before them. Where that leaves
    none at all, the beginnings of the prompts are run instead.
    Raises RuntimeError for tokens, log-probabilities or depths that rounding does not explain
    """
    dtype = engine.kv_dtype
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    plain = copy.deepcopy(engine.model).float()
    gap = error = 0.0
    tokens, slips, depths_seen = 0, 0, []
    for top in (None, TOP_TOKENS):
        params = [_params(request, top) for request in requests]
        outputs = engine.generate([request.prompt_ids for request in requests], params)
        for output in outputs:
            (answer,) = output.outputs
            said = _Plain.of(plain, output.prompt_token_ids, answer.token_ids)
            depths = [*output.prompt_depths, *answer.depths]
            off = [a != b for a, b in zip(depths, said.depth_S.tolist(), strict=True)]
            # Behind another depth stand other keys: what follows cannot be compared.
            first_slip = off.index(True) if True in off else len(off)
            comparable = max(first_slip + 1 - len(output.prompt_token_ids), 0)
            if comparable:
                gap = max(gap, said.gap(answer.token_ids[:comparable]))
                error = max(error, said.error((answer.logprobs or [])[:comparable]))
            slips, tokens = slips + sum(off), tokens + comparable
            depths_seen += depths
    _check(engine.model.config, dtype, slips / len(depths_seen), name=name)
    if not tokens:
        short = [
            request._replace(prompt_ids=request.prompt_ids[:SHORT_PROMPT]) for request in requests
        ]
        if all(len(request.prompt_ids) <= SHORT_PROMPT for request in requests):
            raise RuntimeError(f"{name}: another depth stands in every prompt; nothing is compared")
        return verify(engine, short, name=name)
    if not max(gap, error) <= tolerance:
        raise RuntimeError(
            f"{name}: the engine is {max(gap, error):.3f} standard deviations of the logits off "
            f"the plain model; rounding explains {tolerance}"
        )
    return Verified(tokens, gap, error, slips, sum(depths_seen) / len(depths_seen))


def _params(request: RequestSpec, logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=request.output_len, temperature=0, ignore_eos=True, logprobs=logprobs
    )


def _check(config: ModelConfig, dtype: torch.dtype, slip_share: float, *, name: str) -> None:
    """Raise RuntimeError when more tokens miss their depth than stand near a threshold."""
    has_scores = config.router in ("expert_choice", "threshold", "token_choice")
    allowed = DEPTH_SLIPS.get(dtype, 0.0) if has_scores else 0.0
    if slip_share > allowed:
        raise RuntimeError(
            f"{name}: {slip_share:.1%} of the tokens do not take the plain model's depth"
        )


@torch.inference_mode()
def largest_gap(model: MoR, prompt: Sequence[int], drawn: Sequence[int]) -> float:
    """Return how far a token that was drawn is below the model's best, in deviations."""
    return _Plain.of(model, prompt, drawn).gap(drawn)


def check_mean_depth(depths: Sequence[int], config: ModelConfig, *, name: str) -> float:
    """Return the mean depth; RuntimeError where draws miss what the capacities ask for."""
    mean = sum(depths) / len(depths)
    expected = config.capacity_depth
    square = sum((2 * r + 1) * share for r, share in enumerate(config.capacity))
    off = MANY_SIGMA * math.sqrt(max(square - expected**2, 0.0) / len(depths)) + 1e-9
    if config.router in ("random", "fixed") and abs(mean - expected) > off:
        raise RuntimeError(
            f"{name}: the mean depth is {mean:.3f} over {len(depths)} tokens, {expected:.3f} "
            "should be"
        )
    return mean
