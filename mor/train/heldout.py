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


class Calibration(NamedTuple):
    """Where thresholds were set, and what the model does with them on the text they were set on."""

    kept: dict[str, Any]
    """what the model folder keeps: thresholds, shares reached, logit quantiles; empty for fixed"""
    result: HeldoutResult


@torch.inference_mode()
def set_thresholds(
    model: MoR, batches: list[Batch], *, dtype: torch.dtype | None = None
) -> Calibration:
    """Set every threshold so that the active shares on this text equal the capacities.

    Recursion by recursion, since thresholds before r decide who the candidates of r are.
    """
    config = model.config
    rules = {
        "random": "a hash of seed, recursion, position and token against the capacities",
        "token_choice": "a token takes the depth with the best score, balance added",
    }
    if not config.has_router or config.router in rules:
        result = measure_loss(model, batches, dtype=dtype)
        if not config.has_router:
            return Calibration({}, result)
        return Calibration({"rule": rules[config.router], **_reached(model, result)}, result)
    logits: list[Tensor] = []
    for r in range(1, config.num_recursions):  # the pass for the last tells the logits of all
        logits, tokens = _logits(model, batches, dtype)
        kept = round(config.capacity[r] * tokens)
        model.model.router(r).threshold.fill_(_threshold(torch.sigmoid(logits[r]), kept))
    result = measure_loss(model, batches, dtype=dtype)
    about = {
        "rule": "a token goes on at recursion r if its score is above threshold r",
        "thresholds": [
            float(model.model.router(r).threshold) for r in range(config.num_recursions)
        ],
        **_reached(model, result),
        # Of logits, since the scores of a trained router are nearly all 0 or 1.
        "logit_quantiles": [_quantiles(logit_N) for logit_N in logits],
    }
    return Calibration(about, result)


def _reached(model: MoR, result: HeldoutResult) -> dict[str, Any]:
    return {
        "capacity": list(model.config.capacity),
        "active": list(result.active),
        "tokens": result.tokens,
    }


def _logits(
    model: MoR, batches: Iterable[Batch], dtype: torch.dtype | None
) -> tuple[list[Tensor], int]:
    """Collect the candidates' logits at every recursion, and count all tokens."""
    logits: list[list[Tensor]] = [[] for _ in range(model.config.num_recursions)]
    tokens = 0
    for out in _run(model, batches, "causal", dtype, routing_only=True):
        for collected, stats in zip(logits, out.recursions, strict=True):
            collected.append(stats.logit_N.cpu())
        tokens += out.num_tokens
    return [torch.cat(collected) for collected in logits], tokens


def _quantiles(logit_N: Tensor) -> list[float]:
    """Return evenly spaced quantiles, from the smallest to the largest."""
    if not len(logit_N):
        return []
    points = torch.linspace(0, len(logit_N) - 1, QUANTILES, dtype=torch.float64)
    return logit_N.sort().values[points.round().long()].tolist()


def _threshold(score_N: Tensor, kept: int) -> float:
    """Return a threshold that `kept` scores exceed: halfway to the next one below.

    Scores that are equal go on together: the threshold is just below them.
    """
    score_N = score_N.sort(descending=True).values
    kept = min(kept, len(score_N))
    if kept == 0:
        return 1.0
    if kept == len(score_N):
        return -1.0  # everyone, also a token that scores lower than any here
    last, first_out = score_N[kept - 1], score_N[kept]
    if last == first_out:
        return float(torch.nextafter(last, last - 1))
    middle = (last + first_out) / 2
    return float(first_out if middle >= last else middle)  # no number lies between neighbours


def _run(
    model: MoR,
    batches: Iterable[Batch],
    rule: Rule,
    dtype: torch.dtype | None,
    *,
    routing_only: bool = False,
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
                    labels=batch.labels_BT,
                    segments=batch.segment_BT,
                    rule=rule,
                    routing_only=routing_only,
                )
    finally:
        model.train(was_training)
