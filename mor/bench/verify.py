"""Before anything is timed: does the engine draw the tokens, and take the depths, that it should?

The plain model runs over prompt and answer at once, in float32. Every token of the engine must be
its best one, up to near ties.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mor.bench.workload import RequestSpec
from mor.config import ModelConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams

NEAR_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""how far a token's logit may be below the best, in standard deviations of all logits"""
DEPTH_SLIPS = {torch.float32: 0.001, torch.bfloat16: 0.05}
"""share of tokens that may stand so near a threshold that rounding decides"""
MANY_SIGMA = 5.0


class Verified(NamedTuple):
    """What was compared."""

    num_tokens: int
    num_near_ties: int
    """tokens that were not the plain model's best"""
    largest_gap: float
    """of a token's logit to the best, in standard deviations"""
    num_depth_slips: int
    mean_depth: float


@torch.inference_mode()
def verify(engine: Engine, requests: Sequence[RequestSpec], *, name: str) -> Verified:
    """Run a few requests together and hold them to the plain model.

    Raises RuntimeError for tokens or depths that rounding does not explain
    """
    dtype = engine.kv_dtype
    params = [
        SamplingParams(max_tokens=request.output_len, temperature=0, ignore_eos=True)
        for request in requests
    ]
    outputs = engine.generate([request.prompt_ids for request in requests], params)
    plain = copy.deepcopy(engine.model).float()
    tie, ties, tokens, slips = NEAR_TIE.get(dtype, 1e-3), 0, 0, 0
    largest, depths_seen = 0.0, []
    for output in outputs:
        (answer,) = output.outputs
        prompt = len(output.prompt_token_ids)
        ids = torch.tensor([[*output.prompt_token_ids, *answer.token_ids]], device=plain.device)
        out = plain(ids, rule="causal")
        assert out.logits is not None
        logits_TV = out.logits[0, prompt - 1 : -1]
        drawn_T1 = torch.tensor(answer.token_ids, device=plain.device)[:, None]
        gap_T = logits_TV.max(-1).values - logits_TV.gather(-1, drawn_T1)[:, 0]
        gap = (gap_T / logits_TV.std(-1)).max().item()
        if not gap <= tie:
            raise RuntimeError(
                f"{name}: the engine draws a token that is {gap:.3f} standard deviations below "
                f"the plain model's best; near ties end at {tie}"
            )
        largest, tokens = max(largest, gap), tokens + len(answer.token_ids)
        ties += int((gap_T > 0).sum())
        depths = [*output.prompt_depths, *answer.depths]
        slips += sum(a != b for a, b in zip(depths, out.depth[0].tolist(), strict=False))
        depths_seen += depths
    allowed = 0.0
    if engine.model.config.router in ("expert_choice", "threshold", "token_choice"):
        allowed = DEPTH_SLIPS.get(dtype, 0.0)
    if slips > allowed * len(depths_seen):
        raise RuntimeError(
            f"{name}: {slips} of {len(depths_seen)} tokens do not take the plain model's depth"
        )
    mean_depth = sum(depths_seen) / len(depths_seen)
    return Verified(tokens, ties, largest, slips, mean_depth)


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
