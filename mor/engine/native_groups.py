"""The compiled kernels behind the engine: a group of layers is one call. CPU, bf16 and fp32.

States between groups are fp32 whatever the weights are; `mor.engine.layers.TorchGroups` is the
readable twin. Shapes: N rows, D width, C positions, K head size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.engine.layers import GroupName, LayerRows
from mor.model.layers import Layer, rotary_angles
from mor.model.mor import MoR
from mor.ops.native.compiled import CompiledKernels, LayerGroup, NativeRows
from mor.ops.native.sampling import Draws


class NativeGroups:
    """Layers, packed once, over a pool of pages (pages, elements) of the weights' type."""

    state_dtype = torch.float32

    def __init__(
        self, model: MoR, pool: Tensor, page_tokens: tuple[int, int], kernels: CompiledKernels
    ) -> None:
        """Take the pool, and the tokens of an own and of a block page."""
        self.config, self.kernels, self.pool = model.config, kernels, pool
        self.draws: Draws | None = Draws(kernels)
        self.page_tokens = {"prelude": page_tokens[0], "coda": page_tokens[0]}
        self.page_tokens["block"] = page_tokens[1]
        positions = torch.arange(self.config.max_position_embeddings)
        rotary = rotary_angles(positions, self.config, dtype=torch.float32)
        half = self.config.head_dim // 2
        self.cos_CK = rotary.cos_N1K[:, 0, :half].contiguous()
        self.sin_CK = rotary.sin_N1K[:, 0, :half].contiguous()
        stack, R = model.model, self.config.num_recursions
        blocks = range(1 if self.config.shares_block else R)
        self.prelude = self._pack(stack.prelude)
        self.blocks = [self._pack(stack.block(recursion)) for recursion in blocks]
        self.coda = self._pack(stack.coda)
        self.norm_D = stack.norm.weight.detach().float()
        self.head = kernels.pack_weight(model.head_weight_VD)

    def _pack(self, layers: list[Layer]) -> LayerGroup | None:
        if not layers:
            return None
        return self.kernels.layer_group(
            [layer.state_dict() for layer in layers],
            heads=self.config.num_attention_heads,
            key_heads=self.config.num_key_value_heads,
            head_size=self.config.head_dim,
            eps=self.config.rms_norm_eps,
            cos_CK=self.cos_CK,
            sin_CK=self.sin_CK,
            low_rank_scale=self.config.lora_alpha / max(self.config.lora_rank, 1),
        )

    def run(self, group: GroupName, x_ND: Tensor, rows: LayerRows) -> Tensor:
        packed = self.coda if group == "coda" else self.prelude
        if group == "block":
            packed = self.blocks[int(rows.recursion_N[0]) if len(self.blocks) > 1 else 0]
        if packed is None:  # a prelude or coda without layers
            return x_ND
        starts = torch.tensor(rows.recursion_starts, dtype=torch.int32) if packed.low_rank else None
        x_ND = x_ND.contiguous()
        self.kernels.layers(
            x_ND,
            packed,
            NativeRows(
                rows.position_N,
                rows.recursion_N,
                rows.table_N,
                rows.count_N,
                rows.slot_N,
                tables_TM=rows.tables_TM,
                pool=self.pool,
                page_tokens=self.page_tokens[group],
                first_kv_layer=self.config.num_prelude_layers if group == "coda" else 0,
                num_kv_rows=rows.num_kv_rows,
                num_full_rows=rows.num_full_rows,
                recursion_starts=starts,
            ),
        )
        return x_ND

    def logits(self, x_ND: Tensor) -> Tensor:
        normed_ND = self.kernels.rms_norm(
            x_ND, self.norm_D, self.config.rms_norm_eps, dtype=self.head.dtype
        )
        return self.kernels.linear(normed_ND, self.head)

    def argmax(self, logit_NV: Tensor) -> Tensor:
        return self.kernels.argmax_rows(logit_NV)

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        self.pool[target] = self.pool[source]
