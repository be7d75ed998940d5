"""The host's side of a tick: which rows stand where, and what became of them.

Every token in flight has a row of state. A call of the block takes the rows of all depths; what
differs between them is a table, a count, and the recursion that they stand at.
Shapes: R recursions, M rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mor.config import ModelConfig
from mor.engine.blocks import BlockManager, Ints
from mor.engine.coda import Costs
from mor.engine.core import Batch, DepthPolicy, Flight
from mor.engine.layers import LayerGroups

NO_ROWS = np.zeros(0, np.int64)


class Call(NamedTuple):
    """The rows of one call, flight after flight, each flight's in order of position."""

    rows: Ints
    """state row of each"""
    slots: Ints
    """of each flight, its request"""
    active: Ints
    """of each flight, its rows in this call"""
    length: Ints
    """of each flight, the places that it reserved at every depth"""
    recursion: Ints
    """of each flight, recursions done"""

    @classmethod
    def of(cls, flights: Sequence[Flight]) -> Call:
        """Take the rows of flights that are still in the block."""
        rows = [flight.active for flight in flights]
        about = [(f.request.slot, len(f.active), len(f.rows), f.recursion) for f in flights]
        slots, active, length, recursion = np.array(about).T
        return cls(np.concatenate(rows), slots, active, length, recursion)


class Finished(NamedTuple):
    """What the coda gave."""

    logits_MV: Tensor | None
    """fp32 or wider; None when no row's logits are wanted"""
    rows: list[slice]
    """of each flight, its rows among the logits: all its tokens, the last one, or none"""
    depths: list[list[int]]
    """of each flight, recursions that each token took"""


class Runner(ABC):
    """Runs what the scheduler chose. Holds the state of every token in flight."""

    def __init__(
        self, config: ModelConfig, groups: LayerGroups, blocks: BlockManager, *, num_rows: int
    ) -> None:
        self.config = config
        self.groups = groups
        self.blocks = blocks
        self.is_shared = config.shares_block
        self.position = np.zeros(num_rows, np.int64)
        self.token = np.zeros(num_rows, np.int64)
        self.depth = np.zeros(num_rows, np.int64)
        """recursions done"""
        self.limit = np.zeros(num_rows, np.int64)
        """recursions at most"""
        self.is_replayed = np.zeros(num_rows, bool)
        """its depth is known: `limit`"""
        max_requests = len(blocks.count)
        self.threshold = np.zeros((max_requests, config.num_recursions))
        """thresholds of each request"""
        self.policy: list[DepthPolicy | None] = [None] * max_requests

    @abstractmethod
    def run_prelude(self, call: Call) -> None:
        """Embed the rows' tokens, run the prelude, and note what is decided before recursion 1."""

    @abstractmethod
    def run_block(self, call: Call) -> npt.NDArray[np.bool_]:
        """Run the block on rows ordered by recursion; returns which of them take another."""

    @abstractmethod
    def run_coda(self, call: Call, num_full: int) -> Tensor | None:
        """Run the coda; returns logits of the first num_full rows, None for none."""

    @abstractmethod
    def measure(self, max_rows: int) -> Costs:
        """Time block and ends for numbers of rows up to max_rows, without touching a page."""

    @abstractmethod
    def copy_tables(self) -> None:
        """Bring the tables of pages to where the layers run."""

    def enter(self, batch: Batch) -> None:
        """Run the prelude for a tick, after what has to be copied before."""
        if batch.copies:
            source, target = zip(*batch.copies, strict=True)
            self.groups.copy_pages(list(source), list(target))
        self.copy_tables()
        if batch.entering:
            self._enter(batch.entering)

    def advance(self, batch: Batch) -> None:
        """Run the block for a tick; flights then hold the rows that go on."""
        if self.is_shared:
            if batch.in_block:
                self._recursion(sorted(batch.in_block, key=lambda flight: flight.recursion))
            return
        for recursion in range(self.config.num_recursions):
            at = [f for f in batch.in_block if f.recursion == recursion and len(f.active)]
            if at:
                self._recursion(at)

    def _enter(self, flights: list[Flight]) -> None:
        call = Call.of(flights)
        rows = call.rows
        first = np.array([flight.start for flight in flights])
        self.position[rows] = np.repeat(first, call.active) + rank(call.active)
        self.token[rows] = [
            token
            for flight in flights
            for token in flight.request.tokens(flight.start, flight.stop)
        ]
        self.depth[rows] = 0
        limits = [flight.request.policy.max_recursions for flight in flights]
        self.limit[rows] = np.repeat(limits, call.active)
        self.is_replayed[rows] = False
        for flight in flights:
            self.note_policy(flight)
        self.run_prelude(call)

    def note_policy(self, flight: Flight) -> None:
        """Note a request's thresholds, and the depths that its tokens are known to have."""
        request = flight.request
        if self.policy[request.slot] is not request.policy:
            self.policy[request.slot] = request.policy
            self.threshold[request.slot] = request.policy.thresholds
        if flight.start < len(request.depths):
            known = request.depths[flight.start : flight.stop]
            self.limit[flight.rows[: len(known)]] = known
            self.is_replayed[flight.rows[: len(known)]] = True

    def _recursion(self, flights: Sequence[Flight]) -> None:
        """Run one call of the block on flights ordered by recursion, and route its rows."""
        call = Call.of(flights)
        goes_on = self.run_block(call)
        if len(call.rows) == len(flights):  # one token each
            for flight, goes in zip(flights, goes_on.tolist(), strict=True):
                flight.recursion += 1
                if not goes:
                    flight.active = NO_ROWS
            return
        ends = call.active.cumsum().tolist()
        for flight, end, length in zip(flights, ends, call.active.tolist(), strict=True):
            flight.active = flight.active[goes_on[end - length : end]]
            flight.recursion += 1

    def finish(self, flights: list[Flight]) -> Finished:
        """Run coda and head for flights that left the block."""
        kept = [_num_wanted(flight) for flight in flights]
        ends = list(itertools.accumulate(kept))
        num_full = ends[-1]
        parts = [slice(end - count, end) for end, count in zip(ends, kept, strict=True)]
        lengths = [flight.count for flight in flights]
        if sum(lengths) == num_full:
            rows = in_order = np.concatenate([flight.rows for flight in flights])
            active, slots = kept, [flight.request.slot for flight in flights]
        else:
            # Rows that only leave keys and values come last. Attention does not mind their order.
            wanted = [f.rows[f.count - count :] for f, count in zip(flights, kept, strict=True)]
            rest = [f.rows[: f.count - count] for f, count in zip(flights, kept, strict=True)]
            rows = np.concatenate([*wanted, *rest])
            in_order = np.concatenate([flight.rows for flight in flights])
            active = [len(part) for part in (*wanted, *rest)]
            slots = [flight.request.slot for flight in flights] * 2
        depth, first = self.depth[in_order].tolist(), 0
        depths = []
        for length in lengths:
            depths.append(depth[first : first + length])
            first += length
        if not num_full and not self.config.num_coda_layers:
            return Finished(None, parts, depths)
        nothing = np.zeros(len(active), np.int64)
        call = Call(rows, np.array(slots), np.array(active), nothing, nothing)
        return Finished(self.run_coda(call, num_full), parts, depths)


def _num_wanted(flight: Flight) -> int:
    """Tokens of a flight, counted from its end, whose logits are wanted."""
    if flight.request.params.prompt_logprobs is not None:
        return flight.count
    return 1 if flight.wants_logits else 0


def rank(count: Ints) -> Ints:
    """Return 0, 1, .. count - 1 for each count, one after the other."""
    first = count.cumsum() - count
    return np.arange(int(count.sum())) - np.repeat(first, count)
