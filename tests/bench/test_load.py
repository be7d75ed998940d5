"""Promises of the load generator: it counts what came back, names what failed, waits its turn."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mor.bench.load import Answer, bench_serve, load_requests, summary
from mor.bench.load_config import BenchServeConfig

WAIT_S = 0.01


class Fake:
    """A server that answers every request with so many tokens."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.open = self.most_open = 0
        self.fails = ""
        self.url = ""

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(WAIT_S)
            if self.fails == "status":
                return web.json_response({"error": {"message": "no"}}, status=429)
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "mean_depth": 1.5}
            if not body["stream"]:
                return web.json_response({"usage": usage})
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            events: list[dict[str, Any]] = [{"choices": [{"text": t}]} for t in ("a", "b")]
            events[0]["choices"][0]["delta"] = {"content": "a"}
            if self.fails != "usage":
                events.append({"choices": [], "usage": usage})
            for event in events:
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                await asyncio.sleep(WAIT_S)
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.open -= 1


@pytest.fixture
def fake() -> Iterator[Fake]:
    """Serve on a free port of this machine, in a thread."""
    server = Fake()
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.answer)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)

    async def start() -> str:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        return f"http://127.0.0.1:{port}"

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server.url = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield server
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def go(fake: Fake, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_requests": 12, "concurrency": 3, "warmup": 2}
    return bench_serve(BenchServeConfig(url=fake.url, **{**settings, **more}))


@pytest.mark.parametrize("stream", [True, False])
def test_what_came_back_is_counted(fake: Fake, stream: bool):
    result = go(fake, stream=stream)
    assert result["model"] == "fake" and result["completed"] == 12 and result["errors"] == {}
    assert (result["prompt_tokens"], result["output_tokens"]) == (36, 24)
    assert result["mean_depth"] == 1.5 and result["client_cpu_s"] > 0
    assert (result["ttft_p50_ms"] is not None) == stream
    if stream:
        assert result["ttft_p50_ms"] >= 1e3 * WAIT_S
        assert result["inter_token_p50_ms"] >= 0.5e3 * WAIT_S
    assert len(fake.seen) == 14 and 1 < fake.most_open <= 3
    assert all(isinstance(body["prompt"][0], int) and body["ignore_eos"] for body in fake.seen)


def test_the_same_seed_asks_the_same(fake: Fake):
    go(fake, concurrency=1)
    first, fake.seen = fake.seen, []
    go(fake, concurrency=1)
    assert fake.seen == first


def test_chat_sends_text(fake: Fake, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("some words ")
    assert go(fake, endpoint="chat", text=text)["completed"] == 12
    assert "some words" in fake.seen[0]["messages"][0]["content"]


def test_a_rate_spreads_requests(fake: Fake):
    result = go(fake, rate=50.0, concurrency=100)
    assert result["seconds"] > 0.1 and result["rate"] == 50.0


def test_a_trace_is_followed(fake: Fake, tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    lines = [{"prompt_len": 3, "output_len": 5, "arrival_s": 0.2 * i} for i in range(3)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    result = go(fake, trace=trace, warmup=1)
    assert result["completed"] == 3 and result["seconds"] >= 0.4
    assert [body["max_tokens"] for body in fake.seen] == [5] * 4


@pytest.mark.parametrize(("fault", "said"), [("status", "status 429"), ("usage", "no usage")])
def test_what_failed_is_named(fake: Fake, fault: str, said: str):
    fake.fails = fault
    result = go(fake)
    assert result["completed"] == 0 and result["errors"] == {said: 12}
    assert result["tokens_per_s"] == 0 and result["whole_p50_ms"] is None


def test_a_server_that_is_not_there_is_said():
    with pytest.raises(ValueError, match="does not answer"):
        bench_serve(BenchServeConfig(url="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "127.0.0.1:8000"}, "give one with http"),
        ({"num_requests": 0}, "num_requests is 0; give 1 or more"),
        ({"rate": 0.0}, "rate is 0.0; give a number above 0"),
        ({"endpoint": "chat"}, "give --text FILE"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        BenchServeConfig(**settings)


def test_percentiles_are_of_answered_requests():
    nan = float("nan")
    answers = [Answer("", i / 10, [], i / 10, 1, 1, {}) for i in range(1, 11)]
    answers.append(Answer("timeout", nan, [], 99.0, 0, 0, {}))
    result = summary(answers, 2.0)
    assert result["completed"] == 10 and result["errors"] == {"timeout": 1}
    assert result["whole_p50_ms"] == pytest.approx(600) and result["whole_p99_ms"] == 1000


@pytest.mark.slow
def test_what_serving_costs_is_told_by_rounds(tiny_run: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_run / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    settings: dict[str, Any] = {"num_requests": 6, "concurrency": 2, "vocab_size": 30, "warmup": 1}
    told = bench_serve(BenchServeConfig(bare=folder, rounds=2, stream=False, **settings))
    assert len(told["rounds"]) == 2 and told["completed"] == 6 and not told["errors"]
    ratios = [one["served_tokens_per_s"] / one["bare_tokens_per_s"] for one in told["rounds"]]
    assert told["ratio"] == pytest.approx(sum(ratios) / 2)
    with pytest.raises(ValueError, match="is not a model folder"):
        bench_serve(BenchServeConfig(bare=tmp_path / "none"))


def test_the_bare_engine_takes_random_ids_alone():
    with pytest.raises(ValueError, match=r"rate is 2.0, but bare asks as fast as it can"):
        BenchServeConfig(bare=Path("model"), rate=2.0)
    with pytest.raises(ValueError, match="bare compares completions of random token ids"):
        BenchServeConfig(bare=Path("model"), trace=Path("trace.jsonl"))


def test_requests_of_a_trace_that_warm_up_are_none_of_those_that_count(tmp_path: Path):
    """Else their keys would lie in the server's prefix cache already."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt_len": 9, "output_len": 2}\n' * 4)
    config = BenchServeConfig(trace=trace, warmup=2, vocab_size=1000)
    warm, counted = load_requests(config)[:2], load_requests(config)[2:]
    assert len(counted) == 4
    assert not {one.prompt_ids for one in warm} & {one.prompt_ids for one in counted}
