"""One run of a trace on an engine: so many requests in flight, every tick timed.

A new request is added when one ends. Time is that of `add` and `step`; what the benchmark itself
does between them does not count on a CPU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mor.bench.predict import Event, Window, full_window
from mor.bench.workload import RequestSpec
from mor.engine.blocks import Layout
from mor.engine.captured import PASS_EVERY
from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.model.mor import MoR

MAX_STARVED_TICKS = 2
"""ticks in a row in which a request waits although the batch is full: pages are short; on captured
ticks it may wait for the next pass besides"""


@dataclass(slots=True, eq=False)
class Served:
    """What happened to one request; times are busy seconds since the start of the run."""

    spec: RequestSpec
    added_s: float
    token_s: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Run:
    """One run, in the order of the trace; requests that never began are missing."""

    events: list[Event]
    served: list[Served]
    in_flight: int
    peak_pages: int = 0
    peak_kv_bytes: int = 0
    is_short: bool = False
    """pages did not suffice for so many requests"""

    @property
    def window(self) -> Window:
        return full_window(self.events, self.in_flight)

    @property
    def depths(self) -> list[int]:
        return [depth for one in self.served for depth in one.depths]

    def ttft_s(self) -> list[float]:
        """Seconds to the first token, of requests that came while the batch was full."""
        start_s, stop_s = self._span()
        return [
            one.token_s[0] - one.added_s
            for one in self.served
            if one.token_s and one.added_s >= start_s and one.token_s[0] <= stop_s
        ]

    def gaps_s(self) -> list[float]:
        """Seconds from token to token, while the batch was full."""
        start_s, stop_s = self._span()
        gaps = []
        for one in self.served:
            inside = [at for at in one.token_s if start_s <= at <= stop_s]
            gaps += np.diff(inside).tolist()
        return gaps

    def _span(self) -> tuple[float, float]:
        window = self.window
        start_s = self.events[window.start].seconds if window.start >= 0 else 0.0
        return start_s, self.events[window.stop].seconds


def new_engine(
    model: MoR, *, max_requests: int, max_rows: int, max_model_len: int, kv_cache_bytes: int = 0
) -> Engine:
    """Build an engine without a prefix cache; 0 bytes for pages that always suffice."""
    layout = Layout.of(model.config)
    page_bytes = layout.page_elements * model.model.embed_tokens.weight.element_size()
    worst = layout.worst_pages(max_model_len, layout.num_depths)
    settings = EngineConfig(
        max_num_seqs=max_requests,
        max_num_batched_tokens=max_rows,
        max_model_len=max_model_len,
        kv_cache_bytes=kv_cache_bytes or worst * max_requests * page_bytes,
        enable_prefix_caching=False,
    )
    return Engine(model, settings)


def run_trace(
    engine: Engine,
    trace: Sequence[RequestSpec],
    *,
    in_flight: int,
    until_dry: bool = False,
    ends_when_short: bool = False,
) -> Run:
    """Run a trace and return what came of it; the engine is idle again afterwards.

    until_dry        stop when the last request was added, and end those that run
    ends_when_short  stop at once when pages do not suffice
    Raises           RuntimeError when a request fails
    """
    queue, live = deque(trace), {}
    run = Run([], [], in_flight)
    state, preempted = _State(), engine.scheduler.num_preemptions
    starved_ticks, resumed_s = 0, None
    patience = MAX_STARVED_TICKS + (PASS_EVERY if engine.captured is not None else 0)
    is_gpu = engine.model.device.type == "cuda"
    while queue or live:
        state.wait_for(queue[0].arrival_s if queue and not live else 0.0)
        # A GPU works on while the benchmark looks: there its own work counts too.
        start_s = resumed_s if resumed_s is not None else time.perf_counter()
        while queue and len(live) < in_flight and queue[0].arrival_s <= state.now_s:
            spec = queue.popleft()
            live[_add(engine, spec)] = served = Served(spec, state.busy_s)
            run.served.append(served)
        pieces = engine.step()
        now_s = time.perf_counter()
        state.busy_s += now_s - start_s
        resumed_s = now_s if is_gpu and live else None
        for piece in pieces:
            one = live[piece.request_id]
            if piece.error:
                raise RuntimeError(f"a request of the benchmark failed: {piece.error}")
            one.depths += piece.depths
            if piece.token_ids:
                state.num_begun += not one.token_s
                state.num_tokens += len(piece.token_ids)
                one.token_s += [state.busy_s] * len(piece.token_ids)
            if piece.finish_reason is not None:
                del live[piece.request_id]
                engine.forget(piece.request_id)
        run.events.append(state.event(len(queue)))
        run.peak_pages = max(run.peak_pages, int(engine.blocks.num_used))
        run.peak_kv_bytes = max(run.peak_kv_bytes, engine.kv_bytes)
        is_full = state.num_begun >= in_flight and engine.scheduler.waiting
        starved_ticks = starved_ticks + 1 if is_full else 0
        is_preempted = engine.scheduler.num_preemptions > preempted
        run.is_short |= is_preempted or starved_ticks > patience
        if (run.is_short and ends_when_short) or (until_dry and not queue):
            break
    for request_id in list(live):
        engine.forget(request_id)
    engine.check_integrity()
    return run


class _State:
    """Clock and counts of a run. Waiting for an arrival takes no busy time."""

    def __init__(self) -> None:
        self.busy_s = self.idle_s = 0.0
        self.num_tokens = self.num_begun = 0

    @property
    def now_s(self) -> float:
        return self.busy_s + self.idle_s

    def wait_for(self, arrival_s: float) -> None:
        self.idle_s += max(arrival_s - self.now_s, 0.0)

    def event(self, num_queued: int) -> Event:
        return Event(self.busy_s, self.num_tokens, self.num_begun, num_queued)


def _add(engine: Engine, spec: RequestSpec) -> str:
    params = SamplingParams(max_tokens=spec.output_len, temperature=0, ignore_eos=True)
    request_id = engine.add(spec.prompt_ids, params)
    if spec.depths:  # as at a preemption, known depths are taken again
        (request,) = engine.requests[request_id]
        request.depths, request.num_told = list(spec.depths), 0
    return request_id


def largest_in_flight(
    engine: Engine, trace: Sequence[RequestSpec], *, known: int, guess: int, most: int, tries: int
) -> int:
    """Find the most requests that run at a time without a preemption, by filling real pages.

    known  a number that fits
    guess  where to look first
    most   that are tried
    """
    fits, too_many = known, most + 1
    probe = min(max(guess, known + 1), most)
    for _ in range(tries):
        if not fits < probe < too_many:
            break
        run = run_trace(engine, trace, in_flight=probe, until_dry=True, ends_when_short=True)
        if run.is_short:
            too_many = probe
        else:
            fits = probe
        step = max(guess // 16, 1)
        near = fits + step if too_many > most else too_many - step
        probe = near if fits < near < too_many else (fits + too_many) // 2
    return fits
