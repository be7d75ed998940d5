"""Stretches of ticks run on the device while the host reads some ticks behind.

A stretch begins when every running request has one token in flight, between two recursions, and no
wish that the device does not serve. From then on the host launches ticks without knowing what they
do. It keeps, at every depth of every request, a place for each tick that it has not read, since a
tick stores at most one token a table, and one for the token that is then in flight. What it reads
goes through the same books as on the ordinary path, so tokens behind an end that only the host
knows of, such as a text, are dropped. Rows that end are told to the device; their pages may be
given away at once, since work that still writes to them comes before all work of a new owner.
Short prompts join the stretch: one pass takes them through the model whole, and what it draws goes
on as rows of the ticks that follow. The stretch ends when a request can be admitted that a pass
does not serve, when pages are short, or when the rows left fit a smaller graph by far: all ticks
are read, and the rows are flights again, at the recursions they reached.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mor.engine.blocks import NO_PLACES, BlockManager, Ints
from mor.engine.core import Flight, Request
from mor.engine.device_prompts import DevicePrompts
from mor.engine.device_tick import IDLE, MAX_END_IDS, WENT_ON, DeviceTick
from mor.engine.graphs import Graphs, Readback, upload
from mor.engine.runner import Call
from mor.engine.scheduler import Scheduler
from mor.engine.torch_runner import TorchRunner
from mor.model.cost import count_params
from mor.model.mor import MoR

BUCKETS = (8, 16, 32, 64, 128, 256, 512)
"""Rows of a graph. More requests than that at a time take the ordinary path."""
PROMPT_ROWS = (64, 128, 256, 512)
"""tokens of prompts in a pass"""
BOUND_ROWS = 256
"""rows up to which a step is bound by its weights, so that what is masked costs nothing"""
FREE_PRODUCTS = 2**37
"""rows x parameters, each recursion's counted, up to which a pass is bound by its launches"""
MAX_PROMPTS = 16
"""prompts of a pass"""
PASS_EVERY = 8
"""ticks from one pass to the next: it takes as long as some of them, and so serves more prompts"""
MAX_PASSES = 4
"""passes between two launches of ticks, where many prompts wait"""
TICKS = 2
"""ticks of a launch: the host's part of one takes as long as the device's part of a short tick"""
AHEAD = 8
"""ticks more for which places are kept at a time, while pages are plenty"""
LAG = 2
"""ticks and passes that the host reads behind, so that it never waits for what has just begun"""


class Done(NamedTuple):
    """A token that went through the model, or all of a prompt."""

    flight: Flight
    token: int
    """what was drawn after it, -1 where the logits are not finite"""
    depths: list[int]


class Unread(NamedTuple):
    """A tick, or a pass of prompts, that was launched and not read."""

    record: Readback
    tick: int
    """which of its launch"""
    entering: list[Flight]
    """prompts of a pass; empty for a tick"""


class CapturedTicks:
    """Runs stretches of decoding for an engine; between two of them it holds nothing."""

    def __init__(
        self,
        model: MoR,
        runner: TorchRunner,
        blocks: BlockManager,
        *,
        max_requests: int,
        max_rows: int,
        tick_of: type[DeviceTick] = DeviceTick,
        lag: int = LAG,
    ) -> None:
        """Serve at most so many requests at a time, and so many rows of prompts in a pass."""
        self.runner, self.blocks, self.lag = runner, blocks, lag
        self.device = model.device
        self.keeps_first_keys = model.config.kv_strategy == "shared"
        most = min(max_requests, BUCKETS[-1])
        self.buckets = sorted({*(bucket for bucket in BUCKETS if bucket < most), most})
        tables_TM = torch.from_numpy(blocks.tables).flatten(0, 1)
        self.tick = tick_of(
            model, runner.groups, blocks.layout, num_rows=most, num_ticks=TICKS,
            tables_TM=tables_TM.to(self.device, copy=True),
        )  # fmt: skip
        params = count_params(model.config.twin()).nonembedding
        most = min(max_rows, PROMPT_ROWS[-1], max(BOUND_ROWS, FREE_PRODUCTS // params))
        self.prompt_rows = sorted({*(size for size in PROMPT_ROWS if size < most), most})
        self.prompts = DevicePrompts(self.tick, num_rows=most, num_prompts=MAX_PROMPTS)
        self.graphs = Graphs(self.device)
        self.num_launched = 0
        """ticks of all stretches"""
        self.num_passes = 0
        """passes of prompts of all stretches"""
        self._row_of: dict[int, int] = {}
        """by id of a request that runs here"""
        self._unread: deque[Unread] = deque()
        self._ended: list[int] = []
        """rows that ended since the last launch"""
        self._fresh: list[Ints] = []
        """places of the flat tables that got pages since the last launch"""
        self._num_rows = 0
        self._draws = False
        # Of every row; of rows that nobody has, anything.
        count = self.buckets[-1]
        self.flights: list[Flight | None] = [None] * count
        self._slots, self._most, self._pending, self._since = (
            np.zeros(count, np.int64) for _ in range(4)
        )
        self._all_rows: Ints | None = None
        """rows of requests that run, until that changes"""
        self._newest = 0
        """since when the newest row runs"""
        self._num_sent = self._num_read = 0
        """ticks and passes of this stretch"""
        self._last_pass = 0
        """when the last pass was sent"""
        self._covered = 0
        """ticks that can be launched before places are to be kept for more"""
        self.is_over = False
        """whether the stretch has to end once all is read"""

    @property
    def is_running(self) -> bool:
        return bool(self._row_of)

    @property
    def num_unread(self) -> int:
        """Ticks and passes that were launched and not read."""
        return len(self._unread)

    def begin(self, scheduler: Scheduler) -> bool:
        """Take over all flights, if each can be served here and pages last; else do nothing."""
        flights = scheduler.in_block
        if not len(flights) == len(scheduler.running) <= self.buckets[-1]:
            return False
        if scheduler.ready or not all(map(_is_served, flights)):
            return False
        if (scheduler.can_admit() or not flights) and not self._serves_next(scheduler):
            return False
        if not flights and not self._has_room(scheduler, 0):
            return False
        self._row_of, self._all_rows, self._num_rows = {}, None, self.buckets[0]
        self._unread.clear()
        self._ended.clear()
        self._fresh.clear()
        self._num_sent = self._num_read = self._newest = 0
        self._covered, self.is_over = TICKS + AHEAD, False
        self._last_pass = -PASS_EVERY
        self._draws = False
        rows = np.array([self._join(flight) for flight in flights], np.int64)
        if self._reserve(rows) is None:
            self._row_of = {}
            return False
        self._load(flights)
        return True

    def _join(self, flight: Flight) -> int:
        """Give a request the first row that is free; ticks that are launched from now on count."""
        request, used = flight.request, set(self._row_of.values())
        row = next(row for row in range(self.buckets[-1]) if row not in used)
        self._row_of[id(request)] = row
        self.flights[row] = flight
        self._slots[row], self._pending[row] = request.slot, 0
        # The last token of an answer is never run.
        self._most[row] = len(request.prompt_ids) + request.stops.max_tokens - 1
        self._since[row] = self._newest = self._num_sent
        self._all_rows = None
        self._num_rows = max(self._num_rows, self._bucket(row + 1))
        self._draws |= request.params.temperature > 0
        return row

    def _bucket(self, count: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= count)

    def _reserve(self, rows: Ints) -> Ints | None:
        """Keep places for what is unread, for ticks to come, and for what then is in flight.

        Returns where tables got pages; None when pages are short.
        """
        slots, blocks = self._slots[rows], self.blocks
        is_plenty = blocks.num_available >= 2 * len(rows) * blocks.layout.num_tables
        ahead = TICKS + (AHEAD if is_plenty else 0)
        places = self.num_unread + ahead + 1 + self._pending[rows, None]
        places = np.minimum(places, self._most[rows, None] - blocks.count[slots])
        fresh = blocks.hold(slots, places * blocks.serves[slots])
        if fresh is not None:
            self._covered = min(self._covered, ahead)
        return fresh

    @torch.inference_mode()
    def _load(self, flights: list[Flight]) -> None:
        """Copy the states of the first rows and what is known of their requests to the device."""
        runner, to, count = self.runner, self.tick.rows, len(flights)
        rows = np.array([flight.rows[0] for flight in flights], np.int64)
        index = upload(rows, self.device)
        to.x_ND[:count] = runner.x[index]
        if len(to.start_ND):
            to.start_ND[:count] = runner.start[index]
        values = {
            **self._about([flight.request for flight in flights]),
            "position_N": runner.position[rows],
            "token_N": runner.token[rows],
            "recursion_N": [flight.recursion for flight in flights],
        }
        for name, value in values.items() if count else ():
            getattr(to, name)[:count].copy_(torch.from_numpy(np.array(value)))
        to.is_alive_N.zero_()
        to.is_alive_N[:count].fill_(True)
        self.tick.tables_TM.copy_(torch.from_numpy(self.blocks.tables).flatten(0, 1))

    def _about(self, requests: list[Request]) -> dict[str, npt.ArrayLike]:
        """Return what is known of requests, by the names that it has among a tick's rows."""
        slots = np.array([request.slot for request in requests], np.int64)
        return {
            "slot_N": slots,
            "count_NC": self.blocks.count[slots],
            "limit_N": [r.policy.max_recursions for r in requests],
            "threshold_NR": [r.policy.thresholds for r in requests],
            "length_N": [len(r.output_ids) for r in requests],
            "last_N": [r.stops.max_tokens for r in requests],
            "end_NW": [(r.stops.end_ids + [-1] * MAX_END_IDS)[:MAX_END_IDS] for r in requests],
            "temperature_N": [r.params.temperature for r in requests],
            "seed_N": [r.sample_row.seed for r in requests],
            "sample_N": [r.sample_row.sample for r in requests],
        }

    def admit(self, scheduler: Scheduler) -> bool:
        """Take waiting requests into the stretch by passes; False when one has to end it.

        Where pages or rows are short they wait, and while few of them would have a pass of their
        own soon after the last one.
        """
        if not scheduler.can_admit():
            return True
        is_soon = self._num_sent - self._last_pass < PASS_EVERY
        if not is_soon or 4 * len(scheduler.waiting) >= len(self._row_of):
            for _ in range(MAX_PASSES):
                if not self._run_pass(scheduler):
                    break
        self.is_over = bool(scheduler.can_admit()) and not self._serves_next(scheduler)
        return not self.is_over

    def _run_pass(self, scheduler: Scheduler) -> bool:
        """Let in what fits one pass and launch it; False when nothing does."""
        flights: list[Flight] = []
        copies: list[tuple[int, int]] = []
        num_rows = 0
        while scheduler.can_admit() and len(flights) < MAX_PROMPTS:
            if not self._serves_next(scheduler) or not self._has_room(scheduler, num_rows):
                break
            request, copied = scheduler.let_in()
            copies += copied
            flight = scheduler.start_whole(request)
            flights.append(flight)
            num_rows += flight.count
            row = self._join(flight)
            self._pending[row] = flight.count
            held = self._reserve(np.array([row]))
            assert held is not None, "a prompt was let in without pages"
            self._fresh.append(self.blocks.places_of(request.slot))
        if copies:
            source, target = zip(*copies, strict=True)
            self.runner.groups.copy_pages(list(source), list(target))
        if flights:
            self._launch_prompts(flights)
        return bool(flights)

    def _serves_next(self, scheduler: Scheduler) -> bool:
        """Tell whether a pass serves the next waiting request, if there is one."""
        if not scheduler.waiting:
            return False
        request = scheduler.waiting[0]
        is_plain = request.params.is_plain_draw and request.params.prompt_logprobs is None
        is_fresh = not request.depths  # after a preemption they are taken again
        has_row = len(self._row_of) < self.buckets[-1]
        return is_plain and is_fresh and has_row and scheduler.num_to_run() <= self.prompt_rows[-1]

    def _has_room(self, scheduler: Scheduler, num_rows: int) -> bool:
        """Tell whether the next waiting request has pages, and a place beside so many rows."""
        request, count = scheduler.waiting[0], scheduler.num_to_run()
        # Its tokens at every depth, and pages that are copied where it begins on the cache's.
        places = request.num_tokens + self.num_unread + TICKS + AHEAD + 1
        layout = self.blocks.layout
        pages = layout.worst_pages(places, request.policy.max_recursions) + layout.num_tables
        return (
            num_rows + count <= self.prompt_rows[-1]
            and count <= scheduler.num_spare_rows
            and pages <= self.blocks.num_available
        )

    @torch.inference_mode()
    def _launch_prompts(self, flights: list[Flight]) -> None:
        """Run a pass over whole prompts, whose next tokens then are rows of the ticks."""
        self._tell()
        prompts, counts = self.prompts, np.array([flight.count for flight in flights])
        ends = counts.cumsum()
        total = int(ends[-1])
        tokens = [f.request.tokens(f.start, f.stop) for f in flights]
        positions = [np.arange(f.start, f.stop) for f in flights]
        about = self._about([flight.request for flight in flights])
        prompts.inbox.send(
            num_2=[total, len(flights)],
            token_N=np.concatenate(tokens),
            position_of_N=np.concatenate(positions),
            prompt_N=np.arange(len(flights)).repeat(counts),
            first_Q=ends - counts,
            last_Q=ends - 1,
            row_Q=[self._row_of[id(flight.request)] for flight in flights],
            position_N=[flight.stop for flight in flights],
            **about,
        )
        num_rows = next(size for size in self.prompt_rows if size >= total)
        draws = any(flight.request.params.temperature > 0 for flight in flights)
        self.graphs.run(prompts, num_rows, draws=draws)
        self.num_passes += 1
        self._last_pass = self._num_sent
        record = Readback(prompts.record_X[: MAX_PROMPTS + num_rows])
        self._send(Unread(record, 0, flights))

    def _send(self, unread: Unread) -> None:
        self._unread.append(unread)
        self._num_sent += 1

    def launch(self) -> bool:
        """Run some ticks; False, and nothing was run, when all has to be read first.

        Then fewer places are needed, or the stretch `is_over`.
        """
        assert self.is_running
        # A third more, so that a batch whose size moves about a graph's does not end it.
        if self._bucket(min(4 * len(self._row_of) // 3, self.buckets[-1])) < self._num_rows:
            self.is_over = True
            return False
        fresh: Ints | None = NO_PLACES
        if self._covered < TICKS:
            self._covered = TICKS + AHEAD
            fresh = self._reserve(self._rows())
        if fresh is None:
            self._covered, self.is_over = 0, not self.num_unread
            return False
        self._covered -= TICKS
        self._fresh.append(fresh)
        self._tell()
        self.graphs.run(self.tick, self._num_rows, draws=self._draws)
        self.num_launched += TICKS
        record = Readback(self.tick.record_KN2[:, : self._num_rows])
        for tick in range(TICKS):
            self._send(Unread(record, tick, []))
        return True

    def _tell(self) -> None:
        """Bring the device new pages of tables, and stop rows that the host ended."""
        at = np.concatenate(self._fresh) if self._fresh else self._fresh
        self._fresh.clear()
        if len(at):
            # Places (int64) and behind them pages (int32) in one copy.
            both = np.empty(len(at) + (len(at) + 1) // 2, np.int64)
            both[: len(at)] = at
            both[len(at) :].view(np.int32)[: len(at)] = self.blocks.tables.reshape(-1)[at]
            at_X, page_X = upload(both, self.device).split([len(at), len(both) - len(at)])
            page_X = page_X.view(torch.int32)[: len(at)]
            self.tick.tables_TM.view(-1).index_copy_(0, at_X, page_X)
        if self._ended:
            ended = upload(np.array(self._ended), self.device)
            self.tick.rows.is_alive_N.index_fill_(0, ended, False)
            self._ended.clear()

    def _rows(self) -> Ints:
        """Rows of requests that run."""
        if self._all_rows is None:
            self._all_rows = np.fromiter(self._row_of.values(), np.int64, len(self._row_of))
        return self._all_rows

    def read(self) -> list[Done]:
        """Read the oldest tick or pass and count what it stored; returns what is through.

        The caller notes them, ends what is to end, and calls `go_on` with the rest.
        """
        record, tick, entering = self._unread.popleft()
        number, self._num_read = self._num_read, self._num_read + 1
        if entering:
            return self._read_prompts(record.numpy(), entering)
        rows = self._rows()
        if self._newest > number:
            rows = rows[self._since[rows] <= number]
        code, depth = record.numpy()[tick, rows].T
        assert (code != IDLE).all(), "the device ended a row that the host did not"
        stored, slots = depth, self._slots[rows]
        if self.keeps_first_keys:
            slots, stored = slots[depth == 1], 1
        self.blocks.store_one(slots, stored)
        left = (code != WENT_ON).nonzero()[0]
        told = zip(rows[left].tolist(), code[left].tolist(), depth[left].tolist(), strict=True)
        return [Done(self._flight(row), token, [depth]) for row, token, depth in told]

    def _flight(self, row: int) -> Flight:
        flight = self.flights[row]
        assert flight is not None
        return flight

    def _read_prompts(self, record: Ints, flights: list[Flight]) -> list[Done]:
        done, layout, first = [], self.blocks.layout, MAX_PROMPTS
        tables = np.arange(layout.num_tables)
        for token, flight in zip(record, flights, strict=False):
            count, slot = flight.count, flight.request.slot
            depth, first = record[first : first + count], first + count
            row = self._row_of.get(id(flight.request))
            if row is None:
                continue  # it was ended meanwhile
            self._pending[row] = 0
            # Prelude and coda, and recursion 1, keep every token.
            stored = (depth[:, None] >= tables).sum(0) * self.blocks.serves[slot]
            slots = np.full_like(tables, slot)
            self.blocks.commit(slots, tables, stored, count * self.blocks.serves[slot])
            self.blocks.trim(slots[:1])
            done.append(Done(flight, int(token), depth.tolist()))
        return done

    def go_on(self, requests: list[Request]) -> None:
        """Follow the device to the next token of requests that have drawn one and not ended."""
        rows = [self._row_of[id(request)] for request in requests]
        for row in rows:
            flight = self._flight(row)
            flight.start += 1
            flight.request.num_started += 1
        if self.blocks.layout.own_layers and rows:
            self.blocks.store_one(self._slots[rows], 0)

    def drop(self, request: Request) -> None:
        """Forget a request that ended, if it runs here."""
        row = self._row_of.pop(id(request), None)
        if row is not None:
            self._ended.append(row)
            self._all_rows = None

    @torch.inference_mode()
    def hand_back(self) -> None:
        """End the stretch: the rows are flights again. All ticks have been read."""
        assert not self.num_unread
        rows = self._rows()
        self._row_of, self._all_rows = {}, None
        if not len(rows):
            return
        runner, blocks, tick = self.runner, self.blocks, self.tick.rows
        flights = [self._flight(row) for row in rows]
        slots = self._slots[rows]
        index = upload(rows, self.device)
        about = torch.stack((tick.position_N, tick.token_N, tick.recursion_N, tick.is_alive_N), 1)
        position, token, recursion, is_alive = about[index].cpu().numpy().T
        assert is_alive.all(), "host and device disagree"
        assert position.tolist() == [flight.start for flight in flights]
        for flight, done in zip(flights, recursion.tolist(), strict=True):
            flight.recursion, flight.active = done, flight.rows
            runner.note_policy(flight)
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
