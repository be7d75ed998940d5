"""Next tokens of a batch: every row by its own parameters, and never by its neighbours.

Rows without anything but greedy choice cost one argmax. Others are computed in fp32, as in vLLM,
but probabilities are added up in float64, so a draw is as fine as its 53 random bits.
Shapes: N rows, M rows of these that need more than an argmax, S rows of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.engine.constraint import Mask
from mor.engine.params import SamplingParams
from mor.log import logger
from mor.ops.native.sampling import DRAW, Draws
from mor.ops.select import hash_draw

TEMPERATURES = (1e-30, 1e30)  # in fp32, beyond these a quotient may be NaN


@dataclass(slots=True, kw_only=True, eq=False)
class SampleRow:
    """What the sampler has to know of one answer. Make it once and keep it for the answer's life.

    Ids are read where they lie: output_ids may only grow, and holds all tokens drawn so far.
    """

    params: SamplingParams
    seed: int
    """64 bits; the request's, or the engine's draw where the request has none"""
    sample: int = 0
    """which of the n answers"""
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    eos_id: int | None = None
    _counts: TokenCounts | None = field(default=None, init=False, repr=False)
    _mask: Mask | None = field(default=None, init=False, repr=False)

    @property
    def output_length(self) -> int:
        return len(self.output_ids)

    @property
    def barred_ids(self) -> list[int]:
        """Tokens that would end the answer before min_tokens."""
        if self.output_length >= self.params.min_tokens:
            return []
        return [*self.params.stop_ids, *([] if self.eos_id is None else [self.eos_id])]

    def allowed(self) -> bytes | None:
        """Return the bits of tokens that the answer's grammar lets come next; None without one."""
        if self.params.constraint is None:
            return None
        if self._mask is None:
            self._mask = self.params.constraint.start()
        return self._mask.allowed(self.output_ids)

    def counts(self, vocab_size: int, device: torch.device) -> TokenCounts:
        """Count the tokens so far; only what is new since the last call costs time."""
        if self._counts is None:
            self._counts = TokenCounts(self.prompt_ids, vocab_size, device)
        self._counts.update(self.output_ids)
        return self._counts


class TokenCounts:
    """How often a request wrote every token, and which ones it read."""

    def __init__(self, prompt_ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.output_V = torch.zeros(vocab_size, dtype=torch.int32, device=device)
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen_V[torch.tensor(list(prompt_ids), dtype=torch.int64, device=device)] = True
        self._num_counted = 0

    def update(self, output_ids: Sequence[int]) -> None:
        assert len(output_ids) >= self._num_counted, "output tokens were taken back"
        new_ids = output_ids[self._num_counted :]
        if not new_ids:
            return
        new = torch.tensor(new_ids, dtype=torch.int64, device=self.output_V.device)
        self.output_V.index_add_(0, new, torch.ones_like(new, dtype=torch.int32))
        self.seen_V[new] = True
        self._num_counted = len(output_ids)


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one place."""

    token: int
    logprob: float
    rank: int
    """1 for the best token"""
    top: list[tuple[int, float]]
    """the best tokens and theirs, best first; of equal ones the lower id first"""


class Sampled(NamedTuple):
    """The next token of every row."""

    token_N: Tensor
    """int64, on the logits' device; -1 where failed"""
    failed_N: Tensor
    """rows whose best logit is not finite: NaN in them, or nothing left to choose"""
    logprobs: dict[int, TokenLogprobs]
    """by row, for rows that ask for them and did not fail"""


def finite_argmax(logit_NV: Tensor) -> Tensor:
    """Return the best token of every row, the first of equal ones; -1 if its logit is not finite.

    A row with NaN has NaN for its best logit.
    """
    best = logit_NV.max(1)
    return best.indices.masked_fill(~best.values.isfinite(), -1)


class Sampler:
    """Draws the next tokens of a batch."""

    def __init__(
        self, *, argmax: Callable[[Tensor], Tensor] | None = None, draws: Draws | None = None
    ) -> None:
        """Take an argmax that answers as `finite_argmax` does, and what draws where it can.

        draws  for rows whose logits nothing changes; None draws all in torch
        """
        self._argmax = argmax or finite_argmax
        self._draws = draws

    def sample(self, logit_NV: Tensor, rows: Sequence[SampleRow]) -> Sampled:
        """Choose a token for every row.

        logit_NV  raw logits, fp32; they are not changed
        rows      whose logits they are, in the same order
        Returns   tokens, failures and the log-probabilities asked for. These are of the raw
                  logits, before bias, penalties and temperature, as in vLLM V1
        Order     logit bias, min_tokens, repetition, presence and frequency penalties,
                  temperature, top-k, top-p, min-p, draw
        Draw      one number per token out of (seed, sample, output length), see hash_draw; the
                  token is where it falls in the cumulated probabilities
        """
        assert len(rows) == len(logit_NV)
        token_N = self._argmax(logit_NV)
        special: list[int] = []
        scored: list[int] = []
        for i, row in enumerate(rows):
            if not row.params.is_plain_greedy:
                special.append(i)
            if row.params.logprobs is not None:
                scored.append(i)
        failed_N = token_N < 0
        if special:
            token_N = token_N.clone()
            if self._draws is not None:
                plain = [i for i in special if not rows[i].params.changes_logits]
                special = [i for i in special if rows[i].params.changes_logits]
                if plain:
                    logit_MV = logit_NV if len(plain) == len(rows) else logit_NV[plain]
                    records = _records([rows[i] for i in plain])
                    token_N[plain] = self._draws(logit_MV, token_N[plain], records)
            for some in _chunks(special, logit_NV):
                token_N[some] = _draw(logit_NV[some].float(), [rows[i] for i in some])
            failed_N = failed_N | (token_N < 0)
            token_N = token_N.masked_fill(failed_N, -1)
        if not scored:
            return Sampled(token_N, failed_N, {})
        return Sampled(token_N, failed_N, _chosen_logprobs(logit_NV, token_N, rows, scored))


def token_logprobs(
    logit_NV: Tensor, token_N: Tensor, top_counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Tell the log-probability of each row's token, its rank, and the best tokens beside it.

    logit_NV    raw logits, fp32 or shorter
    token_N     int64, a token of every row
    top_counts  how many best tokens each row tells
    Cost        a few copies of some rows at a time, and one wait for the device per such part
    """
    told: list[TokenLogprobs] = []
    for some in _chunks(range(len(logit_NV)), logit_NV):
        counts = [top_counts[i] for i in some]
        told += _told_logprobs(logit_NV[some].float(), token_N[some], counts)
    return told


def _told_logprobs(
    logit_NV: Tensor, token_N: Tensor, top_counts: Sequence[int]
) -> list[TokenLogprobs]:
    best_N1 = logit_NV.amax(1, keepdim=True)
    total_N1 = (logit_NV - best_N1).exp().sum(1, keepdim=True).log()

    def logprob(id_NK: Tensor) -> Tensor:
        return logit_NV.gather(1, id_NK) - best_N1 - total_N1

    token_N1 = token_N[:, None]
    rank_N = (logit_NV > logit_NV.gather(1, token_N1)).sum(1) + 1
    width = min(max(top_counts), logit_NV.shape[1])
    top_NK = _best_first(logit_NV, width) if width else token_N.new_empty(len(token_N), 0)
    columns = (token_N, logprob(token_N1)[:, 0], rank_N, top_NK, logprob(top_NK))
    return [
        TokenLogprobs(token, chosen, rank, list(zip(ids, logprobs, strict=True))[:count])
        for count, token, chosen, rank, ids, logprobs in zip(
            top_counts, *(column.tolist() for column in columns), strict=True
        )
    ]


def _best_first(logit_NV: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest fp32 logits of each row, of equal ones the lower id first.

    Both are packed into one integer, since topk leaves the order of equal values open.
    """
    bits_NV = (logit_NV + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    ordered_NV = torch.where(bits_NV < 0, bits_NV ^ 0x7FFFFFFF, bits_NV)
    id_V = torch.arange(logit_NV.shape[1], device=logit_NV.device)
    return (ordered_NV * 2**32 - id_V).topk(k).indices


def _chosen_logprobs(
    logit_NV: Tensor, token_N: Tensor, rows: Sequence[SampleRow], scored: list[int]
) -> dict[int, TokenLogprobs]:
    chosen = token_N[scored].tolist()
    good = [i for i, token in zip(scored, chosen, strict=True) if token >= 0]
    if not good:
        return {}
    told = token_logprobs(
        logit_NV[good], token_N[good], [rows[i].params.logprobs or 0 for i in good]
    )
    return dict(zip(good, told, strict=True))


def _chunks(rows: Sequence[int], logit_NV: Tensor) -> Iterator[list[int]]:
    """Split rows into parts whose copies a CPU's caches, or a GPU's memory, hold with ease."""
    elements = 2**18 if logit_NV.device.type == "cpu" else 2**24
    count = max(1, elements // logit_NV.shape[1])
    for start in range(0, len(rows), count):
        yield list(rows[start : start + count])


def _constrain(score_MV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Take tokens out that a row's grammar does not let come next."""
    for score_V, row in zip(score_MV, rows, strict=True):
        try:
            bits = row.allowed()
        except Exception:  # its own request ends, the others of the batch go on
            logger.exception("a constraint failed")
            score_V.fill_(float("-inf"))
            continue
        if bits is None:
            continue
        packed = np.frombuffer(bits, dtype=np.uint8)
        allowed = np.unpackbits(packed, bitorder="little", count=len(score_V)).astype(bool)
        barred_V = torch.from_numpy(~allowed).to(score_V.device)
        score_V.masked_fill_(barred_V, float("-inf"))


def _draw(score_MV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return a token per row, -1 where no score is finite. score_MV is overwritten."""
    _constrain(score_MV, rows)
    _add_bias(score_MV, rows)
    _penalise(score_MV, rows)
    best_M1, token_M1 = score_MV.max(1, keepdim=True)
    temperatures = [row.params.temperature for row in rows]
    if any(temperatures):
        lowest, highest = TEMPERATURES
        divisor_M1 = _column([min(max(t, lowest), highest) for t in temperatures], score_MV)
        # The best score becomes 0, so that a low temperature makes no score infinite.
        score_MV.sub_(best_M1).div_(divisor_M1)
        _keep_top_k(score_MV, rows)
        share_MV = score_MV.softmax(1)
        _keep_top_p(share_MV, rows)
        _keep_min_p(share_MV, rows)
        drawn_M1 = inverse_cdf(share_MV, _numbers(rows).to(share_MV.device)[:, None])
        # Sums made in parallel may grow by rounding where a share of 0 was added.
        is_drawn_M1 = torch.tensor([[t > 0] for t in temperatures], device=score_MV.device)
        is_drawn_M1 &= share_MV.gather(1, drawn_M1) > 0
        token_M1 = torch.where(is_drawn_M1, drawn_M1, token_M1)
    return token_M1.masked_fill(~best_M1.isfinite(), -1)[:, 0]


def _numbers(rows: Sequence[SampleRow]) -> Tensor:
    """Return the number of [0, 1) that decides each row's draw, fp64."""
    places = [(row.seed, row.sample, row.output_length) for row in rows]
    return hash_draw(*torch.tensor(places, dtype=torch.int64).T)


def _records(rows: Sequence[SampleRow]) -> npt.NDArray[np.void]:
    """Describe the draws of rows to the compiled kernels."""
    lowest, highest = TEMPERATURES
    numbers = _numbers(rows).tolist()
    params = [row.params for row in rows]
    return np.array(
        [
            (min(max(p.temperature, lowest), highest), p.top_p, p.min_p, number, max(p.top_k, 0))
            for p, number in zip(params, numbers, strict=True)
        ],
        DRAW,
    )


def _add_bias(score_MV: Tensor, rows: Sequence[SampleRow]) -> None:
    for score_V, row in zip(score_MV, rows, strict=True):
        if row.params.logit_bias is not None:
            ids, biases = list(row.params.logit_bias), list(row.params.logit_bias.values())
            score_V[ids] += score_V.new_tensor(biases)
        if row.params.min_tokens and (barred := row.barred_ids):
            score_V[barred] = -math.inf


def _penalise(score_MV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Apply the repetition, then the frequency and the presence penalty."""
    index = [i for i, row in enumerate(rows) if row.params.has_penalties]
    if not index:
        return
    V, device = score_MV.shape[1], score_MV.device
    counts = [rows[i].counts(V, device) for i in index]
    seen_SV = torch.stack([count.seen_V for count in counts])
    output_SV = torch.stack([count.output_V for count in counts])
    params = [rows[i].params for i in index]
    repetition_S1 = _column([p.repetition_penalty for p in params], score_MV)
    frequency_S1 = _column([p.frequency_penalty for p in params], score_MV)
    presence_S1 = _column([p.presence_penalty for p in params], score_MV)
    score_SV = score_MV[index]
    repeated_SV = torch.where(score_SV > 0, score_SV / repetition_S1, score_SV * repetition_S1)
    score_SV = torch.where(seen_SV, repeated_SV, score_SV)
    score_SV -= frequency_S1 * output_SV
    score_SV -= presence_S1 * (output_SV > 0)
    score_MV[index] = score_SV


def _keep_top_k(score_MV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Set what is below the k-th best score to -inf."""
    V = score_MV.shape[1]
    counts = [row.params.top_k if 0 < row.params.top_k < V else 0 for row in rows]
    if not any(counts):
        return
    k_M1 = torch.tensor(counts, device=score_MV.device)[:, None]
    kth_M1 = score_MV.topk(max(counts)).values.gather(1, (k_M1 - 1).clamp(min=0))
    score_MV.masked_fill_((score_MV < kth_M1) & (k_M1 > 0), -math.inf)


def _keep_top_p(share_MV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Set shares to 0 beyond the best tokens that reach top_p; of equal ones lower ids stay."""
    index = [i for i, row in enumerate(rows) if row.params.top_p < 1]
    if not index:
        return
    share_SV = share_MV[index]
    best_SV = _best_to_worst(share_SV)
    total_SV = best_SV.cumsum(1, dtype=torch.float64)
    top_p_S1 = _column([rows[i].params.top_p for i in index], total_SV)
    kept_S1 = 1 + (total_SV[:, :-1] < top_p_S1).sum(1, keepdim=True)
    last_S1 = best_SV.gather(1, kept_S1 - 1)
    above_SV, equal_SV = share_SV > last_S1, share_SV == last_S1
    room_S1 = kept_S1 - above_SV.sum(1, keepdim=True)
    keeps_SV = above_SV | (equal_SV & (equal_SV.cumsum(1, dtype=torch.int32) <= room_S1))
    share_MV[index] = share_SV.masked_fill(~keeps_SV, 0.0)


def _keep_min_p(share_MV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Set shares below min_p times the best one to 0."""
    min_ps = [row.params.min_p for row in rows]
    if any(min_ps):
        floor_M1 = share_MV.amax(1, keepdim=True) * _column(min_ps, share_MV)
        share_MV.masked_fill_(share_MV < floor_M1, 0.0)


def inverse_cdf(share_MV: Tensor, draw_M1: Tensor) -> Tensor:
    """Return the first token (M, 1) whose cumulated share exceeds the draw, fp64 of [0, 1)."""
    total_MV = share_MV.cumsum(1, dtype=torch.float64)
    aim_M1 = draw_M1 * total_MV[:, -1:]
    return torch.searchsorted(total_MV, aim_M1, right=True).clamp(max=share_MV.shape[1] - 1)


def _best_to_worst(value_SV: Tensor) -> Tensor:
    """Sort every row, the largest first. On a CPU NumPy does it many times faster than torch."""
    if value_SV.device.type == "cpu":
        return torch.from_numpy(np.sort(value_SV.numpy(), axis=1)).flip(1)
    return value_SV.sort(1, descending=True).values


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return values as a column of the same type, on the same device."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
