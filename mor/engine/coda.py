"""When the coda runs: the period that the measured times of block and ends make cheapest.

Running coda, head and prelude every tick keeps no row waiting, but reads their weights for few
rows; waiting gathers rows for them and takes rows from the block. A small simulation of the mean
numbers of rows at every depth says which is better for so many requests in flight.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

TICKS = 48
"""simulated; the first third is left out"""
PERIOD_TICKS = 256
"""ticks for which a period holds"""


class Costs(NamedTuple):
    """Seconds by number of rows, as measured on this machine."""

    rows: list[int]
    block_s: list[float]
    """one call of the shared block"""
    ends_s: list[float]
    """coda, head, argmax, embedding and prelude together"""


def best_period(costs: Costs, shares: Sequence[float], num_requests: int) -> int:
    """Return the ticks between calls of the coda that make most tokens a second, 1..R.

    shares        share of tokens active at each recursion
    num_requests  requests in flight, one row each
    """
    periods = range(1, len(shares) + 1)
    return max(periods, key=lambda period: tokens_per_s(costs, shares, num_requests, period))


def tokens_per_s(costs: Costs, shares: Sequence[float], num_requests: int, period: int) -> float:
    """Simulate the mean numbers of rows at each depth for a fixed period."""
    passes = [b / max(a, 1e-9) for a, b in zip(shares, [*shares[1:], 0.0], strict=True)]
    at = [float(num_requests), *[0.0] * (len(shares) - 1)]
    ready = tokens = seconds = 0.0
    for tick in range(1, TICKS + 1):
        seconds += _cost(costs.rows, costs.block_s, sum(at))
        goes_on = [rows * share for rows, share in zip(at, passes, strict=True)]
        ready += sum(at) - sum(goes_on)
        at = [0.0, *goes_on[:-1]]
        if tick % period == 0 or sum(at) < 0.5:
            seconds += _cost(costs.rows, costs.ends_s, ready)
            at[0], tokens, ready = ready, tokens + ready, 0.0
        if tick == TICKS // 3:
            tokens = seconds = 0.0
    return tokens / seconds


def _cost(rows: list[int], seconds: list[float], count: float) -> float:
    """Read a table between its points; no rows cost nothing."""
    if count < 1e-6:
        return 0.0
    at = min(max(bisect.bisect_left(rows, count), 1), len(rows) - 1) if len(rows) > 1 else 0
    if at == 0:
        return seconds[0]
    share = min(max((count - rows[at - 1]) / (rows[at] - rows[at - 1]), 0.0), 1.0)
    return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])


class PeriodChooser:
    """Chooses the period for so many requests in flight, anew now and then, since depths drift."""

    def __init__(self, measure: Callable[[], Costs]) -> None:
        self.measure = measure
        """called once, when a period is first asked for"""
        self._costs: Costs | None = None
        self._chosen: dict[int, tuple[int, int]] = {}
        """by requests in flight: the period, and the tick to choose it anew"""

    def period(self, num_requests: int, shares: Sequence[float], tick: int) -> int:
        """Return the ticks from one call of the coda to the next."""
        if self._costs is None:
            self._costs = self.measure()
        period, due_tick = self._chosen.get(num_requests, (1, 0))
        if tick >= due_tick:
            period = best_period(self._costs, shares, num_requests)
            self._chosen[num_requests] = period, tick + PERIOD_TICKS
        return period
