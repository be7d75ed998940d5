"""The official client of OpenAI talks to the server as to its own: calls, streams, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.serve.conftest import Client
from tests.serve.test_tools import WEATHER, knows_tools

__all__ = ["knows_tools"]
MESSAGES: Any = [{"role": "user", "content": "the cat"}]
GREEDY: Any = {"model": "mor", "temperature": 0, "max_tokens": 8}


def open_client(client: Client) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)


@pytest.fixture
def ai(client: Client) -> Iterator[OpenAI]:
    with open_client(client) as one:
        yield one


@pytest.fixture
def ai_tools(knows_tools: Client) -> Iterator[OpenAI]:
    with open_client(knows_tools) as one:
        yield one


def test_models(ai: OpenAI):
    assert [model.id for model in ai.models.list()] == ["mor"]


def test_completions_whole_and_streamed(ai: OpenAI):
    whole = ai.completions.create(prompt="the cat sees", echo=True, logprobs=1, **GREEDY)
    assert whole.object == "text_completion" and whole.choices[0].text.startswith("the cat sees")
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    assert whole.choices[0].logprobs is not None
    stream = ai.completions.create(
        prompt="the cat sees",
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": pieces[-1].usage.prompt_tokens_details}
    )


def test_chat_whole_and_streamed(ai: OpenAI):
    whole = ai.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    message = whole.choices[0].message
    assert message.role == "assistant" and whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == 8
    deltas = [
        choice.delta
        for piece in ai.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
        for choice in piece.choices
    ]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == message.content


def test_several_answers_of_one_seed(ai: OpenAI):
    asked: Any = {"messages": MESSAGES, "model": "mor", "n": 3, "seed": 5, "max_tokens": 6}
    first, again = (ai.chat.completions.create(**asked) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in again.choices]
    assert len({c.message.content for c in first.choices}) > 1


def test_depth_rides_in_the_extra_body(ai: OpenAI):
    extra = {"depth": "max", "return_depths": True}
    told = ai.chat.completions.create(messages=MESSAGES, extra_body=extra, **GREEDY)
    assert told.usage is not None and told.usage.model_extra is not None
    assert told.usage.model_extra["mean_depth"] == 3 and told.usage.model_extra["flops_saved"] == 0
    extra_fields = told.choices[0].model_extra or {}
    assert set(extra_fields["depths"]) == {3}


def test_a_schema_made_of_a_class(ai: OpenAI):
    class Animal(BaseModel):
        is_cat: bool

    told = ai.chat.completions.parse(
        model="mor", messages=MESSAGES, response_format=Animal, max_tokens=40
    )
    assert isinstance(told.choices[0].message.parsed, Animal)


def test_tools_whole_and_streamed(ai_tools: OpenAI):
    asked: Any = {
        "model": "mor",
        "messages": MESSAGES,
        "tools": [WEATHER],
        "tool_choice": "required",
        "max_tokens": 60,
        "temperature": 0,
    }
    whole = ai_tools.chat.completions.create(**asked).choices[0]
    (call,) = whole.message.tool_calls or []
    assert whole.finish_reason == "tool_calls" and call.type == "function"
    with ai_tools.chat.completions.stream(**asked) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.type == "function"
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
    answered = [
        *MESSAGES,
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "warm"},
    ]
    asked |= {"messages": answered, "tool_choice": "auto"}
    more = ai_tools.chat.completions.create(**asked)
    assert more.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_errors_are_the_clients_own(ai: OpenAI, start: Any):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        ai.chat.completions.create(messages=MESSAGES, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        ai.chat.completions.create(messages=MESSAGES, model="mor", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="prompt"):
        ai.completions.create(prompt=[1] * 80, model="mor", stream=True)
    with (
        start(api_key_env="PATH") as client,
        open_client(client) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    with (
        start(request_timeout_s=1e-4) as client,
        open_client(client) as late,
        pytest.raises(openai.InternalServerError, match="longer than"),
    ):
        late.completions.create(prompt="the cat", **GREEDY)
