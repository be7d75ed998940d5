"""How deep a request may think: from its parameters to thresholds that stay fixed.

Nothing here looks at earlier depths, so a prefix has the same depths whatever follows it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor.config import ModelConfig
from mor.engine.core import DepthPolicy
from mor.engine.params import SamplingParams

EVERYONE = -math.inf
NOBODY = math.inf
"""Thresholds below and above every logit."""


def depth_policy(
    params: SamplingParams,
    config: ModelConfig,
    *,
    thresholds: Sequence[float],
    calibration: dict[str, Any] | None,
) -> DepthPolicy:
    """Turn a request's depth fields into a policy.

    thresholds   the model's own of scores, one a recursion
    calibration  what the model folder keeps of its logits, for a target depth
    Raises       ValueError for more recursions than the model has, for thresholds that its router
                 does not have, and for a target depth without quantiles
    """
    R = config.num_recursions
    limit = params.max_recursions or R
    if limit > R:
        raise ValueError(f"max_recursions is {limit}, the model has {R}; give {R} or less")
    has_thresholds = config.router in ("expert_choice", "threshold")
    for name, is_given in (
        ("threshold_shift", params.threshold_shift != 0),
        ("target_depth", params.target_depth is not None),
    ):
        if is_given and not has_thresholds:
            raise ValueError(
                f"{name} is for routers with thresholds, not {config.router}; use max_recursions"
            )
    if params.target_depth is not None:
        return DepthPolicy(limit, _at_depth(params.target_depth, R, calibration))
    shift = params.threshold_shift
    return DepthPolicy(limit, tuple(logit(threshold + shift) for threshold in thresholds))


def logit(score: float) -> float:
    """Return the logit whose sigmoid is a score; infinite from 0 down and from 1 up."""
    if 0 < score < 1:
        return math.log(score) - math.log1p(-score)
    return EVERYONE if score <= 0 else NOBODY


def _at_depth(target: float, R: int, calibration: dict[str, Any] | None) -> tuple[float, ...]:
    """Look up thresholds for a mean depth in the quantiles of the candidates' logits.

    The rates p_r at which candidates go on become p_r^t, with t such that the shares
    1, p_2^t, p_2^t p_3^t .. sum to the target. Who the candidates of r are moves a little with the
    thresholds before r, so the depth reached is near the target, exact for R = 2.
    """
    if not 1 <= target <= R:
        raise ValueError(f"target_depth is {target}; give a mean depth from 1 to {R}")
    quantiles = (calibration or {}).get("logit_quantiles")
    active = (calibration or {}).get("active")
    if not quantiles or not active or len(quantiles) != R or not all(quantiles[1:]):
        raise ValueError("target_depth needs a model folder whose calibration has logit quantiles")
    rates = [min(max(b / a, 1e-6), 1 - 1e-6) for a, b in itertools.pairwise(active)]

    def depth_at(power: float) -> float:
        return 1 + float(np.cumprod([rate**power for rate in rates]).sum())

    low, high = 1e-9, 1e9  # powers of full depth and of depth 1
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if depth_at(middle) > target else (low, middle)
    thresholds = [EVERYONE]
    for rate, logits in zip(rates, quantiles[1:], strict=True):
        share = rate**low
        if share >= 1 - 1e-6:
            thresholds.append(EVERYONE)
        elif share <= 1e-6:
            thresholds.append(NOBODY)
        else:
            at = (1 - share) * (len(logits) - 1)
            thresholds.append(float(np.interp(at, np.arange(len(logits)), logits)))
    return tuple(thresholds)
