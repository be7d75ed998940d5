"""`mor bench serve`: load on a server that speaks OpenAI's API, ours or another, over HTTP.

Latencies count from the moment a request was due, so a server that makes the queue wait is not
flattered. The generator's own processor time is told apart: on one machine it takes from the
server. Imports no torch.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple

import aiohttp

from mor.bench.load_config import BenchServeConfig
from mor.bench.workload import RequestSpec, make_trace, read_trace
from mor.log import Progress, progress

BYTES_A_TOKEN = 4
PERCENTILES = (50, 95, 99)


class Answer(NamedTuple):
    """What became of a request; times in seconds after it was due."""

    error: str
    """empty when it was answered"""
    first_s: float
    """nan without a stream"""
    gaps_s: list[float]
    """between pieces of a stream"""
    whole_s: float
    prompt_tokens: int
    output_tokens: int
    usage: dict[str, Any]


def bench_serve(config: BenchServeConfig) -> dict[str, Any]:
    """Send the requests; returns rates, percentiles, errors by kind and the settings.

    Raises ValueError when the server cannot be reached or lists no model, or for a trace or text
    that does not fit
    """
    if config.bare is not None:
        from mor.bench.load_bare import bench_bare

        return bench_bare(config.bare, config)
    return asyncio.run(send_load(config))


async def send_load(config: BenchServeConfig) -> dict[str, Any]:
    """Do what `bench_serve` promises, against config.url."""
    key = os.environ.get(config.api_key_env, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=config.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        base_url=config.url.rstrip("/") + "/", headers=headers, timeout=timeout, connector=connector
    ) as session:
        model = config.model or await _first_model(session, config.url)
        bodies = list(_bodies(config, model))
        for _, body in bodies[: config.warmup]:
            await _ask(session, config, body, time.perf_counter())
        cpu_s, start_s = time.process_time(), time.perf_counter()
        with progress("requests", len(bodies) - config.warmup) as bar:
            answers = await _send(session, config, bodies[config.warmup :], bar)
        seconds = time.perf_counter() - start_s
        cpu_s = time.process_time() - cpu_s
    return {"model": model, **summary(answers, seconds), "client_cpu_s": cpu_s, **_told(config)}


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get("v1/models") as response:
            listed = await response.json()
        return listed["data"][0]["id"]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ValueError(f"{url} does not answer ({error}); is the server up?") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{url} lists no model; name it with --model") from error


def _bodies(config: BenchServeConfig, model: str) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield when each request is due, in seconds, and what is asked."""
    requests = load_requests(config)
    draw, due_s = random.Random(config.seed + 1), 0.0
    text, at = _text(config), 0
    for index, request in enumerate(requests):
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": request.output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": config.stream,
        }
        if config.stream:
            body["stream_options"] = {"include_usage": True}
        prompt: str | list[int] = list(request.prompt_ids)
        if text:
            size = request.prompt_len * BYTES_A_TOKEN
            prompt = "".join(text[(at + i) % len(text)] for i in range(size))
            at += size
        if config.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        yield request.arrival_s if config.trace else due_s, body
        if index >= config.warmup and config.rate < float("inf"):
            due_s += draw.expovariate(config.rate)


def load_requests(config: BenchServeConfig) -> Sequence[RequestSpec]:
    """Return the requests, those that warm up first."""
    if config.trace is None:
        count = config.num_requests + config.warmup
        return make_trace(count, config.mix, vocab_size=config.vocab_size, seed=config.seed)
    # Of another seed: the same prompts would find their keys in the server's cache.
    warm, found = (
        read_trace(config.trace, vocab_size=config.vocab_size, max_recursions=2**31, seed=seed)
        for seed in (config.seed + 1, config.seed)
    )
    return [*warm[: config.warmup], *found]


def _text(config: BenchServeConfig) -> str:
    if config.text is None:
        return ""
    text = config.text.read_text(encoding="utf-8")
    if not text:
        raise ValueError(f"{config.text} is empty; give a text with words in it")
    return text


async def _send(
    session: aiohttp.ClientSession,
    config: BenchServeConfig,
    bodies: Sequence[tuple[float, dict[str, Any]]],
    bar: Progress,
) -> list[Answer]:
    room = asyncio.Semaphore(config.concurrency)
    start_s = time.perf_counter()
    is_timed = config.trace is not None or config.rate < float("inf")

    async def one(due_s: float, body: dict[str, Any]) -> Answer:
        await asyncio.sleep(max(0.0, start_s + due_s - time.perf_counter()))
        async with room:
            # Without a rate a request is due when there is room for it.
            due = start_s + due_s if is_timed else time.perf_counter()
            answer = await _ask(session, config, body, due)
        bar.advance()
        return answer

    return list(await asyncio.gather(*(one(*body) for body in bodies)))


async def _ask(
    session: aiohttp.ClientSession, config: BenchServeConfig, body: dict[str, Any], due_s: float
) -> Answer:
    """Send one request and follow it to its end; errors are told, not raised."""
    path = "v1/chat/completions" if config.endpoint == "chat" else "v1/completions"
    times: list[float] = []
    usage: dict[str, Any] = {}
    error = ""
    try:
        async with session.post(path, json=body) as response:
            if response.status != 200:
                error = f"status {response.status}"
                await response.read()
            elif config.stream:
                async for event in _events(response):
                    if "error" in event:
                        error = "error in the stream"
                    if _has_text(event):
                        times.append(time.perf_counter())
                    usage = event.get("usage") or usage
            else:
                usage = (await response.json()).get("usage", {})
    except TimeoutError:
        error = "timeout"
    except (aiohttp.ClientError, ConnectionError, ValueError) as caught:
        error = type(caught).__name__
    if not error and not usage:
        error = "no usage"
    return Answer(
        error,
        times[0] - due_s if times else float("nan"),
        [b - a for a, b in itertools.pairwise(times)],
        time.perf_counter() - due_s,
        usage.get("prompt_tokens", 0),
        usage.get("completion_tokens", 0),
        usage,
    )


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data:") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[5:])


def _has_text(event: dict[str, Any]) -> bool:
    for choice in event.get("choices") or []:
        if choice.get("text") or (choice.get("delta") or {}).get("content"):
            return True
    return False


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Return what the answers come to; latencies in milliseconds, of answered requests."""
    good = [answer for answer in answers if not answer.error]
    out = sum(answer.output_tokens for answer in good)
    depths = [a.usage["mean_depth"] for a in good if a.usage.get("mean_depth") is not None]
    return {
        "completed": len(good),
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "output_tokens": out,
        "tokens_per_s": out / seconds,
        "mean_depth": sum(depths) / len(depths) if depths else None,
        **_percentiles("ttft", [a.first_s for a in good if a.first_s == a.first_s]),
        **_percentiles("inter_token", [gap for a in good for gap in a.gaps_s]),
        **_percentiles("whole", [a.whole_s for a in good]),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    ranked = sorted(seconds)
    found = {}
    for percent in PERCENTILES:
        place = min(len(ranked) - 1, int(len(ranked) * percent / 100))
        found[f"{name}_p{percent}_ms"] = 1e3 * ranked[place] if ranked else None
    return found


def _told(config: BenchServeConfig) -> dict[str, Any]:
    """Return the settings that decide what was measured."""
    return {
        "url": config.url,
        "endpoint": config.endpoint,
        "stream": config.stream,
        "rate": config.rate if config.rate < float("inf") else None,
        "concurrency": config.concurrency,
        "seed": config.seed,
    }
