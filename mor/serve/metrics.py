"""What `/metrics` tells, in Prometheus's words; every name begins with `mor_`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from mor.engine.outputs import StepOutput

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
OUTCOMES = ("done", "cancelled", "failed", "timeout", "refused")

Read = Callable[[], float | Mapping[str, float]]


class Metrics:
    """Counters of requests and tokens, times, depths; the engine's state is read when asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("mor_requests", "Requests by outcome", ["outcome"], **own)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.refused = Counter("mor_queue_refused", "Requests refused by a full queue", **own)
        self.prompt_tokens = Counter("mor_prompt_tokens", "Prompt tokens of ended requests", **own)
        self.ttft = Histogram(
            "mor_time_to_first_token_seconds",
            "From arrival, of ended requests",
            buckets=SECONDS,
            **own,
        )
        self.gap = Histogram(
            "mor_inter_token_seconds", "Between pieces of a stream", buckets=SECONDS, **own
        )
        self._depths: Callable[[], Sequence[int]] = lambda: ()
        self._reads: list[tuple[type[Metric], str, str, str, Read]] = []
        self.registry.register(self)  # pyrefly: ignore
        self._last: dict[str, float] = {}

    def gauge(self, name: str, about: str, read: Read, *, label: str = "") -> None:
        """Add a value that is read when somebody asks; with a label, one for each of its values."""
        self._reads.append((GaugeMetricFamily, name, about, label, read))

    def counter(self, name: str, about: str, read: Read, *, label: str = "") -> None:
        """Add a number that only grows and that somebody else keeps."""
        self._reads.append((CounterMetricFamily, name, about, label, read))

    def depths(self, read: Callable[[], Sequence[int]]) -> None:
        """Take tokens by depth, 1 first, from somebody who counts them."""
        self._depths = read

    def collect(self) -> Iterator[Metric]:
        """Read all of them; what a registry asks for."""
        for kind, name, about, label, read in self._reads:
            family = kind(name, about, labels=[label] if label else [])  # pyrefly: ignore
            found = read()
            for value, number in found.items() if isinstance(found, Mapping) else [("", found)]:
                family.add_metric([value] if label else [], number)  # pyrefly: ignore
            yield family
        counts = [int(count) for count in self._depths()]
        upto = list(itertools.accumulate(counts, initial=0))[1:]
        buckets = [(f"{d}.0", float(n)) for d, n in enumerate(upto, 1)]
        yield HistogramMetricFamily(
            "mor_token_depth",
            "Recursions that a token took",
            buckets=[*buckets, ("+Inf", float(sum(counts)))],
            sum_value=float(sum(d * n for d, n in enumerate(counts, 1))),
        )

    def piece(self, request_id: str, piece: StepOutput) -> None:
        """Count what a piece of a stream, or the last of an answer, brought."""
        if piece.token_ids:
            now, last = time.perf_counter(), self._last.get(request_id)
            if last is not None:
                self.gap.observe(now - last)
            self._last[request_id] = now
        if piece.result is not None:
            self.ttft.observe(piece.result.ttft_s)
            self.prompt_tokens.inc(len(piece.result.prompt_token_ids))

    def end(self, request_id: str, outcome: str) -> None:
        """Count how a request ended; called once for each."""
        self.requests.labels(outcome).inc()
        self._last.pop(request_id, None)

    def text(self) -> bytes:
        return generate_latest(self.registry)
