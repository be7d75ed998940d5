"""What a model's parts cost alone: seconds by rows and keys, measured beside the runs.

A sweep times every point once; points are medians over sweeps, one a round, so that tables and
runs see the same machine. The order of calls is a tick's, so weights come from where they would.
Looking tokens up costs a copy of a row and counts as nothing.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mor.bench.kernels import CallRows, Kernels, build_kernels, chunk, pages_of, singles
from mor.model.mor import MoR

ROWS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)
DECODE_ROWS = (1, 4, 16, 32, 64, 128)
CHUNK_ROWS = (16, 64, 256)
KEYS = (64, 256, 1024)
MOST_KEYS = 32768
"""keys of a call that is timed; more rows or keys are read off the last two points"""
SHORT_ROWS = 64
"""calls of so many rows or fewer are short, and timed three times in a sweep"""


@dataclass(frozen=True, slots=True)
class Line:
    """A value by number of rows: straight between points and beyond the last; 0 rows cost 0."""

    at: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, x: float) -> float:
        return _read(self.at, self.values, x) if x > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Grid:
    """A value by rows and keys, bilinear."""

    keys: tuple[float, ...]
    lines: tuple[Line, ...]
    """by rows, one for each of keys"""

    def __call__(self, rows: float, keys: float) -> float:
        if rows <= 0:
            return 0.0
        return _read(self.keys, [line(rows) for line in self.lines], keys)


def _read(at: Sequence[float], values: Sequence[float], x: float) -> float:
    """Interpolate; the first value holds before the first point."""
    if x <= at[0] or len(at) == 1:
        return values[0]
    i = min(bisect.bisect_left(at, x), len(at) - 1)
    share = (x - at[i - 1]) / (at[i] - at[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Seconds of the parts of a tick."""

    prelude_s: Line
    """by rows, each seeing its own key alone"""
    layer_s: Line
    """one layer of the block, the same"""
    coda_s: Line
    """by rows whose logits are wanted, the same"""
    coda_keys_s: Line
    """by rows that leave only keys and values"""
    head_s: Line
    """norm, head and argmax, by rows"""
    decode_s: Grid
    """what attention adds to a layer for rows of as many requests, by rows and keys that each
    sees"""
    chunk_s: Grid
    """what attention adds to a layer for rows of one prompt, by rows and keys before the first"""

    def to_dict(self) -> dict[str, Any]:
        """Return the points, for the report."""
        lines = ("prelude_s", "layer_s", "coda_s", "coda_keys_s", "head_s")
        points: dict[str, Any] = {}
        for name in lines:
            line = getattr(self, name)
            points[name] = dict(zip(map(str, line.at), line.values, strict=True))
        for name in ("decode_s", "chunk_s"):
            grid: Grid = getattr(self, name)
            points[name] = {
                str(keys): dict(zip(map(str, line.at), line.values, strict=True))
                for keys, line in zip(grid.keys, grid.lines, strict=True)
            }
        return points


class TableMaker:
    """Times the parts of a model, sweep by sweep."""

    def __init__(
        self,
        model: MoR,
        *,
        max_rows: int,
        max_requests: int,
        max_keys: int,
        wants_compiled: bool = True,
    ) -> None:
        """Plan the points.

        max_rows      of a call of the block
        max_requests  that decode at a time
        max_keys      that a row sees
        """
        self.config, self.device = model.config, model.device
        self.rows = _up_to(ROWS, max_rows)
        self.head_rows = _up_to(ROWS, max_requests)
        self.decode_rows = _up_to(DECODE_ROWS, max_requests)
        self.chunk_rows = _up_to(CHUNK_ROWS, max_rows)
        self.keys = (1, *_up_to(KEYS, max_keys, least=2))
        calls = [singles(self.rows[-1], 1)]
        calls += [singles(rows, keys) for rows, keys in self._decode_points()]
        calls += [chunk(self.chunk_rows[-1], self.keys[-1])]
        pages = max(pages_of(call) for call in calls)
        self.kernels: Kernels = build_kernels(model, pages=pages, wants_compiled=wants_compiled)
        self.kernels.head(self._states(self.head_rows[-1]))
        self.samples: dict[tuple[Any, ...], list[float]] = defaultdict(list)

    def _decode_points(self) -> list[tuple[int, int]]:
        return [
            (rows, keys)
            for keys in self.keys[1:]
            for rows in self.decode_rows
            if rows * keys <= MOST_KEYS or rows == self.decode_rows[0]
        ]

    def sweep(self) -> None:
        """Time every point once more."""
        for rows in self.rows:
            self._ends(rows)
        for rows, keys in self._decode_points():
            self._block(("decode", rows, keys), singles(rows, keys))
        for rows in self.chunk_rows:
            for prior in (0, *self.keys[1:]):
                self._block(("chunk", rows, prior), chunk(rows, prior))

    def _ends(self, rows: int) -> None:
        """Time all parts on rows that see nothing but themselves, in the order of a tick."""
        kernels, call = self.kernels, singles(rows, 1)
        for _ in range(3 if rows <= SHORT_ROWS else 1):
            for group in ("prelude", "block", "coda", "coda keys"):
                if group != "block" and not self.config.num_own_layers:
                    continue
                name, full = (group, rows) if group != "coda keys" else ("coda", 0)
                x_ND = self._states(rows)
                self._time((group, rows), lambda g=name, x=x_ND, f=full: self._run(g, x, call, f))
            if rows <= self.head_rows[-1]:
                x_ND = self._states(rows)
                self._time(("head", rows), lambda x=x_ND: kernels.head(x))

    def _block(self, point: tuple[Any, ...], call: CallRows) -> None:
        rows = len(call.position_N)
        for _ in range(3 if rows <= SHORT_ROWS else 1):
            x_ND = self._states(rows)
            self._time(point, lambda x=x_ND: self._run("block", x, call, rows))

    def _run(self, group: Any, x_ND: torch.Tensor, call: CallRows, num_full: int) -> None:
        self.kernels.layers(group, x_ND, call, num_full)

    def _states(self, rows: int) -> torch.Tensor:
        shape = (rows, self.config.hidden_size)
        return torch.full(shape, 0.01, dtype=self.kernels.state_dtype, device=self.device)

    def _time(self, point: tuple[Any, ...], run: Callable[[], object]) -> None:
        self._wait()
        start_s = time.perf_counter()
        run()
        self._wait()
        self.samples[point].append(time.perf_counter() - start_s)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tables(self) -> Tables:
        """Return the medians of all sweeps so far."""
        median = {point: statistics.median(samples) for point, samples in self.samples.items()}
        layers = self.config.num_block_layers

        def line(name: str, rows: Sequence[int], share: float = 1.0) -> Line:
            return Line(tuple(rows), tuple(median.get((name, n), 0.0) * share for n in rows))

        layer_s = line("block", self.rows, 1 / layers)

        def grid(name: str, rows: Sequence[int], keys: Sequence[int], zero: int | None) -> Grid:
            lines = []
            for count in keys:
                if count == zero:  # a layer's own time holds it
                    lines.append(Line((1.0,), (0.0,)))
                    continue
                known = [n for n in rows if (name, n, count) in median]
                # noise may go below 0: cut off, it would not average out
                over = [median[name, n, count] / layers - layer_s(n) for n in known]
                lines.append(Line(tuple(known), tuple(over)))
            return Grid(tuple(keys), tuple(lines))

        return Tables(
            prelude_s=line("prelude", self.rows),
            layer_s=layer_s,
            coda_s=line("coda", self.rows),
            coda_keys_s=line("coda keys", self.rows),
            head_s=line("head", self.head_rows),
            decode_s=grid("decode", self.decode_rows, self.keys, 1),
            chunk_s=grid("chunk", self.chunk_rows, (0, *self.keys[1:]), None),
        )


def _up_to(points: Sequence[int], most: int, *, least: int = 1) -> tuple[int, ...]:
    """Return the points below most, and most."""
    most = max(most, least)
    return (*(point for point in points if least <= point < most), most)
