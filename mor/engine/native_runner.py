"""The device's side of a tick in three compiled calls. CPU only; the twin is `TorchRunner`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.config import ModelConfig
from mor.engine.blocks import BlockManager
from mor.engine.native_groups import NativeGroups
from mor.engine.runner import Call
from mor.engine.torch_runner import TorchRunner
from mor.model.mor import MoR
from mor.ops.native.tick import DECIDING, GATINGS, Flights, State, Ticks
from mor.ops.select import ODD, wrap


def fits(config: ModelConfig) -> bool:
    """Tell whether the compiled tick knows a model's router: those of one linear score."""
    return config.router in DECIDING and (
        not config.has_router or (config.router_body == "linear" and not config.has_aux_router)
    )


class NativeRunner(TorchRunner):
    """Gathers, runs, joins, routes and scatters in C++, on the arrays of `TorchRunner`."""

    def __init__(
        self, model: MoR, groups: NativeGroups, blocks: BlockManager, *, num_rows: int
    ) -> None:
        super().__init__(model, groups, blocks, num_rows=num_rows)
        self.native, config, layout = groups, model.config, blocks.layout
        R = config.num_recursions
        shares = self.router.shares_R.tolist() if config.router == "random" else [1.0] * R
        encoding, bias = model.model.recursion_encoding, self.router.joined_bias_R
        weight = model.model.embed_tokens.weight.detach()
        heads = 2 * config.num_key_value_heads * config.head_dim
        state = State(
            x=self.x,
            gate=self.gate,
            position=self.position,
            token=self.token,
            depth=self.depth,
            limit=self.limit,
            is_replayed=self.is_replayed,
            threshold=self.threshold,
            count=blocks.count,
            reserved=blocks.reserved,
            held=blocks.held,
            serves=blocks.serves,
            tables=blocks.tables,
            embedding=weight.contiguous(),
            router=self.router.joined_RD,
            router_bias=bias,
            encoding=None if encoding is None else encoding.detach().float().contiguous(),
            share=np.array(shares),
            pool=groups.pool,
            width=config.hidden_size,
            recursions=R,
            num_tables=layout.num_tables,
            table_width=blocks.tables.shape[-1],
            page_stride=groups.pool.stride(0),
            layer_stride_per_token=heads,
            own_page_tokens=layout.own_page_tokens if layout.own_layers else 0,
            block_page_tokens=layout.block_page_tokens,
            prelude_layers=config.num_prelude_layers,
            seed=wrap(config.router_seed * ODD[2]),
            embedding_is_bf16=weight.dtype == torch.bfloat16,
            keeps_first_keys=self.keeps_first_keys,
            gating=GATINGS[config.gating],
            deciding=DECIDING[config.router],
            gate_factor=2.0 if config.gating == "residual" else config.router_alpha,
        )
        self.ticks = Ticks(groups.kernels, state)

    def run_prelude(self, call: Call) -> None:
        self.ticks.enter(Flights(*call), self.native.prelude)

    def run_block(self, call: Call) -> npt.NDArray[np.bool_]:
        blocks = self.native.blocks
        block = blocks[int(call.recursion[0]) if len(blocks) > 1 else 0]
        assert block is not None
        goes_on, has_spare = self.ticks.recursion(Flights(*call), block)
        if has_spare.any():
            self.blocks.trim(call.slots[has_spare])
        return goes_on

    @torch.inference_mode()
    def run_coda(self, call: Call, num_full: int) -> Tensor | None:
        if self.stack.exit_maps is not None:
            index = self._tensor(call.rows)
            self.x.index_copy_(0, index, self._map_exits(call, self.x[index]))
        normed_MD = self.ticks.leave(
            Flights(*call),
            self.native.coda,
            num_full,
            gain_D=self.native.norm_D,
            eps=self.config.rms_norm_eps,
            dtype=self.native.head.dtype,
        )
        return self.native.kernels.linear(normed_MD, self.native.head) if num_full else None
