"""Stretches of ticks that only decode, run on the device while the host reads some ticks behind.

A stretch begins when every running request has one token in flight, between two recursions, and no
wish that the device does not serve. From then on the host launches ticks without knowing what they
do. It keeps, at every depth of every request, a place for each tick that it has not read, since a
tick stores at most one token a table, and one for the token that is then in flight. What it reads
goes through the same books as on the ordinary path, so tokens behind an end that only the host
knows of, such as a text, are dropped. Rows that end are told to the device; their pages may be
given away at once, since work that still writes to them comes before all work of a new owner.
The stretch ends when a request can be admitted, when pages are short, or when the rows left fit a
smaller graph: all ticks are read, and the rows are flights again, at the recursions they reached.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from mor.engine.blocks import BlockManager, Ints
from mor.engine.core import Flight, Request
from mor.engine.device_tick import IDLE, MAX_END_IDS, WENT_ON, DeviceTick
from mor.engine.graphs import Graphs, Readback, upload
from mor.engine.runner import Call
from mor.engine.scheduler import Scheduler
from mor.engine.torch_runner import TorchRunner
from mor.model.mor import MoR

BUCKETS = (8, 16, 32, 64, 128, 200)
"""Rows of a graph. With more rows a step is no longer bound by its weights: the ordinary path."""
LAG = 2
"""ticks that the host reads behind, so that it never waits for one that has just begun"""


class Done(NamedTuple):
    """A token that went through the model."""

    flight: Flight
    token: int
    """what was drawn after it, -1 where the logits are not finite"""
    depth: int


class CapturedTicks:
    """Runs stretches of decoding for an engine; between two of them it holds nothing."""

    def __init__(
        self,
        model: MoR,
        runner: TorchRunner,
        blocks: BlockManager,
        *,
        max_requests: int,
        lag: int = LAG,
    ) -> None:
        self.runner, self.blocks, self.lag = runner, blocks, lag
        self.device = model.device
        self.keeps_first_keys = model.config.kv_strategy == "shared"
        most = min(max_requests, BUCKETS[-1])
        self.buckets = sorted({*(bucket for bucket in BUCKETS if bucket < most), most})
        tables_TM = torch.from_numpy(blocks.tables).flatten(0, 1)
        self.tick = DeviceTick(
            model, runner.groups, blocks.layout, num_rows=most,
            tables_TM=tables_TM.to(self.device, copy=True),
        )  # fmt: skip
        self.graphs = Graphs(self.tick)
        self.flights: list[Flight] = []
        """by row; those of requests that ended stay until the stretch does"""
        self._row_of: dict[int, int] = {}
        """by id of a request that runs here"""
        self._unread: deque[Readback] = deque()
        self._ended: list[int] = []
        """rows that ended since the last launch"""
        self._num_rows = 0
        self._draws = False
        self._slots, self._recursion, self._most = (np.zeros(0, np.int64) for _ in range(3))

    @property
    def is_running(self) -> bool:
        return bool(self._row_of)

    @property
    def num_unread(self) -> int:
        """Ticks that were launched and not read."""
        return len(self._unread)

    def begin(self, scheduler: Scheduler) -> bool:
        """Take over all flights, if each can be served here and pages last; else do nothing."""
        flights = scheduler.in_block
        if not 0 < len(flights) == len(scheduler.running) <= self.buckets[-1]:
            return False
        if scheduler.ready or scheduler.can_admit() or not all(map(_is_served, flights)):
            return False
        requests = [flight.request for flight in flights]
        self._slots = np.array([request.slot for request in requests])
        self._recursion = np.array([flight.recursion for flight in flights])
        # The last token of an answer is never run.
        most = [len(r.prompt_ids) + r.stops.max_tokens - 1 for r in requests]
        self._most = np.array(most)
        if self._reserve(np.arange(len(flights))) is None:
            return False
        self.flights = list(flights)
        self._row_of = {id(request): row for row, request in enumerate(requests)}
        self._unread.clear()
        self._ended.clear()
        self._num_rows = self._bucket(len(flights))
        self._draws = any(request.params.temperature > 0 for request in requests)
        self._load(requests)
        return True

    def _bucket(self, count: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= count)

    def _reserve(self, rows: Ints) -> Ints | None:
        """Keep places for what is unread after the next launch, and for what then is in flight."""
        slots = self._slots[rows]
        places = np.minimum(self.lag + 2, self._most[rows, None] - self.blocks.count[slots])
        return self.blocks.hold(slots, places * self.blocks.serves[slots])

    @torch.inference_mode()
    def _load(self, requests: list[Request]) -> None:
        """Copy the rows' states and what is known of their requests to the device."""
        runner, to, count = self.runner, self.tick.rows, len(requests)
        rows = np.array([flight.rows[0] for flight in self.flights])
        index = upload(rows, self.device)
        to.x_ND[:count] = runner.x[index]
        if len(to.start_ND):
            to.start_ND[:count] = runner.start[index]
        end_ids = [(r.stops.end_ids + [-1] * MAX_END_IDS)[:MAX_END_IDS] for r in requests]
        values = {
            "slot_N": self._slots,
            "position_N": runner.position[rows],
            "token_N": runner.token[rows],
            "recursion_N": self._recursion,
            "count_NC": self.blocks.count[self._slots],
            "limit_N": [r.policy.max_recursions for r in requests],
            "threshold_NR": [r.policy.thresholds for r in requests],
            "length_N": [len(r.output_ids) for r in requests],
            "last_N": [r.stops.max_tokens for r in requests],
            "end_NW": end_ids,
            "temperature_N": [r.params.temperature for r in requests],
            "seed_N": [r.sample_row.seed for r in requests],
            "sample_N": [r.sample_row.sample for r in requests],
        }
        for name, value in values.items():
            getattr(to, name)[:count].copy_(torch.from_numpy(np.array(value)))
        to.is_alive_N.zero_()
        to.is_alive_N[:count].fill_(True)
        self.tick.tables_TM.copy_(torch.from_numpy(self.blocks.tables).flatten(0, 1))

    def launch(self) -> bool:
        """Run a tick; False, and nothing was run, when the stretch has to end."""
        assert self.is_running and self.num_unread <= self.lag
        if self._bucket(len(self._row_of)) < self._num_rows:
            return False
        fresh = self._reserve(self._rows())
        if fresh is None:
            return False
        tick = self.tick
        if len(fresh):
            pages = self.blocks.tables.reshape(-1)[fresh].astype(np.int64)
            at = upload(fresh, self.device)
            tick.tables_TM.view(-1).index_copy_(0, at, upload(pages, self.device).int())
        if self._ended:
            ended = upload(np.array(self._ended), self.device)
            tick.rows.is_alive_N.index_fill_(0, ended, False)
            self._ended.clear()
        self.graphs.run(self._num_rows, draws=self._draws)
        self._unread.append(Readback(tick.rows.record_N2[: self._num_rows]))
        return True

    def _rows(self) -> Ints:
        """Rows of requests that run."""
        return np.fromiter(self._row_of.values(), np.int64, len(self._row_of))

    def read(self) -> list[Done]:
        """Read the oldest tick and count what it stored; returns the tokens that are through.

        The caller notes them, ends what is to end, and calls `go_on` with the rest.
        """
        rows = self._rows()
        code, depth = self._unread.popleft().numpy()[rows].T
        assert (code != IDLE).all(), "the device ended a row that the host did not"
        stores = depth == 1 if self.keeps_first_keys else np.ones_like(depth, bool)
        slots, one = self._slots[rows][stores], np.ones(int(stores.sum()), np.int64)
        self.blocks.commit(slots, depth[stores], one, one)
        has_left = code != WENT_ON
        self._recursion[rows] = np.where(has_left, 0, depth)
        left = zip(rows[has_left], code[has_left].tolist(), depth[has_left].tolist(), strict=True)
        return [Done(self.flights[row], token, depth) for row, token, depth in left]

    def go_on(self, requests: list[Request]) -> None:
        """Follow the device to the next token of requests that have drawn one and not ended."""
        rows = [self._row_of[id(request)] for request in requests]
        for row in rows:
            self.flights[row].start += 1
            self.flights[row].request.num_started += 1
        if self.blocks.layout.own_layers and rows:
            slots = self._slots[rows]
            one = np.ones_like(slots)
            self.blocks.commit(slots, np.zeros_like(slots), one, one)

    def drop(self, request: Request) -> None:
        """Forget a request that ended, if it runs here."""
        row = self._row_of.pop(id(request), None)
        if row is not None:
            self._ended.append(row)

    @torch.inference_mode()
    def hand_back(self) -> None:
        """End the stretch: the rows are flights again. All ticks have been read."""
        assert not self.num_unread
        rows = self._rows()
        self._row_of = {}
        if not len(rows):
            return
        runner, blocks, tick = self.runner, self.blocks, self.tick.rows
        flights = [self.flights[row] for row in rows]
        recursion, slots = self._recursion[rows], self._slots[rows]
        for flight, done in zip(flights, recursion.tolist(), strict=True):
            flight.recursion, flight.active = done, flight.rows
        index = upload(rows, self.device)
        about = torch.stack((tick.position_N, tick.token_N, tick.recursion_N, tick.is_alive_N), 1)
        position, token, at, is_alive = about[index].cpu().numpy().T
        assert (at == recursion).all() and is_alive.all(), "host and device disagree"
        assert position.tolist() == [flight.start for flight in flights]
        call = Call.of(flights)
        to = upload(call.rows, self.device)
        runner.x.index_copy_(0, to, tick.x_ND[index])
        if len(tick.start_ND):
            runner.start.index_copy_(0, to, tick.start_ND[index])
        limit = np.array([flight.request.policy.max_recursions for flight in flights])
        runner.resume(call, position, token, limit)
        deeper = np.arange(blocks.layout.num_tables) > recursion[:, None]
        deeper[:, 0] = False
        held = blocks.hold(slots, blocks.serves[slots] * deeper)
        assert held is not None and not len(held)


def _is_served(flight: Flight) -> bool:
    """Tell whether a flight is the newest token of a request, and all it wishes for is known."""
    request = flight.request
    return (
        flight.count == 1
        and flight.wants_logits
        and len(request.depths) <= flight.start
        and request.params.is_plain_draw
    )
