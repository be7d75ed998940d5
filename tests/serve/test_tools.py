"""Promises of tool calls: what a template's model writes becomes calls, and text stays text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.serve.tools import Scanner, ToolFields, format_of
from tests.serve.conftest import Client, running

HERMES = (
    "{% if tools %}Tools: {{ tools | tojson }} Answer <tool_call>json</tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments.place }}){% endfor %}\n{% endfor %}assistant: "
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Rome", "Oslo"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
CALL = '{"name": "weather", "arguments": {"place": "Rome"}}'
FORMS = {
    "hermes": format_of(HERMES),
    "mistral": format_of("{{ tools }} [TOOL_CALLS]"),
    "llama": format_of("{{ tools }} parameters"),
}


def scan(form: str, pieces: list[str], **more: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Return all text and all calls of an answer in pieces."""
    found = FORMS[form]
    assert found is not None
    scanner, text, calls = Scanner(found, ["weather"], **more), "", []
    for place, piece in enumerate(pieces):
        told, more_calls = scanner.push(piece, is_last=place == len(pieces) - 1)
        text, calls = text + told, calls + more_calls
    return text, [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


ROME = ("weather", {"place": "Rome"})
ANSWERS = [
    ("hermes", f"Let me look.<tool_call>\n{CALL}\n</tool_call>", "Let me look.", [ROME]),
    ("hermes", f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", [ROME, ROME]),
    ("hermes", f"<tool_call>{CALL}</tool_call>a<tool_call>{CALL}</tool_call>", "a", [ROME, ROME]),
    ("hermes", f"<tool_call>{CALL}", "", [ROME]),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", "<tool_call>none</tool_call>.", "<tool_call>none</tool_call>.", []),
    (
        "hermes",
        '<tool_call>{"name": "rm"}</tool_call>',
        '<tool_call>{"name": "rm"}</tool_call>',
        [],
    ),
    ("mistral", f"[TOOL_CALLS][{CALL}]", "", [ROME]),
    ("mistral", "[TOOL", "[TOOL", []),
    ("llama", '{"name": "weather", "parameters": {"place": "Rome"}}', "", [ROME]),
    ("llama", '{"a": 1}', '{"a": 1}', []),
    ("llama", f"Well: {CALL}", f"Well: {CALL}", []),
    ("llama", " ", " ", []),
]


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS)
@given(data=st.data())
def test_calls_are_found_however_an_answer_is_cut(form, answer, text, calls, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert scan(form, pieces) == (text, calls)


def test_one_call_where_no_more_are_wanted_and_a_call_that_the_prompt_began():
    assert scan("hermes", [f"<tool_call>[{CALL}, {CALL}]</tool_call>"], most=1) == ("", [ROME])
    assert scan("hermes", [CALL, "</tool_call>"], is_inside=True) == ("", [ROME])
    assert scan("hermes", ["none", "</tool_call>"], is_inside=True) == ("none</tool_call>", [])
    assert scan("mistral", [f"[{CALL}]"], is_inside=True) == ("", [ROME])


def test_templates_without_tools_know_no_format():
    assert format_of("{{ messages }}") is None


def test_what_is_asked_of_tools():
    fields = ToolFields.model_validate({"tools": [WEATHER], "tool_choice": "none"})
    assert fields.offered() == fields.forced() == []
    named = {"type": "function", "function": {"name": "weather"}}
    fields = ToolFields.model_validate({"tools": [WEATHER], "tool_choice": named})
    assert [tool.function.name for tool in fields.forced()] == ["weather"]
    with pytest.raises(ValueError, match="two tools are named 'weather'"):
        ToolFields.model_validate({"tools": [WEATHER, WEATHER]})


@pytest.fixture(scope="module")
def knows_tools(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny_run / "model", folder)
    (folder / "chat_template.jinja").write_text(HERMES)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    with running(folder, max_num_seqs=4) as client:
        yield client


def asked(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Is it warm in Rome?"}]
    return {"messages": messages, "tools": [WEATHER], "max_tokens": 60, "seed": 1, **more}


@pytest.mark.parametrize("choice", ["required", {"function": {"name": "weather"}}])
def test_a_forced_call_follows_the_functions_schema(knows_tools: Client, choice: Any):
    body = knows_tools.post("/v1/chat/completions", asked(tool_choice=choice)).json
    told = body["choices"][0]
    assert told["finish_reason"] == "tool_calls" and told["message"]["content"] is None
    (call,) = told["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["place"] in ("Rome", "Oslo")


def test_a_stream_of_a_forced_call(knows_tools: Client):
    answer = knows_tools.post("/v1/chat/completions", asked(tool_choice="required", stream=True))
    choices = [choice for event in answer.events for choice in event["choices"]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0]
    assert json.loads(calls[0]["function"]["arguments"])["place"] in ("Rome", "Oslo")
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(choice["delta"].get("content") for choice in choices)


def test_tools_left_free_and_their_answers_in_the_conversation(knows_tools: Client):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"place": "Rome"}'},
    }
    messages = [
        {"role": "user", "content": "Is it warm in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "30"},
    ]
    body = knows_tools.post("/v1/chat/completions", asked(messages=messages)).json
    assert isinstance(body["choices"][0]["message"]["content"], str)
    ids = knows_tools.post("/tokenize", {"messages": messages}).json["tokens"]
    text = knows_tools.post("/detokenize", {"tokens": ids}).json["prompt"]
    assert "weather(Rome)" in text and "tool: 30" in text
    with_tools = body["usage"]["prompt_tokens"]
    plain = knows_tools.post("/v1/chat/completions", asked(messages=messages, tool_choice="none"))
    assert plain.json["usage"]["prompt_tokens"] == len(ids) < with_tools


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (asked(tool_choice={"function": {"name": "rm"}}), "'rm', which is none of the tools"),
        (asked(tools=None, tool_choice="required"), "there are no tools"),
        (asked(tools=[{"type": "function"}]), "function"),
        (asked(tools=[WEATHER, WEATHER]), "two tools are named"),
        (
            asked(
                tools=[
                    {"type": "function", "function": {"name": "f", "parameters": {"$defs": ["A"]}}}
                ],
                tool_choice="required",
            ),
            "$defs is ['A']; give an object of schemas",
        ),
        (asked(messages=[{"role": "assistant", "tool_calls": [{"function": 3}]}]), "no call"),
        (asked(messages=[{"role": "assistant", "tool_calls": "x"}]), "no call"),
        (asked(messages=[{"role": "assistant", "tool_calls": 5}]), "no call"),
        (
            asked(
                messages=[
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "x", "arguments": "[" * 9999}}],
                    }
                ]
            ),
            "no call",
        ),
        (
            asked(messages=[{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]),
            "half a surrogate pair",
        ),
    ],
)
def test_mistakes_are_told(knows_tools: Client, body: dict[str, Any], fault: str):
    for stream in (False, True):
        answer = knows_tools.post("/v1/chat/completions", {**body, "stream": stream})
        assert answer.status == 400 and fault in answer.json["error"]["message"], answer.text


def test_a_template_that_knows_none_says_so(client: Client):
    answer = client.post("/v1/chat/completions", asked())
    assert answer.status == 400 and "template knows none" in answer.json["error"]["message"]


def test_definitions_of_a_tool_move_to_the_root_of_the_grammar():
    place = {"$defs": {"P": {"enum": ["Rome"]}}, "properties": {"at": {"$ref": "#/$defs/P"}}}
    tools = ToolFields.model_validate(
        {
            "tools": [
                {"type": "function", "function": {"name": name, "parameters": place}}
                for name in ("a", "b")
            ]
        }
    ).tools
    assert tools is not None
    for form in FORMS.values():
        assert form is not None
        schema = form.schema(tools)
        assert sorted(schema["$defs"]) == ["0-defs-P", "1-defs-P"]
        told = json.dumps(schema)
        assert "#/$defs/0-defs-P" in told and "#/$defs/P" not in told
        llguidance.LLMatcher.grammar_from_json_schema(told)
