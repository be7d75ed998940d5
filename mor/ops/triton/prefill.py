"""Attention of a prompt's rows to paged keys, many rows at a time.

Rows of a chunk share a table, so a tile of them reads every key once.
Shapes: N rows, H query heads, G key heads, K head size, T tables, M pages of a table, P tokens of a
page, W tiles, Q queries of a tile (its rows times the heads of a group). kv is one layer's pages,
(pages, 2, G, P, K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.ops.triton.blocks import LOWEST, check_pages, dot_dtype, load_block, softmax_step

# Queries of a tile, and keys of a block. Small tiles: a small model has few heads to fill a GPU.
QUERIES = 64
KEYS = 64


class Tiles(NamedTuple):
    """Consecutive rows that share a table; int32, made by the host when it schedules."""

    start_W: Tensor
    rows_W: Tensor
    """at most `rows_per_tile`; 0 in a padded tile"""
    table_W: Tensor

    def to(self, device: torch.device) -> Tiles:
        """Copy all three to a device at once."""
        return Tiles(*torch.stack(self).to(device, non_blocking=True))


def rows_per_tile(group: int) -> int:
    """Return how many rows fit a tile, for query heads per key head."""
    assert 1 <= group <= QUERIES, group
    return QUERIES // group


def plan_tiles(table_N: Sequence[int], *, group: int, num_tiles: int | None = None) -> Tiles:
    """Cut rows into tiles, on the host.

    table_N    table of every row; equal neighbours are joined
    group      query heads per key head
    num_tiles  pad to so many tiles, for a captured graph
    """
    most = rows_per_tile(group)
    tiles: list[tuple[int, int, int]] = []
    for row, table in enumerate(table_N):
        start, rows, last_table = tiles[-1] if tiles else (0, most, 0)
        if table == last_table and rows < most:
            tiles[-1] = (start, rows + 1, table)
        else:
            tiles.append((row, 1, table))
    if num_tiles is not None:
        assert len(tiles) <= num_tiles, (len(tiles), num_tiles)
        tiles += [(0, 0, 0)] * (num_tiles - len(tiles))
    return Tiles(*torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3).T.contiguous())


def paged_prefill(
    q_NHK: Tensor,
    kv: Tensor,
    tables_TM: Tensor,
    count_N: Tensor,
    tiles: Tiles,
    *,
    out_NHK: Tensor | None = None,
) -> Tensor:
    """Attend every row of the tiles to the first count tokens of its tile's table.

    q_NHK      queries; any strides over rows and heads
    kv         (pages, 2, G, P, K) of q's type, any strides but the last
    tables_TM  int32 page ids; entries that no row's count reaches may hold anything
    count_N    int32, keys that each row sees, in any order; 0 writes zeros
    tiles      every row belongs to one tile; rows of no tile are not written
    out_NHK    where to write; a new tensor if None
    Returns    (N, H, K) of q's type; softmax in fp32
    Cost       reads 2 G K x itemsize bytes for every key up to a tile's highest count, once a tile,
               and multiplies by as many keys in every row of it. No host sync
    Source     tiling: FlashAttention, arXiv 2307.08691
    """
    (_, _, K), (_, _, G, P, _) = q_NHK.shape, kv.shape
    group = check_pages(q_NHK, kv, tables_TM, count_N, *tiles)
    assert group <= QUERIES, group
    # fp32 has no tensor cores here: smaller blocks and more warps keep it in registers
    is_wide = q_NHK.dtype == torch.float32
    out_NHK = torch.empty_like(q_NHK) if out_NHK is None else out_NHK
    assert out_NHK.stride(2) == 1
    _attend_tile[(len(tiles.start_W), G)](
        q_NHK, kv, tables_TM, count_N, *tiles, out_NHK,
        math.log2(math.e) / math.sqrt(K),
        q_NHK.stride(0), q_NHK.stride(1), *kv.stride()[:4], tables_TM.stride(0),
        out_NHK.stride(0), out_NHK.stride(1),
        GROUP=group, P=P, K=K, QUERIES=QUERIES, BLOCK_K=max(16, triton.next_power_of_2(K)),
        KEYS=KEYS // 2 if is_wide else KEYS, DOT=dot_dtype(q_NHK.dtype),
        num_warps=8 if is_wide else 4, num_stages=3,
    )  # fmt: skip
    return out_NHK


@triton.jit
def _attend_tile(
    q_ptr, kv_ptr, tables_ptr, count_ptr, start_ptr, rows_ptr, table_ptr, out_ptr,
    scale,
    stride_q, stride_q_head, stride_page, stride_value, stride_head, stride_token, stride_table,
    stride_out, stride_out_head,
    GROUP: tl.constexpr, P: tl.constexpr, K: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_K: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attend one tile's heads of one key head to all keys that any of its rows sees."""
    tile, key_head = tl.program_id(0), tl.program_id(1)
    num_rows = tl.load(rows_ptr + tile)
    if num_rows == 0:
        return
    # the heads of a row are neighbours: three heads waste one query of 64, not one in four
    query_Q = tl.arange(0, QUERIES)
    is_query_Q = query_Q < num_rows * GROUP
    row_Q = (tl.load(start_ptr + tile) + query_Q // GROUP).to(tl.int64)
    head_Q = key_head * GROUP + query_Q % GROUP
    dim_K = tl.arange(0, BLOCK_K)
    mask_QK = is_query_Q[:, None] & (dim_K < K)[None, :]
    place_Q = row_Q * stride_q + head_Q * stride_q_head
    q_QK = tl.load(q_ptr + place_Q[:, None] + dim_K[None, :], mask=mask_QK, other=0.0)
    count_Q = tl.load(count_ptr + row_Q, mask=is_query_Q, other=0)
    num_keys = tl.max(count_Q, 0)
    table = tl.load(table_ptr + tile).to(tl.int64)
    tables_ptr += table * stride_table
    kv_ptr += key_head.to(tl.int64) * stride_head

    high_Q = tl.full([QUERIES], LOWEST, tl.float32)
    total_Q = tl.zeros([QUERIES], tl.float32)
    acc_QK = tl.zeros([QUERIES, BLOCK_K], tl.float32)
    for start in range(0, num_keys, KEYS):
        key_S = start + tl.arange(0, KEYS)
        k_SK, v_SK = load_block(
            kv_ptr, tables_ptr, key_S, num_keys, stride_page, stride_value, stride_token,
            P, K, BLOCK_K,
        )  # fmt: skip
        is_seen_QS = key_S[None, :] < count_Q[:, None]
        high_Q, total_Q, acc_QK = softmax_step(
            q_QK, k_SK, v_SK, is_seen_QS, scale, high_Q, total_Q, acc_QK, DOT
        )

    out_QK = acc_QK / tl.where(total_Q > 0, total_Q, 1.0)[:, None]
    place_Q = row_Q * stride_out + head_Q * stride_out_head
    ptr_QK = out_ptr + place_Q[:, None] + dim_K[None, :]
    tl.store(ptr_QK, out_QK.to(out_ptr.dtype.element_ty), mask=mask_QK)
