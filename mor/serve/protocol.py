"""Bodies of requests, in OpenAI's words and vLLM's, and ours for depth; bodies of answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams
from mor.engine.sampler import TokenLogprobs
from mor.serve.tools import Tool, ToolFields

BytesOf = Callable[[int], bytes]
"""what a token stands for"""
DepthPoints = Mapping[str, float | None]
"""mean depths by name; None for the model's thresholds as trained"""


class StreamOptions(BaseModel):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    def schema_asked(self) -> dict[str, Any] | None:
        """Return the schema to follow; None for text. ValueError where it is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        schema = (self.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            raise ValueError("response_format.json_schema.schema is missing")
        return schema


class Common(BaseModel):
    """What both endpoints take. Fields that no engine knows are ignored, as OpenAI's clients send
    some."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        """OpenAI's schema and clients send null for what is not set."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    model: str | None = None
    max_tokens: int | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    # ours
    max_recursions: int | None = None
    depth: float | str | None = None
    return_depths: bool = False

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, points: DepthPoints, **more: Any) -> SamplingParams:
        """Return the engine's parameters; ValueError for a value outside its range.

        points  what the names of depths stand for
        """
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop=self.stop,
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,  # pyrefly: ignore
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            max_recursions=self.max_recursions,
            target_depth=depth_of(self.depth, points),
            **more,
        )


def depth_of(depth: float | str | None, points: DepthPoints) -> float | None:
    """Return the mean depth that a name or number stands for; None for the model as trained."""
    if not isinstance(depth, str):
        return depth
    if depth not in points:
        raise ValueError(f"depth is {depth!r}; give a mean depth or one of {', '.join(points)}")
    return points[depth]


class CompletionRequest(Common):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """Return every prompt, text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyrefly: ignore
        return list(self.prompt)  # pyrefly: ignore


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message for a template; ValueError for content that is not text.

        Arguments of calls become objects, as templates want them.
        """
        told: dict[str, Any] = {"role": self.role, "content": self._text()}
        extra = self.model_extra or {}
        told |= {name: extra[name] for name in ("name", "tool_call_id") if extra.get(name)}
        if extra.get("tool_calls"):
            if not isinstance(extra["tool_calls"], list):
                raise ValueError("tool_calls is no list, so it holds no call of a function")
            told["tool_calls"] = [_plain_call(call) for call in extra["tool_calls"]]
        try:
            json.dumps(told, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a message holds half a surrogate pair, which is no text") from error
        return told

    def _text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        given = [part.get("text") for part in self.content if part.get("type") == "text"]
        texts = [text for text in given if isinstance(text, str)]
        if len(texts) < len(self.content):
            raise ValueError("content has parts that are not text; this model reads text alone")
        return "".join(texts)


def _plain_call(call: Any) -> dict[str, Any]:
    """Return a call with its arguments as an object; ValueError for what is no call."""
    try:
        function = call["function"]
        given = function.get("arguments", {})
        given = json.loads(given or "{}") if isinstance(given, str) else given
        if not isinstance(given, dict):
            raise TypeError("arguments are no object")
        return {**call, "function": {**function, "arguments": given}}
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError("tool_calls holds what is no call of a function") from error


class ChatRequest(Common, ToolFields):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    tokens: list[int]


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Return the tokens of a request's prompts and answers, and what depth saved."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    drawn = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in outputs)},
        "mean_depth": sum(o.mean_depth for o in outputs) / len(outputs),
        "flops_saved": sum(o.flops_saved for o in outputs) / len(outputs),
    }


def head_of(kind: str, request_id: str, model: str) -> dict[str, Any]:
    """Return what every answer and every piece begins with."""
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}


def token_name(data: bytes) -> str:
    """Return a token's text; of one that is part of a character its bytes, as OpenAI writes them.

    So tokens that are no text each have a name of their own.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Offsets:
    """Where tokens begin in a text, in characters; one begun by a token before counts with that."""

    def __init__(self, at: int = 0, *, drops_space: bool = False) -> None:
        """at: where the first token begins; drops_space: a space that it begins with is no text."""
        self.at, self._open, self._drops_space = at, b"", drops_space

    def push(self, data: bytes) -> int:
        """Return where a token begins, and go on behind it."""
        if self._drops_space and data:
            data, self._drops_space = data.removeprefix(b" "), False
        at, self._open = self.at, self._open + data
        try:
            self.at, self._open = self.at + len(self._open.decode("utf-8")), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                self.at, self._open = self.at + len(self._open.decode("utf-8", "replace")), b""
        return at


def completion_logprobs(
    places: Sequence[TokenLogprobs | None],
    tokens: Sequence[int],
    offsets: Offsets,
    bytes_of: BytesOf,
    hidden: Container[int],
) -> dict[str, Any]:
    """Return log-probabilities in the shape of /v1/completions.

    places   of each token; None for one that nothing stands before
    offsets  where the first token begins in the whole text; goes on behind the last
    hidden   tokens that the text does not show
    """

    def top_of(place: TokenLogprobs | None) -> dict[str, float] | None:
        if place is None:
            return None
        found = {token_name(bytes_of(token)): lp for token, lp in place.top}
        return {**found, token_name(bytes_of(place.token)): place.logprob}

    return {
        "tokens": [token_name(bytes_of(token)) for token in tokens],
        "token_logprobs": [None if place is None else place.logprob for place in places],
        "top_logprobs": [top_of(place) for place in places],
        "text_offset": [
            offsets.push(b"" if token in hidden else bytes_of(token)) for token in tokens
        ],
    }


def chat_logprobs(places: Sequence[TokenLogprobs], bytes_of: BytesOf) -> dict[str, Any]:
    """Return log-probabilities in the shape of /v1/chat/completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = bytes_of(token)
        return {"token": token_name(data), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            {
                **one(place.token, place.logprob),
                "top_logprobs": [one(token, lp) for token, lp in place.top],
            }
            for place in places
        ]
    }
