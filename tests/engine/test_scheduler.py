"""Promises of the scheduler: bounds, accounting, fairness, and a tick that does not grow."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from support_engine import (
    SERVED,
    assert_exact,
    assert_pages_hold_what_is_active,
    greedy,
    new_engine,
    pages_for,
    prompt_of,
    served_model,
)
from torch import Tensor

from mor.engine.engine import Engine
from mor.engine.layers import GroupName, LayerRows

R = 3


def watch_rows(engine: Engine) -> dict[int, list[int]]:
    """Note the ticks that each flight spends in the block, and how long it waits for the coda."""
    seen: dict[int, list[int]] = {}
    kept = []  # flights stay alive, so that their ids stay theirs

    def note() -> None:
        for kind, flights in ((0, engine.scheduler.in_block), (1, engine.scheduler.ready)):
            for flight in flights:
                kept.append(flight)
                seen.setdefault(id(flight), [0, 0])[kind] += 1

    step = engine.step

    def stepped():
        pieces = step()
        note()
        return pieces

    engine.step = stepped  # pyrefly: ignore
    return seen


def watch_calls(engine: Engine) -> list[tuple[str, LayerRows]]:
    """Note every call of a group of layers."""
    calls: list[tuple[str, LayerRows]] = []
    run = engine.groups.run

    def noted(group: GroupName, x_ND: Tensor, rows: LayerRows) -> Tensor:
        calls.append((group, rows))
        return run(group, x_ND, rows)

    engine.groups.run = noted
    return calls


@pytest.mark.parametrize("period", [0, 1, 2, 3])
def test_no_row_waits_longer_than_the_stated_bound(period: int) -> None:
    engine = new_engine(served_model(0), coda_period=period, max_num_seqs=5)
    seen = watch_rows(engine)
    engine.generate([prompt_of(3 + 5 * i, seed=i) for i in range(7)], greedy(12))
    assert max(ticks for ticks, _ in seen.values()) <= R
    assert max(waits for _, waits in seen.values()) <= R


def test_the_oldest_prompt_advances_while_others_decode() -> None:
    """A budget that decode rows nearly fill still moves a long prompt every few ticks."""
    engine = new_engine(served_model(0), max_num_seqs=4, max_num_batched_tokens=5)
    for i in range(3):
        engine.add(prompt_of(2, seed=i), greedy(40))
    for _ in range(4):
        engine.step()
    late = engine.add(prompt_of(30, seed=9), greedy(2))
    (request,) = engine.requests[late]
    before = 0
    for tick in range(120):
        engine.step()
        if engine.is_done(late):
            break
        if (tick + 1) % (R + 1) == 0 and request.num_started < 30:
            assert request.num_started > before
            before = request.num_started
    assert engine.is_done(late)


def test_requests_are_admitted_in_order_of_arrival() -> None:
    engine = new_engine(served_model(0), max_num_seqs=2)
    ids = [engine.add(prompt_of(4, seed=i), greedy(6)) for i in range(6)]
    finished = []
    while engine.has_work:
        finished += [piece.request_id for piece in engine.step() if piece.finish_reason]
    order = [ids.index(request_id) // 2 for request_id in finished]
    assert order == sorted(order)


@pytest.mark.parametrize("index", [0, 4, 6, 9, 12, 18, 26, 27])
def test_pages_hold_what_is_active_and_nothing_else(index: int) -> None:
    """Tokens stored are the (token, depth) pairs that ran, exactly, in every tick."""
    engine = new_engine(served_model(index), enable_prefix_caching=False)
    for i in range(4):
        engine.add(prompt_of(3 + 6 * i, seed=i), greedy(10))
    while engine.has_work:
        engine.step()
        assert_pages_hold_what_is_active(engine)


def test_the_vanilla_twin_takes_one_call_of_each_group_a_token() -> None:
    from mor.model.mor import MoR

    twin = MoR(served_model(0).config.twin()).double()
    engine = new_engine(twin)
    calls = watch_calls(engine)
    outputs = engine.generate([prompt_of(5, seed=i) for i in range(3)], greedy(8))
    assert [name for name, _ in calls] == ["prelude", "block", "coda"] * 8
    for output in outputs:
        assert_exact(twin, output)


def test_a_token_that_left_costs_no_row() -> None:
    """Rows of block calls are the sum of depths, of prompts and answers alike."""
    engine = new_engine(served_model(0), enable_prefix_caching=False, coda_period=1)
    calls = watch_calls(engine)
    outputs = engine.generate([prompt_of(9 + i, seed=i) for i in range(4)], greedy(7))
    depths = [d for o in outputs for d in (*o.prompt_depths, *o.outputs[0].depths)]
    rows = Counter[str]()
    for name, where in calls:
        rows[name] += len(where)
    assert rows == {"prelude": len(depths), "block": sum(depths), "coda": len(depths)}
    assert sum(depths) < 3 * len(depths)


def test_prompt_tokens_that_need_no_logits_end_with_their_keys() -> None:
    engine = new_engine(served_model(0))
    calls = watch_calls(engine)
    engine.generate([prompt_of(15, seed=1)], greedy(3))
    full = [(where.num_full_rows, len(where)) for name, where in calls if name == "coda"]
    assert full == [(1, 15), (1, 1), (1, 1)]


def test_aborting_at_any_tick_frees_all() -> None:
    model = served_model(SERVED.index(("expert_choice", "weighted")))
    for tick in range(12):
        engine = new_engine(model, max_num_batched_tokens=7, enable_prefix_caching=False)
        keep = engine.add(prompt_of(6, seed=1), greedy(5))
        gone = engine.add(prompt_of(25, seed=2), greedy(5))
        for _ in range(tick):
            engine.step()
        engine.abort(gone)
        engine.abort(gone)  # twice harms nothing
        engine.abort("never added")
        engine.check_integrity()
        while engine.has_work:
            engine.step()
        engine.check_integrity()
        assert_exact(model, engine.result(keep))


def test_pages_of_the_cache_are_given_up_when_requests_need_them() -> None:
    model = served_model(0)
    engine = new_engine(model, kv_cache_bytes=pages_for(model, 44, 4, 1.0))
    for i in range(5):
        (output,) = engine.generate([prompt_of(36, seed=i)], greedy(6))
        engine.check_integrity()
        assert_exact(model, output)
    assert engine.prefix is not None and engine.prefix.entries
    engine.prefix.clear()
    engine.check_integrity()
    assert len(engine.blocks.free) == engine.blocks.num_pages


def test_a_tick_does_not_grow_with_waiting_or_finished_requests() -> None:
    engine = new_engine(served_model(0), max_num_seqs=1)

    def best_tick_s() -> float:
        times = []
        for _ in range(25):
            start_s = time.thread_time()  # of this thread alone, whatever else runs
            engine.step()
            times.append(time.thread_time() - start_s)
        return min(times)

    engine.add(prompt_of(2, seed=0), greedy(60))
    alone_s = best_tick_s()
    for i in range(3000):
        engine.add(prompt_of(2, seed=i % 7), greedy(2))
    assert best_tick_s() < 3 * alone_s
