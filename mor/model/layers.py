"""Llama's layer in plain torch.nn, with transformers' weight names.

Shapes: N rows (any leading shape works), D width, H query heads, G key heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mor.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_NHK, k_NGK, v_NGK) -> out_NHK: attention among the rows that a view decides."""


class Rotary(NamedTuple):
    """Cosine and sine of every row's angles, (N, 1, K): one pair serves all layers."""

    cos_N1K: Tensor
    sin_N1K: Tensor

    def take(self, index_A: Tensor) -> Rotary:
        return Rotary(self.cos_N1K[index_A], self.sin_N1K[index_A])


def rotary_angles(position_N: Tensor, config: ModelConfig, *, dtype: torch.dtype) -> Rotary:
    """Compute half-split rotary factors at the rows' original positions, in fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    half = torch.arange(0, config.head_dim, 2, dtype=wide, device=position_N.device)
    frequency = config.rope_theta ** (-half / config.head_dim)
    angle_NK = position_N[..., None].to(wide) * frequency
    angle_N1K = torch.cat((angle_NK, angle_NK), dim=-1)[..., None, :]
    return Rotary(angle_N1K.cos().to(dtype), angle_N1K.sin().to(dtype))


def rotate(x_NHK: Tensor, rotary: Rotary) -> Tensor:
    """Turn every head by its row's angles (half-split, as in transformers' Llama)."""
    low, high = x_NHK.chunk(2, dim=-1)
    return x_NHK * rotary.cos_N1K + torch.cat((-high, low), dim=-1) * rotary.sin_N1K


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.rms_norm(x_ND, self.weight.shape, self.weight.to(x_ND.dtype), self.eps)


class Attention(nn.Module):
    """Projections of grouped-query attention; who sees whom is the caller's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x_ND: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        heads = (-1, self.head_dim)
        q_NHK = rotate(self.q_proj(x_ND).unflatten(-1, heads), rotary)
        k_NGK = rotate(self.k_proj(x_ND).unflatten(-1, heads), rotary)
        v_NGK = self.v_proj(x_ND).unflatten(-1, heads)
        return self.o_proj(attend(q_NHK, k_NGK, v_NGK).flatten(-2))


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_ND: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND), rotary, attend)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))
