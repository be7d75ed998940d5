"""The engine's layers on a GPU: matrix products of PyTorch, Triton kernels for all between them.

Checked in Triton's interpreter and on an H200.
Shapes: N rows, D width, H query heads, G key heads, K head size, C positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mor.engine.blocks import Ints
from mor.engine.layers import GroupName, LayerRows, TorchGroups
from mor.model.layers import Layer, RMSNorm, rotary_angles
from mor.model.mor import MoR
from mor.ops.triton.decode import paged_decode, pick_splits
from mor.ops.triton.norm import add_rms_norm, silu_mul
from mor.ops.triton.prefill import paged_prefill, plan_tiles
from mor.ops.triton.reference import AddNorm
from mor.ops.triton.store import rotate_and_store, store

CHUNK_ROWS = 8
"""a stretch of rows of one table from which tiles of rows pay"""


class TritonGroups(TorchGroups):
    """`TorchGroups` with the kernels of `mor.ops.triton`."""

    def __init__(
        self,
        model: MoR,
        pool: Tensor,
        page_tokens: tuple[int, int],
        *,
        max_rows: int,
        max_count: int,
    ) -> None:
        """Fix the splits of a row's keys by the most rows and keys of a decode call."""
        super().__init__(model, pool, page_tokens)
        processors = 1
        if pool.is_cuda:
            processors = torch.cuda.get_device_properties(pool.device).multi_processor_count
        self.group = self.config.num_attention_heads // self.config.num_key_value_heads
        self.num_splits = pick_splits(
            max_rows,
            self.config.num_key_value_heads,
            max_count=max_count,
            num_processors=processors,
        )

        position_C = torch.arange(self.config.max_position_embeddings, device=pool.device)
        angles = rotary_angles(position_C, self.config, dtype=torch.float32)
        self.cos_CK, self.sin_CK = (part_C1K[:, 0].contiguous() for part_C1K in angles)

        stack = self.model.model
        layers = [*stack.prelude, *stack.block(0), *stack.coda]
        self.packed = {} if self.config.lora_rank else {layer: _pack(layer) for layer in layers}

    def run(self, group: GroupName, x_ND: Tensor, rows: LayerRows) -> Tensor:
        layers = self._layers(group, rows)
        is_whole = rows.num_kv_rows == rows.num_full_rows == len(rows)
        if not is_whole or layers[0] not in self.packed or not len(rows):
            return super().run(group, x_ND, rows)
        recursion_N = rows.recursion_N
        x_ND, normed_ND = _add_norm(x_ND, None, layers[0].input_layernorm, recursion_N)
        norms = [layer.input_layernorm for layer in layers[1:]]
        for layer, norm, kv in zip(layers, [*norms, None], self.kv[group], strict=True):
            x_ND, normed_ND = self._fused_layer(layer, x_ND, normed_ND, norm, kv, rows)
        return x_ND

    def _fused_layer(
        self,
        layer: Layer,
        x_ND: Tensor,
        normed_ND: Tensor,
        next_norm: RMSNorm | None,
        kv: Tensor,
        rows: LayerRows,
    ) -> AddNorm:
        """Apply a layer to rows that all make keys; returns the stream, normed for the next one."""
        attention, packed = layer.self_attn, self.packed[layer]
        heads, key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        made_NX = F.linear(normed_ND, packed.qkv_XD, packed.qkv_X)
        made_NXK = made_NX.unflatten(-1, (-1, attention.head_dim))
        q_NHK, k_NGK, v_NGK = made_NXK.split([heads, key_heads, key_heads], 1)
        if attention.q_norm is not None and attention.k_norm is not None:
            q_NHK, k_NGK = attention.q_norm(q_NHK), attention.k_norm(k_NGK)
        q_NHK = rotate_and_store(
            q_NHK,
            k_NGK,
            v_NGK,
            kv,
            rows.slot_N,
            cos_CK=self.cos_CK,
            sin_CK=self.sin_CK,
            position_N=rows.position_N,
        )
        out_ND = attention.o_proj(self._attend(q_NHK, kv, rows).flatten(-2))
        norm, recursion_N = layer.post_attention_layernorm, rows.recursion_N
        x_ND, normed_ND = _add_norm(x_ND, out_ND, norm, recursion_N)
        gate_NF, up_NF = F.linear(normed_ND, packed.gate_up_FD).chunk(2, 1)
        out_ND = layer.mlp.down_proj(silu_mul(gate_NF, up_NF))
        if next_norm is None:
            return AddNorm(x_ND + out_ND, normed_ND)
        return _add_norm(x_ND, out_ND, next_norm, recursion_N)

    def _store(self, k_NGK: Tensor, v_NGK: Tensor, kv: Tensor, rows: LayerRows) -> None:
        store(k_NGK.contiguous(), v_NGK.contiguous(), kv, rows.slot_N[: len(k_NGK)])

    def _attend(self, q_NHK: Tensor, kv: Tensor, rows: LayerRows) -> Tensor:
        N = len(q_NHK)
        if not N:
            return q_NHK
        host, count_N = rows.host_table_N, rows.count_N[:N]
        if host is None or _longest_run(host[:N]) < CHUNK_ROWS:
            return paged_decode(
                q_NHK,
                kv,
                rows.tables_TM,
                rows.table_N[:N],
                count_N,
                num_splits=self.num_splits,
            )
        tiles = plan_tiles(host[:N].tolist(), group=self.group).to(q_NHK.device)
        return paged_prefill(q_NHK, kv, rows.tables_TM, count_N, tiles)


class Packed(NamedTuple):
    """Weights that meet the same states, one under the other: one product instead of three."""

    qkv_XD: Tensor
    qkv_X: Tensor | None
    gate_up_FD: Tensor


def _pack(layer: Layer) -> Packed:
    """Put weights together; the layer's own become views of them."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = []
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    for projections in (qkv, (mlp.gate_proj, mlp.up_proj)):
        whole = torch.cat([projection.weight.data for projection in projections])
        sizes = [projection.out_features for projection in projections]
        for projection, part in zip(projections, whole.split(sizes), strict=True):
            projection.weight.data = part
        joined.append(whole)
    biases = [projection.bias.data for projection in qkv if projection.bias is not None]
    return Packed(joined[0], torch.cat(biases) if biases else None, joined[1])


def _add_norm(
    x_ND: Tensor, update_ND: Tensor | None, norm: RMSNorm, recursion_N: Tensor
) -> AddNorm:
    by_recursion = recursion_N if norm.weight.dim() == 2 else None
    return add_rms_norm(x_ND, update_ND, norm.weight, eps=norm.eps, recursion_N=by_recursion)


def _longest_run(table_N: Ints) -> int:
    """Return the length of the longest stretch of one table."""
    ends = np.flatnonzero(np.diff(table_N, append=-1)) + 1
    return int(np.diff(ends, prepend=0).max())
