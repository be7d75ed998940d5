"""Passes over held-out text under the causal rule: loss, depth, and the thresholds themselves.

Shapes: R recursions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mor.data.loader import Batch
from mor.model.mor import MoR, MoROutput
from mor.model.router import Rule
from mor.ops.device import autocast

QUANTILES = 201


class HeldoutResult(NamedTuple):
    """Means over the tokens of a pass."""

    loss: float
    """nats per token"""
    tokens: int
    active: tuple[float, ...]
    """share of tokens active at each recursion"""
    depth_shares: tuple[float, ...]
    """share of tokens of depth 1, 2, .. R"""

    @property
    def mean_depth(self) -> float:
        return sum(self.active)

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        return self.loss / math.log(2) * tokens_per_byte


@torch.inference_mode()
def measure_loss(
    model: MoR, batches: Iterable[Batch], *, rule: Rule = "causal", dtype: torch.dtype | None = None
) -> HeldoutResult:
    """Run batches and return loss and depth. The rule `train` peeks at the future: name it so.

    dtype  autocast type; None keeps the model's own
    Raises ValueError when there is no batch
    """
    R = model.config.num_recursions
    loss, tokens, active = 0.0, 0, [0] * R
    for out in _run(model, batches, rule, dtype):
        assert out.loss_sum is not None
        loss += float(out.loss_sum)
        tokens += out.num_tokens
        for r, stats in enumerate(out.recursions):
            active[r] += stats.num_active
    if tokens == 0:
        raise ValueError("there is no held-out text; prepare more")
    shares = [count / tokens for count in active]
    depth_shares = [a - b for a, b in zip(shares, [*shares[1:], 0.0], strict=True)]
    return HeldoutResult(loss / tokens, tokens, tuple(shares), tuple(depth_shares))


@torch.inference_mode()
def set_thresholds(
    model: MoR, batches: list[Batch], *, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Set every threshold so that the active shares on this text equal the capacities.

    Recursion by recursion, since thresholds before r decide who the candidates of r are. Returns
    what the model folder keeps as calibration: thresholds, shares reached, score quantiles.
    """
    config = model.config
    if not config.has_router:
        return {}
    quantiles = []
    for r in range(config.num_recursions):
        score_N, tokens = _scores(model, batches, r, dtype)
        if r > 0 and config.router != "random":
            kept = round(config.capacity[r] * tokens)
            model.model.router(r).threshold.fill_(_threshold(score_N, kept))
        points = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
        index = (points * max(len(score_N) - 1, 0)).round().long()
        quantiles.append(score_N.sort().values[index].tolist() if len(score_N) else [])
    reached = measure_loss(model, batches, dtype=dtype)
    return {
        "rule": "a token goes on at recursion r if its score is above threshold r",
        "thresholds": [
            float(model.model.router(r).threshold) for r in range(config.num_recursions)
        ],
        "capacity": list(config.capacity),
        "active": list(reached.active),
        "tokens": reached.tokens,
        "score_quantiles": quantiles,
    }


def _scores(
    model: MoR, batches: Iterable[Batch], recursion: int, dtype: torch.dtype | None
) -> tuple[Tensor, int]:
    """Collect the candidates' scores at a recursion, and count all tokens."""
    scores, tokens = [], 0
    for out in _run(model, batches, "causal", dtype, with_loss=False):
        scores.append(out.recursions[recursion].score_N.cpu())
        tokens += out.num_tokens
    return torch.cat(scores), tokens


def _threshold(score_N: Tensor, kept: int) -> float:
    """Return a threshold that `kept` scores exceed: halfway to the next one below."""
    score_N = score_N.sort(descending=True).values
    kept = min(kept, len(score_N))
    if kept == 0:
        return 1.0
    if kept == len(score_N):
        return max(float(score_N[-1]) / 2, 0.0) if len(score_N) else 0.5
    return float((score_N[kept - 1] + score_N[kept]) / 2)


def _run(
    model: MoR,
    batches: Iterable[Batch],
    rule: Rule,
    dtype: torch.dtype | None,
    *,
    with_loss: bool = True,
) -> Iterator[MoROutput]:
    """Run batches in evaluation mode; the model's mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = batch.to(model.device)
            with autocast(model.device, dtype):
                yield model(
                    batch.input_ids_BT,
                    labels=batch.labels_BT if with_loss else None,
                    segments=batch.segment_BT,
                    rule=rule,
                    last_only=not with_loss,
                )
    finally:
        model.train(was_training)
