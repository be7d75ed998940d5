"""Grouped-query attention over padded rows: a plain twin by matrix products, and the fast one.

Shapes: B sequences, Q queries, S keys, H query heads, G key heads (H = G x group), K head size.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which torch prefers on Hopper: it plans every new shape anew, and here most
shapes come once; and its gradients under a mask may be NaN (pytorch issue 196678)."""


def attention_reference(
    q_BQHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    visible_BQS: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Softmax attention written as matrix products over full squares.

    visible_BQS  True where a query may see a key; every query must see at least one
    is_causal    query i sees keys 0..i (then Q = S)
    Returns      (B, Q, H, K) in the type of q
    """
    q_BHQK, k_BHSK, v_BHSK = _by_head(q_BQHK, k_BSGK, v_BSGK)
    score_BHQS = q_BHQK @ k_BHSK.transpose(2, 3) / math.sqrt(q_BQHK.shape[-1])
    if is_causal:
        side = torch.ones(score_BHQS.shape[-2:], dtype=torch.bool, device=q_BQHK.device)
        score_BHQS = score_BHQS.masked_fill(~side.tril(), -math.inf)
    if visible_BQS is not None:
        score_BHQS = score_BHQS.masked_fill(~visible_BQS[:, None], -math.inf)
    return (score_BHQS.softmax(-1) @ v_BHSK).transpose(1, 2)


def attention(
    q_BQHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    visible_BQS: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Same numbers as `attention_reference`, through PyTorch's fused attention."""
    B, Q, H, K = q_BQHK.shape
    G = k_BSGK.shape[2]
    if Q == 1 and not is_causal:
        # One query a sequence: the heads of a group become the queries of their key head, so keys
        # and values are read once and never expanded (5 to 6 times faster on CPU).
        mask = None if visible_BQS is None else visible_BQS[:, None]
        out_BGgK = _fused(
            q_BQHK.reshape(B, G, H // G, K),
            k_BSGK.transpose(1, 2),
            v_BSGK.transpose(1, 2),
            attn_mask=mask,
        )
        return out_BGgK.reshape(B, 1, H, K)
    q_BHQK, k_BHSK, v_BHSK = _by_head(q_BQHK, k_BSGK, v_BSGK)
    mask = None if visible_BQS is None else visible_BQS[:, None]
    return _fused(q_BHQK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=is_causal).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(BACKENDS) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options)


def serves_documents(q_NHK: Tensor) -> bool:
    """Tell whether `documents_attention` takes such queries: halves, on a GPU from Ampere on."""
    if not q_NHK.is_cuda or q_NHK.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = q_NHK.shape[-1]
    is_new = torch.cuda.get_device_capability(q_NHK.device) >= (8, 0)
    return is_new and head_dim % 8 == 0 and head_dim <= 256


def documents_attention(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """Attend causally within documents that lie one after the other, without padding.

    offsets  (D + 1) int32: each document's first row, and N
    longest  rows of the longest
    Twin     `attention` for each document apart
    """
    # What torch.nn.attention.varlen runs; that wrapper's arguments differ from release to release.
    args = (q_NHK, k_NGK, v_NGK, offsets, offsets, longest, longest, 0.0, True, False)
    return torch.ops.aten._flash_attention_forward(*args)[0]


def _by_head(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring heads before tokens and repeat every key head for its group of query heads."""
    group = q_BQHK.shape[2] // k_BSGK.shape[2]
    k, v = k_BSGK, v_BSGK
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    return q_BQHK.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
