"""Whatever a body holds: an answer or a clear error, nobody else harmed, no page lost.

Two sources: schemathesis reads our OpenAPI, and fields of bodies that fit are changed at random.
"""

from __future__ import annotations

import json
import random
import string
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from tests.serve.conftest import Client

COMPLETION = {"prompt": "the cat", "max_tokens": 3, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "the dog"}], "max_tokens": 3, "seed": 1}
FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "temperature"),
    *("top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "stream"),
    *("stream_options", "response_format", "top_k", "min_p", "repetition_penalty", "min_tokens"),
    *("ignore_eos", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens"),
    *("max_recursions", "depth", "return_depths", "logprobs", "top_logprobs", "echo", "tools"),
    *("tool_choice", "parallel_tool_calls", "user", "best_of", "suffix"),
]
ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, -(2**70), 0.5, 1e308, -0.0, 1e-320),
    *(
        "",
        "a",
        "the cat",
        "\x00",
        "\ud7ff",
        "😀" * 9,
        "<|endoftext|>",
        "low",
        "max",
        "auto",
        "json_object",
    ),
    *([], {}, [[]], [{}], [0], [1, 2], [-1], ["a"], [None], [[0], "a"], {"0": 1}, {"1": -200.0}),
    *({"x": 1}, {"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}),
    {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}},
    {"include_usage": True},
    [{"role": "user", "content": None}],
    [{"role": "tool", "content": "x", "tool_calls": [{}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
]


def broken(draw: random.Random) -> tuple[str, bytes]:
    """Return a path and a body with fields changed, left out or added, sometimes no JSON at all."""
    path, base = draw.choice([("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
    body: dict[str, Any] = dict(base)
    for _ in range(draw.choice((1, 1, 2, 3, 5))):
        body[draw.choice(FIELDS)] = draw.choice(ODD)
    if draw.random() < 0.1:
        body.pop(draw.choice(list(body)))
    data = json.dumps(body).encode()
    kind = draw.random()
    if kind < 0.05:  # cut, or a byte changed
        at = draw.randrange(len(data))
        data = data[:at] + draw.choice([b"", b"\xff", b"}"]) + data[at + 1 :]
    elif kind < 0.07:
        data = draw.choice([b"", b"null", b"[]", b"NaN", b'"x"', b"[" * 3000, b'{"prompt": NaN}'])
    elif kind < 0.08:
        data = "".join(draw.choices(string.printable, k=50)).encode()
    return path, data


def fuzz(client: Client, count: int, seed: int) -> dict[int, int]:
    """Send bodies; returns answers by status. Neighbours go on as before, no page is lost."""
    draw, seen = random.Random(seed), dict[int, int]()
    before = client.post("/v1/completions", COMPLETION).json["choices"]
    for place in range(count):
        path, data = broken(draw)
        answer = client.post(path, data)
        assert answer.status in (200, 400, 404, 413, 429), (data, answer.text)
        if answer.status != 200:
            error = answer.json["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
        elif answer.headers["content-type"].startswith("text/event-stream"):
            assert not any("error" in event for event in answer.events), (data, answer.text)
        else:
            assert answer.json["choices"]
        seen[answer.status] = seen.get(answer.status, 0) + 1
        if place % 500 == 499:
            assert client.post("/v1/completions", COMPLETION).json["choices"] == before
    client.wait_idle()
    assert client.post("/v1/completions", COMPLETION).json["choices"] == before
    return seen


def test_broken_bodies_get_a_clear_error_and_harm_nobody(client: Client):
    seen = fuzz(client, 300, seed=0)
    assert seen[200] > 20 and seen[400] > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_broken_bodies(client: Client, seed: int):
    fuzz(client, 1000, seed=100 + seed)


def ask_of_schema(client: Client, path: str, method: str, examples: int) -> None:
    """Let schemathesis ask a path what its OpenAPI allows, and what it does not."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{client.port}/openapi.json")

    @given(st.data())
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(data: st.DataObject) -> None:
        mode = data.draw(st.sampled_from(list(schemathesis.GenerationMode)))
        case = data.draw(schema[path][method].as_strategy(generation_mode=mode))
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # else nearly all ends as an unknown model
        response = case.call_and_validate(checks=[not_a_server_error], timeout=60)
        assert response.status_code in (200, 400, 404, 405, 413, 415, 429)

    ask()


PATHS = [
    *(("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/tokenize", "POST")),
    *(("/detokenize", "POST"), ("/v1/models", "GET"), ("/health", "GET"), ("/ready", "GET")),
]


@pytest.mark.parametrize(("path", "method"), PATHS)
def test_the_openapi_is_kept(client: Client, path: str, method: str):
    ask_of_schema(client, path, method, examples=30 if method == "POST" else 2)
    client.wait_idle()


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), [one for one in PATHS if one[1] == "POST"])
def test_the_openapi_is_kept_at_length(client: Client, path: str, method: str):
    ask_of_schema(client, path, method, examples=1000)
    client.wait_idle()
