"""Ticks for rows that decode, all of them on the device: nothing here asks for a number.

    block -> join -> routers -> coda, head, draw -> embed, prelude

Every row is the newest token of one request, wherever it stands. All rows take part in every
step, since a step of few rows is bound by its weights; a row that a step is not for sees no key
(count 0), leaves none (slot -1), and what the step makes of it is dropped. Tensors keep size and
address, so a CUDA graph may hold the tick; on a CPU it runs as it is, op by op.
Shapes: N rows, D width, R recursions, V vocabulary, C tables of a request, T tables of all
requests, M pages of the longest table, W tokens that end an answer.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mor.engine.blocks import Layout
from mor.engine.layers import LayerGroups, LayerRows
from mor.engine.routing import Decision, DepthRouter
from mor.engine.sampler import TEMPERATURES, inverse_cdf
from mor.model.mor import MoR
from mor.ops.select import hash_draw

WENT_ON, IDLE = -2, -3
"""What a row's code says when it is no token; -1 is a token that could not be drawn."""
MAX_END_IDS = 8
"""tokens that the device knows to end an answer; of more, the host finds the rest"""


class DeviceRows(NamedTuple):
    """State of every row; int64 where nothing else is said."""

    x_ND: Tensor
    """states, in the groups' type"""
    start_ND: Tensor
    """what recursion 1 got (token choice); empty without"""
    slot_N: Tensor
    """the request's row of the tables"""
    is_alive_N: Tensor
    """bool"""
    position_N: Tensor
    token_N: Tensor
    recursion_N: Tensor
    """recursions done, so the number, from 0, of the next"""
    count_NC: Tensor
    """tokens in each table of the block; the first, prelude's and coda's, is left at 0"""
    limit_N: Tensor
    """recursions at most"""
    threshold_NR: Tensor
    """float64"""
    length_N: Tensor
    """tokens of the answer so far"""
    last_N: Tensor
    """tokens at which the answer ends"""
    end_NW: Tensor
    """tokens that end it, padded with -1"""
    temperature_N: Tensor
    """float32; 0 for the best token"""
    seed_N: Tensor
    sample_N: Tensor

    @classmethod
    def zeros(cls, num_rows: int, model: MoR, layout: Layout, dtype: torch.dtype) -> DeviceRows:
        config, device = model.config, model.device
        D, R, C = config.hidden_size, config.num_recursions, layout.num_tables
        num_starts = num_rows if config.router == "token_choice" else 0
        other = {
            "x_ND": torch.zeros(num_rows, D, dtype=dtype, device=device),
            "start_ND": torch.zeros(num_starts, D, dtype=dtype, device=device),
            "is_alive_N": torch.zeros(num_rows, dtype=torch.bool, device=device),
            "threshold_NR": torch.zeros(num_rows, R, dtype=torch.float64, device=device),
            "temperature_N": torch.zeros(num_rows, dtype=torch.float32, device=device),
        }
        widths = {"count_NC": (C,), "end_NW": (MAX_END_IDS,)}
        whole = {
            name: torch.zeros(num_rows, *widths.get(name, ()), dtype=torch.int64, device=device)
            for name in cls._fields
            if name not in other
        }
        return cls(**other, **whole)

    def first(self, count: int) -> DeviceRows:
        """Return views of the first rows."""
        return DeviceRows(*(tensor[:count] for tensor in self))


class Recursed(NamedTuple):
    """What a recursion made of rows."""

    x_ND: Tensor
    """of rows that are not alive as they were"""
    goes_on_N: Tensor
    """bool, who takes another recursion"""
    exit_gate_N: Tensor | None
    """token choice, where it gates at the exit"""


class DeviceTick:
    """Runs ticks on its rows. Tables of pages are its own copy: the host brings what is new."""

    def __init__(
        self,
        model: MoR,
        groups: LayerGroups,
        layout: Layout,
        *,
        num_rows: int,
        num_ticks: int = 1,
        tables_TM: Tensor,
    ) -> None:
        """Serve at most num_rows requests, num_ticks ticks a run.

        groups  `TorchGroups` or made of them: they leave the states that they get as they are
        """
        self.config, self.stack, self.groups, self.layout = (
            model.config,
            model.model,
            groups,
            layout,
        )
        self.router = DepthRouter(model)
        self.new_rows = partial(
            DeviceRows.zeros, model=model, layout=layout, dtype=groups.state_dtype
        )
        """makes rows that are not alive"""
        self.rows = self.new_rows(num_rows + 1)
        """the last is for whatever nobody asked for"""
        self.record_KN2 = torch.zeros(
            num_ticks, num_rows + 1, 2, dtype=torch.int64, device=model.device
        )
        """what the last ticks did: the token drawn or WENT_ON or IDLE, and recursions done"""
        self.tables_TM = tables_TM
        self.table_C = torch.arange(layout.num_tables, device=model.device)
        self.keeps_first_keys = self.config.kv_strategy == "shared"
        self.has_gate = self.config.gating in ("weighted", "residual")

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Where these are False a tick changes nothing."""
        return (self.rows.is_alive_N,)

    @torch.inference_mode()
    def run(self, num_rows: int, *, draws: bool) -> None:
        """Run ticks on the first rows; `draws` where some row has a temperature."""
        rows = self.rows.first(num_rows)
        for record_N2 in self.record_KN2[:, :num_rows]:
            self._run_one(rows, record_N2, draws=draws)

    def _run_one(self, rows: DeviceRows, record_N2: Tensor, *, draws: bool) -> None:
        x_ND, goes_on_N, exit_gate_N = self.recurse(rows)
        leaves_N = rows.is_alive_N & ~goes_on_N
        out_ND = self.run_coda(rows, x_ND, leaves_N, rows.recursion_N + 1, exit_gate_N)
        drawn_N = self.draw(rows, out_ND, draws=draws)
        enters_N = self.advance(rows, record_N2, drawn_N, goes_on_N)
        first_ND = self.run_prelude(rows, enters_N)
        rows.x_ND.copy_(first_ND.where(enters_N[:, None], x_ND))
        if self.router.is_token_choice:
            rows.start_ND.copy_(first_ND.where(enters_N[:, None], rows.start_ND))

    def recurse(self, rows: DeviceRows) -> Recursed:
        """Take rows that are alive through the block, at the recursion where they stand."""
        x_ND, choice = rows.x_ND, None
        if self.router.is_token_choice:
            choice = self.router.choose(rows.start_ND)
        block_ND = self.groups.run("block", x_ND, self._block_rows(rows))
        if self.stack.recursion_encoding is not None:
            block_ND = block_ND * self.stack.recursion_encoding[rows.recursion_N].to(block_ND)
        if choice is None:
            return Recursed(*self._join_and_ask(rows, block_ND), None)
        at_N1, gate_N, exit_gate_N = rows.recursion_N[:, None], None, None
        if choice.step_gate_NR is not None:
            gate_N = choice.step_gate_NR.gather(1, at_N1)[:, 0]
        if choice.exit_gate_N1 is not None:
            exit_gate_N = choice.exit_gate_N1[:, 0]
        joined_ND = self.router.join(x_ND, block_ND, gate_N)
        most_N = torch.minimum(rows.limit_N, choice.depth_N)
        goes_on_N = rows.is_alive_N & (rows.recursion_N + 1 < most_N)
        return Recursed(joined_ND.where(rows.is_alive_N[:, None], x_ND), goes_on_N, exit_gate_N)

    def _join_and_ask(self, rows: DeviceRows, block_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Join what the block made to the stream, and ask the routers who takes another recursion.

        Returns states, of rows that are not alive as they were, and who goes on.
        """
        x_ND, is_alive_N, gate_N = rows.x_ND, rows.is_alive_N, None
        if self.has_gate:
            gate_N = self._decide(rows, x_ND, rows.recursion_N).gate_N
        joined_ND = self.router.join(x_ND, block_ND, gate_N).where(is_alive_N[:, None], x_ND)
        done_N = rows.recursion_N + 1
        goes_on_N = is_alive_N & (done_N < rows.limit_N)
        if self.router.has_gate:
            last = self.config.num_recursions - 1
            asked_N = self._decide(rows, joined_ND, done_N.clamp(max=last)).goes_on_N
            goes_on_N = goes_on_N if asked_N is None else goes_on_N & asked_N
        return joined_ND, goes_on_N

    def _decide(self, rows: DeviceRows, x_ND: Tensor, recursion_N: Tensor) -> Decision:
        return self.router.decide(
            recursion_N,
            x_ND,
            threshold_N=rows.threshold_NR.gather(1, recursion_N[:, None])[:, 0],
            position_N=rows.position_N,
            token_N=rows.token_N,
            asks_all=True,
        )

    def advance(
        self, rows: DeviceRows, record_N2: Tensor, drawn_N: Tensor, goes_on_N: Tensor
    ) -> Tensor:
        """Bring rows to the next recursion or the token drawn; returns which begin with a token."""
        leaves_N, done_N = rows.is_alive_N & ~goes_on_N, rows.recursion_N + 1
        length_N = rows.length_N + leaves_N
        enters_N = leaves_N & self.goes_further(rows, drawn_N, length_N)
        record_N2[:, 0].copy_(drawn_N.where(leaves_N, torch.where(goes_on_N, WENT_ON, IDLE)))
        record_N2[:, 1].copy_(done_N * rows.is_alive_N)
        rows.length_N.copy_(length_N)
        rows.token_N.copy_(drawn_N.where(enters_N, rows.token_N))
        rows.position_N.add_(enters_N)
        rows.recursion_N.copy_(done_N.where(goes_on_N, rows.recursion_N * ~enters_N))
        rows.is_alive_N.copy_(goes_on_N | enters_N)
        return enters_N

    def run_coda(
        self,
        rows: DeviceRows,
        x_ND: Tensor,
        leaves_N: Tensor,
        depth_N: Tensor,
        exit_gate_N: Tensor | None,
    ) -> Tensor:
        """Take rows that leave the block at these depths through the coda; of others, anything."""
        if self.router.is_token_choice:
            x_ND = self.router.leave(rows.start_ND, x_ND, exit_gate_N)
        if self.stack.exit_maps is not None:
            x_ND = self._map_exits(x_ND, depth_N)
        if self.config.num_coda_layers:
            x_ND = self.groups.run("coda", x_ND, self._own_rows(rows, leaves_N))
        return x_ND

    def _map_exits(self, x_ND: Tensor, depth_N: Tensor) -> Tensor:
        """Pass every row through every map, and keep what its depth says."""
        assert self.stack.exit_maps is not None
        maps, mapped_ND = self.stack.exit_maps, x_ND
        for r, weight_DD in enumerate(maps.weight, start=1):
            is_here_N1 = (depth_N == r)[:, None]
            mapped_ND = (x_ND + maps.step(x_ND, weight_DD)).where(is_here_N1, mapped_ND)
        return mapped_ND

    def draw(self, rows: DeviceRows, x_ND: Tensor, *, draws: bool) -> Tensor:
        """Run the head on states after the coda, and draw; -1 where the logits are not finite."""
        logit_NV = self.groups.logits(x_ND)
        best_N = self.groups.argmax(logit_NV)
        return self._draw(rows, logit_NV.float(), best_N) if draws else best_N

    def _draw(self, rows: DeviceRows, logit_NV: Tensor, best_N: Tensor) -> Tensor:
        """Draw as `Sampler` does with a temperature and nothing else."""
        divisor_N1 = rows.temperature_N.clamp(*TEMPERATURES)[:, None]
        share_NV = ((logit_NV - logit_NV.amax(1, keepdim=True)) / divisor_N1).softmax(1)
        draw_N = hash_draw(rows.seed_N, rows.sample_N, rows.length_N)
        drawn_N1 = inverse_cdf(share_NV, draw_N[:, None])
        is_drawn_N = (rows.temperature_N > 0) & (share_NV.gather(1, drawn_N1)[:, 0] > 0)
        return drawn_N1[:, 0].where(is_drawn_N & (best_N >= 0), best_N)

    def goes_further(self, rows: DeviceRows, drawn_N: Tensor, length_N: Tensor) -> Tensor:
        """Tell which answers go on after a token that makes them so long."""
        is_end_N = (drawn_N[:, None] == rows.end_NW).any(1) | (length_N >= rows.last_N)
        return ~is_end_N & (drawn_N >= 0)

    def run_prelude(self, rows: DeviceRows, enters_N: Tensor) -> Tensor:
        x_ND = self.stack.embed_tokens(rows.token_N).to(rows.x_ND.dtype)
        if not self.config.num_prelude_layers:
            return x_ND
        return self.groups.run("prelude", x_ND, self._own_rows(rows, enters_N))

    def _own_rows(self, rows: DeviceRows, is_in_N: Tensor) -> LayerRows:
        """Describe rows to prelude and coda, where every token has a place: its position."""
        table_N = rows.slot_N * self.layout.num_tables
        size = self.layout.own_page_tokens
        return self._where(rows, table_N, rows.position_N, size, is_in_N, is_in_N)

    def _block_rows(self, rows: DeviceRows) -> LayerRows:
        """Describe rows to the block, and count what they leave there."""
        recursion_N, size = rows.recursion_N, self.layout.block_page_tokens
        first_N, is_in_N = rows.slot_N * self.layout.num_tables, rows.is_alive_N
        if self.keeps_first_keys:  # recursion 1 takes every token, so its place is its position
            makes_N = is_in_N & (recursion_N == 0)
            return self._where(rows, first_N + 1, rows.position_N, size, is_in_N, makes_N)
        table_N1 = 1 + recursion_N[:, None]
        place_N = rows.count_NC.gather(1, table_N1)[:, 0]
        rows.count_NC.add_((table_N1 == self.table_C) & is_in_N[:, None])
        return self._where(rows, first_N + table_N1[:, 0], place_N, size, is_in_N, is_in_N)

    def _where(
        self,
        rows: DeviceRows,
        table_N: Tensor,
        place_N: Tensor,
        page_tokens: int,
        is_in_N: Tensor,
        makes_N: Tensor,
    ) -> LayerRows:
        """Look up the page of each row's place; rows that are out stay within the tables."""
        at_N = table_N * self.tables_TM.shape[1] + place_N // page_tokens
        page_N = self.tables_TM.view(-1)[at_N].long()
        slot_N = page_N * page_tokens + place_N % page_tokens
        return LayerRows(
            position_N=rows.position_N.int(),
            recursion_N=rows.recursion_N.int(),
            recursion_starts=(),
            tables_TM=self.tables_TM,
            table_N=table_N.int(),
            count_N=((place_N + 1) * is_in_N).int(),
            slot_N=slot_N.masked_fill(~makes_N, -1),
            num_kv_rows=len(table_N),
            num_full_rows=len(table_N),
            host_table_N=None,
            max_count=0,
        )
