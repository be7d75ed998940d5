"""Ticks on the device alone give what the plain model gives, and the host's books stay right.

On a CPU the same tick runs op by op; the marked cases capture it on a GPU.
"""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_engine import (
    CAPTURED,
    SERVED,
    SOME_SERVED,
    assert_exact,
    assert_pages_hold_what_is_active,
    assert_same_up_to_ties,
    greedy,
    mixed_prompts,
    new_engine,
    pages_for,
    play_any_mix,
    prompt_of,
    run_twice_and_check,
    served_model,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mor.engine.captured import PASS_EVERY, CapturedTicks
from mor.engine.engine import Engine
from mor.engine.graphs import Inbox, Runs
from mor.engine.layers import TorchGroups
from mor.engine.params import SamplingParams
from mor.model.mor import MoR


@functools.cache
def model_on(device: str, index: int, dtype: torch.dtype = torch.float64) -> MoR:
    model = served_model(index, dtype)
    return model if device == "cpu" else copy.deepcopy(model).to(device)


def captured_engine(model: MoR, *, lag: int = 2, **values) -> Engine:
    engine = new_engine(model, **{"capture": "on"} | values)
    ticks_of(engine).lag = lag
    return engine


def ticks_of(engine: Engine) -> CapturedTicks:
    assert engine.captured is not None
    return engine.captured


def step_until(engine: Engine, is_reached: Callable[[], bool]) -> None:
    for _ in range(200):
        if is_reached():
            return
        engine.step()
        engine.check_integrity()
    raise AssertionError("never reached")


def run_out(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.check_integrity()


@pytest.mark.parametrize("index", CAPTURED)
def test_a_cache_filled_by_captured_ticks_changes_nothing(index: int, device: str) -> None:
    """The same prompts twice, and a prompt that is another's prompt and answer."""
    model = served_model(index)
    engine = captured_engine(
        model_on(device, index), lag=1 + index % 4, max_num_batched_tokens=9, block_size=4
    )
    assert sum(run_twice_and_check(engine, 1, oracle=model)) > 60
    (first,) = engine.generate([prompt_of(6, seed=1)], greedy(20))
    longer = first.prompt_token_ids + first.outputs[0].token_ids
    (second,) = engine.generate([longer], greedy(9))
    assert second.num_cached_tokens == 24, "the answer itself is kept"
    for output in (first, second):
        assert_exact(model, output)
    engine.check_integrity()
    assert ticks_of(engine).num_launched > 40
    if device == "cuda":
        assert ticks_of(engine).graphs.num_captured > 0


@settings(max_examples=20)
@given(data=st.data())
def test_any_mix_of_arrivals_aborts_and_sizes_is_exact(data: st.DataObject) -> None:
    new = functools.partial(captured_engine, lag=data.draw(st.integers(1, 4)))
    play_any_mix(data, served_model(data.draw(st.sampled_from(CAPTURED))), new, max_new=20)


@pytest.mark.parametrize(("index", "lag"), [(0, 1), (5, 2), (8, 3), (9, 4), (28, 1), (31, 4)])
def test_preemption_between_stretches_changes_nothing(index: int, lag: int, device: str) -> None:
    model = served_model(index)
    room = pages_for(model, 38, 4, 1.1)
    engine = captured_engine(model_on(device, index), lag=lag, kv_cache_bytes=room, max_num_seqs=5)
    ids = [engine.add(prompt_of(3 + i, seed=i), greedy(30)) for i in range(5)]
    run_out(engine)
    for request_id in ids:
        assert_exact(model, engine.result(request_id))
    assert engine.scheduler.num_preemptions > 0 and ticks_of(engine).num_launched > 20


@pytest.mark.parametrize(("index", "lag"), [(0, 1), (4, 3), (7, 2), (11, 4), (27, 1), (28, 3)])
def test_pages_hold_what_is_active_whenever_a_stretch_ends(index: int, lag: int) -> None:
    """A stretch is ended after every few ticks; flights then stand where the device left them."""
    engine = captured_engine(served_model(index), lag=lag, enable_prefix_caching=False)
    ticks, ends = ticks_of(engine), 0
    ids = [engine.add(prompt_of(3 + i, seed=i), greedy(30)) for i in range(4)]
    launch, left = ticks.launch, [1]

    def launch_some() -> bool:
        left[0] -= 1
        ticks.is_over = left[0] < 0
        return not ticks.is_over and launch()

    ticks.launch = launch_some
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        if not ticks.is_running:
            assert_pages_hold_what_is_active(engine)
            ends += left[0] < 0
            left[0] = 1 + ends % 7
    assert ends > 5
    for request_id in ids:
        assert_exact(engine.model, engine.result(request_id))


@pytest.mark.parametrize("num_others", [0, 10])
@pytest.mark.parametrize("lag", [1, 4])
def test_a_stop_in_the_middle_ends_one_request_alone(
    num_others: int, lag: int, device: str
) -> None:
    """Also one that the device does not know, since it keeps but some ids: the rest is dropped."""
    model = model_on(device, 0)
    prompts = [prompt_of(4 + i, seed=i) for i in range(3)]
    engine = captured_engine(model, lag=lag)
    whole = [o.outputs[0] for o in captured_engine(model).generate(prompts, greedy(24))]
    tokens = whole[1].token_ids
    stop = next(
        token for place, token in enumerate(tokens) if place > 7 and token not in tokens[:place]
    )
    others = [token for token in range(61) if token not in tokens][:num_others]
    params = greedy(24, stop_token_ids=[*others, stop])
    outputs = [o.outputs[0] for o in engine.generate(prompts, [greedy(24), params, greedy(24)])]
    engine.check_integrity()
    end = tokens.index(stop) + 1
    assert outputs[1].token_ids == tokens[:end] and outputs[1].finish_reason == "stop"
    assert outputs[1].depths == whole[1].depths[: end - 1]
    assert [outputs[0], outputs[2]] == [whole[0], whole[2]]


def test_draws_are_those_of_the_ordinary_path(device: str) -> None:
    model = model_on(device, 0)
    params = [
        SamplingParams(max_tokens=15, temperature=t, seed=7, n=n, ignore_eos=True)
        for t, n in ((0.7, 2), (0.0, 1), (1.9, 1))
    ]
    prompts = [prompt_of(5 + i, seed=i) for i in range(3)]
    plain, ticked = (new_engine(model, capture=capture) for capture in ("off", "on"))
    answers = [[o.outputs for o in each.generate(prompts, params)] for each in (ticked, plain)]
    assert answers[0] == answers[1]
    assert ticks_of(ticked).num_launched > 20


@pytest.mark.parametrize("fields", [{"top_p": 0.5, "temperature": 1}, {"logprobs": 1}])
def test_a_wish_that_the_device_does_not_serve_keeps_the_batch(fields: dict) -> None:
    engine = captured_engine(served_model(0))
    ticks = ticks_of(engine)
    special = engine.add(prompt_of(4, seed=1), SamplingParams(max_tokens=9, seed=1, **fields))
    other = engine.add(prompt_of(4, seed=2), greedy(30))
    step_until(engine, lambda: engine.is_done(special))
    assert ticks.num_launched == 0
    run_out(engine)
    assert ticks.num_launched > 10
    assert_exact(engine.model, engine.result(other))


def test_an_abort_or_a_callback_that_raises_ends_its_request_in_a_stretch() -> None:
    engine = captured_engine(served_model(0), lag=3)
    seen: list[int] = []

    def raise_late(piece) -> None:
        seen.extend(piece.token_ids)
        if len(seen) > 5:
            raise RuntimeError("a bug of the caller")

    keep, gone = (engine.add(prompt_of(5, seed=i), greedy(40)) for i in (1, 2))
    broken = engine.add(prompt_of(5, seed=3), greedy(40), on_output=raise_late)
    ticks = ticks_of(engine)
    step_until(engine, lambda: ticks.num_launched > 6)
    engine.abort(gone)
    engine.check_integrity()
    assert ticks.is_running, "the others go on"
    step_until(engine, lambda: engine.is_done(broken))
    assert "a bug of the caller" in str(engine.result(broken).outputs[0].error)
    run_out(engine)
    assert_exact(engine.model, engine.result(keep))
    for request_id in (keep, gone, broken):
        engine.forget(request_id)
    engine.abort(engine.add(prompt_of(3, seed=1), greedy(3)))
    engine.check_integrity()


def test_aborting_everyone_ends_the_stretch_at_once() -> None:
    engine = captured_engine(served_model(0))
    ids = [engine.add(prompt_of(5, seed=i), greedy(40)) for i in range(3)]
    step_until(engine, lambda: ticks_of(engine).num_unread == 2)
    for request_id in ids:
        engine.forget(request_id)
    assert not engine.has_work and not ticks_of(engine).is_running
    engine.check_integrity()
    (output,) = engine.generate([prompt_of(5, seed=9)], greedy(9))
    assert_exact(engine.model, output)


def test_a_prompt_that_waits_ends_the_stretch_when_it_can_be_admitted() -> None:
    engine = captured_engine(served_model(0), max_num_seqs=2)
    ticks = ticks_of(engine)
    for i, length in enumerate((40, 12)):
        engine.add(prompt_of(4, seed=i), greedy(length))
    step_until(engine, lambda: ticks.is_running)
    late = engine.add(prompt_of(9, seed=5), greedy(4))
    (request,) = engine.requests[late]
    step_until(engine, lambda: len(engine.scheduler.free_slots) == 1)
    assert request.slot < 0, "there was no place before"
    for _ in range(3):
        engine.step()
    assert request.num_started > 0
    run_out(engine)
    assert_exact(engine.model, engine.result(late))


def note_ends(ticks: CapturedTicks) -> list[int]:
    """Return a list that gets how many requests ran whenever a stretch ends with some."""
    ends, hand_back = [], ticks.hand_back

    def noted() -> None:
        ends.append(len(ticks._row_of))
        hand_back()

    ticks.hand_back = noted
    return ends


@pytest.mark.parametrize("index", [0, 4, 7, 27, 31])
def test_short_prompts_join_a_stretch_and_never_end_it(index: int, device: str) -> None:
    """Also on what the cache keeps of them, and a batch that grows by them."""
    model = model_on(device, index)
    engine = captured_engine(
        model, max_num_seqs=12, max_num_batched_tokens=64, block_size=4, kv_cache_bytes=2**22
    )
    ticks, ends = ticks_of(engine), note_ends(ticks_of(engine))
    ids = [engine.add(prompt_of(5, seed=1), greedy(40))]
    for i in range(11):
        step_until(engine, lambda: ticks.num_passes >= len(ids))
        shared = prompt_of(12, seed=3) if i % 2 else []
        ids.append(engine.add([*shared, *prompt_of(1 + 3 * i, seed=i)], greedy(9 + i)))
    run_out(engine)
    assert not [count for count in ends if count > 4], "the batch got smaller at the end alone"
    assert sum(engine.result(request_id).num_cached_tokens for request_id in ids) > 20
    for request_id in ids:
        assert_exact(served_model(index), engine.result(request_id))


def test_a_prompt_waits_for_company_but_not_for_long() -> None:
    engine = captured_engine(served_model(0), max_num_seqs=12, max_num_batched_tokens=64)
    ticks = ticks_of(engine)
    for i in range(10):
        engine.add(prompt_of(4, seed=i), greedy(60))
    step_until(engine, lambda: ticks.num_passes == 1)
    launched = ticks.num_launched
    late = engine.add(prompt_of(9, seed=77), greedy(4))
    step_until(engine, lambda: ticks.num_passes == 2)
    assert 4 <= ticks.num_launched - launched <= PASS_EVERY
    for i in range(3):  # with a quarter of the batch waiting there is no delay
        engine.forget(f"request-{i}")
    ids = [engine.add(prompt_of(5, seed=80 + i), greedy(4)) for i in range(3)]
    engine.step()
    assert ticks.num_passes == 3
    run_out(engine)
    for request_id in (late, *ids):
        assert_exact(engine.model, engine.result(request_id))


def test_many_prompts_take_several_passes_at_once() -> None:
    engine = captured_engine(served_model(0), max_num_seqs=40, max_num_batched_tokens=64)
    ticks = ticks_of(engine)
    ids = [engine.add(prompt_of(3, seed=i), greedy(5)) for i in range(40)]
    engine.step()
    assert ticks.num_passes == 3 and len(engine.scheduler.running) == 40
    run_out(engine)
    for request_id in ids:
        assert_exact(engine.model, engine.result(request_id))


@pytest.mark.parametrize("length", [20, 3])
def test_a_prompt_that_no_pass_serves_ends_the_stretch(length: int) -> None:
    """One with more tokens than a pass has rows, or that asks for log-probabilities."""
    engine = captured_engine(served_model(0), max_num_batched_tokens=12)
    ticks, ends = ticks_of(engine), note_ends(ticks_of(engine))
    engine.add(prompt_of(4, seed=1), greedy(30))
    step_until(engine, lambda: ticks.num_launched > 4)
    params = greedy(6) if length > 12 else greedy(6, logprobs=1)
    late = engine.add(prompt_of(length, seed=2), params)
    run_out(engine)
    assert ends[0] == 1 and ticks.num_passes == 1
    assert_exact(engine.model, engine.result(late))


def test_an_inbox_brings_numbers_of_all_types_in_one_copy(device: str) -> None:
    inbox = Inbox(
        torch.device(device),
        whole_N=torch.full((3,), 7),
        real_NR=torch.zeros(2, 2, dtype=torch.float64),
        small_N=torch.zeros(3, dtype=torch.float32),
    )
    inbox.send(whole_N=[2**62], real_NR=[[0.1, math.inf]], small_N=[1.5, 2.5, 3.5])
    assert inbox["whole_N"].tolist() == [2**62, 7, 7]
    assert inbox["real_NR"].tolist() == [[0.1, math.inf], [0, 0]]
    inbox.send()
    assert inbox["whole_N"].tolist() == [7] * 3 and inbox["small_N"].tolist() == [0] * 3


def test_rows_that_end_leave_a_smaller_graph() -> None:
    engine = captured_engine(served_model(0), max_num_seqs=12, max_num_batched_tokens=40)
    ticks, sizes = ticks_of(engine), set()
    run = ticks.graphs.run

    def noted(what: Runs, num_rows: int, *, draws: bool) -> None:
        if what is ticks.tick:
            sizes.add(num_rows)
        run(what, num_rows, draws=draws)

    ticks.graphs.run = noted
    outputs = engine.generate(
        [prompt_of(4, seed=i) for i in range(12)], [greedy(8 + 2 * i) for i in range(12)]
    )
    assert sizes == {8, 12}
    for output in outputs:
        assert_exact(engine.model, output)


@pytest.mark.parametrize("index", [0, 6, 27])
def test_ticks_of_rows_that_are_not_alive_change_nothing(index: int) -> None:
    """So a graph may be captured in the middle of a stretch."""
    engine = captured_engine(served_model(index))
    for i in range(3):
        engine.add(prompt_of(5, seed=i), greedy(20))
    ticks = ticks_of(engine)
    step_until(engine, lambda: ticks.num_launched > 3)
    rows = ticks.tick.rows
    rows.is_alive_N.zero_()
    assert isinstance(engine.groups, TorchGroups)
    pool = engine.groups.pool
    before = [tensor.clone() for tensor in (*rows, pool)]
    ticks.tick.run(4, draws=True)
    for one, other in zip(before, (*rows, pool), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_logits_that_are_not_finite_end_one_request() -> None:
    engine = captured_engine(served_model(0))
    argmax, calls = engine.groups.argmax, [0]

    def broken(logit_NV: Tensor) -> Tensor:
        calls[0] += 1
        best_N = argmax(logit_NV)
        return best_N.index_fill(0, torch.tensor([0]), -1) if calls[0] > 9 else best_N

    ids = [engine.add(prompt_of(5, seed=i), greedy(20)) for i in range(2)]
    step_until(engine, lambda: ticks_of(engine).is_running)
    engine.groups.argmax = broken
    run_out(engine)
    first, second = (engine.result(request_id).outputs[0] for request_id in ids)
    assert first.finish_reason == "error" and "not finite" in str(first.error)
    assert len(second.token_ids) == 20


def test_the_vanilla_twin_runs_on_the_device_too(device: str) -> None:
    twin = MoR(served_model(0).config.twin()).double()
    engine = captured_engine(copy.deepcopy(twin).to(device))
    for output in engine.generate(mixed_prompts(2), greedy(9)):
        assert_exact(twin, output)
    assert ticks_of(engine).num_launched > 8


@pytest.mark.slow
@pytest.mark.parametrize("index", SOME_SERVED)
def test_triton_kernels_in_captured_ticks_give_the_plain_models_answers(
    index: int, device: str
) -> None:
    pytest.importorskip("triton")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this process; TRITON_INTERPRET=1 interprets them")
    model = served_model(index, torch.float32)
    engine = captured_engine(model_on(device, index, torch.float32), backend="triton")
    count = 3 if device == "cpu" else 12
    outputs = engine.generate([prompt_of(1 + 7 * i % 38, seed=i) for i in range(count)], greedy(10))
    engine.check_integrity()
    held = sum(assert_same_up_to_ties(model, output) for output in outputs)
    assert held / (10 * count) > 0.6
    assert ticks_of(engine).num_launched > 5


ASKS = {"item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique"}
ASKS |= {"unique_consecutive", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__"}
MAKES = {"tensor", "as_tensor", "from_numpy", "new_tensor"}
"""They copy from the host's memory, which a capture refuses."""
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "lift_fresh"}
WAITS |= {"_unique2", "unique_consecutive", "unique_dim", "equal"}


class NoQuestions(TorchFunctionMode):
    """Refuses calls by which the host learns a number of the device, or gives it one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in ASKS | MAKES, f"{name} is called in a tick"
        return func(*args, **(kwargs or {}))


class NoWaits(TorchDispatchMode):
    """Refuses the operators below them, and indices by a mask, which ask how much is True."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} runs in a tick"
        if name in ("index", "index_put", "index_put_"):
            indices = list(args)[1]
            assert all(i is None or i.dtype != torch.bool for i in indices), "a mask as an index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("index", CAPTURED)
def test_a_tick_never_asks_the_device(index: int) -> None:
    engine = captured_engine(served_model(index))
    ticks, watched = ticks_of(engine), [0]
    run = ticks.tick.run

    def watch(num_rows: int, *, draws: bool) -> None:
        with NoQuestions(), NoWaits():
            run(num_rows, draws=draws)
        watched[0] += 1

    ticks.tick.run = watch
    drawn = SamplingParams(max_tokens=9, temperature=1, seed=1, ignore_eos=True)
    engine.generate([prompt_of(5, seed=i) for i in range(3)], [greedy(20), drawn, greedy(9)])
    assert watched[0] > 10


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor(1.0),
    ],
)
def test_the_watch_over_ticks_sees_what_asks(ask: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError), NoQuestions(), NoWaits():
        ask(torch.arange(3))


def test_capture_is_refused_where_it_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="capture is on"):
        new_engine(served_model(SERVED.index(("expert_choice", {"sharing": "none"}))), capture="on")
    with pytest.raises(ValueError, match="capture 'maybe' is unknown"):
        new_engine(served_model(0), capture="maybe")
    assert new_engine(served_model(0)).captured is None, "auto is off on a CPU"
