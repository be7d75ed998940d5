"""Choosing tokens: top-k within a sequence, and the hashes behind the random router and sampling.

Shapes: B sequences, C candidates (padded), N packed candidates, A kept rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_k_mask(score_BC: Tensor, k_B: Tensor) -> Tensor:
    """Mark the k best-scored candidates of every sequence; equal scores go to the earlier one.

    score_BC  scores; -inf where there is no candidate
    k_B       int64, how many to keep of each sequence
    Returns   bool (B, C); marks fewer than k where there are fewer candidates
    Source    expert choice, arXiv 2507.10524 Eq. 2.1
    """
    order_BC = torch.argsort(score_BC, dim=1, descending=True, stable=True)
    rank = torch.arange(score_BC.shape[1], device=score_BC.device).expand_as(order_BC)
    best_BC = torch.zeros_like(score_BC, dtype=torch.bool).scatter(1, order_BC, rank < k_B[:, None])
    return best_BC & (score_BC > -math.inf)


def top_k_count(length_B: Tensor, capacity: float) -> Tensor:
    """Return max(1, int(capacity x length)) for every sequence, 0 for an empty one.

    The tiny term keeps shares such as 1/3 from losing a token to rounding.
    """
    k_B = (length_B.to(torch.float64) * capacity + 1e-9).floor().to(torch.int64)
    return torch.minimum(k_B.clamp(min=1), length_B)


def hash_uniform(
    position_N: Tensor, token_N: Tensor, *, seed: int, recursion: int | Tensor
) -> Tensor:
    """Draw a number of [0, 1) from (seed, recursion, position, token id) alone.

    recursion  from 0; of all rows, or of each (N, int64)

    The same token at the same place draws the same number in training, prefill and decode,
    whatever else is in the batch. Returns float64 of shape N.
    Source: the finaliser of SplitMix64, in wrapping int64 arithmetic.
    """
    state_N = position_N.to(torch.int64) * ODD[0] + token_N.to(torch.int64) * ODD[1]
    if isinstance(recursion, Tensor):
        return _unit(_mix(state_N + wrap(seed * ODD[2]) + (recursion + 1) * ODD[3]))
    return _unit(_mix(state_N + wrap(seed * ODD[2] + (recursion + 1) * ODD[3])))


def hash_draw(seed_N: Tensor, sample_N: Tensor, step_N: Tensor) -> Tensor:
    """Draw a number of [0, 1) from (seed, sample, step) alone, all int64; float64 of shape N.

    Seed and sample are mixed before the step is added, so streams of two seeds are not the same
    numbers shifted. Source: as hash_uniform, the finaliser twice.
    """
    stream_N = _mix(seed_N * ODD[0] + sample_N * ODD[1])
    return _unit(_mix(stream_N + step_N * ODD[2]))


def _mix(state_N: Tensor) -> Tensor:
    for shift, factor in ((30, ODD[4]), (27, ODD[5])):
        state_N = (state_N ^ _shift_right(state_N, shift)) * factor
    return state_N ^ _shift_right(state_N, 31)


def _unit(state_N: Tensor) -> Tensor:
    """Turn the upper 53 bits into a float64 of [0, 1)."""
    return _shift_right(state_N, 11).to(torch.float64) / 2.0**53


def wrap(value: int) -> int:
    """Return value as a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63


ODD = tuple(
    wrap(value)
    for value in (
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xBF58476D1CE4E5B9,
        0x94D049BB133111EB,
    )
)


def _shift_right(value_N: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros (PyTorch's own shift copies the sign)."""
    return (value_N >> bits) & (2 ** (64 - bits) - 1)
