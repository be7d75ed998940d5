"""Promises of response_format: what comes is JSON of the schema, whatever the model would say."""

from __future__ import annotations

import json

import pytest

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


def asked(schema: object, **more: object) -> dict[str, object]:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    messages = [{"role": "user", "content": "the cat"}]
    return {"messages": messages, "response_format": form, "max_tokens": 60, **more}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_its_schema(client, temperature: float):
    body = asked(SCHEMA, temperature=temperature, seed=3)
    choice = client.post("/v1/chat/completions", body).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    told = json.loads(choice["message"]["content"])
    assert set(told) == {"name", "old"} and told["name"] in ("cat", "dog")
    assert isinstance(told["old"], bool)


def test_a_stream_and_neighbours_without_a_grammar(client):
    plain = {"prompt": "the cat", "max_tokens": 8, "temperature": 0}
    before = client.post("/v1/completions", plain).json["choices"]
    events = client.post("/v1/chat/completions", asked(SCHEMA, stream=True)).events
    text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
    assert json.loads(text)["name"] in ("cat", "dog")
    assert client.post("/v1/completions", plain).json["choices"] == before


def test_a_schema_that_is_none_is_refused(client):
    for body in (
        asked({"type": "nothing"}),
        asked(5),
        {**asked(SCHEMA), "response_format": {"type": "xml"}},
    ):
        answer = client.post("/v1/chat/completions", body)
        assert answer.status == 400, answer.text
        assert answer.json["error"]["message"]
