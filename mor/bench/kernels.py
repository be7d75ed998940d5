"""A model's layers and head called alone, so that they can be timed without an engine.

Nothing of `mor.engine` is imported: what the engine takes beyond these calls is its own.
Shapes: N rows, D width, T tables, M pages of a table, P tokens of a page, G key heads, K head size,
V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mor.bench.serve_config import BLOCK_SIZE
from mor.model.layers import Layer, rotary_angles
from mor.model.mor import MoR
from mor.ops.native import compiled
from mor.ops.native.compiled import CompiledKernels, NativeRows
from mor.ops.paged import paged_attention_reference, store_reference

GroupName = Literal["prelude", "block", "coda"]


class CallRows(NamedTuple):
    """Where the rows of a call stand: what each sees, and where its own key and value go."""

    position_N: Tensor
    table_N: Tensor
    count_N: Tensor
    slot_N: Tensor
    tables_TM: Tensor


class Kernels(Protocol):
    """Calls of a model's parts on pages of their own."""

    state_dtype: torch.dtype

    def layers(self, group: GroupName, x_ND: Tensor, rows: CallRows, num_full: int) -> None:
        """Run a group's layers; rows from num_full on end with keys and values of the last."""
        ...

    def head(self, x_ND: Tensor) -> Tensor:
        """Norm, head and argmax: the best token of every row."""
        ...


def singles(rows: int, keys: int) -> CallRows:
    """Rows of as many requests, each of which sees so many keys: a call in decode."""
    pages = -(-keys // BLOCK_SIZE)
    tables_TM = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    place = keys - 1
    slot_N = tables_TM[:, -1].long() * BLOCK_SIZE + place % BLOCK_SIZE
    count_N = torch.full((rows,), keys, dtype=torch.int32)
    return CallRows(count_N - 1, torch.arange(rows, dtype=torch.int32), count_N, slot_N, tables_TM)


def chunk(rows: int, prior_keys: int) -> CallRows:
    """Rows of one prompt behind prior_keys tokens: a call in prefill."""
    place_N = torch.arange(prior_keys, prior_keys + rows)
    tables_TM = torch.arange(-(-(prior_keys + rows) // BLOCK_SIZE), dtype=torch.int32)[None]
    position_N = place_N.to(torch.int32)
    return CallRows(position_N, torch.zeros_like(position_N), position_N + 1, place_N, tables_TM)


def pages_of(rows: CallRows) -> int:
    """Pages that a call reads or writes."""
    return int(rows.tables_TM.numel())


def build_kernels(model: MoR, *, pages: int, wants_compiled: bool) -> Kernels:
    """Return the compiled kernels where they can be had and are wanted, else torch's."""
    config, weight = model.config, model.model.embed_tokens.weight
    token_layer = 2 * config.num_key_value_heads * config.head_dim
    ends = (config.num_prelude_layers, config.num_coda_layers)
    elements = max(config.num_block_layers, *ends) * BLOCK_SIZE * token_layer
    # Pages that nobody wrote would share one page of memory, and be too quick to read.
    pool = torch.empty(pages, elements, dtype=weight.dtype, device=weight.device).normal_(std=0.02)
    is_float = weight.dtype in (torch.bfloat16, torch.float32)
    found = compiled.load() if wants_compiled and is_float and not weight.is_cuda else None
    return PlainKernels(model, pool) if found is None else NativeKernels(model, pool, found)


class NativeKernels:
    """The compiled kernels. CPU, bf16 and fp32."""

    state_dtype = torch.float32

    def __init__(self, model: MoR, pool: Tensor, kernels: CompiledKernels) -> None:
        self.config, self.pool, self.kernels = model.config, pool, kernels
        positions = torch.arange(self.config.max_position_embeddings)
        rotary = rotary_angles(positions, self.config, dtype=torch.float32)
        half = self.config.head_dim // 2
        angles = {
            "cos_CK": rotary.cos_N1K[:, 0, :half].contiguous(),
            "sin_CK": rotary.sin_N1K[:, 0, :half].contiguous(),
        }
        stack = model.model
        groups = {"prelude": stack.prelude, "block": stack.block(0), "coda": stack.coda}
        self.groups = {
            name: self._pack(layers, angles) for name, layers in groups.items() if layers
        }
        self.norm_D = stack.norm.weight.detach().float()
        self.head_weight = kernels.pack_weight(model.head_weight_VD)
        self.logits_NV = torch.empty(0, self.config.vocab_size)
        """kept, since fresh memory of this size costs as much as the product"""

    def _pack(self, layers: list[Layer], angles: dict[str, Tensor]) -> Any:
        return self.kernels.layer_group(
            [layer.state_dict() for layer in layers],
            heads=self.config.num_attention_heads,
            key_heads=self.config.num_key_value_heads,
            head_size=self.config.head_dim,
            eps=self.config.rms_norm_eps,
            low_rank_scale=self.config.lora_alpha / max(self.config.lora_rank, 1),
            **angles,
        )

    def layers(self, group: GroupName, x_ND: Tensor, rows: CallRows, num_full: int) -> None:
        packed = self.groups[group]
        starts = None
        if packed.low_rank:
            starts = torch.tensor([0] + [len(x_ND)] * packed.recursions, dtype=torch.int32)
        position_N, table_N, count_N, slot_N, tables_TM = rows
        self.kernels.layers(
            x_ND,
            packed,
            NativeRows(
                position_N,
                torch.zeros_like(position_N),
                table_N,
                count_N,
                slot_N,
                tables_TM=tables_TM,
                pool=self.pool,
                page_tokens=BLOCK_SIZE,
                num_full_rows=num_full,
                recursion_starts=starts,
            ),
        )

    def head(self, x_ND: Tensor) -> Tensor:
        weight = self.head_weight
        normed_ND = self.kernels.rms_norm(
            x_ND, self.norm_D, self.config.rms_norm_eps, dtype=weight.dtype
        )
        if len(self.logits_NV) < len(x_ND):
            self.logits_NV = torch.zeros(len(x_ND), self.config.vocab_size)
        logits_NV = self.logits_NV[: len(x_ND)]
        return self.kernels.argmax_rows(self.kernels.linear(normed_ND, weight, out=logits_NV))


class PlainKernels:
    """torch's operators, as the engine's plain path calls them; any device and type."""

    def __init__(self, model: MoR, pool: Tensor) -> None:
        self.config, self.stack, self.pool = model.config, model.model, pool
        self.head_weight_VD = model.head_weight_VD.detach()
        self.state_dtype = self.head_weight_VD.dtype
        heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        layers = pool.shape[1] // (2 * heads * BLOCK_SIZE * head_dim)
        shape = (layers, 2, heads, BLOCK_SIZE, head_dim)
        kv_PL2GSK = pool.view(len(pool), *shape)
        self.kv = [kv_PL2GSK[:, layer] for layer in range(layers)]

    @torch.inference_mode()
    def layers(self, group: GroupName, x_ND: Tensor, rows: CallRows, num_full: int) -> None:
        position_N, table_N, count_N, slot_N, tables_TM = (part.to(x_ND.device) for part in rows)
        rotary = rotary_angles(position_N, self.config, dtype=x_ND.dtype)
        stack = self.stack
        layers = {"prelude": stack.prelude, "block": stack.block(0), "coda": stack.coda}[group]
        for index, (layer, kv) in enumerate(zip(layers, self.kv, strict=False)):
            N = num_full if index == len(layers) - 1 else len(x_ND)
            q_NHK, k_NGK, v_NGK = layer.before(x_ND, rotary, 0, True)
            assert k_NGK is not None and v_NGK is not None
            store_reference(k_NGK, v_NGK, kv, slot_N)
            if not N:
                return
            attended_NHK = paged_attention_reference(
                q_NHK[:N], kv, tables_TM, table_N[:N], count_N[:N]
            )
            x_ND = layer.after(x_ND[:N], attended_NHK, 0)

    @torch.inference_mode()
    def head(self, x_ND: Tensor) -> Tensor:
        return F.linear(self.stack.norm(x_ND), self.head_weight_VD).float().argmax(-1)
