"""Promises of predictions: they add up the tables over an ideal schedule, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest

from mor.bench.predict import (
    Event,
    Layers,
    Window,
    efficiency,
    full_window,
    is_valid,
    predict,
)
from mor.bench.tables import Grid, Line, Tables
from mor.bench.workload import RequestSpec


def always(seconds: float) -> Line:
    return Line((1.0,), (seconds,))


FREE = Grid((1.0,), (always(0),))
# One call: prelude 1, each layer of the block 2, coda 1, keys of the coda 0.5, head 3.
CALLS = Tables(
    prelude_s=always(1),
    layer_s=always(2),
    coda_s=always(1),
    coda_keys_s=always(0.5),
    head_s=always(3),
    decode_s=FREE,
    chunk_s=FREE,
)
NOTHING = Tables(
    **{name: always(0) for name in ("prelude_s", "layer_s", "coda_s", "coda_keys_s", "head_s")},
    decode_s=FREE,
    chunk_s=FREE,
)
PRODUCT = Grid((1, 100), (Line((1, 100), (1, 100)), Line((1, 100), (100, 10000))))
"""rows x keys"""


def request(prompt: int, output: int, *depths: int, arrival_s: float = 0.0) -> RequestSpec:
    depths = depths * (prompt + output - 1) if len(depths) == 1 else depths
    return RequestSpec((0,) * prompt, output, arrival_s, depths)


def seconds(tables: Tables, layers: Layers, *trace: RequestSpec, rows: int = 100) -> float:
    best = predict(tables, layers, trace, in_flight=len(trace), max_rows=rows)
    assert best.window.num_tokens == sum(request.output_len for request in trace)
    return best.window.seconds


def test_a_vanilla_token_costs_one_call_of_everything():
    layers = Layers(1, 2, 1, 1, False)
    prompt, token = 1 + 4 + (1 + 0.5) + 3, 1 + 4 + 1 + 3
    assert seconds(CALLS, layers, request(4, 3, 1)) == prompt + 2 * token


def test_a_chunk_that_does_not_end_its_prompt_leaves_keys_only():
    layers = Layers(1, 2, 1, 1, False)
    first, second, token = 1 + 4 + 0.5, 1 + 4 + (1 + 0.5) + 3, 1 + 4 + 1 + 3
    assert seconds(CALLS, layers, request(4, 2, 1), rows=2) == first + second + token


def test_rows_of_two_depths_share_a_call_and_the_best_coda_period_counts():
    """Period 1: 9 + 9 + 5 + 8 seconds; period 2: 5 + 8 twice."""
    trace = (request(1, 2, 1), request(1, 2, 2))
    best = predict(CALLS, Layers(1, 2, 1, 2, False), trace, in_flight=2, max_rows=100)
    assert best.period == 2
    assert best.window == Window(-1, 3, 26.0, 4)


def test_keys_are_those_of_tokens_that_were_active_at_the_recursion():
    tables = dataclasses.replace(NOTHING, decode_s=PRODUCT)
    trace = request(1, 3, 2, 1, 2)
    assert seconds(tables, Layers(0, 1, 0, 2, False), trace) == (1 + 1) + 2 + (3 + 2)
    assert seconds(tables, Layers(0, 1, 0, 2, True), trace) == (1 + 1) + 2 + (3 + 3)


def test_prompts_use_the_table_of_chunks_with_the_rows_that_are_active():
    by_rows = Line((1, 100), (1, 100))
    tables = dataclasses.replace(NOTHING, chunk_s=Grid((0.0,), (by_rows,)))
    trace = request(4, 1, 1, 2, 2, 2)
    assert seconds(tables, Layers(0, 1, 0, 2, False), trace) == 4 + 3
    assert seconds(tables, Layers(2, 1, 0, 2, False), trace) == 2 * 4 + 4 + 3


def test_waiting_for_an_arrival_is_not_busy_time():
    layers = Layers(1, 2, 1, 1, False)
    alone = seconds(CALLS, layers, request(1, 2, 1))
    assert seconds(CALLS, layers, request(1, 2, 1), request(1, 2, 1, arrival_s=1e3)) == 2 * alone


def test_a_run_counts_from_the_full_batch_to_the_dry_queue():
    events = [
        Event(1.0, 1, 1, 2),
        Event(2.0, 3, 2, 2),
        Event(3.5, 5, 3, 1),
        Event(4.0, 7, 4, 0),
        Event(9.0, 8, 4, 0),
    ]
    assert full_window(events, 2) == Window(1, 3, 2.0, 4)
    assert full_window(events, 5) == Window(-1, 4, 9.0, 8), "never full: the whole run"


@pytest.mark.parametrize(("speed", "good"), [(0.9, True), (1.0, True), (1.02, True), (1.03, False)])
def test_a_run_that_beats_its_kernels_is_invalid(speed, good):
    value = efficiency(Window(0, 1, 1.0, round(1000 * speed)), Window(0, 1, 1.0, 1000))
    assert value == pytest.approx(speed) and is_valid(value) == good


def test_tables_are_straight_between_points_and_beyond():
    line = Line((1, 3, 5), (1.0, 2.0, 6.0))
    assert [line(x) for x in (0, 0.5, 1, 2, 3, 4, 6)] == [0, 1, 1, 1.5, 2, 4, 8]
    assert PRODUCT(7, 13) == pytest.approx(91) and PRODUCT(0, 13) == 0
    assert PRODUCT(200, 200) == pytest.approx(40000)
