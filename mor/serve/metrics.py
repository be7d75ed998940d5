"""What `/metrics` tells, in Prometheus's words; every name begins with `mor_`."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mor.engine.outputs import StepOutput

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
OUTCOMES = ("done", "cancelled", "failed", "timeout", "refused")


class Metrics:
    """Counters of requests and tokens, times, depths; gauges are read when somebody asks."""

    def __init__(self, max_depth: int) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("mor_requests", "Requests by outcome", ["outcome"], **own)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.refused = Counter("mor_queue_refused", "Requests refused by a full queue", **own)
        self.tokens = Counter("mor_tokens", "Tokens drawn", **own)
        self.prompt_tokens = Counter("mor_prompt_tokens", "Prompt tokens of ended requests", **own)
        self.ttft = Histogram(
            "mor_time_to_first_token_seconds", "From arrival", buckets=SECONDS, **own
        )
        self.gap = Histogram(
            "mor_inter_token_seconds", "Between pieces of a request", buckets=SECONDS, **own
        )
        buckets = tuple(float(depth) for depth in range(1, max_depth + 1))
        self.depth = Histogram(
            "mor_token_depth", "Recursions that a token took", buckets=buckets, **own
        )
        self._named: dict[str, Gauge] = {}
        self._gauges: list[tuple[Gauge, Callable[[], float]]] = []
        self._began: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def gauge(self, name: str, about: str, read: Callable[[], float], **labels: str) -> None:
        """Add a value that is read when somebody asks; one call for each set of labels."""
        if name not in self._named:
            self._named[name] = Gauge(name, about, list(labels), registry=self.registry)
        made = self._named[name]
        self._gauges.append((made.labels(**labels) if labels else made, read))

    def begin(self, request_id: str) -> None:
        self._began[request_id] = time.perf_counter()

    def piece(self, request_id: str, piece: StepOutput) -> None:
        """Count what a tick brought."""
        now = time.perf_counter()
        if piece.token_ids:
            last = self._last.get(request_id)
            if last is None:
                self.ttft.observe(now - self._began[request_id])
            else:
                self.gap.observe(now - last)
            self._last[request_id] = now
            self.tokens.inc(len(piece.token_ids))
        for depth in piece.depths:
            self.depth.observe(depth)
        if piece.result is not None:
            self.prompt_tokens.inc(len(piece.result.prompt_token_ids))

    def end(self, request_id: str, outcome: str) -> None:
        if self._began.pop(request_id, None) is not None:
            self.requests.labels(outcome).inc()
        self._last.pop(request_id, None)

    def text(self) -> bytes:
        for gauge, read in self._gauges:
            gauge.set(read())
        return generate_latest(self.registry)
