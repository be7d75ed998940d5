"""Calls of tools: what a chat template's model writes for one, and OpenAI's shape of it.

A template that knows tools says how they are called: between `<tool_call>` marks (Hermes, Qwen,
SmolLM), behind `[TOOL_CALLS]` (Mistral), or as an answer that is JSON and nothing else (Llama).
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: Function


class Named(BaseModel):
    name: str


class Choice(BaseModel):
    """One function that the model has to call."""

    type: Literal["function"] = "function"
    function: Named


class ToolFields(BaseModel):
    """What a chat request says of tools."""

    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool = True

    @field_validator("tools")
    @classmethod
    def _check_names(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or ()]
        twice = {name for name, times in Counter(names).items() if times > 1}
        if twice:
            raise ValueError(f"two tools are named {min(twice)!r}")
        return tools

    def offered(self) -> list[Tool]:
        """Return the tools that the template is told of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def forced(self) -> list[Tool]:
        """Return the tools one of which has to be called; ValueError for a name that is none."""
        if self.tool_choice in (None, "none", "auto"):
            return []
        tools = list(self.tools or ())
        if isinstance(self.tool_choice, Choice):
            name = self.tool_choice.function.name
            tools = [tool for tool in tools if tool.function.name == name]
            if not tools:
                raise ValueError(f"tool_choice names {name!r}, which is none of the tools")
        if not tools:
            raise ValueError("tool_choice wants a call, but there are no tools")
        return tools


class ToolFormat(NamedTuple):
    """How a model writes calls."""

    start: str
    """what stands before the JSON; nothing: the whole answer is JSON"""
    end: str
    is_list: bool
    """the JSON is a list of calls"""

    @property
    def lead(self) -> str:
        """What a prompt ends with so that a call must follow."""
        return self.start + ("\n" if self.end else "")

    def schema(self, tools: Sequence[Tool]) -> dict[str, Any]:
        """Return the JSON schema of a call of one of the tools."""
        key = "arguments" if self.start else "parameters"
        calls, shared = [], {}
        for number, tool in enumerate(tools):
            parameters, defined = _lifted(tool.function.parameters or {"type": "object"}, number)
            shared |= defined
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": tool.function.name}, key: parameters},
                    "required": ["name", key],
                    "additionalProperties": False,
                }
            )
        one = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.is_list:
            one = {"type": "array", "items": one, "minItems": 1, "maxItems": 1}
        return {**one, "$defs": shared} if shared else one


def _lifted(schema: dict[str, Any], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take a schema's own definitions out, for the root that it becomes a part of.

    Returns the schema and its definitions, under names with the tool's number in them, references
    rewritten. Raises ValueError for definitions that are no table.
    """
    for where in ("$defs", "definitions"):
        if not isinstance(schema.get(where, {}), dict):
            raise ValueError(f"{where} is {schema[where]!r}; give an object of schemas")
    places = {
        f"#/{where}/{name}": f"{number}-{where.strip('$')}-{name}"
        for where in ("$defs", "definitions")
        for name in schema.get(where, {})
    }

    def rewritten(value: Any) -> Any:
        if isinstance(value, list):
            return [rewritten(one) for one in value]
        if not isinstance(value, dict):
            return value
        found = {name: rewritten(one) for name, one in value.items()}
        if isinstance(value.get("$ref"), str) and value["$ref"] in places:
            found["$ref"] = f"#/$defs/{places[value['$ref']]}"
        return found

    plain = {k: v for k, v in schema.items() if k not in ("$defs", "definitions")}
    defined = {}
    for place, name in places.items():
        where, key = place.removeprefix("#/").split("/", 1)
        defined[name] = rewritten(schema[where][key])
    return rewritten(plain), defined


def format_of(template: str) -> ToolFormat | None:
    """Return how a template's model calls tools; None where the template knows none."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return ToolFormat("<tool_call>", "</tool_call>", is_list=False)
    if "[TOOL_CALLS]" in template:
        return ToolFormat("[TOOL_CALLS]", "", is_list=True)
    return ToolFormat("", "", is_list=False)


class Scanner:
    """Takes an answer's text as it comes and tells text for the reader from calls.

    Text that may be the beginning of a call is held back; what turns out to be none is text after
    all.
    """

    def __init__(
        self, form: ToolFormat, names: Sequence[str], *, most: int = 0, is_inside: bool = False
    ) -> None:
        """Begin an answer.

        names      of the tools
        most       calls to hand on, 0 for all
        is_inside  the prompt ended with the beginning of a call
        """
        self.form, self.names, self.most = form, set(names), most
        self.is_inside, self.was_led = is_inside, is_inside
        self.held, self.num_calls = "", 0
        self.has_begun = False

    def push(self, text: str, *, is_last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Add text; returns what is certain to be text, and the calls that are whole."""
        self.held += text
        if not self.form.start:
            return self._bare(is_last)
        told, calls = "", []
        while True:
            if not self.is_inside:
                before, mark, after = self.held.partition(self.form.start)
                if not mark:
                    keep = 0 if is_last else _overlap(self.held, self.form.start)
                    told += self.held[: len(self.held) - keep]
                    self.held = self.held[len(self.held) - keep :]
                    return told, calls
                told, self.held, self.is_inside = told + before, after, True
            if self.form.end and self.form.end in self.held:
                inner, _, rest = self.held.partition(self.form.end)
            elif is_last:
                inner, rest = self.held, ""
            else:
                return told, calls
            found = self._calls(inner)
            if found is None:
                told += ("" if self.was_led else self.form.start) + inner
                told += self.form.end if self.form.end in self.held else ""
            else:
                calls += found
            self.held, self.is_inside, self.was_led = rest, False, False

    def _bare(self, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Hold back an answer that begins like JSON until its end."""
        if not self.has_begun and self.held.strip():
            self.has_begun, self.is_inside = True, self.held.lstrip()[0] in "{["
        if not self.has_begun or (self.is_inside and not is_last):
            return ("", []) if not is_last else (self._take(), [])
        if self.is_inside:
            found = self._calls(self.held)
            if found is not None:
                self.held = ""
                return "", found
        return self._take(), []

    def _take(self) -> str:
        text, self.held = self.held, ""
        return text

    def _calls(self, text: str) -> list[dict[str, Any]] | None:
        """Return calls in OpenAI's shape; None where it is no JSON, or names no such tool."""
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            return None
        calls = []
        for one in found if isinstance(found, list) else [found]:
            name = one.get("name") if isinstance(one, dict) else None
            if name not in self.names:
                return None
            given = one.get("arguments", one.get("parameters", {}))
            given = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            calls.append(
                {
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": name, "arguments": given},
                }
            )
        if self.most:
            calls = calls[: max(0, self.most - self.num_calls)]
        self.num_calls += len(calls)
        return calls


def _overlap(text: str, mark: str) -> int:
    """Return how many last characters of a text may begin a mark."""
    most = min(len(mark) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)
