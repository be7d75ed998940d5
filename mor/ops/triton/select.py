"""Who goes on, on the device: lists of rows without asking how long they are.

Shapes: N rows, A listed rows (as many as N, unused ones -1), D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.ops.select import ODD, wrap
from mor.ops.triton.reference import GoOn

_POSITION, _TOKEN, _SEED, _RECURSION, _MIX_1, _MIX_2 = (
    tl.constexpr(factor % 2**64) for factor in ODD
)


def go_on(score_N: Tensor, threshold_N: Tensor, is_active_N: Tensor) -> GoOn:
    """List the active rows whose score is above their threshold, and those that leave, in order.

    score_N      any float type; NaN is above nothing. What it means is the caller's: a sigmoid and
                 its threshold, a logit and the threshold's logit, or minus a random draw and minus
                 the share
    threshold_N  of score_N's type; rows of several recursions may be in one call
    is_active_N  bool; False rows (padding, or left before) are in neither list
    Returns      lists int64 (N,), padded with -1, and their lengths int32 (1,), all on the device
    Cost         one program walks over all rows: meant for up to a few thousand. No host sync
    """
    assert score_N.dtype == threshold_N.dtype, (score_N.dtype, threshold_N.dtype)
    N, device = len(score_N), score_N.device
    lists_2N = torch.empty((2, N), dtype=torch.int64, device=device)
    counts_2 = torch.empty(2, dtype=torch.int32, device=device)
    _go_on[(1,)](
        score_N.contiguous(), threshold_N.contiguous(), is_active_N.contiguous(),
        lists_2N, counts_2, N, BLOCK=min(1024, triton.next_power_of_2(max(N, 1))), num_warps=4,
    )  # fmt: skip
    return GoOn(lists_2N[0], counts_2[:1], lists_2N[1], counts_2[1:])


def gather_rows(x_ND: Tensor, index_A: Tensor, *, fill: float = 0) -> Tensor:
    """Return x[index], with fill where the index is -1.

    x_ND     any type and any trailing dimensions, also none
    index_A  int32 or int64
    """
    flat_ND = x_ND.reshape(len(x_ND), -1)
    out_AD = flat_ND.new_empty(len(index_A), flat_ND.shape[1])
    _launch_rows(_gather, flat_ND, index_A, out_AD, fill)
    return out_AD.view(len(index_A), *x_ND.shape[1:])


def scatter_rows(x_AD: Tensor, index_A: Tensor, into_ND: Tensor) -> None:
    """Write x to into[index], in place; rows whose index is -1 are skipped.

    x_AD     of into's type and trailing dimensions
    index_A  int32 or int64; no row twice
    into_ND  contiguous behind its first dimension
    """
    assert x_AD.shape[1:] == into_ND.shape[1:] and x_AD.dtype == into_ND.dtype
    _launch_rows(_scatter, x_AD.reshape(len(x_AD), -1), index_A, into_ND.view(len(into_ND), -1), 0)


def hash_uniform(
    position_N: Tensor, token_N: Tensor, *, seed: int, recursion: int | Tensor
) -> Tensor:
    """Draw what `mor.ops.select.hash_uniform` draws, bit by bit.

    position_N, token_N  int32 or int64
    recursion            of all rows (from 0), or an integer tensor with that of each
    Returns              float64 of shape N
    """
    N = len(position_N)
    out_N = torch.empty(N, dtype=torch.float64, device=position_N.device)
    has_recursions = isinstance(recursion, Tensor)
    offset = seed * ODD[2]
    if not isinstance(recursion, Tensor):
        offset += (recursion + 1) * ODD[3]
    _hash_uniform[(triton.cdiv(N, 256),)](
        position_N.contiguous(), token_N.contiguous(),
        recursion.contiguous() if isinstance(recursion, Tensor) else position_N, out_N,
        wrap(offset), N, HAS_RECURSIONS=has_recursions, BLOCK=256, num_warps=2,
    )  # fmt: skip
    return out_N


@triton.jit
def _go_on(
    score_ptr, threshold_ptr, active_ptr, lists_ptr, counts_ptr, num_rows, BLOCK: tl.constexpr
):
    """Walk over the rows once to list them and once to pad the lists."""
    num_on = tl.zeros([], tl.int32)
    num_off = tl.zeros([], tl.int32)
    off_ptr = lists_ptr + num_rows
    for start in range(0, num_rows, BLOCK):
        row_B = start + tl.arange(0, BLOCK)
        inside_B = row_B < num_rows
        active_B = tl.load(active_ptr + row_B, mask=inside_B, other=0) != 0
        score_B = tl.load(score_ptr + row_B, mask=inside_B, other=0)
        passes_B = score_B > tl.load(threshold_ptr + row_B, mask=inside_B, other=0)
        is_on_B, is_off_B = active_B & passes_B, active_B & (passes_B == 0)
        on_B, off_B = is_on_B.to(tl.int32), is_off_B.to(tl.int32)
        row_B = row_B.to(tl.int64)
        tl.store(lists_ptr + num_on + tl.cumsum(on_B, 0) - 1, row_B, mask=is_on_B)
        tl.store(off_ptr + num_off + tl.cumsum(off_B, 0) - 1, row_B, mask=is_off_B)
        num_on += tl.sum(on_B, 0)
        num_off += tl.sum(off_B, 0)
    tl.store(counts_ptr, num_on)
    tl.store(counts_ptr + 1, num_off)
    for start in range(0, num_rows, BLOCK):
        place_B = start + tl.arange(0, BLOCK)
        none_B = tl.full([BLOCK], -1, tl.int64)
        tl.store(lists_ptr + place_B, none_B, mask=(place_B >= num_on) & (place_B < num_rows))
        tl.store(off_ptr + place_B, none_B, mask=(place_B >= num_off) & (place_B < num_rows))


def _launch_rows(kernel, from_ND: Tensor, index_A: Tensor, to_ND: Tensor, fill: float) -> None:
    width = to_ND.shape[1]
    assert from_ND.stride(1) == to_ND.stride(1) == 1 or width == 1
    block = min(1024, triton.next_power_of_2(max(width, 1)))
    fill = float(fill) if to_ND.is_floating_point() else int(fill)
    kernel[(len(index_A), triton.cdiv(width, block))](
        from_ND, index_A.contiguous(), to_ND, from_ND.stride(0), to_ND.stride(0), width, fill,
        BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _gather(
    from_ptr, index_ptr, to_ptr, stride_from, stride_to, width, FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr + row).to(tl.int64)
    num_read = tl.where(index >= 0, width, 0)
    dim_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_D = tl.load(from_ptr + index * stride_from + dim_D, mask=dim_D < num_read, other=FILL)
    tl.store(to_ptr + row * stride_to + dim_D, x_D, mask=dim_D < width)


@triton.jit
def _scatter(
    from_ptr, index_ptr, to_ptr, stride_from, stride_to, width, FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr + row).to(tl.int64)
    if index < 0:
        return
    dim_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_D = dim_D < width
    x_D = tl.load(from_ptr + row * stride_from + dim_D, mask=mask_D)
    tl.store(to_ptr + index * stride_to + dim_D, x_D, mask=mask_D)


@triton.jit
def draw(position_B, token_B, number_B, offset):
    """Draw by the finaliser of SplitMix64, all int64; unsigned numbers wrap, and shift in zeros.

    number_B  the recursion, counted from 1
    offset    seed x its factor, wrapped
    """
    state_B = position_B.to(tl.uint64) * _POSITION + token_B.to(tl.uint64) * _TOKEN
    state_B += number_B.to(tl.uint64) * _RECURSION + offset.to(tl.int64).to(tl.uint64)
    state_B = (state_B ^ (state_B >> 30)) * _MIX_1
    state_B = (state_B ^ (state_B >> 27)) * _MIX_2
    state_B = state_B ^ (state_B >> 31)
    return (state_B >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit(do_not_specialize=["offset"])
def _hash_uniform(
    position_ptr, token_ptr, recursion_ptr, out_ptr, offset, num_rows,
    HAS_RECURSIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_B = row_B < num_rows
    # sign first, then bits: a position of -1 is 2^64 - 1, as in the twin
    position_B = tl.load(position_ptr + row_B, mask=inside_B, other=0).to(tl.int64)
    token_B = tl.load(token_ptr + row_B, mask=inside_B, other=0).to(tl.int64)
    number_B = tl.zeros_like(position_B)
    if HAS_RECURSIONS:
        number_B = tl.load(recursion_ptr + row_B, mask=inside_B, other=0).to(tl.int64) + 1
    tl.store(out_ptr + row_B, draw(position_B, token_B, number_B, offset), mask=inside_B)
