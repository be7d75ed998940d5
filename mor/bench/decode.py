"""`mor bench decode`: does MoR serve more tokens a second than its vanilla twin, and all it could?

Both run on the same engine, in one process, in rounds whose order changes; ratios are taken within
a round. `fixed_batch` keeps the same number of requests in flight, `max_batch` gives both the same
bytes of keys and values and lets each run as many requests as fit. A sweep of the kernels' own
times comes before every round; what they allow is the prediction, and efficiency is its share.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mor.bench.predict import Layers, Prediction, efficiency, predict
from mor.bench.serve import Run, largest_in_flight, new_engine, run_trace
from mor.bench.serve_config import (
    FULL_MIX,
    MAX_SLOTS,
    QUICK_MIX,
    REQUESTS_PER_SLOT,
    BenchDecodeConfig,
    served_config,
)
from mor.bench.serve_report import cell_of, longest_context, row_of, summary
from mor.bench.tables import TableMaker, Tables
from mor.bench.train import in_order
from mor.bench.verify import Verified, check_mean_depth, verify
from mor.bench.workload import RequestSpec, cut_prompts, make_trace, read_trace
from mor.checkpoint import load_model
from mor.config import ModelConfig
from mor.engine.engine import Engine
from mor.log import progress
from mor.model.mor import MoR
from mor.ops.device import describe_machine, pick_device, pick_dtype
from mor.tokenizer import Tokenizer
from mor.train.metrics import peak_memory_bytes

VERIFIED_REQUESTS = 3
VERIFIED_TOKENS = 12
SEARCH_RUNS = 5


class Cell(NamedTuple):
    """What is compared: a model, its twin, and the requests in flight."""

    mor: MoR
    trace: list[RequestSpec]
    in_flight: int
    is_drawn: bool
    """depths are drawn, not a trained router's"""


@dataclass(slots=True, eq=False)
class Side:
    """A model of a cell on its engine."""

    name: str
    engine: Engine
    trace: list[RequestSpec]
    verified: Verified
    warm: Run
    """a whole run, which tells the depth of every token"""
    most: int = 0
    """requests that run at a time in the bytes that both have"""

    @property
    def model(self) -> MoR:
        return self.engine.model


@dataclass(slots=True, eq=False)
class Contest:
    """A side at a number of requests in flight, and its runs."""

    side: Side
    in_flight: int
    runs: list[Run] = field(default_factory=list)

    def rates(self) -> list[float]:
        return [run.window.tokens_per_s for run in self.runs]


def bench_decode(config: BenchDecodeConfig) -> dict[str, Any]:
    """Run all cells; returns the summary, `cells`, settings and machine.

    Raises  ValueError for what a user can get wrong; RuntimeError when a model does not compute
            what it should
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    cells = []
    for recursions in (0,) if config.model else config.recursions:
        mor = build_model(config, recursions, dtype=dtype, device=device)
        for in_flight in config.in_flight:
            trace = build_trace(config, mor.config, in_flight)
            cells.append(bench_cell(config, Cell(mor, trace, in_flight, config.model is None)))
            gc.collect()
    return {
        **summary(cells),
        "cells": cells,
        "machine": describe_machine(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "peak_memory_bytes": peak_memory_bytes(device),
        "settings": settings_of(config),
    }


def settings_of(config: Any) -> dict[str, Any]:
    """Return a benchmark's settings as JSON has them."""
    names = [name for one in type(config).__mro__ for name in getattr(one, "__slots__", ())]
    values = {name: getattr(config, name) for name in names}
    values = {
        k: v if isinstance(v, (int, tuple)) or v is None else str(v) for k, v in values.items()
    }
    return {**values, "rounds": config.num_rounds}


def build_model(config: Any, recursions: int, *, dtype: torch.dtype, device: torch.device) -> MoR:
    """Load the trained model, or make one of the shape with fresh weights."""
    if config.model is not None:
        model = load_model(config.model, dtype=dtype, device=device)
        if model.config.num_recursions == 1:
            raise ValueError(
                f"{config.model} has one recursion; give a MoR, its twin runs beside it"
            )
        return model
    torch.manual_seed(config.seed)
    return MoR(served_config(config.shape, recursions)).to(dtype=dtype, device=device).eval()


def build_twin(mor: MoR, seed: int) -> MoR:
    """Make the vanilla model of equal unrolled layers; its time does not depend on its weights."""
    torch.manual_seed(seed)
    weight = mor.model.embed_tokens.weight
    return MoR(mor.config.twin()).to(dtype=weight.dtype, device=weight.device).eval()


def build_trace(config: BenchDecodeConfig, model: ModelConfig, in_flight: int) -> list[RequestSpec]:
    """Read or draw the requests of a cell."""
    if config.trace is not None:
        trace = read_trace(
            config.trace,
            vocab_size=model.vocab_size,
            max_recursions=model.num_recursions,
            seed=config.seed,
        )
    else:
        mix = QUICK_MIX if config.quick else FULL_MIX
        count = REQUESTS_PER_SLOT * in_flight
        trace = make_trace(count, mix, vocab_size=model.vocab_size, seed=config.seed)
    longest = max(request.num_tokens for request in trace)
    if longest > model.max_position_embeddings:
        raise ValueError(
            f"a request of the trace has {longest} tokens, the model's context is "
            f"{model.max_position_embeddings}; shorten it"
        )
    if len(trace) <= in_flight:
        raise ValueError(
            f"the trace has {len(trace)} requests for {in_flight} in flight; give more requests"
        )
    if config.text is not None:
        assert config.model is not None
        text = config.text.read_text(encoding="utf-8")
        trace = cut_prompts(trace, Tokenizer.load(config.model).encode(text))
    return trace


def bench_cell(config: BenchDecodeConfig, cell: Cell) -> dict[str, Any]:
    """Verify, fill pages, sweep tables and run the rounds of one cell."""
    name = f"mor{cell.mor.config.num_recursions}"
    with progress(f"{name}, {cell.in_flight} in flight", config.num_rounds + 2) as bar:
        twin, mor = build_sides(config, cell, name)
        bar.advance(1, note="verified")
        kv_budget = config.kv_cache_bytes or twin.warm.peak_pages * twin.engine.page_bytes
        contests = make_contests(config, cell, twin, mor, kv_budget)
        bar.advance(1, note="pages filled")
        maker = TableMaker(
            cell.mor,
            max_rows=num_rows(config, cell),
            max_requests=max(contest.in_flight for contest in contests.values()),
            max_keys=max(request.num_tokens for request in cell.trace),
        )
        for round_ in range(config.num_rounds):
            maker.sweep()
            for contest in in_order(list(dict.fromkeys(contests.values())), round_):
                contest.runs.append(
                    run_trace(
                        contest.side.engine,
                        contest.side.trace,
                        in_flight=contest.in_flight,
                        until_dry=True,
                    )
                )
            rates = (contests["fixed_batch", "mor"], contests["fixed_batch", "twin"])
            ratio = rates[0].rates()[-1] / rates[1].rates()[-1]
            bar.advance(1, note=f"{ratio:.2f} times the twin")
    return report_cell(config, cell, contests, maker.tables(), kv_budget)


def num_rows(config: BenchDecodeConfig, cell: Cell) -> int:
    """Rows of a call: as asked for, but room for prompts beside the most requests."""
    return max(config.max_num_batched_tokens, 2 * MAX_SLOTS * cell.in_flight)


def build_sides(config: BenchDecodeConfig, cell: Cell, name: str) -> tuple[Side, Side]:
    """Build both engines, verify them, and run the trace once to its end.

    MoR has the bytes that the twin filled, or what the user gives to both.
    """
    bare = [request._replace(depths=()) for request in cell.trace]
    twin = _side(config, cell, "twin", build_twin(cell.mor, config.seed), bare)
    kv_budget = config.kv_cache_bytes or twin.warm.peak_pages * twin.engine.page_bytes
    mor = _side(config, cell, name, cell.mor, cell.trace, kv_budget)
    if cell.is_drawn and not any(request.depths for request in cell.trace):
        check_mean_depth(mor.warm.depths, mor.model.config, name=name)
    return twin, mor


def _side(
    config: BenchDecodeConfig,
    cell: Cell,
    name: str,
    model: MoR,
    trace: list[RequestSpec],
    kv_cache_bytes: int = 0,
) -> Side:
    engine = new_engine(
        model,
        max_requests=MAX_SLOTS * cell.in_flight,
        max_rows=num_rows(config, cell),
        max_model_len=max(request.num_tokens for request in trace),
        kv_cache_bytes=kv_cache_bytes or config.kv_cache_bytes,
    )
    few = [
        request._replace(output_len=min(request.output_len, VERIFIED_TOKENS), depths=())
        for request in trace[:VERIFIED_REQUESTS]
    ]
    verified = verify(engine, few, name=name)
    warm = run_trace(engine, trace, in_flight=cell.in_flight)
    if warm.is_short:
        raise ValueError(
            f"{cell.in_flight} requests of {name} do not fit into kv_cache_bytes "
            f"{engine.blocks.num_pages * engine.page_bytes}; give more bytes or fewer in_flight"
        )
    return Side(name, engine, trace, verified, warm)


def make_contests(
    config: BenchDecodeConfig, cell: Cell, twin: Side, mor: Side, kv_budget: int
) -> dict[tuple[str, str], Contest]:
    """Find how many requests fit for each side; returns runs by (regime, side).

    Both regimes share a run where their numbers are equal.
    """
    contests = {}
    for which, side in (("mor", mor), ("twin", twin)):
        pages = kv_budget // side.engine.page_bytes
        # With bytes of its own making the twin's number is known: it filled them.
        side.most = cell.in_flight
        if which == "mor" or config.kv_cache_bytes:
            side.most = largest_in_flight(
                side.engine,
                side.trace,
                known=cell.in_flight,
                guess=cell.in_flight * pages // side.warm.peak_pages,
                most=min(MAX_SLOTS * cell.in_flight, len(side.trace) - 1),
                tries=SEARCH_RUNS,
            )
        fixed = Contest(side, cell.in_flight)
        contests["fixed_batch", which] = fixed
        is_same = side.most == cell.in_flight
        contests["max_batch", which] = fixed if is_same else Contest(side, side.most)
    return contests


def report_cell(
    config: BenchDecodeConfig,
    cell: Cell,
    contests: dict[tuple[str, str], Contest],
    tables: Tables,
    kv_budget: int,
) -> dict[str, Any]:
    """Predict what was run, and put the cell's numbers together."""
    predictions: dict[Contest, Prediction] = {}
    rows = []
    for (regime, which), contest in contests.items():
        if contest not in predictions:
            predictions[contest] = _predict(contest, tables, num_rows(config, cell))
        shares = efficiencies(contest.runs, predictions[contest])
        longest = longest_context(contest.side.engine, contest.side.warm.depths, kv_budget)
        rows.append(
            row_of(
                contest.runs,
                regime=regime,
                side=which,
                name=contest.side.name,
                model=contest.side.model,
                prediction=predictions[contest],
                efficiencies=shares,
                most_requests=contest.side.most,
                longest_context=longest,
                verified=contest.side.verified,
            )
        )
    pairs = {
        regime: (contests[regime, "mor"].rates(), contests[regime, "twin"].rates())
        for regime in ("fixed_batch", "max_batch")
    }
    return cell_of(
        rows,
        pairs,
        config=cell.mor.config,
        shape=str(config.model or config.shape),
        in_flight=cell.in_flight,
        kv_budget_bytes=kv_budget,
        depths_are="drawn" if cell.is_drawn else "trained",
        tables=tables.to_dict(),
    )


def _predict(contest: Contest, tables: Tables, max_rows: int) -> Prediction:
    """Replay the first timed run; what it did not reach has the depths of the warm-up."""
    side, run = contest.side, contest.runs[0]
    depths = [one.depths for one in side.warm.served]
    for index, one in enumerate(run.served):
        depths[index] = one.depths + depths[index][len(one.depths) :]
    trace = [
        request._replace(depths=tuple(known))
        for request, known in zip(side.trace, depths, strict=True)
    ]
    layers = Layers.of(side.model.config)
    return predict(tables, layers, trace, in_flight=contest.in_flight, max_rows=max_rows)


def efficiencies(runs: Sequence[Run], prediction: Prediction) -> list[float]:
    """Return each run's efficiency."""
    return [efficiency(run.window, prediction.window) for run in runs]
