"""`mor bench decode`: does MoR serve more tokens a second than its vanilla twin, and all it could?

Both run on the same engine, in one process, in rounds whose order changes; ratios are taken within
a round. `fixed_batch` keeps the same number of requests in flight, `max_batch` gives both the same
bytes of keys and values and lets each run as many requests as fit. A sweep of the kernels' own
times comes before every round; what they allow is the prediction, and efficiency is its share.
"""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

from mor.bench.contest import Contest, Side, build_side
from mor.bench.predict import Prediction
from mor.bench.serve import largest_in_flight
from mor.bench.serve_config import (
    FULL_MIX,
    MAX_SLOTS,
    QUICK_MIX,
    REQUESTS_PER_SLOT,
    BenchDecodeConfig,
)
from mor.bench.serve_models import about, build_model, build_twin
from mor.bench.serve_report import cell_of, longest_context, row_of, summary
from mor.bench.tables import TableMaker, Tables
from mor.bench.train import in_order
from mor.bench.verify import check_mean_depth
from mor.bench.workload import RequestSpec, cut_prompts, make_trace, read_trace
from mor.config import ModelConfig
from mor.log import progress
from mor.model.mor import MoR
from mor.ops.device import pick_device, pick_dtype
from mor.tokenizer import Tokenizer

SEARCH_RUNS = 5


class Cell(NamedTuple):
    """What is compared: a model, its twin, and the requests in flight."""

    mor: MoR
    trace: list[RequestSpec]
    in_flight: int
    is_drawn: bool
    """depths are drawn, not a trained router's"""


def bench_decode(config: BenchDecodeConfig) -> dict[str, Any]:
    """Run all cells; returns the summary, `cells`, settings and machine.

    Raises  ValueError for what a user can get wrong; RuntimeError when a model does not compute
            what it should
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if config.peers and device.type != "cpu":
        raise ValueError("--peers runs engines of the CPU; add --device cpu, or leave it out")
    models = [
        build_model(config, recursions, dtype=dtype, device=device)
        for recursions in ((0,) if config.model else config.recursions)
    ]
    cells = []
    for mor in models:
        for in_flight in config.in_flight:
            trace = build_trace(config, mor.config, in_flight)
            cells.append(bench_cell(config, Cell(mor, trace, in_flight, config.model is None)))
            gc.collect()
    result = {**summary(cells), "cells": cells}
    if config.peers:
        from mor.bench.serve_peers import bench_peers

        result["peers"] = [
            row for mor in models for row in bench_peers(config, build_twin(mor, config.seed), mor)
        ]
    return {**result, **about(config, device, dtype)}


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
        trace = cut_prompts(
            trace, Tokenizer.load(config.model, eos_token=model.eos_token_id).encode(text)
        )
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
        maker = None
        if cell.mor.device.type == "cpu":  # on a GPU a tick is one launch, not a sum of calls
            maker = TableMaker(
                cell.mor,
                max_rows=num_rows(config, cell),
                max_requests=max(contest.in_flight for contest in contests.values()),
                max_keys=max(request.num_tokens for request in cell.trace),
            )
        for round_ in range(config.num_rounds):
            if maker is not None:
                maker.sweep()
            for contest in in_order(list(dict.fromkeys(contests.values())), round_):
                contest.run(until_dry=True)
            rates = (contests["fixed_batch", "mor"], contests["fixed_batch", "twin"])
            ratio = rates[0].rates()[-1] / rates[1].rates()[-1]
            bar.advance(1, note=f"{ratio:.2f} times the twin")
    return report_cell(config, cell, contests, None if maker is None else maker.tables(), kv_budget)


def num_rows(config: BenchDecodeConfig, cell: Cell) -> int:
    """Rows of a call: as asked for, but room for prompts beside the most requests."""
    return max(config.max_num_batched_tokens, 2 * MAX_SLOTS * cell.in_flight)


def build_sides(config: BenchDecodeConfig, cell: Cell, name: str) -> tuple[Side, Side]:
    """Build both engines, verify them, and run the trace once to its end.

    MoR has the bytes that the twin filled, or what the user gives to both.
    """
    bare = [request._replace(depths=()) for request in cell.trace]
    sizes = {
        "in_flight": cell.in_flight,
        "max_requests": MAX_SLOTS * cell.in_flight,
        "max_rows": num_rows(config, cell),
    }
    given = config.kv_cache_bytes
    model = build_twin(cell.mor, config.seed)
    twin = build_side("twin", model, bare, kv_cache_bytes=given, **sizes)
    kv_budget = given or twin.warm.peak_pages * twin.engine.page_bytes
    mor = build_side(name, cell.mor, cell.trace, kv_cache_bytes=kv_budget, **sizes)
    if cell.is_drawn and not any(request.depths for request in cell.trace):
        check_mean_depth(mor.warm.depths, mor.model.config, name=name)
    return twin, mor


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
    tables: Tables | None,
    kv_budget: int,
) -> dict[str, Any]:
    """Predict what was run where there are tables, and put the cell's numbers together."""
    predictions: dict[Contest, Prediction] = {}
    rows = []
    for (regime, which), contest in contests.items():
        if tables is not None and contest not in predictions:
            predictions[contest] = contest.predict(tables, max_rows=num_rows(config, cell))
        longest = longest_context(contest.side.engine, contest.side.warm.depths, kv_budget)
        rows.append(
            row_of(
                contest.runs,
                regime=regime,
                side=which,
                name=contest.side.name,
                model=contest.side.model,
                prediction=predictions.get(contest),
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
        routing=config.routing,
        tables=None if tables is None else tables.to_dict(),
    )
