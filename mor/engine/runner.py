"""Builds the tensors of a tick and runs them: prelude, block, routing, coda, head.

Every token in flight has a row of state. A call of the block takes the rows of all depths; what
differs between them is a table, a count, and the recursion that they stand at.
Shapes: N rows, D width, R recursions, V vocabulary, M rows whose logits are wanted.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mor.engine.blocks import BlockManager, Ints
from mor.engine.coda import Costs
from mor.engine.core import Batch, Flight
from mor.engine.layers import LayerGroups, LayerRows
from mor.engine.routing import DepthRouter
from mor.model.mor import MoR

NO_ROWS = np.zeros(0, np.int64)


class Finished(NamedTuple):
    """What the coda gave."""

    logits_MV: Tensor | None
    """fp32 or wider; None when no row's logits are wanted"""
    rows: list[slice]
    """of each flight, its rows among the logits: all its tokens, the last one, or none"""
    depths: list[list[int]]
    """of each flight, recursions that each token took"""


class Runner:
    """Runs what the scheduler chose. Holds the state of every token in flight."""

    def __init__(
        self, model: MoR, groups: LayerGroups, blocks: BlockManager, *, num_rows: int
    ) -> None:
        self.config = model.config
        self.stack = model.model
        self.groups = groups
        self.blocks = blocks
        self.router = DepthRouter(model)
        self.device = model.device
        R, D = self.config.num_recursions, self.config.hidden_size
        self.is_shared = self.config.sharing != "none"
        self.keeps_first_keys = self.config.kv_strategy == "shared"
        tensor = {"dtype": groups.state_dtype, "device": self.device}
        self.x = torch.zeros(num_rows, D, **tensor)
        self.start = torch.zeros(num_rows if self.router.is_token_choice else 0, D, **tensor)
        """what recursion 1 got, for the exit of token choice"""
        wide = torch.promote_types(groups.state_dtype, torch.float32)
        self.gate = torch.zeros(num_rows, dtype=wide, device=self.device)
        """gate of the recursion that a row takes next"""
        self.gates = torch.zeros(num_rows, R, dtype=wide, device=self.device)
        """gates of all recursions (token choice)"""
        self.exit_gate = torch.zeros(num_rows, dtype=wide, device=self.device)
        self.has_gate = self.config.gating in ("weighted", "residual")
        self.has_exit_gate = self.router.is_token_choice and self.config.gating == "residual"
        # on the host
        self.position = np.zeros(num_rows, np.int64)
        self.token = np.zeros(num_rows, np.int64)
        self.depth = np.zeros(num_rows, np.int64)
        self.limit = np.zeros(num_rows, np.int64)
        """recursions at most"""
        self.is_replayed = np.zeros(num_rows, bool)
        """its depth is known: `limit`"""
        self.threshold = np.zeros((num_rows, R))
        self.tables_TM = self._tensor(blocks.tables.reshape(-1, blocks.tables.shape[-1]))

    @torch.inference_mode()
    def advance(self, batch: Batch) -> None:
        """Run prelude and block for a tick; flights then hold the rows that go on."""
        if batch.copies:
            source, target = zip(*batch.copies, strict=True)
            self.groups.copy_pages(list(source), list(target))
        if self.device.type != "cpu":
            self.tables_TM.copy_(torch.from_numpy(self.blocks.tables).flatten(0, 1))
        if batch.entering:
            self._enter(batch.entering)
        if self.is_shared:
            if batch.in_block:
                self._recursion(sorted(batch.in_block, key=lambda flight: flight.recursion))
            return
        for recursion in range(self.config.num_recursions):
            at = [f for f in batch.in_block if f.recursion == recursion and len(f.active)]
            if at:
                self._recursion(at)

    def _enter(self, flights: list[Flight]) -> None:
        """Embed tokens, run the prelude, and decide what is decided before recursion 1."""
        rows = np.concatenate([flight.rows for flight in flights])
        count = np.array([flight.count for flight in flights])
        first = np.array([flight.start for flight in flights])
        position = np.repeat(first, count) + _rank(count)
        self.position[rows] = position
        token = [t for flight in flights for t in flight.request.tokens(flight.start, flight.stop)]
        self.token[rows] = token
        self.depth[rows] = 0
        self._set_limits(flights, rows, count)
        slots = np.array([flight.request.slot for flight in flights])
        x_ND = self.stack.embed_tokens(self._tensor(np.array(token)))
        x_ND = x_ND.to(self.groups.state_dtype)
        if self.blocks.layout.own_layers:
            self.blocks.commit(slots, np.zeros_like(slots), count, count)
            where = self._own_rows(np.repeat(slots, count), position, len(rows))
            x_ND = self.groups.run("prelude", x_ND, where)
        index = self._tensor(rows)
        self.x.index_copy_(0, index, x_ND)
        if self.router.is_token_choice:
            choice = self.router.choose(x_ND)
            self.start.index_copy_(0, index, x_ND)
            if choice.step_gate_NR is not None:
                self.gates[index] = choice.step_gate_NR
            if choice.exit_gate_N1 is not None:
                self.exit_gate[index] = choice.exit_gate_N1[:, 0]
            chosen = np.minimum(self.limit[rows], choice.depth_N.cpu().numpy())
            self.limit[rows] = np.where(self.is_replayed[rows], self.limit[rows], chosen)
        else:  # everyone takes recursion 1; only its gate is asked for
            self._decide(rows, index, np.zeros_like(rows), x_ND)

    def _decide(self, rows: Ints, index: Tensor, recursion: Ints, x_ND: Tensor) -> Tensor | None:
        """Ask the routers who may take a recursion, and note the gates of those that do."""
        decision = self.router.decide(
            self._tensor(recursion),
            x_ND,
            threshold_N=self._tensor(self.threshold[rows, recursion]),
            position_N=self._tensor(self.position[rows]),
            token_N=self._tensor(self.token[rows]),
        )
        if decision.gate_N is not None:
            self.gate.index_copy_(0, index, decision.gate_N)
        return decision.goes_on_N

    def _set_limits(self, flights: list[Flight], rows: Ints, count: Ints) -> None:
        """Note how deep each row may go, and by which thresholds."""
        self.limit[rows] = np.repeat([f.request.policy.max_recursions for f in flights], count)
        self.is_replayed[rows] = False
        thresholds = np.array([flight.request.policy.thresholds for flight in flights])
        self.threshold[rows] = np.repeat(thresholds, count, axis=0)
        for flight in flights:
            known = flight.request.depths[flight.start : flight.stop]
            if known:
                self.limit[flight.rows[: len(known)]] = known
                self.is_replayed[flight.rows[: len(known)]] = True

    def _recursion(self, flights: Sequence[Flight]) -> None:
        """Run one call of the block on flights ordered by recursion, and route its rows."""
        rows = np.concatenate([flight.active for flight in flights])
        count = np.array([len(flight.active) for flight in flights])
        recursion = np.array([flight.recursion for flight in flights])
        at = np.repeat(recursion, count)
        index = self._tensor(rows)
        x_ND = self.x[index]
        where = self._block_rows(flights, rows, count, recursion)
        block_ND = self.groups.run("block", x_ND.clone(), where)
        if self.stack.recursion_encoding is not None:
            block_ND = block_ND * self.stack.recursion_encoding[self._tensor(at)].to(block_ND)
        gate_N = None
        if self.has_gate:
            by_row = self.router.is_token_choice
            gate_N = self.gates[index, self._tensor(at)] if by_row else self.gate[index]
        x_ND = self.router.join(x_ND, block_ND, gate_N)
        self.x.index_copy_(0, index, x_ND)
        self.depth[rows] = at + 1
        goes_on = self._route(rows, index, at + 1, x_ND)
        if len(rows) == len(flights):  # one token each
            for flight, goes in zip(flights, goes_on.tolist(), strict=True):
                flight.recursion += 1
                if not goes:
                    flight.active = NO_ROWS
            return
        ends = count.cumsum()
        for flight, end, length in zip(flights, ends.tolist(), count.tolist(), strict=True):
            flight.active = flight.active[goes_on[end - length : end]]
            flight.recursion += 1

    def _route(self, rows: Ints, index: Tensor, following: Ints, x_ND: Tensor) -> np.ndarray:
        """Return which rows take the recursion that follows; their gates are noted."""
        goes_on = following < self.limit[rows]
        if not self.router.has_gate or not goes_on.any():
            return goes_on
        last = self.config.num_recursions - 1
        asked_N = self._decide(rows, index, np.minimum(following, last), x_ND)
        if asked_N is not None:
            goes_on &= asked_N.cpu().numpy() | self.is_replayed[rows]
        return goes_on

    @torch.inference_mode()
    def finish(self, flights: list[Flight]) -> Finished:
        """Run coda and head for flights that left the block."""
        kept = [self._num_wanted(flight) for flight in flights]
        ends = list(itertools.accumulate(kept))
        begin = ends[-1]
        parts = [slice(end - count, end) for end, count in zip(ends, kept, strict=True)]
        wanted = [f.rows[f.count - count :] for f, count in zip(flights, kept, strict=True)]
        rest = [f.rows[: f.count - count] for f, count in zip(flights, kept, strict=True)]
        # Rows that only leave keys and values come last. Attention does not mind their order.
        rows = np.concatenate([*wanted, *rest])
        counts = [len(part) for part in (*wanted, *rest)]
        slots = np.repeat([flight.request.slot for flight in flights] * 2, counts)
        in_order = self.depth[np.concatenate([flight.rows for flight in flights])].tolist()
        depths, first = [], 0
        for flight in flights:
            depths.append(in_order[first : first + flight.count])
            first += flight.count
        if not begin and not self.config.num_coda_layers:
            return Finished(None, parts, depths)
        index = self._tensor(rows)
        x_ND = self.x[index]
        if self.router.is_token_choice:
            exit_gate = self.exit_gate[index] if self.has_exit_gate else None
            x_ND = self.router.leave(self.start[index], x_ND, exit_gate)
        if self.config.num_coda_layers:
            where = self._own_rows(slots, self.position[rows], begin)
            x_ND = self.groups.run("coda", x_ND, where)
        logits = self.groups.logits(x_ND[:begin]) if begin else None
        return Finished(logits, parts, depths)

    @torch.inference_mode()
    def measure(self, max_rows: int) -> Costs:
        """Time block and ends for numbers of rows up to max_rows, without touching a page."""
        rows = sorted({min(2**i, max_rows) for i in range(max_rows.bit_length() + 1)})
        block_s, ends_s = [], []
        for count in rows:
            x_ND = torch.zeros(count, self.config.hidden_size, dtype=self.groups.state_dtype)
            x_ND, where = x_ND.to(self.device), self._nowhere(count)

            def ends(x_ND: Tensor = x_ND, where: LayerRows = where) -> None:
                if self.blocks.layout.own_layers:
                    self.groups.run("prelude", x_ND.clone(), where)
                    self.groups.run("coda", x_ND.clone(), where)
                self.groups.argmax(self.groups.logits(x_ND))

            block_s.append(_best_of(lambda x=x_ND, w=where: self.groups.run("block", x.clone(), w)))
            ends_s.append(_best_of(ends))
        return Costs(rows, block_s, ends_s)

    def _nowhere(self, count: int) -> LayerRows:
        """Describe rows that see nothing and leave nothing."""
        zero_N = self._tensor(np.zeros(count, np.int32))
        return LayerRows(
            position_N=zero_N,
            recursion_N=zero_N,
            recursion_starts=(0, *[count] * self.config.num_recursions),
            tables_TM=self.tables_TM,
            table_N=zero_N,
            count_N=zero_N,
            slot_N=self._tensor(np.full(count, -1)),
            num_kv_rows=count,
            num_full_rows=count,
            host_table_N=np.zeros(count, np.int64),
            max_count=0,
        )

    @staticmethod
    def _num_wanted(flight: Flight) -> int:
        """Tokens of a flight, counted from its end, whose logits are wanted."""
        if flight.request.params.prompt_logprobs is not None:
            return flight.count
        return 1 if flight.wants_logits else 0

    def _own_rows(self, slots: Ints, position: Ints, num_full: int) -> LayerRows:
        """Describe rows to prelude and coda, where every token has a place: its position."""
        size = self.blocks.layout.own_page_tokens
        page = self.blocks.tables[slots, 0, position // size].astype(np.int64)
        table = slots * self.blocks.layout.num_tables
        return LayerRows(
            position_N=self._tensor(position.astype(np.int32)),
            recursion_N=self._tensor(np.zeros(len(slots), np.int32)),
            recursion_starts=(0, len(slots)),
            tables_TM=self.tables_TM,
            table_N=self._tensor(table.astype(np.int32)),
            count_N=self._tensor((position + 1).astype(np.int32)),
            slot_N=self._tensor(page * size + position % size),
            num_kv_rows=len(slots),
            num_full_rows=num_full,
            host_table_N=table,
            max_count=int(position.max()) + 1,
        )

    def _block_rows(
        self, flights: Sequence[Flight], rows: Ints, count: Ints, recursion: Ints
    ) -> LayerRows:
        """Turn reserved places into tokens, and describe the rows to the block."""
        blocks, size = self.blocks, self.blocks.layout.block_page_tokens
        slots = np.array([flight.request.slot for flight in flights])
        position = self.position[rows]
        makes_keys = recursion == 0 if self.keeps_first_keys else np.ones_like(recursion, bool)
        table = np.where(makes_keys, 1 + recursion, 1)
        first = np.zeros_like(recursion)
        length = np.array([flight.count for flight in flights])
        first[makes_keys] = blocks.commit(
            slots[makes_keys], table[makes_keys], count[makes_keys], length[makes_keys]
        )
        place = np.repeat(first, count) + _rank(count)
        num_kv_rows = int(count[makes_keys].sum())
        place[num_kv_rows:] = position[num_kv_rows:]  # of recursion 1's table: its own position
        slot_N, table_N = np.repeat(slots, count), np.repeat(table, count)
        page = blocks.tables[slot_N, table_N, place // size].astype(np.int64)
        at, host_table = np.repeat(recursion, count), slot_N * blocks.layout.num_tables + table_N
        starts = np.searchsorted(at, np.arange(self.config.num_recursions + 1))
        return LayerRows(
            position_N=self._tensor(position.astype(np.int32)),
            recursion_N=self._tensor(at.astype(np.int32)),
            recursion_starts=tuple(starts.tolist()),
            tables_TM=self.tables_TM,
            table_N=self._tensor(host_table.astype(np.int32)),
            count_N=self._tensor((place + 1).astype(np.int32)),
            slot_N=self._tensor(page * size + place % size),
            num_kv_rows=num_kv_rows,
            num_full_rows=len(rows),
            host_table_N=host_table,
            max_count=int(place.max()) + 1,
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _best_of(run: Callable[[], object], times: int = 3) -> float:
    """Return the shortest of a few runs, in seconds, after one that warms up."""
    run()
    seconds = []
    for _ in range(times):
        start_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)


def _rank(count: Ints) -> Ints:
    """Return 0, 1, .. count - 1 for each count, one after the other."""
    first = count.cumsum() - count
    return np.arange(int(count.sum())) - np.repeat(first, count)
