"""What a captured tick does between its layers, a launch each: find places, join and route, go on.

One tick takes few rows through layers that are bound by their launches, so some 150 small operators
around them cost as much as the layers. Twins in plain PyTorch: the methods of
`mor.engine.device_tick.DeviceTick` that call these on a GPU.
Shapes: N rows, D width, R recursions, C tables of a request, T tables of all requests, M pages of
the longest table, W tokens that end an answer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.ops.select import ODD, wrap
from mor.ops.triton.select import draw

ROWS = 32
"""rows of a program in kernels that treat a row by a few numbers"""

Kind = Literal["own", "first", "each"]


class Places(NamedTuple):
    """Where rows read and write, as `LayerRows` has it."""

    position_N: Tensor
    recursion_N: Tensor
    table_N: Tensor
    count_N: Tensor
    slot_N: Tensor


def locate(
    slot_N: Tensor,
    position_N: Tensor,
    recursion_N: Tensor,
    count_NC: Tensor,
    is_in_N: Tensor,
    tables_TM: Tensor,
    *,
    page_tokens: int,
    kind: Kind,
) -> Places:
    """Find table, count and place of every row; rows that are not in see no key and leave none.

    kind      own: table 0, a token's place is its position; first: table 1 likewise, and only
              recursion 1 leaves keys; each: the recursion's table, its place is the count, which
              grows by one here
    Returns   int32, but slots int64
    """
    N, C = count_NC.shape
    small = [torch.empty_like(position_N, dtype=torch.int32) for _ in range(4)]
    places = Places(small[0], small[1], small[2], small[3], torch.empty_like(position_N))
    _locate[(triton.cdiv(N, ROWS),)](
        slot_N, position_N, recursion_N, count_NC, is_in_N, tables_TM, *places, N,
        C=C, M=tables_TM.shape[1], P=page_tokens, KIND=kind, ROWS=ROWS, num_warps=1,
    )  # fmt: skip
    return places


def join_and_ask(
    x_ND: Tensor,
    block_ND: Tensor,
    weight_RD: Tensor,
    bias_R: Tensor | None,
    threshold_NR: Tensor,
    *,
    recursion_N: Tensor,
    limit_N: Tensor,
    is_alive_N: Tensor,
    gating: str,
    factor: float,
    shares_R: Tensor | None,
    position_N: Tensor,
    token_N: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Join what the block made to the stream by the recursion's gate; ask the next one's router.

    weight_RD, bias_R  routers of one linear score, fp32
    gating             weighted or residual, with factor x sigmoid(score) for the gate
    shares_R           float64, the shares that go on at a random router; None to ask thresholds
    Returns            states, of rows that are not alive as they were, and who goes on (bool)
    """
    (N, D), R = x_ND.shape, len(weight_RD)
    joined_ND = torch.empty_like(x_ND)
    goes_on_N = torch.empty_like(is_alive_N)
    _join_and_ask[(N,)](
        x_ND, block_ND, weight_RD, weight_RD if bias_R is None else bias_R,
        threshold_NR if shares_R is None else shares_R, recursion_N, limit_N, is_alive_N,
        position_N, token_N, joined_ND, goes_on_N,
        x_ND.stride(0), block_ND.stride(0), factor, wrap(seed * ODD[2]),
        HAS_BIAS=bias_R is not None, IS_RESIDUAL=gating == "residual",
        IS_RANDOM=shares_R is not None, D=D, R=R, BLOCK_D=triton.next_power_of_2(D),
        num_warps=4 if D <= 2048 else 8,
    )  # fmt: skip
    return joined_ND, goes_on_N


def advance(
    drawn_N: Tensor,
    goes_on_N: Tensor,
    end_NW: Tensor,
    last_N: Tensor,
    *,
    is_alive_N: Tensor,
    recursion_N: Tensor,
    position_N: Tensor,
    token_N: Tensor,
    length_N: Tensor,
    record_N2: Tensor,
    went_on: int,
    idle: int,
) -> Tensor:
    """Bring rows to their next recursion, or to the token that was drawn, in place.

    end_NW, last_N  tokens that end an answer, and the length that does
    record_N2       gets what was drawn, or went_on or idle, and the recursions done
    Returns         bool, rows that begin with a new token
    """
    N, W = end_NW.shape
    enters_N = torch.empty_like(goes_on_N)
    _advance[(triton.cdiv(N, ROWS),)](
        drawn_N, goes_on_N, end_NW, last_N, is_alive_N, recursion_N, position_N, token_N, length_N,
        record_N2, enters_N, N, WENT_ON=went_on, IDLE=idle, W=W, ROWS=ROWS, num_warps=1,
    )  # fmt: skip
    return enters_N


@triton.jit
def _locate(
    slot_ptr, position_ptr, recursion_ptr, count_ptr, is_in_ptr, tables_ptr,
    position_out, recursion_out, table_out, count_out, slot_out, N,
    C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    position = tl.load(position_ptr + row, mask=is_row, other=0)
    recursion = tl.load(recursion_ptr + row, mask=is_row, other=0)
    is_in = tl.load(is_in_ptr + row, mask=is_row, other=0).to(tl.int1)
    table = tl.load(slot_ptr + row, mask=is_row, other=0) * C
    place = position
    makes = is_in
    if KIND == "first":
        table += 1
        makes = is_in & (recursion == 0)
    if KIND == "each":
        table += 1 + recursion
        at = count_ptr + row * C + 1 + recursion
        place = tl.load(at, mask=is_row, other=0)
        tl.store(at, place + is_in.to(tl.int64), mask=is_row)
    page = tl.load(tables_ptr + table * M + place // P, mask=is_row, other=0).to(tl.int64)
    slot = tl.where(makes, page * P + place % P, -1)
    tl.store(position_out + row, position.to(tl.int32), mask=is_row)
    tl.store(recursion_out + row, recursion.to(tl.int32), mask=is_row)
    tl.store(table_out + row, table.to(tl.int32), mask=is_row)
    tl.store(count_out + row, tl.where(is_in, place + 1, 0).to(tl.int32), mask=is_row)
    tl.store(slot_out + row, slot, mask=is_row)


@triton.jit(do_not_specialize=["offset"])
def _join_and_ask(
    x_ptr, block_ptr, weight_ptr, bias_ptr, ask_ptr, recursion_ptr, limit_ptr, is_alive_ptr,
    position_ptr, token_ptr, joined_ptr, goes_on_ptr,
    stride_x, stride_block, factor, offset,
    HAS_BIAS: tl.constexpr, IS_RESIDUAL: tl.constexpr, IS_RANDOM: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Join and route one row."""
    row = tl.program_id(0).to(tl.int64)
    dim_D = tl.arange(0, BLOCK_D)
    mask_D = dim_D < D
    recursion = tl.load(recursion_ptr + row)
    is_alive = tl.load(is_alive_ptr + row).to(tl.int1)
    dtype = joined_ptr.dtype.element_ty
    x_D = tl.load(x_ptr + row * stride_x + dim_D, mask=mask_D, other=0.0).to(tl.float32)
    block_D = tl.load(block_ptr + row * stride_block + dim_D, mask=mask_D, other=0.0).to(tl.float32)
    weight_D = tl.load(weight_ptr + recursion * D + dim_D, mask=mask_D, other=0.0).to(tl.float32)
    score = tl.sum(x_D * weight_D, 0)
    if HAS_BIAS:
        score += tl.load(bias_ptr + recursion).to(tl.float32)
    gate = (factor * tl.sigmoid(score)).to(dtype).to(tl.float32)
    if IS_RESIDUAL:
        block_D -= x_D
    joined_D = tl.where(is_alive, x_D + gate * block_D, x_D).to(dtype)
    tl.store(joined_ptr + row * D + dim_D, joined_D, mask=mask_D)

    following = tl.minimum(recursion + 1, R - 1)
    if IS_RANDOM:
        position, token = tl.load(position_ptr + row), tl.load(token_ptr + row)
        goes_on = draw(position, token, following + 1, offset) < tl.load(ask_ptr + following)
    else:
        weight_D = tl.load(weight_ptr + following * D + dim_D, mask=mask_D, other=0.0)
        score = tl.sum(joined_D.to(tl.float32) * weight_D.to(tl.float32), 0)
        if HAS_BIAS:
            score += tl.load(bias_ptr + following).to(tl.float32)
        goes_on = score.to(tl.float64) > tl.load(ask_ptr + row * R + following)
    goes_on = goes_on & is_alive & (recursion + 1 < tl.load(limit_ptr + row))
    tl.store(goes_on_ptr + row, goes_on)


@triton.jit
def _advance(
    drawn_ptr, goes_on_ptr, end_ptr, last_ptr, is_alive_ptr, recursion_ptr, position_ptr, token_ptr,
    length_ptr, record_ptr, enters_ptr, N,
    WENT_ON: tl.constexpr, IDLE: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    drawn = tl.load(drawn_ptr + row, mask=is_row, other=-1)
    is_alive = tl.load(is_alive_ptr + row, mask=is_row, other=0).to(tl.int1)
    goes_on = tl.load(goes_on_ptr + row, mask=is_row, other=0).to(tl.int1)
    recursion = tl.load(recursion_ptr + row, mask=is_row, other=0)
    leaves = is_alive & (goes_on == 0)
    length = tl.load(length_ptr + row, mask=is_row, other=0) + leaves.to(tl.int64)
    goes_further = (drawn >= 0) & (length < tl.load(last_ptr + row, mask=is_row, other=0))
    for which in tl.static_range(W):
        end = tl.load(end_ptr + row * W + which, mask=is_row, other=-1)
        goes_further = goes_further & (drawn != end)
    enters = leaves & goes_further
    code = tl.where(leaves, drawn, tl.where(goes_on, WENT_ON, IDLE))
    tl.store(record_ptr + row * 2, code, mask=is_row)
    tl.store(record_ptr + row * 2 + 1, tl.where(is_alive, recursion + 1, 0), mask=is_row)
    recursion = tl.where(goes_on, recursion + 1, tl.where(enters, 0, recursion))
    tl.store(length_ptr + row, length, mask=is_row)
    tl.store(token_ptr + row, drawn, mask=is_row & enters)
    position = tl.load(position_ptr + row, mask=is_row, other=0) + enters.to(tl.int64)
    tl.store(position_ptr + row, position, mask=is_row)
    tl.store(recursion_ptr + row, recursion, mask=is_row)
    tl.store(is_alive_ptr + row, goes_on | enters, mask=is_row)
    tl.store(enters_ptr + row, enters, mask=is_row)
