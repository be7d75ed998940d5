"""What both attention kernels do: find a block of keys in its pages, take one step of the softmax.

Shapes: M queries of a tile, S keys of a block, K head size, P tokens of a page. kv is one layer's
pages, (pages, 2, G, P, K), keys at 0 and values at 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Scores below this are as good as none. Finite, so that a row without keys never makes inf - inf.
LOWEST = tl.constexpr(-1e38)


@triton.jit
def load_block(
    head_ptr,
    table_ptr,
    key_S,
    num_keys,
    stride_page,
    stride_value,
    stride_token,
    P: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load keys and values of a table's tokens key_S, (S, BLOCK_K) each; zeros from num_keys on.

    The page of every token is looked up, so a page may hold any number of tokens and a block may
    begin anywhere in one. Nothing is read past num_keys: neither the table nor the pages.
    """
    is_key_S = key_S < num_keys
    page_S = tl.load(table_ptr + key_S // P, mask=is_key_S, other=0).to(tl.int64)
    dim_K = tl.arange(0, BLOCK_K)
    mask_SK = is_key_S[:, None] & (dim_K < K)[None, :]
    place_S = page_S * stride_page + (key_S % P) * stride_token
    ptr_SK = head_ptr + place_S[:, None] + dim_K[None, :]
    k_SK = tl.load(ptr_SK, mask=mask_SK, other=0.0)
    v_SK = tl.load(ptr_SK + stride_value, mask=mask_SK, other=0.0)
    return k_SK, v_SK


@triton.jit
def softmax_step(q_MK, k_SK, v_SK, is_seen, scale, high_M, total_M, acc_MK, DOT: tl.constexpr):
    """Add a block of keys to the running softmax in base 2.

    is_seen  True where a query sees a key; broadcasts to (M, S)
    scale    log2(e) / sqrt(K)
    Returns  highest score, sum of weights, weighted sum of values: fp32
    Source   Milakov and Gimelshein, arXiv 1805.02867
    """
    # ieee: fp32 stays fp32 where the hardware would multiply in tf32; other types do not care
    score_MS = tl.dot(q_MK.to(DOT), tl.trans(k_SK).to(DOT), input_precision="ieee") * scale
    score_MS = tl.where(is_seen, score_MS, float("-inf"))
    new_high_M = tl.maximum(high_M, tl.max(score_MS, 1))
    weight_MS = tl.exp2(score_MS - new_high_M[:, None])
    shrink_M = tl.exp2(high_M - new_high_M)
    total_M = total_M * shrink_M + tl.sum(weight_MS, 1)
    weight_MS = weight_MS.to(v_SK.dtype).to(DOT)
    acc_MK = tl.dot(weight_MS, v_SK.to(DOT), acc_MK * shrink_M[:, None], input_precision="ieee")
    return new_high_M, total_M, acc_MK


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the type in which tiles are multiplied: their own, except in the interpreter.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        dtype
    ]


def check_pages(q_NHK: Tensor, kv: Tensor, tables_TM: Tensor, *rows_N: Tensor) -> int:
    """Check what the attention kernels take for granted; return query heads per key head."""
    heads, key_heads = q_NHK.shape[1], kv.shape[2]
    assert kv.shape[1] == 2 and kv.shape[4] == q_NHK.shape[2], (kv.shape, q_NHK.shape)
    assert heads % key_heads == 0, (heads, key_heads)
    assert q_NHK.dtype == kv.dtype, (q_NHK.dtype, kv.dtype)
    assert all(row_N.is_contiguous() for row_N in rows_N)
    assert q_NHK.stride(2) == kv.stride(4) == tables_TM.stride(1) == 1
    return heads // key_heads
