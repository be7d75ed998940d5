"""Write keys and values to their places in the pages, turning them by their positions on the way.

Shapes: N rows, H query heads, G key heads, K head size, P tokens of a page, C positions. kv is one
layer's pages, (pages, 2, G, P, K); a slot is page x P + offset, -1 where nothing is to be stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def store(k_NGK: Tensor, v_NGK: Tensor, kv: Tensor, slot_N: Tensor) -> None:
    """Write every row's keys and values to its slot; rows with slot -1 are skipped.

    k_NGK, v_NGK  of kv's type, any strides over rows and heads
    kv            (pages, 2, G, P, K), written in place, any strides but the last
    slot_N        int64; no slot twice
    """
    _check(k_NGK, v_NGK, kv, slot_N)
    N, G, K = k_NGK.shape
    _store[(N,)](
        k_NGK, v_NGK, kv, slot_N, *k_NGK.stride()[:2], *v_NGK.stride()[:2], *kv.stride()[:4],
        G=G, P=kv.shape[3], K=K,
        BLOCK_G=triton.next_power_of_2(G), BLOCK_K=triton.next_power_of_2(K), num_warps=2,
    )  # fmt: skip


def rotate_and_store(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGK: Tensor,
    kv: Tensor,
    slot_N: Tensor,
    *,
    cos_CK: Tensor,
    sin_CK: Tensor,
    position_N: Tensor,
) -> Tensor:
    """Turn queries and keys by their positions, store keys and values; the rest as in `store`.

    cos_CK, sin_CK  factors of every position, fp32 where it matters; both halves of K are equal, so
                    only the first is read
    position_N      int32 or int64, 0 <= position < C, also where the slot is -1
    Returns         turned queries (N, H, K); products in fp32, rounded once
    Source          half-split rotary embedding, as `rotate` in mor/model/layers.py
    """
    _check(k_NGK, v_NGK, kv, slot_N)
    return _rotate(q_NHK, (k_NGK, v_NGK, kv, slot_N), cos_CK, sin_CK, position_N)


def rotate(q_NHK: Tensor, *, cos_CK: Tensor, sin_CK: Tensor, position_N: Tensor) -> Tensor:
    """Turn queries alone, where no keys are made; arguments as in `rotate_and_store`."""
    return _rotate(q_NHK, None, cos_CK, sin_CK, position_N)


def _rotate(
    q_NHK: Tensor,
    stored: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    cos_CK: Tensor,
    sin_CK: Tensor,
    position_N: Tensor,
) -> Tensor:
    N, H, K = q_NHK.shape
    assert K % 2 == 0 and position_N.is_contiguous(), K
    assert q_NHK.stride(2) == cos_CK.stride(1) == sin_CK.stride(1) == 1
    out_NHK = torch.empty((N, H, K), dtype=q_NHK.dtype, device=q_NHK.device)
    # without keys the kernel never touches these
    k_NGK, v_NGK, kv, slot_N = stored or (q_NHK, q_NHK, q_NHK, position_N)
    G, P = (kv.shape[2], kv.shape[3]) if stored else (1, 1)
    kv_strides = kv.stride()[:4] if stored else (0, 0, 0, 0)
    _rotate_row[(N,)](
        q_NHK, k_NGK, v_NGK, out_NHK, kv, slot_N, position_N, cos_CK, sin_CK,
        *q_NHK.stride()[:2], *k_NGK.stride()[:2], *v_NGK.stride()[:2], *kv_strides,
        cos_CK.stride(0), sin_CK.stride(0),
        HAS_KEYS=stored is not None, H=H, G=G, P=P, HALF=K // 2,
        BLOCK_H=triton.next_power_of_2(H), BLOCK_G=triton.next_power_of_2(G),
        BLOCK_HALF=triton.next_power_of_2(K // 2), num_warps=4,
    )  # fmt: skip
    return out_NHK


def _check(k_NGK: Tensor, v_NGK: Tensor, kv: Tensor, slot_N: Tensor) -> None:
    assert slot_N.is_contiguous()
    assert k_NGK.shape == v_NGK.shape, (k_NGK.shape, v_NGK.shape)
    assert kv.shape[1:3] == (2, k_NGK.shape[1]) and kv.shape[4] == k_NGK.shape[2], kv.shape
    assert k_NGK.dtype == v_NGK.dtype == kv.dtype, (k_NGK.dtype, v_NGK.dtype, kv.dtype)
    assert k_NGK.stride(2) == v_NGK.stride(2) == kv.stride(4) == 1


@triton.jit
def _slot_ptr(kv_ptr, slot, stride_page, stride_token, P: tl.constexpr):
    slot = slot.to(tl.int64)
    return kv_ptr + (slot // P) * stride_page + (slot % P) * stride_token


@triton.jit
def _store(
    k_ptr, v_ptr, kv_ptr, slot_ptr,
    stride_k, stride_k_head, stride_v, stride_v_head,
    stride_page, stride_value, stride_head, stride_token,
    G: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    if slot < 0:
        return
    head_G1 = tl.arange(0, BLOCK_G)[:, None]
    dim_1K = tl.arange(0, BLOCK_K)[None, :]
    mask_GK = (head_G1 < G) & (dim_1K < K)
    k_GK = tl.load(k_ptr + row * stride_k + head_G1 * stride_k_head + dim_1K, mask=mask_GK)
    v_GK = tl.load(v_ptr + row * stride_v + head_G1 * stride_v_head + dim_1K, mask=mask_GK)
    to_ptr = _slot_ptr(kv_ptr, slot, stride_page, stride_token, P)
    to_GK = to_ptr + head_G1.to(tl.int64) * stride_head + dim_1K
    tl.store(to_GK, k_GK, mask=mask_GK)
    tl.store(to_GK + stride_value, v_GK, mask=mask_GK)


@triton.jit
def _rotate_heads(from_ptr, to_ptr, cos, sin, mask, HALF: tl.constexpr):
    """Turn heads: (low, high) becomes (low cos - high sin, high cos + low sin)."""
    low = tl.load(from_ptr, mask=mask).to(tl.float32)
    high = tl.load(from_ptr + HALF, mask=mask).to(tl.float32)
    dtype = to_ptr.dtype.element_ty
    tl.store(to_ptr, (low * cos - high * sin).to(dtype), mask=mask)
    tl.store(to_ptr + HALF, (high * cos + low * sin).to(dtype), mask=mask)


@triton.jit
def _rotate_row(
    q_ptr, k_ptr, v_ptr, out_ptr, kv_ptr, slot_ptr, position_ptr, cos_ptr, sin_ptr,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head,
    stride_page, stride_value, stride_head, stride_token, stride_cos, stride_sin,
    HAS_KEYS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Turn one row's queries and keys, store its keys and values."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row).to(tl.int64)
    dim_1K = tl.arange(0, BLOCK_HALF)[None, :]
    is_dim_1K = dim_1K < HALF
    cos_1K = tl.load(cos_ptr + position * stride_cos + dim_1K, mask=is_dim_1K).to(tl.float32)
    sin_1K = tl.load(sin_ptr + position * stride_sin + dim_1K, mask=is_dim_1K).to(tl.float32)

    head_H1 = tl.arange(0, BLOCK_H)[:, None]
    from_HK = q_ptr + row * stride_q + head_H1 * stride_q_head + dim_1K
    to_HK = out_ptr + row * (H * 2 * HALF) + head_H1 * (2 * HALF) + dim_1K
    _rotate_heads(from_HK, to_HK, cos_1K, sin_1K, (head_H1 < H) & is_dim_1K, HALF)

    if HAS_KEYS:
        slot = tl.load(slot_ptr + row)
        if slot >= 0:
            head_G1 = tl.arange(0, BLOCK_G)[:, None]
            mask_GK = (head_G1 < G) & is_dim_1K
            to_ptr = _slot_ptr(kv_ptr, slot, stride_page, stride_token, P)
            to_GK = to_ptr + head_G1.to(tl.int64) * stride_head + dim_1K
            from_GK = k_ptr + row * stride_k + head_G1 * stride_k_head + dim_1K
            _rotate_heads(from_GK, to_GK, cos_1K, sin_1K, mask_GK, HALF)
            from_GK = v_ptr + row * stride_v + head_G1 * stride_v_head + dim_1K
            to_GK += stride_value
            tl.store(to_GK, tl.load(from_GK, mask=mask_GK), mask=mask_GK)
            tl.store(to_GK + HALF, tl.load(from_GK + HALF, mask=mask_GK), mask=mask_GK)
