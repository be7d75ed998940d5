"""Chat templates of model folders: messages to token ids, as transformers renders them.

A template's special tokens become special ids; the same characters inside a message stay ordinary
text, so that what a user types cannot end a turn. Templates run in Jinja2's sandbox.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mor.tokenizer import Tokenizer

PLAIN = (
    "{% for message in messages %}{{ message['role'].capitalize() }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models that have no template."""

Message = Mapping[str, Any]
SIGN = re.compile("\ue000\\d+\ue001")
"""what stands for a special token's characters in a message while a template renders"""


class ChatTemplate:
    """Turns messages (role and content) into the ids of a prompt."""

    def __init__(
        self, source: str | None, tokenizer: Tokenizer, *, variables: Mapping[str, Any]
    ) -> None:
        """Compile a template; None takes a plain one. Raises ValueError for a broken template."""
        self.is_plain = source is None
        self.source = source if source is not None else PLAIN
        self.tokenizer = tokenizer
        self.variables = dict(variables)
        self._special = _special_pattern(tokenizer)
        self._template = _compile(self.source)

    @classmethod
    def load(
        cls, folder: Path, tokenizer: Tokenizer, *, bos_token_id: int | None = None
    ) -> ChatTemplate:
        """Read `chat_template.jinja`, or the field `chat_template` of `tokenizer_config.json`.

        bos_token_id  the model's first token, where no file names it
        """
        config: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            try:
                config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{folder / 'tokenizer_config.json'} is not JSON") from error
        source = config.get("chat_template")
        if isinstance(source, list):  # named templates
            named = {one.get("name"): one.get("template") for one in source}
            source = named.get("default")
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text("utf-8")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        variables = {name: _text_of(config.get(name)) for name in names}
        variables["eos_token"] = variables["eos_token"] or tokenizer.eos_token
        if not variables["bos_token"] and bos_token_id is not None:
            variables["bos_token"] = tokenizer.decode([bos_token_id])
        return cls(source, tokenizer, variables=variables)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn, for the plain template."""
        return ("\nUser:", "\nSystem:") if self.is_plain else ()

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the ids of a conversation; ValueError when the template refuses it.

        tools  functions that may be called, in OpenAI's shape, for a template that knows them
        """
        text, hidden = self._render(messages, tools, add_generation_prompt)
        ids: list[int] = []
        raw = self.tokenizer.token_ids
        for part in self._special.split(text) if self._special else [text]:
            if part in raw and self._special is not None and self._special.fullmatch(part):
                ids.append(raw[part])
            elif part:
                shown = SIGN.sub(lambda match: hidden.get(match.group(), match.group()), part)
                ids += self.tokenizer.encode(shown)
        return ids

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
    ) -> tuple[str, dict[str, str]]:
        """Render with every special token inside a message replaced by a sign of its own."""
        hidden: dict[str, str] = {}

        def sign_of(match: re.Match[str]) -> str:
            sign = f"\ue000{len(hidden)}\ue001"
            hidden[sign] = match.group()
            return sign

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return value if self._special is None else self._special.sub(sign_of, value)
            if isinstance(value, Mapping):
                return {hide(name): hide(inner) for name, inner in value.items()}
            return [hide(inner) for inner in value] if isinstance(value, list) else value

        try:
            text = self._template.render(
                messages=[hide(message) for message in messages],
                tools=[hide(tool) for tool in tools] or None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # a template is a program of others, with errors of any kind
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template refuses the conversation: {said}") from error
        return text, hidden


def check_extra() -> None:
    """Raise ValueError with the install command where Jinja2 is missing."""
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("chat templates need Jinja2: pip install 'mixture-of-recursions[chat]'")


def _compile(source: str) -> Any:
    check_extra()
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_extension()],
    )

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers' filter."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.filters["tojson"] = to_json
    own: dict[str, Any] = {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.globals.update(own)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is broken: {error}") from error


def _generation_extension() -> Any:
    """Return an extension that lets `{% generation %}` blocks of training templates pass."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Match any special token, the longest first."""
    texts = [text for text, token in tokenizer.token_ids.items() if token in tokenizer.special_ids]
    if not texts:
        return None
    texts.sort(key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(text) for text in texts) + ")")


def _text_of(token: Any) -> str:
    """Return a token's text; some files keep an object instead."""
    return token.get("content", "") if isinstance(token, dict) else token or ""
