"""The engine for asyncio: same answers, nothing leaks, a fault is told and survived."""

from __future__ import annotations

import asyncio

import pytest
from support_engine import greedy, new_engine, prompt_of, served_model

from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.engine.stream import AsyncEngine, EngineFault


async def collect(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> list[int]:
    tokens: list[int] = []
    async for piece in engine.generate(prompt, params):
        tokens += piece.token_ids
    return tokens


async def idle(engine: Engine, served: AsyncEngine) -> None:
    """Wait until the thread has carried out what it was told."""
    for _ in range(500):
        if not engine.requests and not engine.has_work:
            break
        await asyncio.sleep(0.01)
    await served.close()
    assert not engine.requests
    engine.check_integrity()


def test_concurrent_readers_get_what_generate_gives() -> None:
    prompts = [prompt_of(2 + 3 * i, seed=i) for i in range(12)]
    expected = new_engine(served_model(0)).generate(prompts, greedy(9))
    engine = new_engine(served_model(0))

    async def run() -> list[list[int]]:
        served = AsyncEngine(engine)
        got = await asyncio.gather(*(collect(served, p, greedy(9)) for p in prompts))
        await idle(engine, served)
        return got

    assert asyncio.run(run()) == [output.outputs[0].token_ids for output in expected]


def test_leaving_or_cancelling_ends_the_request() -> None:
    engine = new_engine(served_model(0))

    async def run() -> list[int]:
        served = AsyncEngine(engine)
        pieces = served.generate(prompt_of(5, seed=1), greedy(50))
        async for piece in pieces:
            if piece.token_ids:
                break
        await pieces.aclose()
        task = asyncio.create_task(collect(served, prompt_of(6, seed=2), greedy(50)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        tokens = await collect(served, prompt_of(7, seed=3), greedy(4))
        await idle(engine, served)
        return tokens

    assert len(asyncio.run(run())) == 4


def test_abort_gives_a_last_piece() -> None:
    async def run() -> list[str | None]:
        async with AsyncEngine(new_engine(served_model(0))) as served:
            reasons, is_told = [], False
            async for piece in served.generate(prompt_of(5, seed=1), greedy(50), request_id="mine"):
                reasons.append(piece.finish_reason)
                if piece.token_ids and not is_told:
                    is_told = True
                    await served.abort("mine")
            return reasons

    assert asyncio.run(run())[-1] == "abort"


def test_an_aborted_answers_pieces_are_its_text() -> None:
    """What was held back, for it might have begun a stop string, is told with the last piece."""
    engine = new_engine(served_model(0))
    engine.add(prompt_of(5, seed=1), greedy(50), request_id="mine")
    text = "".join(piece.text for _ in range(4) for piece in engine.step())
    engine.requests["mine"][0].stops.flush = lambda: "held"
    (last,) = engine.abort("mine")
    assert (last.finish_reason, last.text) == ("abort", "held")
    assert engine.result("mine").outputs[0].text == text + last.text
    assert engine.abort("mine") == engine.abort("nobody") == []


def test_what_cannot_be_served_is_raised_to_the_caller_alone() -> None:
    async def run() -> list[int]:
        async with AsyncEngine(new_engine(served_model(0))) as served:
            good = asyncio.create_task(collect(served, prompt_of(5, seed=1), greedy(6)))
            with pytest.raises(ValueError, match="shorten the prompt"):
                await collect(served, prompt_of(70, seed=1), greedy(6))
            return await good

    assert len(asyncio.run(run())) == 6


def test_a_tick_that_raises_is_told_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = new_engine(served_model(0))
    advance, broken = engine.runner.advance, [True]

    def fail_once(batch):
        if broken and len(batch.in_block) > 1:
            broken.clear()
            raise RuntimeError("a bug")
        return advance(batch)

    monkeypatch.setattr(engine.runner, "advance", fail_once)

    async def run() -> list[int]:
        served = AsyncEngine(engine)
        both = [collect(served, prompt_of(5, seed=s), greedy(20)) for s in (1, 2)]
        results = await asyncio.gather(*both, return_exceptions=True)
        assert all(isinstance(result, EngineFault) for result in results)
        assert "RuntimeError: a bug" in str(results[0])
        tokens = await collect(served, prompt_of(5, seed=3), greedy(6))
        await idle(engine, served)
        return tokens

    expected = new_engine(served_model(0)).generate([prompt_of(5, seed=3)], greedy(6))
    assert asyncio.run(run()) == expected[0].outputs[0].token_ids


def test_closing_ends_readers_with_a_clear_error() -> None:
    async def run() -> None:
        served = AsyncEngine(new_engine(served_model(0)))
        task = asyncio.create_task(collect(served, prompt_of(5, seed=1), greedy(50)))
        await asyncio.sleep(0.05)
        await served.close()
        with pytest.raises(EngineFault, match="closed"):
            await task
        with pytest.raises(EngineFault, match="closed"):
            await collect(served, prompt_of(5, seed=1), greedy(5))

    asyncio.run(run())


def test_an_engine_whose_reset_fails_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(served_model(0))

    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    async def run() -> None:
        served = AsyncEngine(engine)
        monkeypatch.setattr(engine, "step", broken)
        monkeypatch.setattr(engine, "reset", broken)
        with pytest.raises(EngineFault):
            await asyncio.wait_for(collect(served, prompt_of(5, seed=1), greedy(5)), 10)
        with pytest.raises(EngineFault, match="closed"):
            await asyncio.wait_for(collect(served, prompt_of(5, seed=1), greedy(5)), 10)
        assert not served.is_alive

    asyncio.run(run())


def test_one_of_several_last_pieces_has_the_result() -> None:
    async def run() -> list[bool]:
        async with AsyncEngine(new_engine(served_model(0))) as served:
            params = SamplingParams(n=3, max_tokens=4, ignore_eos=True, max_recursions=1)
            pieces = [piece async for piece in served.generate(prompt_of(5, seed=1), params)]
        return [piece.result is not None for piece in pieces if piece.finish_reason]

    assert sorted(asyncio.run(run())) == [False, False, True]
