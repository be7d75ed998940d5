"""The plain cache: keys and values of active tokens only, for a fixed batch of sequences.

It is the oracle of generation: simple, exact, really skipping. Two kinds of group hold tokens with
equal counts: `own` (prelude and coda, every token) and one per recursion (its active tokens).
Shapes: B sequences, N rows, S stored tokens, G key heads, K head size, M rows of the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.config import ModelConfig
from mor.model.layers import Attend
from mor.model.rows import Rows
from mor.ops.attention import attention


class LocalView:
    """Rows attend among themselves, causally, within their sequence and document.

    Documents are laid out by themselves, those of similar length together, so that no product is
    spent on a pair that a mask would drop; the padding of a group is at most the longest's half.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.groups: list[tuple[Tensor, Tensor]] = []  # row of each place (D, M), places in use
        if rows.is_dense and rows.segment_N is None:
            return
        starts, lengths = _runs(rows)
        by_size: dict[int, list[int]] = {}
        for index, length in enumerate(lengths.tolist()):
            by_size.setdefault((length - 1).bit_length(), []).append(index)
        for members in by_size.values():
            first_D1, length_D1 = starts[members, None], lengths[members, None]
            place_M = torch.arange(int(length_D1.max()), device=starts.device)
            row_DM = first_D1 + torch.minimum(place_M, length_D1 - 1)
            self.groups.append((row_DM, (place_M < length_D1).flatten().nonzero()[:, 0]))
        order_N = torch.cat([row_DM.flatten()[used] for row_DM, used in self.groups])
        self.inverse_N = torch.argsort(order_N)

    def layer(self, index: int) -> Attend:
        return self._attend if self.groups else self._attend_dense

    def _attend_dense(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        rows = self.rows
        q, k, v = (rows.pad(x, None) for x in (q_NHK, k_NGK, v_NGK))
        return rows.unpad(attention(q, k, v, is_causal=True), None)

    def _attend(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        parts = []
        for row_DM, used in self.groups:
            out_DMHK = attention(q_NHK[row_DM], k_NGK[row_DM], v_NGK[row_DM], is_causal=True)
            parts.append(out_DMHK.flatten(0, 1)[used])
        return torch.cat(parts)[self.inverse_N]


def _runs(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return first row and length of every stretch of rows of one sequence and document."""
    N = len(rows)
    differs_N = torch.ones(N, dtype=torch.bool, device=rows.sequence_N.device)
    differs_N[1:] = rows.sequence_N.diff() != 0
    if rows.segment_N is not None:
        differs_N[1:] |= rows.segment_N.diff() != 0
    starts = differs_N.nonzero()[:, 0]
    return starts, torch.diff(starts, append=starts.new_tensor([N]))


class KVGroup:
    """Keys and values of a few layers whose tokens are the same; grows by doubling."""

    def __init__(
        self, num_layers: int, batch_size: int, config: ModelConfig, dtype: torch.dtype, device: str
    ) -> None:
        heads = (config.num_key_value_heads, config.head_dim)
        shape = (2, num_layers, batch_size, 0, *heads)
        self.kv_2LBSGK = torch.zeros(shape, dtype=dtype, device=device)
        self.count_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_count = 0

    def append(self, rows: Rows) -> CachedView:
        """Make room for rows after what is stored; the view writes them layer by layer."""
        start_B = self.count_B
        self.count_B = start_B + rows.count_B
        # The host knows the longest sequence without asking for it when all rows are alike.
        if rows.num_sequences == 1:
            self.max_count += len(rows)
        else:
            self.max_count = int(self.count_B.max())
        capacity = self.kv_2LBSGK.shape[3]
        if self.max_count > capacity:
            grown = list(self.kv_2LBSGK.shape)
            grown[3] = max(2 * capacity, self.max_count, 16)
            kv = self.kv_2LBSGK.new_zeros(grown)
            kv[:, :, :, :capacity] = self.kv_2LBSGK
            self.kv_2LBSGK = kv
        return CachedView(self, rows, start_B)

    def reorder(self, index_B: Tensor) -> None:
        """Let sequence b go on from what sequence index_B[b] holds; their number may change."""
        self.kv_2LBSGK = self.kv_2LBSGK[:, :, index_B]
        self.count_B = self.count_B[index_B]
        self.max_count = int(self.count_B.max()) if len(index_B) else 0


class CachedView:
    """Rows attend to what their group holds of their sequence, themselves included."""

    def __init__(self, group: KVGroup, rows: Rows, start_B: Tensor) -> None:
        self.group = group
        self.rows = rows
        self.slot_N = None if rows.is_dense else rows.slot_N()
        self.write_N = start_B[rows.sequence_N] + rows.rank_N()
        device = start_B.device
        self.visible_BMS = None
        if rows.num_sequences > 1 or rows.max_count > 1:
            last_BM = start_B[:, None] + torch.arange(rows.max_count, device=device)
            key_S = torch.arange(group.max_count, device=device)
            self.visible_BMS = key_S <= last_BM[..., None]

    def layer(self, index: int) -> Attend:
        def attend(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            group, rows = self.group, self.rows
            k_BSGK, v_BSGK = group.kv_2LBSGK[:, index]
            k_BSGK[rows.sequence_N, self.write_N] = k_NGK.to(k_BSGK.dtype)
            v_BSGK[rows.sequence_N, self.write_N] = v_NGK.to(v_BSGK.dtype)
            out_BMHK = attention(
                rows.pad(q_NHK, self.slot_N),
                k_BSGK[:, : group.max_count].to(q_NHK.dtype),
                v_BSGK[:, : group.max_count].to(q_NHK.dtype),
                visible_BQS=self.visible_BMS,
            )
            return rows.unpad(out_BMHK, self.slot_N)

        return attend


class KVCache:
    """Keys and values of a batch of sequences in generation. `length_B` counts tokens seen."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        def group(num_layers: int) -> KVGroup:
            return KVGroup(num_layers, batch_size, config, dtype, str(device))

        self.own = group(config.num_own_layers)
        self.block = [group(config.num_block_layers) for _ in range(config.num_recursions)]
        self.length_B = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values held, without the room kept for growth."""
        total = 0
        for group in (self.own, *self.block):
            kv = group.kv_2LBSGK
            a_token = 2 * kv.shape[1] * kv.shape[4] * kv.shape[5] * kv.element_size()
            total += a_token * int(group.count_B.sum())
        return total

    def reorder(self, index_B: Tensor) -> None:
        """Let sequence b go on from what sequence index_B[b] holds, as beam search asks."""
        self.length_B = self.length_B[index_B]
        for group in {id(group): group for group in (self.own, *self.block)}.values():
            group.reorder(index_B)
