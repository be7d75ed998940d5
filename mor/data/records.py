"""The text of one record, whether a JSONL line, a row of a Parquet file or of a dataset."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from mor.data.streams import BadInput

MESSAGES = "messages"
MAX_NAMES = 8


class Row(NamedTuple):
    """The text of a row and its number, from 1."""

    text: str
    number: int


def text_of(record: Any, text_field: str) -> str:
    """Return a record's text_field, or its `messages` as "role: content" lines.

    Raises BadInput saying what is missing or of another type
    """
    if not isinstance(record, dict):
        raise BadInput(f"a line holds one JSON object, this is {type(record).__name__}")
    field = choose_field(list(record), text_field)
    value = record[field]
    if value is None:
        raise BadInput(f"field {field!r} is null")
    if field == text_field:
        if not isinstance(value, str):
            raise BadInput(f"field {field!r} is {type(value).__name__}, not text")
        text = value
    else:
        text = _render_messages(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"the text holds half a surrogate pair at {error.start}") from error
    return text


def choose_field(names: Sequence[str], text_field: str) -> str:
    """Return which of a record's fields holds its text: text_field, else `messages`.

    Raises BadInput naming the nearest field and some of the others
    """
    if text_field in names:
        return text_field
    if MESSAGES in names:
        return MESSAGES
    known = ", ".join([*names[:MAX_NAMES], *(["..."] if len(names) > MAX_NAMES else [])])
    near = difflib.get_close_matches(text_field, names, n=1)
    hint = f"did you mean --text-field {near[0]}?" if near else "set --text-field"
    raise BadInput(f"no field {text_field!r} (fields: {known or 'none'}); {hint}")


def _render_messages(messages: Any) -> str:
    if not isinstance(messages, list):
        raise BadInput(f"field 'messages' is {type(messages).__name__}, not a list")
    lines = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadInput("a message needs role and content as text")
        lines.append(f"{role}: {content}\n")
    return "".join(lines)
