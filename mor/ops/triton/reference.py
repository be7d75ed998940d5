"""Plain PyTorch twins of the kernels that have none elsewhere; triton is not needed.

Shapes: N rows, A listed rows, D width, F feed-forward width, H heads, K head size, C positions,
R recursions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class GoOn(NamedTuple):
    """Who goes on and who leaves, in the order of the rows."""

    index_N: Tensor
    """rows that go on, int64, padded with -1"""
    count_1: Tensor
    """how many they are, int32"""
    leaving_N: Tensor
    """active rows that leave, int64, padded with -1"""
    num_leaving_1: Tensor
    """how many they are, int32"""


class AddNorm(NamedTuple):
    """A residual stream after an addition, and its norm."""

    sum_ND: Tensor
    normed_ND: Tensor


def go_on_reference(score_N: Tensor, threshold_N: Tensor, is_active_N: Tensor) -> GoOn:
    """List the active rows whose score is above their threshold, and the other active rows."""
    passes_N = score_N > threshold_N
    on_A, off_A = ((is_active_N & which_N).nonzero()[:, 0] for which_N in (passes_N, ~passes_N))
    return GoOn(*_padded(on_A, len(score_N)), *_padded(off_A, len(score_N)))


def gather_rows_reference(x_ND: Tensor, index_A: Tensor, *, fill: float = 0) -> Tensor:
    """Return x[index], with fill where the index is -1."""
    out_AD = torch.full((len(index_A), *x_ND.shape[1:]), fill, dtype=x_ND.dtype, device=x_ND.device)
    is_row_A = index_A >= 0
    out_AD[is_row_A] = x_ND[index_A[is_row_A].long()]
    return out_AD


def scatter_rows_reference(x_AD: Tensor, index_A: Tensor, into_ND: Tensor) -> None:
    """Write x to into[index], in place; rows whose index is -1 are skipped."""
    is_row_A = index_A >= 0
    into_ND[index_A[is_row_A].long()] = x_AD[is_row_A]


def rotate_reference(
    x_NHK: Tensor, *, cos_CK: Tensor, sin_CK: Tensor, position_N: Tensor
) -> Tensor:
    """Turn every head by its row's position (half-split), in fp32 or wider, rounded once."""
    wide_NHK = x_NHK.to(torch.promote_types(x_NHK.dtype, torch.float32))
    low_NHk, high_NHk = wide_NHK.chunk(2, dim=-1)
    half = low_NHk.shape[-1]
    cos_N1k = cos_CK[position_N.long(), None, :half].to(wide_NHK.dtype)
    sin_N1k = sin_CK[position_N.long(), None, :half].to(wide_NHK.dtype)
    turned = (low_NHk * cos_N1k - high_NHk * sin_N1k, high_NHk * cos_N1k + low_NHk * sin_N1k)
    return torch.cat(turned, dim=-1).to(x_NHK.dtype)


def add_rms_norm_reference(
    stream_ND: Tensor,
    update_ND: Tensor | None,
    gain_RD: Tensor,
    *,
    eps: float,
    recursion_N: Tensor | None = None,
) -> AddNorm:
    """Add an update to the stream and norm the sum, with each row's own gain."""
    sum_ND = stream_ND if update_ND is None else stream_ND + update_ND
    wide_ND = sum_ND.to(torch.promote_types(sum_ND.dtype, torch.float32))
    gain_ND = (gain_RD if recursion_N is None else gain_RD[recursion_N.long()]).to(sum_ND.dtype)
    normed_ND = F.rms_norm(wide_ND, wide_ND.shape[-1:], None, eps) * gain_ND
    return AddNorm(sum_ND, normed_ND.to(sum_ND.dtype))


def silu_mul_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Return silu(gate) x up, in fp32 or wider, rounded once."""
    wide = torch.promote_types(gate_NF.dtype, torch.float32)
    return (F.silu(gate_NF.to(wide)) * up_NF.to(wide)).to(gate_NF.dtype)


def _padded(index_A: Tensor, length: int) -> tuple[Tensor, Tensor]:
    padded_N = F.pad(index_A, (0, length - len(index_A)), value=-1)
    return padded_N, torch.tensor([len(index_A)], dtype=torch.int32, device=index_A.device)
