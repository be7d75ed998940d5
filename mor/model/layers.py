"""Llama's layer in plain torch.nn, with transformers' weight names.

A shared layer may keep norm gains and low-rank additions for each recursion; `recursion` (from 0)
says which. Shapes: N rows (any leading shape works), D width, H query heads, G key heads,
K head size, R recursions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mor.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Attend:
    """Attention of a layer's rows to what a view lets them see."""

    run: Callable[..., Tensor]
    """(q_NHK, k_NGK, v_NGK) -> out_NHK"""
    takes_keys: bool = True
    """False where recursion 1's keys and values serve: then none are made, and run gets None"""


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
    """Root-mean-square norm with a gain, or with one for each recursion, (R, D)."""

    def __init__(self, size: int, eps: float, *, recursions: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(recursions, size) if recursions else torch.ones(size))
        self.eps = eps

    def forward(self, x_ND: Tensor, recursion: int = 0) -> Tensor:
        gain_D = self.weight if self.weight.dim() == 1 else self.weight[recursion]
        return F.rms_norm(x_ND, gain_D.shape, gain_D.to(x_ND.dtype), self.eps)


class Projection(nn.Linear):
    """Linear map, plus a low-rank addition of each recursion's own.

    x W^T + b (where there is one) + alpha / rank x A_r^T B_r^T; B starts at zero. Source: LoRA,
    arXiv 2106.09685, one per recursion as in Relaxed Recursive Transformers, arXiv 2410.20672.
    """

    def __init__(self, inputs: int, outputs: int, *, rank: int = 0, recursions: int = 0) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.recursion_A = nn.Parameter(torch.empty(recursions, rank, inputs)) if rank else None
        self.recursion_B = nn.Parameter(torch.empty(recursions, outputs, rank)) if rank else None
        self.scale = 0.0

    def forward(self, x_ND: Tensor, recursion: int = 0) -> Tensor:  # pyrefly: ignore
        y = F.linear(x_ND, self.weight, self.bias)
        if self.recursion_A is None or self.recursion_B is None:
            return y
        low = F.linear(x_ND, self.recursion_A[recursion])
        return y + self.scale * F.linear(low, self.recursion_B[recursion])


class ExitMaps(nn.Module):
    """What stands in for the recursions that a token skips: x + W_r x, where it took r < R.

    W starts at zero, so that the token leaves as it is. Source: ours; a least-squares map in place
    of whole layers is from arXiv 2505.02819.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, maps = config.hidden_size, config.num_recursions - 1
        self.weight = nn.Parameter(torch.zeros(maps, D, D))

    def forward(self, x_ND: Tensor, depth_N: Tensor) -> Tensor:
        """Map the rows that left early; depth_N counts the recursions that each row took."""
        for r, weight_DD in enumerate(self.weight, start=1):
            at_A = (depth_N == r).nonzero()[:, 0]
            left_AD = x_ND.index_select(0, at_A)
            x_ND = x_ND.index_copy(0, at_A, left_AD + self.step(left_AD, weight_DD))
        return x_ND

    def step(self, x_AD: Tensor, weight_DD: Tensor) -> Tensor:
        """Return what a map adds, in the type of the rows."""
        return F.linear(x_AD.to(weight_DD.dtype), weight_DD).to(x_AD.dtype)


class Attention(nn.Module):
    """Projections of grouped-query attention; who sees whom is the caller's."""

    def __init__(self, config: ModelConfig, *, is_shared: bool) -> None:
        super().__init__()
        d, self.head_dim = config.hidden_size, config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        make = functools.partial(_projection, config, is_shared)
        self.q_proj = make("q_proj", d, q_size)
        self.k_proj = make("k_proj", d, kv_size)
        self.v_proj = make("v_proj", d, kv_size)
        self.o_proj = make("o_proj", q_size, d)
        if config.attention_bias:
            for projection in (self.q_proj, self.k_proj, self.v_proj):
                projection.bias = nn.Parameter(torch.zeros(projection.out_features))
        make_norm = functools.partial(RMSNorm, config.head_dim, config.rms_norm_eps)
        self.q_norm = make_norm() if config.qk_norm else None
        self.k_norm = make_norm() if config.qk_norm else None

    def split(self, flat_NX: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Lay heads apart, each normed where the model has that norm."""
        head_NHK = flat_NX.unflatten(-1, (-1, self.head_dim))
        return head_NHK if norm is None else norm(head_NHK)

    def project(
        self, x_ND: Tensor, rotary: Rotary, recursion: int, *, takes_keys: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return queries and, where they are to be made, keys and values, with their angles."""
        q_NHK = rotate(self.split(self.q_proj(x_ND, recursion), self.q_norm), rotary)
        if not takes_keys:
            return q_NHK, None, None
        k_NGK = rotate(self.split(self.k_proj(x_ND, recursion), self.k_norm), rotary)
        return q_NHK, k_NGK, self.split(self.v_proj(x_ND, recursion))


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: ModelConfig, *, is_shared: bool) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        make = functools.partial(_projection, config, is_shared)
        self.gate_proj = make("gate_proj", d, inner)
        self.up_proj = make("up_proj", d, inner)
        self.down_proj = make("down_proj", inner, d)

    def forward(self, x_ND: Tensor, recursion: int = 0) -> Tensor:
        gated = F.silu(self.gate_proj(x_ND, recursion)) * self.up_proj(x_ND, recursion)
        return self.down_proj(gated, recursion)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig, *, is_shared: bool) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        gains = config.num_recursions if config.relax_norms and is_shared else 0
        self.input_layernorm = RMSNorm(d, eps, recursions=gains)
        self.self_attn = Attention(config, is_shared=is_shared)
        self.post_attention_layernorm = RMSNorm(d, eps, recursions=gains)
        self.mlp = MLP(config, is_shared=is_shared)

    def forward(self, x_ND: Tensor, rotary: Rotary, attend: Attend, recursion: int = 0) -> Tensor:
        q_NHK, k_NGK, v_NGK = self.before(x_ND, rotary, recursion, attend.takes_keys)
        return self.after(x_ND, attend.run(q_NHK, k_NGK, v_NGK), recursion)

    def before(
        self, x_ND: Tensor, rotary: Rotary, recursion: int, takes_keys: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What comes before attention; rows apart from each other, as in `after`."""
        normed_ND = self.input_layernorm(x_ND, recursion)
        return self.self_attn.project(normed_ND, rotary, recursion, takes_keys=takes_keys)

    def after(self, x_ND: Tensor, attended_NHK: Tensor, recursion: int) -> Tensor:
        """What comes after attention."""
        x_ND = x_ND + self.self_attn.o_proj(attended_NHK.flatten(-2), recursion)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND, recursion), recursion)

    def compile_parts(self) -> None:
        """Compile what treats rows apart; attention stays as it is, its shapes are the router's."""
        for name in ("before", "after"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True))


def _projection(
    config: ModelConfig, is_shared: bool, name: str, inputs: int, outputs: int
) -> Projection:
    rank = config.lora_rank if is_shared and name in config.lora_targets else 0
    projection = Projection(inputs, outputs, rank=rank, recursions=config.num_recursions)
    if rank:
        projection.scale = config.lora_alpha / rank
    return projection
