"""Groups of layers over rows of mixed depth and paged keys and values: the plain path in torch.

The mathematics is `mor.model.layers`; what is new is that each row has a table and a count instead
of a batch's mask, and that rows of different recursions stand in one call, ordered by recursion.
Shapes: N rows, D width, H query heads, G key heads, K head size, V vocabulary, T tables, M pages of
the longest table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mor.engine.blocks import Ints
from mor.engine.sampler import finite_argmax
from mor.model.layers import Layer, Projection, RMSNorm, Rotary, rotary_angles, rotate
from mor.model.mor import MoR
from mor.ops.native.sampling import Draws
from mor.ops.paged import (
    paged_attention_reference,
    paged_decode_unasked,
    store_reference,
    store_unasked,
)

GroupName = Literal["prelude", "block", "coda"]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Where the rows of one call stand, ordered by recursion.

    Where the host does not know them (`host_table_N` is None) they are in any order, one a table;
    a row of count 0 is no row then, and one of slot -1 makes no keys.
    """

    position_N: Tensor
    """int32"""
    recursion_N: Tensor
    """int32, recursions (from 0) that the rows stand at"""
    recursion_starts: tuple[int, ...]
    """first row of each recursion, R + 1 values; prelude and coda count as recursion 0; empty where
    the host does not know"""
    tables_TM: Tensor
    """int32, pages of every table"""
    table_N: Tensor
    """int32, the table that a row reads"""
    count_N: Tensor
    """int32, keys that it sees, its own included"""
    slot_N: Tensor
    """int64, where its own key and value go: page x page tokens + place"""
    num_kv_rows: int
    """rows from here on make no keys and values, since recursion 1's serve"""
    num_full_rows: int
    """rows from here on end with their keys and values of the group's last layer"""
    host_table_N: Ints | None
    """table_N on the host, for kernels that plan by it; None where the host does not know"""
    max_count: int
    """largest of count_N; 0 where the host does not know"""

    def __len__(self) -> int:
        return len(self.position_N)

    def slices(self, stop: int) -> Iterator[tuple[int, slice]]:
        """Yield each recursion that has rows before `stop`, and its rows."""
        for recursion, first in enumerate(self.recursion_starts[:-1]):
            last = min(self.recursion_starts[recursion + 1], stop)
            if last > first:
                yield recursion, slice(first, last)


class LayerGroups(Protocol):
    """Runs the layers of a model; the pool of pages is its own."""

    state_dtype: torch.dtype
    """type of the states between groups"""
    draws: Draws | None
    """what draws tokens, where there is something faster than torch"""

    def run(self, group: GroupName, x_ND: Tensor, rows: LayerRows) -> Tensor:
        """Apply a group's layers; returns the new states, x may be overwritten.

        Rows that do not run the last layer whole come back with undefined states.
        """
        ...

    def logits(self, x_ND: Tensor) -> Tensor:
        """Apply last norm and head: (N, V), fp32 or wider."""
        ...

    def argmax(self, logit_NV: Tensor) -> Tensor:
        """Return the best token of every row, -1 where a logit is NaN or none is finite."""
        ...

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        """Copy pages, all read before the first is written."""
        ...


class TorchGroups:
    """The readable twin of the compiled kernels; any device and type."""

    draws: Draws | None = None

    def __init__(self, model: MoR, pool: Tensor, page_tokens: tuple[int, int]) -> None:
        """Take the pool (pages, elements) and the tokens of an own and of a block page."""
        self.model, self.config, self.pool = model, model.config, pool
        self.state_dtype = model.model.embed_tokens.weight.dtype
        heads = (self.config.num_key_value_heads, self.config.head_dim)

        def view(layers: int, size: int) -> list[Tensor]:
            kv_PL2GSK = pool.view(len(pool), layers, 2, heads[0], size, heads[1])
            return [kv_PL2GSK[:, layer] for layer in range(layers)]

        own = view(self.config.num_own_layers, page_tokens[0]) if page_tokens[0] else []
        prelude = self.config.num_prelude_layers
        self.kv = {
            "prelude": own[:prelude],
            "block": view(self.config.num_block_layers, page_tokens[1]),
            "coda": own[prelude:],
        }

    def run(self, group: GroupName, x_ND: Tensor, rows: LayerRows) -> Tensor:
        rotary = rotary_angles(rows.position_N, self.config, dtype=x_ND.dtype)
        layers = self._layers(group, rows)
        for index, (layer, kv) in enumerate(zip(layers, self.kv[group], strict=True)):
            is_last = index == len(layers) - 1
            full = rows.num_full_rows if is_last else len(rows)
            x_ND = self._layer(layer, x_ND, rotary, kv, rows, full)
        return x_ND

    def _layers(self, group: GroupName, rows: LayerRows) -> list[Layer]:
        stack = self.model.model
        if group == "block":
            # Where recursions run other layers the rows of a call stand at one of them.
            is_one = self.config.shares_block
            return stack.block(0 if is_one else next(iter(rows.slices(len(rows))))[0])
        return stack.prelude if group == "prelude" else stack.coda

    def _layer(
        self, layer: Layer, x_ND: Tensor, rotary: Rotary, kv: Tensor, rows: LayerRows, full: int
    ) -> Tensor:
        attention = layer.self_attn
        normed_ND = _norm(layer.input_layernorm, x_ND, rows)
        made = rows.num_kv_rows
        if made:
            turn = Rotary(rotary.cos_N1K[:made], rotary.sin_N1K[:made])
            k_NX = _project(attention.k_proj, normed_ND[:made], rows)
            v_NGK = attention.split(_project(attention.v_proj, normed_ND[:made], rows))
            k_NGK = rotate(attention.split(k_NX, attention.k_norm), turn)
            self._store(k_NGK, v_NGK, kv, rows)
        turn = Rotary(rotary.cos_N1K[:full], rotary.sin_N1K[:full])
        q_NX = _project(attention.q_proj, normed_ND[:full], rows)
        q_NHK = rotate(attention.split(q_NX, attention.q_norm), turn)
        attended_NHK = self._attend(q_NHK, kv, rows)
        x_ND = x_ND[:full] + _project(attention.o_proj, attended_NHK.flatten(-2), rows)
        normed_ND = _norm(layer.post_attention_layernorm, x_ND, rows)
        gate_NF = F.silu(_project(layer.mlp.gate_proj, normed_ND, rows))
        up_NF = _project(layer.mlp.up_proj, normed_ND, rows)
        return x_ND + _project(layer.mlp.down_proj, gate_NF * up_NF, rows)

    def _store(self, k_NGK: Tensor, v_NGK: Tensor, kv: Tensor, rows: LayerRows) -> None:
        store = store_unasked if rows.host_table_N is None else store_reference
        store(k_NGK, v_NGK, kv, rows.slot_N[: len(k_NGK)])

    def _attend(self, q_NHK: Tensor, kv: Tensor, rows: LayerRows) -> Tensor:
        """Attend from the first rows of a call, as many as there are queries."""
        N = len(q_NHK)
        attend = paged_decode_unasked if rows.host_table_N is None else paged_attention_reference
        return attend(q_NHK, kv, rows.tables_TM, rows.table_N[:N], rows.count_N[:N])

    def logits(self, x_ND: Tensor) -> Tensor:
        logit_NV = F.linear(self.model.model.norm(x_ND), self.model.head_weight_VD)
        return logit_NV.to(torch.promote_types(logit_NV.dtype, torch.float32))

    def argmax(self, logit_NV: Tensor) -> Tensor:
        return finite_argmax(logit_NV)

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        self.pool[target] = self.pool[source]


def _norm(norm: RMSNorm, x_ND: Tensor, rows: LayerRows) -> Tensor:
    if norm.weight.dim() == 1:
        return norm(x_ND)
    if rows.host_table_N is None:
        gain_ND = norm.weight[rows.recursion_N].to(x_ND.dtype)
        return F.rms_norm(x_ND, x_ND.shape[-1:], None, norm.eps) * gain_ND
    parts = [norm(x_ND[part], recursion) for recursion, part in rows.slices(len(x_ND))]
    return torch.cat(parts)


def _project(projection: Projection, x_ND: Tensor, rows: LayerRows) -> Tensor:
    """Apply the base weight to all rows, each recursion's addition to its own."""
    if projection.recursion_A is None:
        return F.linear(x_ND, projection.weight, projection.bias)
    parts = [projection(x_ND[part], recursion) for recursion, part in rows.slices(len(x_ND))]
    return torch.cat(parts)
