"""The readable twin of the sampler: one row, one step after the other, in plain Python.

Only softmax and its logarithm are torch's, so that both twins round alike. Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mor.engine.sampler import SampleRow, TokenLogprobs
from mor.ops.select import hash_draw


class ReferenceSample(NamedTuple):
    token: int
    """-1 where the best logit is not finite"""
    logprobs: TokenLogprobs | None
    share_V: list[float]
    """probability of every token; greedy choice puts all of it on one"""


def sample_reference(logit_V: Tensor, row: SampleRow) -> ReferenceSample:
    """Choose the next token of one row; the order of the steps is `Sampler.sample`'s.

    logit_V  raw logits, fp32
    """
    params, V = row.params, len(logit_V)
    failed = ReferenceSample(-1, None, [0.0] * V)
    if not math.isfinite(max(logit_V.tolist(), key=_nan_first)):
        return failed
    score_V = _penalised(logit_V, row)
    best = max(score_V)
    if not math.isfinite(best):
        return failed
    if params.temperature == 0:
        token = score_V.index(best)
        share_V = [float(i == token) for i in range(V)]
    else:
        share_V = _shares(score_V, row)
        token = _draw(share_V, row)
    return ReferenceSample(token, _logprobs(logit_V, token, params.logprobs), share_V)


def _penalised(logit_V: Tensor, row: SampleRow) -> list[float]:
    """Apply bias, min_tokens and penalties, each rounded to fp32."""
    params, score_V = row.params, logit_V.clone()
    for token, bias in (params.logit_bias or {}).items():
        score_V[token] += bias
    if len(row.output_ids) < params.min_tokens:
        ends = {*params.stop_ids, *([] if row.eos_id is None else [row.eos_id])}
        for token in ends:
            score_V[token] = -math.inf
    counts = Counter(row.output_ids)
    for token in {*row.prompt_ids, *row.output_ids}:
        if score_V[token] > 0:
            score_V[token] /= params.repetition_penalty
        else:
            score_V[token] *= params.repetition_penalty
    for token, count in counts.items():
        score_V[token] -= torch.tensor(params.frequency_penalty) * count
        score_V[token] -= params.presence_penalty
    return score_V.tolist()


def _shares(score_V: list[float], row: SampleRow) -> list[float]:
    """Return what temperature, top-k, top-p and min-p leave of every token's probability."""
    params, V = row.params, len(score_V)
    temperature = min(max(params.temperature, 1e-30), 1e30)
    scaled = (torch.tensor(score_V) - max(score_V)) / temperature
    score_V = scaled.tolist()
    if 0 < params.top_k < V:
        kth = sorted(score_V, reverse=True)[params.top_k - 1]
        score_V = [score if score >= kth else -math.inf for score in score_V]
    share_V = torch.tensor(score_V).softmax(0).tolist()
    if params.top_p < 1:
        kept: set[int] = set()
        total = 0.0
        for token in sorted(range(V), key=lambda token: -share_V[token]):
            if kept and total >= params.top_p:
                break
            kept.add(token)
            total += share_V[token]
        share_V = [share if token in kept else 0.0 for token, share in enumerate(share_V)]
    floor = float(torch.tensor(max(share_V)) * torch.tensor(params.min_p))
    return [share if share >= floor else 0.0 for share in share_V]


def _draw(share_V: list[float], row: SampleRow) -> int:
    """Return the first token whose cumulated share exceeds the draw."""
    place = (torch.tensor([value]) for value in (row.seed, row.sample, len(row.output_ids)))
    totals = list(accumulate(share_V))
    return bisect_right(totals, float(hash_draw(*place)) * totals[-1])


def _logprobs(logit_V: Tensor, token: int, count: int | None) -> TokenLogprobs | None:
    if count is None:
        return None
    logprob_V = logit_V.log_softmax(0).tolist()
    logits = logit_V.tolist()
    best_first = sorted(range(len(logits)), key=lambda token: -logits[token])
    rank = sum(logit > logits[token] for logit in logits) + 1
    top = [(best, logprob_V[best]) for best in best_first[:count]]
    return TokenLogprobs(token, logprob_V[token], rank, top)


def _nan_first(logit: float) -> float:
    return math.inf if math.isnan(logit) else logit
