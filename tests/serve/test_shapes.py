"""The request shapes of vLLM's public serving benchmark run unchanged, and its times are true."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import pytest

from tests.serve.conftest import Client, slowly

# As vLLM's benchmark builds them, for its backends openai and openai-chat.
COMPLETIONS = {
    "model": "mor",
    "prompt": "the cat sees",
    "repetition_penalty": 1.0,
    "max_tokens": 12,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "temperature": 0.0,
}
CHAT = {
    "model": "mor",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "the cat sees"}]}],
    "max_completion_tokens": 12,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
}
SHAPES = {"/v1/completions": COMPLETIONS, "/v1/chat/completions": CHAT}


def follow(client: Client, path: str, body: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Read a stream as that benchmark does: an event with choices is a token, usage comes after."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{client.port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "x-request-id": "benchmark-serving0"},
    )
    times, usage = [], {}
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200 and response.headers["x-request-id"] == "benchmark-serving0"
        for line in response:
            if not line.strip() or line.startswith(b":"):
                continue
            chunk = line.decode().removeprefix("data: ").strip()
            if chunk == "[DONE]":
                continue
            data = json.loads(chunk)
            if choices := data.get("choices"):
                assert isinstance(choices[0].get("text", choices[0].get("delta")), str | dict)
                times.append(time.perf_counter())
            elif data.get("usage"):
                usage = data["usage"]
    return times, usage


@pytest.mark.parametrize("path", SHAPES)
def test_the_benchmarks_shapes_run_unchanged(client: Client, path: str):
    times, usage = follow(client, path, SHAPES[path])
    assert usage["completion_tokens"] == 12 and usage["prompt_tokens"] > 0
    assert 1 <= len(times) <= 12  # no event that is no token flatters the time to the first


@pytest.mark.parametrize("path", SHAPES)
def test_the_first_event_waits_for_the_first_token(start: Any, path: str):
    with start(max_num_seqs=1) as client:
        engine = client.service.engine._engine
        engine.step = slowly(engine.step, 0.05)
        began = time.perf_counter()
        times, _ = follow(client, path, SHAPES[path])
        assert times[0] - began >= 0.05
