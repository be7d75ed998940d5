"""How long a trace must take: an ideal scheduler over the kernels' own times, and nothing else.

Every tick runs the rows of all depths in one call of the block, prompts in chunks beside them; the
coda runs every p ticks, and the best p counts. Scheduling, routing, gathering, sampling and page
tables take no time here. Nothing of `mor.engine` is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mor.bench.serve_config import MAX_EFFICIENCY
from mor.bench.tables import Tables
from mor.bench.workload import RequestSpec
from mor.config import ModelConfig


class Layers(NamedTuple):
    """What a prediction needs to know of a model."""

    prelude: int
    block: int
    coda: int
    recursions: int
    sees_all: bool
    """keys of recursion 1 serve all"""

    @classmethod
    def of(cls, config: ModelConfig) -> Layers:
        return cls(
            config.num_prelude_layers,
            config.num_block_layers,
            config.num_coda_layers,
            config.num_recursions,
            config.kv_strategy == "shared",
        )


class Event(NamedTuple):
    """The state after a tick."""

    seconds: float
    """busy since the start of the run"""
    num_tokens: int
    """drawn since the start of the run"""
    num_begun: int
    """requests that have drawn their first token since the start of the run"""
    num_queued: int
    """requests that were not let in yet"""


class Window(NamedTuple):
    """The stretch of a run in which the batch is full."""

    start: int
    """event after which it begins; -1 for the start of the run"""
    stop: int
    """its last event"""
    seconds: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def full_window(events: Sequence[Event], in_flight: int) -> Window:
    """Return the window from the moment when the batch is full to that when the queue is dry.

    It begins when as many requests as may be in flight have drawn their first token. A run that is
    never full, or only once the queue is dry, counts whole.
    """
    stop = next((i for i, event in enumerate(events) if not event.num_queued), len(events) - 1)
    full = (i for i, event in enumerate(events[:stop]) if event.num_begun >= in_flight)
    start = next(full, -1)
    if start < 0:
        stop = len(events) - 1
    first = events[start] if start >= 0 else Event(0.0, 0, 0, 0)
    last = events[stop]
    return Window(start, stop, last.seconds - first.seconds, last.num_tokens - first.num_tokens)


@dataclass(slots=True, eq=False)
class _Unit:
    """Consecutive tokens of a request in the block: one, or a prompt's chunk."""

    request: _Request
    start: int
    count: int
    recursion: int = 0

    @property
    def num_active(self) -> int:
        return self.request.active(self.recursion, self.start, self.start + self.count)

    @property
    def wants_logits(self) -> bool:
        return self.start + self.count >= self.request.spec.prompt_len


@dataclass(slots=True, eq=False)
class _Request:
    """A request on its way; before_RT[r, t] counts the tokens before t that are active at r."""

    spec: RequestSpec
    before_RT: np.ndarray
    num_started: int = 0
    num_drawn: int = 0
    num_left: int = 0
    """tokens that the coda has seen"""

    @classmethod
    def of(cls, spec: RequestSpec, recursions: int) -> _Request:
        depth_T = np.array(spec.depths)
        assert len(depth_T) == spec.num_run, "a depth for every token that runs"
        active_RT = depth_T > np.arange(recursions)[:, None]
        before_RT = np.zeros((recursions, len(depth_T) + 1), np.int64)
        active_RT.cumsum(1, out=before_RT[:, 1:])
        return cls(spec, before_RT)

    def active(self, recursion: int, start: int, stop: int) -> int:
        if recursion >= len(self.before_RT):
            return 0
        return int(self.before_RT[recursion, stop] - self.before_RT[recursion, start])

    @property
    def is_decoding(self) -> bool:
        return self.num_drawn > 0


class _Ideal:
    """One replay."""

    def __init__(
        self,
        tables: Tables,
        layers: Layers,
        trace: Sequence[RequestSpec],
        *,
        in_flight: int,
        max_rows: int,
        period: int,
    ) -> None:
        self.tables, self.layers, self.period = tables, layers, period
        self.in_flight, self.max_rows = in_flight, max_rows
        self.queue = [_Request.of(spec, layers.recursions) for spec in reversed(trace)]
        self.running: list[_Request] = []
        self.in_block: list[_Unit] = []
        self.ready: list[_Unit] = []
        self.events: list[Event] = []
        self.idle_s = self.busy_s = 0.0
        self.num_tokens = self.num_begun = self.ticks_since_coda = 0

    def run(self) -> list[Event]:
        while self.queue or self.running:
            self._admit()
            self._enter()
            self._block()
            self._coda()
            state = Event(self.busy_s, self.num_tokens, self.num_begun, len(self.queue))
            self.events.append(state)
        return self.events

    def _admit(self) -> None:
        now_s = self.busy_s + self.idle_s
        if not self.running and self.queue and self.queue[-1].spec.arrival_s > now_s:
            self.idle_s += self.queue[-1].spec.arrival_s - now_s
            now_s = self.queue[-1].spec.arrival_s
        while self.queue and len(self.running) < self.in_flight:
            if self.queue[-1].spec.arrival_s > now_s:
                break
            self.running.append(self.queue.pop())

    def _enter(self) -> None:
        """Let the newest token of each request in, then chunks of prompts while rows last."""
        entering = []
        for request in self.running:
            place = request.num_started
            if request.is_decoding and place < request.spec.prompt_len + request.num_drawn:
                entering.append(_Unit(request, place, 1))
                request.num_started += 1
        rows = sum(unit.num_active for unit in self.in_block) + len(entering)
        for request in self.running:
            count = min(request.spec.prompt_len - request.num_started, self.max_rows - rows)
            if count > 0:
                entering.append(_Unit(request, request.num_started, count))
                request.num_started += count
                rows += count
        if entering and self.layers.prelude:
            num_rows = sum(unit.count for unit in entering)
            self.busy_s += self.tables.prelude_s(num_rows)
            self.busy_s += self.layers.prelude * self._own_attention_s(entering)
        self.in_block += entering

    def _block(self) -> None:
        active = [(unit, unit.num_active) for unit in self.in_block]
        a_layer_s = self.tables.layer_s(sum(count for _, count in active))
        a_layer_s += self._attention_s([(n, self._keys_before(unit)) for unit, n in active])
        self.busy_s += self.layers.block * a_layer_s
        stay = []
        for unit, _ in active:
            unit.recursion += 1
            (stay if unit.num_active else self.ready).append(unit)
        self.in_block = stay

    def _keys_before(self, unit: _Unit) -> int:
        recursion = 0 if self.layers.sees_all else unit.recursion
        return int(unit.request.before_RT[recursion, unit.start])

    def _own_attention_s(self, units: Sequence[_Unit]) -> float:
        return self._attention_s([(unit.count, unit.start) for unit in units])

    def _attention_s(self, parts: Sequence[tuple[int, int]]) -> float:
        """Seconds that attention adds to a layer: parts are rows and keys before the first."""
        single = [before + 1 for count, before in parts if count == 1]
        seconds = sum(self.tables.chunk_s(count, before) for count, before in parts if count > 1)
        if single:
            seconds += self.tables.decode_s(len(single), sum(single) / len(single))
        return seconds

    def _coda(self) -> None:
        self.ticks_since_coda += 1
        if not self.ready or (self.in_block and self.ticks_since_coda < self.period):
            return
        self.ticks_since_coda = 0
        due, wait = [], []
        for unit in sorted(self.ready, key=lambda unit: unit.start):
            in_order = unit.start == unit.request.num_left
            (due if in_order else wait).append(unit)
            unit.request.num_left += unit.count if in_order else 0
        self.ready = wait
        wanted = [unit for unit in due if unit.wants_logits]
        if self.layers.coda:
            keys_only = sum(unit.count for unit in due) - len(wanted)
            self.busy_s += self.tables.coda_s(len(wanted)) + self.tables.coda_keys_s(keys_only)
            ends = [(1, unit.start + unit.count - 1) for unit in wanted]
            self.busy_s += self.layers.coda * self._attention_s(ends)
        self.busy_s += self.tables.head_s(len(wanted))
        for unit in wanted:
            request = unit.request
            self.num_begun += not request.is_decoding
            request.num_drawn += 1
            self.num_tokens += 1
            if request.num_drawn == request.spec.output_len:
                self.running.remove(request)


class Prediction(NamedTuple):
    """The best replay of a trace."""

    period: int
    """ticks from one call of the coda to the next"""
    window: Window


def predict(
    tables: Tables,
    layers: Layers,
    trace: Sequence[RequestSpec],
    *,
    in_flight: int,
    max_rows: int,
) -> Prediction:
    """Replay a trace with every coda period from 1 to R; the one of most tokens a second counts.

    trace     arrivals, lengths, and the depth of every token that ran
    max_rows  of one call of the block; chunks of prompts take what decode rows leave
    """

    def replay(period: int) -> Prediction:
        ideal = _Ideal(tables, layers, trace, in_flight=in_flight, max_rows=max_rows, period=period)
        return Prediction(period, full_window(ideal.run(), in_flight))

    periods = range(1, layers.recursions + 1)
    return max(map(replay, periods), key=lambda best: best.window.tokens_per_s)


def efficiency(measured: Window, predicted: Window) -> float:
    """Return predicted over measured seconds for a token drawn while the batch is full."""
    return measured.tokens_per_s / predicted.tokens_per_s


def is_valid(value: float) -> bool:
    """Tell whether a run is not quicker than its prediction allows."""
    return value <= MAX_EFFICIENCY
