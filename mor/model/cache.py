"""The plain cache: keys and values of active tokens only, for a fixed batch of sequences.

It is the oracle of generation: simple, exact, really skipping. Two kinds of group hold tokens with
equal counts: `own` (prelude and coda, every token) and one per recursion (its active tokens; with
shared keys and values recursion 1's alone).
Shapes: B sequences, N rows, S stored tokens, G key heads, K head size, M rows of the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.config import ModelConfig
from mor.model.layers import Attend
from mor.model.rows import Rows
from mor.model.views import View
from mor.ops.attention import attention


class KVGroup:
    """Keys and values of a few layers whose tokens are the same; grows by doubling."""

    def __init__(
        self, num_layers: int, batch_size: int, config: ModelConfig, dtype: torch.dtype, device: str
    ) -> None:
        heads = (config.num_key_value_heads, config.head_dim)
        shape = (2, num_layers, batch_size, 0, *heads)
        self.kv_2LBSGK = torch.zeros(shape, dtype=dtype, device=device)
        self.position_BS = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
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
            room = max(capacity, self.max_count - capacity, 16)
            L, B = self.kv_2LBSGK.shape[1:3]
            fresh = self.kv_2LBSGK.new_zeros((2, L, B, room, *self.kv_2LBSGK.shape[4:]))
            self.kv_2LBSGK = torch.cat((self.kv_2LBSGK, fresh), 3)
            self.position_BS = torch.cat((self.position_BS, self.position_BS.new_zeros(B, room)), 1)
        view = CachedView(self, rows, start_B)
        self.position_BS[rows.sequence_N, view.write_N] = rows.position_N
        return view

    def reorder(self, index_B: Tensor) -> None:
        """Let sequence b go on from what sequence index_B[b] holds; their number may change."""
        self.kv_2LBSGK = self.kv_2LBSGK[:, :, index_B]
        self.position_BS = self.position_BS[index_B]
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

    def write(self, index: int, k_NGK: Tensor, v_NGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store what a layer made of the rows; returns all that it holds, (B, S, G, K) each."""
        k_BSGK, v_BSGK = self.group.kv_2LBSGK[:, index]
        k_BSGK[self.rows.sequence_N, self.write_N] = k_NGK.to(k_BSGK.dtype)
        v_BSGK[self.rows.sequence_N, self.write_N] = v_NGK.to(v_BSGK.dtype)
        return k_BSGK[:, : self.group.max_count], v_BSGK[:, : self.group.max_count]

    def layer(self, index: int) -> Attend:
        def attend(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            k_BSGK, v_BSGK = self.write(index, k_NGK, v_NGK)
            return _attend(q_NHK, k_BSGK, v_BSGK, self.rows, self.slot_N, self.visible_BMS)

        return Attend(attend)


class CachedLaterView:
    """Rows attend to all tokens of their sequence up to themselves, by keys of recursion 1.

    later  what this recursion's active tokens hold: each stands in for its first key (`hybrid`);
           None for no keys of this recursion (`shared`)
    """

    def __init__(self, first: KVGroup, rows: Rows, later: CachedView | None) -> None:
        self.first, self.rows, self.later = first, rows, later
        self.slot_N = None if rows.is_dense else rows.slot_N()
        self.visible_BMS = None
        if rows.num_sequences > 1 or rows.equal_length != 1:  # else the newest token sees all
            key_S = torch.arange(first.max_count, device=rows.position_N.device)
            position_BM = rows.pad(rows.position_N, self.slot_N)
            self.visible_BMS = key_S <= position_BM[..., None]
        if later is not None:
            group = later.group
            place_S = torch.arange(group.max_count, device=rows.position_N.device)
            self.held = (place_S < group.count_B[:, None]).nonzero(as_tuple=True)
            self.held_position = group.position_BS[self.held]

    def layer(self, index: int) -> Attend:
        def attend(q_NHK: Tensor, k_NGK: Tensor | None, v_NGK: Tensor | None) -> Tensor:
            k_BSGK, v_BSGK = self.first.kv_2LBSGK[:, index, :, : self.first.max_count]
            if self.later is not None:
                assert k_NGK is not None and v_NGK is not None
                own_k, own_v = self.later.write(index, k_NGK, v_NGK)
                at = (self.held[0], self.held_position)
                k_BSGK = k_BSGK.index_put(at, own_k[self.held])
                v_BSGK = v_BSGK.index_put(at, own_v[self.held])
            return _attend(q_NHK, k_BSGK, v_BSGK, self.rows, self.slot_N, self.visible_BMS)

        return Attend(attend, takes_keys=self.later is not None)


def _attend(
    q_NHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    rows: Rows,
    slot_N: Tensor | None,
    visible_BMS: Tensor | None,
) -> Tensor:
    out_BMHK = attention(
        rows.pad(q_NHK, slot_N),
        k_BSGK.to(q_NHK.dtype),
        v_BSGK.to(q_NHK.dtype),
        visible_BQS=visible_BMS,
    )
    return rows.unpad(out_BMHK, slot_N)


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

        self.strategy = config.kv_strategy
        self.own = group(config.num_own_layers)
        num_groups = 1 if self.strategy == "shared" else config.num_recursions
        self.block = [group(config.num_block_layers) for _ in range(num_groups)]
        self.length_B = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def append(self, rows: Rows) -> CachedKeys:
        """Make room for the rows of one forward pass; they are written as it runs."""
        self.length_B = self.length_B + rows.count_B
        return CachedKeys(self, rows)

    def reorder(self, index_B: Tensor) -> None:
        """Let sequence b go on from what sequence index_B[b] holds, as beam search asks."""
        self.length_B = self.length_B[index_B]
        for group in (self.own, *self.block):
            group.reorder(index_B)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values held, without the room kept for growth."""
        total = 0
        for group in (self.own, *self.block):
            kv = group.kv_2LBSGK
            a_token = 2 * kv.shape[1] * kv.shape[4] * kv.shape[5] * kv.element_size()
            total += a_token * int(group.count_B.sum())
        return total


class CachedKeys:
    """What the layers of one forward pass see of a cache, their own rows included."""

    def __init__(self, cache: KVCache, rows: Rows) -> None:
        self.cache = cache
        self.own: View = cache.own.append(rows)

    def recursion(self, recursion: int, rows: Rows, origin_A: Tensor) -> View:
        """Return what the active rows of a recursion see, and make room for what they leave."""
        cache = self.cache
        if recursion == 0 or cache.strategy == "per_recursion":
            return cache.block[recursion].append(rows)
        later = cache.block[recursion].append(rows) if cache.strategy == "hybrid" else None
        return CachedLaterView(cache.block[0], rows, later)
