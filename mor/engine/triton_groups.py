"""The engine's layers on a GPU: matrix products of PyTorch, Triton kernels for paged attention.

Checked in Triton's interpreter and on an H200.
Shapes: N rows, H query heads, G key heads, K head size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mor.engine.blocks import Ints
from mor.engine.layers import LayerRows, TorchGroups
from mor.model.mor import MoR
from mor.ops.triton.decode import paged_decode, pick_splits
from mor.ops.triton.prefill import paged_prefill, plan_tiles
from mor.ops.triton.store import store

CHUNK_ROWS = 8
"""a stretch of rows of one table from which tiles of rows pay"""


class TritonGroups(TorchGroups):
    """`TorchGroups` with the stores and the attention of `mor.ops.triton`."""

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


def _longest_run(table_N: Ints) -> int:
    """Return the length of the longest stretch of one table."""
    ends = np.flatnonzero(np.diff(table_N, append=-1)) + 1
    return int(np.diff(ends, prepend=0).max())
