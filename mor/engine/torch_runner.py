"""The device's side of a tick in plain torch: gather rows, run layers, join, route, scatter.

Shapes: N rows of a call, D width, R recursions, V vocabulary, M rows whose logits are wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.engine.blocks import BlockManager, Ints
from mor.engine.coda import Costs
from mor.engine.layers import LayerGroups, LayerRows
from mor.engine.routing import DepthRouter
from mor.engine.runner import Call, Runner, rank
from mor.model.mor import MoR


class TorchRunner(Runner):
    """The readable twin of `NativeRunner`; any router, device and type."""

    def __init__(
        self, model: MoR, groups: LayerGroups, blocks: BlockManager, *, num_rows: int
    ) -> None:
        super().__init__(model.config, groups, blocks, num_rows=num_rows)
        self.stack = model.model
        self.router = DepthRouter(model)
        self.device = model.device
        self.keeps_first_keys = self.config.kv_strategy == "shared"
        R, D = self.config.num_recursions, self.config.hidden_size
        self.x = torch.zeros(num_rows, D, dtype=groups.state_dtype, device=self.device)
        chooses = self.router.is_token_choice
        self.start = self.x.new_zeros(num_rows if chooses else 0, D)
        """what recursion 1 got, for the exit of token choice"""
        wide = torch.promote_types(groups.state_dtype, torch.float32)
        self.gate = torch.zeros(num_rows, dtype=wide, device=self.device)
        """gate of the recursion that a row takes next"""
        self.gates = self.gate.new_zeros(num_rows if chooses else 0, R)
        """gates of all recursions (token choice)"""
        self.exit_gate = self.gate.new_zeros(num_rows if chooses else 0)
        self.has_gate = self.config.gating in ("weighted", "residual")
        if chooses and self.config.gating == "residual":
            self.has_gate = False  # it gates at the exit alone
        self.tables_TM = self._tensor(blocks.tables.reshape(-1, blocks.tables.shape[-1]))

    def copy_tables(self) -> None:
        if self.device.type != "cpu":  # there they are the same memory
            self.tables_TM.copy_(torch.from_numpy(self.blocks.tables).flatten(0, 1))

    @torch.inference_mode()
    def run_prelude(self, call: Call) -> None:
        rows, slots = call.rows, call.slots
        index = self._tensor(rows)
        x_ND = self.stack.embed_tokens(self._tensor(self.token[rows])).to(self.x.dtype)
        if self.blocks.layout.own_layers:
            self.blocks.commit(slots, np.zeros_like(slots), call.active, call.length)
            x_ND = self.groups.run("prelude", x_ND, self._own_rows(call, len(rows)))
        self.x.index_copy_(0, index, x_ND)
        if self.router.is_token_choice:
            self._choose(call, index, x_ND)
        else:  # everyone takes recursion 1; its gate is asked for
            self._decide(call, index, np.zeros_like(rows), x_ND)

    @torch.inference_mode()
    def resume(self, call: Call, position: Ints, token: Ints, limit: Ints) -> None:
        """Go on with rows that stand between two recursions; `x` and `start` hold their states.

        limit  most recursions that each row's request may take
        """
        rows, index = call.rows, self._tensor(call.rows)
        self.position[rows], self.token[rows] = position, token
        self.depth[rows], self.limit[rows], self.is_replayed[rows] = call.recursion, limit, False
        if self.router.is_token_choice:
            self._choose(call, index, self.start[index])
        else:
            self._decide(call, index, call.recursion, self.x[index])

    def _choose(self, call: Call, index: Tensor, x_ND: Tensor) -> None:
        """Note what token choice decides about rows that left the prelude."""
        rows = call.rows
        choice = self.router.choose(x_ND)
        self.start.index_copy_(0, index, x_ND)
        if choice.step_gate_NR is not None:
            self.gates[index] = choice.step_gate_NR
        if choice.exit_gate_N1 is not None:
            self.exit_gate[index] = choice.exit_gate_N1[:, 0]
        chosen = np.minimum(self.limit[rows], choice.depth_N.cpu().numpy())
        self.limit[rows] = np.where(self.is_replayed[rows], self.limit[rows], chosen)

    def _decide(self, call: Call, index: Tensor, recursion: Ints, x_ND: Tensor) -> Tensor | None:
        """Ask the routers who may take a recursion, and note the gates of those that do."""
        row_slots = np.repeat(call.slots, call.active)
        decision = self.router.decide(
            self._tensor(recursion),
            x_ND,
            threshold_N=self._tensor(self.threshold[row_slots, recursion]),
            position_N=self._tensor(self.position[call.rows]),
            token_N=self._tensor(self.token[call.rows]),
        )
        if decision.gate_N is not None:
            self.gate.index_copy_(0, index, decision.gate_N)
        return decision.goes_on_N

    @torch.inference_mode()
    def run_block(self, call: Call) -> npt.NDArray[np.bool_]:
        at = np.repeat(call.recursion, call.active)
        index = self._tensor(call.rows)
        x_ND = self.x[index]
        block_ND = self.groups.run("block", x_ND.clone(), self._block_rows(call))
        if self.stack.recursion_encoding is not None:
            block_ND = block_ND * self.stack.recursion_encoding[self._tensor(at)].to(block_ND)
        gate_N = None
        if self.has_gate:
            by_row = self.router.is_token_choice
            gate_N = self.gates[index, self._tensor(at)] if by_row else self.gate[index]
        x_ND = self.router.join(x_ND, block_ND, gate_N)
        self.x.index_copy_(0, index, x_ND)
        self.depth[call.rows] = at + 1
        goes_on = at + 1 < self.limit[call.rows]
        if self.router.has_gate and goes_on.any():
            following = np.minimum(at + 1, self.config.num_recursions - 1)
            asked_N = self._decide(call, index, following, x_ND)
            if asked_N is not None:
                goes_on &= asked_N.cpu().numpy() | self.is_replayed[call.rows]
        self._give_back(call, goes_on)
        return goes_on

    def _give_back(self, call: Call, goes_on: npt.NDArray[np.bool_]) -> None:
        """Give back the places that flights out of the block did not use, and empty pages."""
        remaining = np.add.reduceat(goes_on, call.active.cumsum() - call.active, dtype=np.int64)
        nothing = self.blocks.layout.num_tables
        unused = np.where(remaining > 0, nothing, 2 + call.recursion)
        self.blocks.release(call.slots, unused, call.length)

    @torch.inference_mode()
    def run_coda(self, call: Call, num_full: int) -> Tensor | None:
        index = self._tensor(call.rows)
        x_ND = self.x[index]
        if self.router.is_token_choice:
            x_ND = self.router.leave(self.start[index], x_ND, self.exit_gate[index])
        if self.stack.exit_maps is not None:
            x_ND = self._map_exits(call, x_ND)
        if self.config.num_coda_layers:
            x_ND = self.groups.run("coda", x_ND, self._own_rows(call, num_full))
        return self.groups.logits(x_ND[:num_full]) if num_full else None

    def _map_exits(self, call: Call, x_ND: Tensor) -> Tensor:
        """Pass the rows that left early through the maps of their depths."""
        assert self.stack.exit_maps is not None
        return self.stack.exit_maps(x_ND, self._tensor(self.depth[call.rows]))

    def _own_rows(self, call: Call, num_full: int) -> LayerRows:
        """Describe rows to prelude and coda, where every token has a place: its position."""
        size = self.blocks.layout.own_page_tokens
        slots, position = np.repeat(call.slots, call.active), self.position[call.rows]
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

    def _block_rows(self, call: Call) -> LayerRows:
        """Turn reserved places into tokens, and describe the rows to the block."""
        blocks, size = self.blocks, self.blocks.layout.block_page_tokens
        rows, slots, count, length, recursion = call
        position = self.position[rows]
        makes_keys = recursion == 0 if self.keeps_first_keys else np.ones_like(recursion, bool)
        table = np.where(makes_keys, 1 + recursion, 1)
        first = np.zeros_like(recursion)
        first[makes_keys] = blocks.commit(
            slots[makes_keys], table[makes_keys], count[makes_keys], length[makes_keys]
        )
        place = np.repeat(first, count) + rank(count)
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

            def block(x_ND: Tensor = x_ND, where: LayerRows = where) -> None:
                self.groups.run("block", x_ND.clone(), where)

            block_s.append(_best_of(block, self.device))
            ends_s.append(_best_of(ends, self.device))
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


def _best_of(run: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Return the shortest of a few runs, in seconds, after one that warms up."""
    run()
    seconds = []
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)
