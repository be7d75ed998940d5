"""Promises of the API: OpenAI's shapes, the engine's answers, depth as a field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mor.config import ModelConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.serve.protocol import Offsets, depth_of
from mor.serve.run import depth_points

PROMPT = "the cat sees"
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def wanted(tiny_run: Path) -> Any:
    """What the bare engine answers to the prompt."""
    engine = Engine.load(tiny_run / "model")
    assert engine.tokenizer is not None
    ids = [0, *engine.tokenizer.encode(PROMPT)]
    return engine.generate([ids], SamplingParams(max_tokens=6, temperature=0))[0]


def test_a_completion_is_the_engines(client, wanted):
    answer = client.post("/v1/completions", {"prompt": PROMPT, "return_depths": True, **GREEDY})
    assert answer.status == 200
    body = answer.json
    assert body["object"] == "text_completion" and body["model"] == "mor"
    choice = body["choices"][0]
    assert choice["text"] == wanted.outputs[0].text
    assert choice["depths"] == wanted.outputs[0].depths
    assert choice["prompt_depths"] == wanted.prompt_depths
    usage = body["usage"]
    assert usage["completion_tokens"] == len(wanted.outputs[0].token_ids)
    assert usage["prompt_tokens"] == len(wanted.prompt_token_ids)
    assert usage["mean_depth"] == pytest.approx(wanted.mean_depth)
    assert usage["flops_saved"] == pytest.approx(wanted.flops_saved)


def test_a_stream_joins_to_the_whole(client, wanted):
    asked = {"prompt": PROMPT, "stream": True, "return_depths": True, **GREEDY}
    answer = client.post("/v1/completions", {**asked, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.events
    assert "".join(c["text"] for e in events for c in e["choices"]) == wanted.outputs[0].text
    tokens = [t for e in events for c in e["choices"] for t in c["token_ids"]]
    assert tokens == wanted.outputs[0].token_ids
    depths = [d for e in events for c in e["choices"] for d in c["depths"]]
    assert depths == [*wanted.prompt_depths, *wanted.outputs[0].depths]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == len(tokens)
    reasons = [c["finish_reason"] for e in events for c in e["choices"]]
    assert reasons[-1] == wanted.outputs[0].finish_reason and not any(reasons[:-1])


def test_prompts_come_as_text_ids_and_lists(client, wanted):
    ids = wanted.prompt_token_ids
    one = client.post("/v1/completions", {"prompt": ids, **GREEDY}).json
    assert one["choices"][0]["text"] == wanted.outputs[0].text
    for prompt in ([PROMPT, PROMPT], [ids, ids]):
        answer = client.post("/v1/completions", {"prompt": prompt, **GREEDY})
        assert answer.status == 200, answer.text
        body = answer.json
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert {choice["text"] for choice in body["choices"]} == {wanted.outputs[0].text}


def test_several_answers_are_numbered_through(client):
    body = {"prompt": [PROMPT, PROMPT], "n": 2, "seed": 1, "max_tokens": 6, "ignore_eos": True}
    whole = client.post("/v1/completions", body).json["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    assert whole[0]["text"] == whole[2]["text"] != whole[1]["text"]
    events = client.post("/v1/completions", {**body, "stream": True}).events
    texts = ["", "", "", ""]
    for choice in (c for e in events for c in e["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole]


def test_echo_and_logprobs(client, wanted):
    body = {"prompt": PROMPT, "echo": True, "logprobs": 2, **GREEDY}
    choice = client.post("/v1/completions", body).json["choices"][0]
    assert choice["text"] == PROMPT + wanted.outputs[0].text
    told = choice["logprobs"]
    sizes = {len(told[name]) for name in told}
    assert len(sizes) == 1
    assert "".join(told["tokens"][-6:]) == wanted.outputs[0].text
    assert all(value <= 0 for value in told["token_logprobs"] if value is not None)
    assert all(2 <= len(top) <= 3 for top in told["top_logprobs"][-6:])
    for token, top in zip(told["tokens"], told["top_logprobs"], strict=True):
        assert top is None or token in top  # the one that was drawn is among them
    assert told["text_offset"][-6] == len(PROMPT)
    offsets = told["text_offset"]
    assert offsets[:2] == [0, 0] and offsets == sorted(offsets)  # the first token shows nothing
    events = client.post("/v1/completions", {**body, "echo": False, "stream": True}).events
    pieces = [c["logprobs"] for e in events for c in e["choices"] if c["logprobs"]]
    assert [t for piece in pieces for t in piece["tokens"]] == told["tokens"][-6:]
    assert client.post("/v1/completions", {**body, "stream": True}).status == 400


def test_a_token_inside_a_character_has_its_bytes(client):
    tokenizer = client.service.tokenizer
    ids = tokenizer.encode("\u00e9")
    assert [tokenizer.token_bytes(token) for token in ids] == [b"\xc3", b"\xa9"]
    body = {"prompt": "\u00e9t", "echo": True, "logprobs": 1, "max_tokens": 1}
    told = client.post("/v1/completions", body).json["choices"][0]["logprobs"]
    assert told["tokens"][1:4] == ["bytes:\\xc3", "bytes:\\xa9", "t"]
    assert told["text_offset"][:4] == [0, 0, 0, 1]


def test_the_space_that_a_tokenizer_puts_before_a_text_takes_no_place():
    offsets = Offsets(drops_space=True)
    assert [offsets.push(piece) for piece in (b"", b" The", b" cat")] == [0, 0, 3]
    assert [Offsets().push(b" The")] == [0]


def test_usage_counts_answers_that_end_together_once(client):
    body = {"prompt": PROMPT, "n": 4, "max_recursions": 1, **GREEDY, "temperature": 1, "seed": 1}
    whole = client.post("/v1/completions", body).json["usage"]
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    streamed = client.post("/v1/completions", asked).events[-1]["usage"]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [streamed[name] for name in names] == [whole[name] for name in names]


def test_chat_uses_the_template_and_streams(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "the dog"}]}]
    body = client.post("/v1/chat/completions", {"messages": messages, "logprobs": True, **GREEDY})
    choice = body.json["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["logprobs"]["content"]) == body.json["usage"]["completion_tokens"]
    asked = {"messages": messages, "stream": True, **GREEDY}
    events = client.post("/v1/chat/completions", asked).events
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
    assert text == choice["message"]["content"]


def test_depth_is_a_field(client):
    means = {}
    for depth in (1, "low", "medium", "max", 2.5):
        body = {"prompt": "the old red house likes a river and the cat", "depth": depth, **GREEDY}
        means[depth] = client.post("/v1/completions", body).json["usage"]["mean_depth"]
    assert means[1] == 1 and means["max"] == 3
    assert means["low"] <= means["medium"] <= means["max"]
    body = {"prompt": PROMPT, "max_recursions": 1, **GREEDY}
    usage = client.post("/v1/completions", body).json["usage"]
    assert usage["mean_depth"] == 1 and usage["flops_saved"] > 0


def test_names_of_depths(tmp_path: Path):
    config = ModelConfig(
        num_hidden_layers=8, num_recursions=3, router="expert_choice", capacity=(1.0, 0.8, 0.4)
    )
    points = depth_points(tmp_path, config)
    assert points == {
        "low": pytest.approx(1.4),
        "medium": pytest.approx(1.8),
        "high": None,
        "max": 3,
    }
    assert depth_of("low", points) == points["low"] and depth_of(1.7, points) == 1.7
    (tmp_path / "depths.json").write_text('{"draft": 1.1, "low": 1.2}')
    assert depth_points(tmp_path, config) == {**points, "draft": 1.1, "low": 1.2}
    with pytest.raises(ValueError, match="'deep'; give a mean depth or one of low, medium"):
        depth_of("deep", points)
    for text, fault in (
        ("[1]", "an object"),
        ("{", "JSON"),
        ('{"a": 4}', "a is 4"),
        ('{"a": "x"}', "a is x"),
    ):
        (tmp_path / "depths.json").write_text(text)
        with pytest.raises(ValueError, match=fault):
            depth_points(tmp_path, config)
    assert depth_points(tmp_path / "none", ModelConfig(num_hidden_layers=8, num_recursions=2)) == {
        "high": None,
        "max": None,
    }


def test_models_tokenize_health_ready(client):
    model = client.get("/v1/models").json["data"][0]
    assert model["id"] == "mor" and model["num_recursions"] == 3
    assert list(model["depth_points"]) == ["low", "medium", "high", "max"]
    told = client.post("/tokenize", {"prompt": PROMPT}).json
    assert told["count"] == len(told["tokens"]) > 0
    back = client.post("/detokenize", {"tokens": told["tokens"][1:]}).json["prompt"]
    assert back == PROMPT
    chat = client.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]}).json
    assert chat["count"] > 1
    assert client.get("/health").status == client.get("/ready").status == 200


def test_metrics_count_tokens_depths_and_outcomes(client):
    before = client.metric("mor_tokens_total"), client.metric("mor_token_depth_count")
    usage = client.post("/v1/completions", {"prompt": PROMPT, "ignore_eos": True, **GREEDY}).json[
        "usage"
    ]
    client.wait_idle()
    assert client.metric("mor_tokens_total") - before[0] == 6
    ran = usage["prompt_tokens"] + usage["completion_tokens"] - 1
    assert client.metric("mor_token_depth_count") - before[1] == ran
    assert client.metric('mor_requests_total{outcome="done"}') >= 1
    assert client.metric("mor_requests_running") == 0
    assert client.metric("mor_rows_total") >= client.metric("mor_ticks_total") > 0
    for recursion in range(4):
        assert client.metric(f'mor_kv_bytes{{recursion="{recursion}"}}') == 0


def test_the_page_asks_nothing_of_others(client):
    answer = client.get("/")
    assert answer.status == 200 and "<title>mor</title>" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "'sha256-" in policy
    assert "http://" not in answer.text and "https://" not in answer.text
