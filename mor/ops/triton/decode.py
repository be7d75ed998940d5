"""Attention of single rows to long paged keys, the keys split over many programs.

Shapes: N rows, H query heads, G key heads, K head size, T tables, M pages of a table, P tokens of a
page, Z splits. kv is one layer's pages, (pages, 2, G, P, K).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.ops.triton.blocks import LOWEST, check_pages, dot_dtype, load_block, softmax_step

# Keys of a block. A split holds whole blocks, so a row has no more splits than blocks.
KEYS = 64
# Tensor cores want 16 rows; the heads of a group fill the first of them.
LEAST_ROWS = 16


def paged_decode(
    q_NHK: Tensor,
    kv: Tensor,
    tables_TM: Tensor,
    table_N: Tensor,
    count_N: Tensor,
    *,
    num_splits: int,
    out_NHK: Tensor | None = None,
) -> Tensor:
    """Attend every row to the first count tokens of its table.

    q_NHK       queries; any strides over rows and heads
    kv          (pages, 2, G, P, K) of q's type, any strides but the last
    tables_TM   int32 page ids; entries that no row's count reaches may hold anything
    table_N     int32, the table of each row; not read where the count is 0
    count_N     int32, keys that each row sees; 0 writes zeros (a padded row of a captured graph)
    num_splits  programs among which a row's keys are divided; a row's numbers depend on this and on
                the row alone, so keep it fixed where the same bits are wanted in every batch
    out_NHK     where to write; a new tensor if None
    Returns     (N, H, K) of q's type; softmax in fp32
    Cost        reads every key and value once for its group of heads, 2 G K x itemsize bytes a key;
                with splits also writes and reads up to num_splits x H x (K + 1) floats a row. No
                host sync
    Source      flash decoding: split keys, join by log-sum-exp
    """
    assert num_splits >= 1, num_splits
    (N, H, K), (_, _, G, P, _) = q_NHK.shape, kv.shape
    group = check_pages(q_NHK, kv, tables_TM, table_N, count_N)
    out_NHK = torch.empty_like(q_NHK) if out_NHK is None else out_NHK
    assert out_NHK.stride(2) == 1
    has_splits = num_splits > 1
    part_NHZK = lse_NHZ = out_NHK
    if has_splits:
        shape = (N, H, num_splits)
        part_NHZK = torch.empty(*shape, K, dtype=torch.float32, device=q_NHK.device)
        lse_NHZ = torch.empty(shape, dtype=torch.float32, device=q_NHK.device)
    block_k = triton.next_power_of_2(K)
    _attend_split[(N, G, num_splits)](
        q_NHK, kv, tables_TM, table_N, count_N, out_NHK, part_NHZK, lse_NHZ,
        math.log2(math.e) / math.sqrt(K),
        q_NHK.stride(0), q_NHK.stride(1), *kv.stride()[:4], tables_TM.stride(0),
        out_NHK.stride(0), out_NHK.stride(1),
        SPLITS=num_splits, GROUP=group, P=P, K=K,
        BLOCK_H=max(LEAST_ROWS, triton.next_power_of_2(group)), BLOCK_K=max(16, block_k),
        KEYS=KEYS, DOT=dot_dtype(q_NHK.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    if has_splits:
        _join_splits[(N, H)](
            part_NHZK, lse_NHZ, count_N, out_NHK, out_NHK.stride(0), out_NHK.stride(1),
            SPLITS=num_splits, BLOCK_Z=triton.next_power_of_2(num_splits),
            K=K, BLOCK_K=block_k, KEYS=KEYS, num_warps=2,
        )  # fmt: skip
    return out_NHK


def pick_splits(num_rows: int, num_key_heads: int, *, max_count: int, num_processors: int) -> int:
    """Divide rows so that every multiprocessor has about two programs, from host numbers alone.

    max_count       most keys that a row of this bucket can have
    num_processors  multiprocessors of the GPU
    """
    wanted = -(-2 * num_processors // max(1, num_rows * num_key_heads))
    return max(1, min(wanted, -(-max_count // (4 * KEYS)), 64))


@triton.jit
def _split_length(count, SPLITS: tl.constexpr, KEYS: tl.constexpr):
    """Keys of a split: whole blocks, as even as they can be."""
    return tl.maximum(tl.cdiv(tl.cdiv(count, SPLITS), KEYS), 1) * KEYS


@triton.jit
def _attend_split(
    q_ptr, kv_ptr, tables_ptr, table_ptr, count_ptr, out_ptr, part_ptr, lse_ptr,
    scale,
    stride_q, stride_q_head, stride_page, stride_value, stride_head, stride_token, stride_table,
    stride_out, stride_out_head,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attend one row's heads of one key head to one split of its keys."""
    row = tl.program_id(0).to(tl.int64)
    key_head, split = tl.program_id(1), tl.program_id(2)
    count = tl.load(count_ptr + row)
    length = _split_length(count, SPLITS, KEYS)
    first = split * length
    if first >= count and SPLITS > 1:
        return
    last = tl.minimum(first + length, count)

    member_H = tl.arange(0, BLOCK_H)
    dim_K = tl.arange(0, BLOCK_K)
    head_H = key_head * GROUP + member_H
    mask_HK = (member_H < GROUP)[:, None] & (dim_K < K)[None, :]
    q_ptr += row * stride_q
    q_HK = tl.load(
        q_ptr + head_H[:, None] * stride_q_head + dim_K[None, :], mask=mask_HK, other=0.0
    )
    table = tl.load(table_ptr + row, mask=count > 0, other=0).to(tl.int64)
    tables_ptr += table * stride_table
    kv_ptr += key_head.to(tl.int64) * stride_head

    high_H = tl.full([BLOCK_H], LOWEST, tl.float32)
    total_H = tl.zeros([BLOCK_H], tl.float32)
    acc_HK = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    for start in range(first, last, KEYS):
        key_S = start + tl.arange(0, KEYS)
        k_SK, v_SK = load_block(
            kv_ptr, tables_ptr, key_S, last, stride_page, stride_value, stride_token, P, K, BLOCK_K
        )
        high_H, total_H, acc_HK = softmax_step(
            q_HK, k_SK, v_SK, (key_S < last)[None, :], scale, high_H, total_H, acc_HK, DOT
        )

    out_HK = acc_HK / tl.where(total_H > 0, total_H, 1.0)[:, None]
    if SPLITS == 1:
        out_ptr += row * stride_out
        ptr_HK = out_ptr + head_H[:, None] * stride_out_head + dim_K[None, :]
        tl.store(ptr_HK, out_HK.to(out_ptr.dtype.element_ty), mask=mask_HK)
    else:
        place_H = (row * tl.num_programs(1) * GROUP + head_H) * SPLITS + split
        tl.store(part_ptr + place_H[:, None] * K + dim_K[None, :], out_HK, mask=mask_HK)
        tl.store(lse_ptr + place_H, high_H + tl.log2(total_H), mask=member_H < GROUP)


@triton.jit
def _join_splits(
    part_ptr, lse_ptr, count_ptr, out_ptr, stride_out, stride_out_head,
    SPLITS: tl.constexpr, BLOCK_Z: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one row and head by their share of the softmax."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    count = tl.load(count_ptr + row)
    num_used = tl.cdiv(count, _split_length(count, SPLITS, KEYS))
    split_Z = tl.arange(0, BLOCK_Z)
    dim_K = tl.arange(0, BLOCK_K)
    is_used_Z = split_Z < num_used
    place_Z = (row * tl.num_programs(1) + head) * SPLITS + split_Z
    lse_Z = tl.load(lse_ptr + place_Z, mask=is_used_Z, other=float("-inf"))
    weight_Z = tl.exp2(lse_Z - tl.maximum(tl.max(lse_Z, 0), LOWEST))
    mask_ZK = is_used_Z[:, None] & (dim_K < K)[None, :]
    part_ZK = tl.load(part_ptr + place_Z[:, None] * K + dim_K[None, :], mask=mask_ZK, other=0.0)
    total = tl.sum(weight_Z, 0)
    out_K = tl.sum(weight_Z[:, None] * part_ZK, 0) / tl.where(total > 0, total, 1.0)
    ptr_K = out_ptr + row * stride_out + head * stride_out_head + dim_K
    tl.store(ptr_K, out_K.to(out_ptr.dtype.element_ty), mask=dim_K < K)
