"""/v1/chat/completions: a conversation, rendered by the model's template, and calls of tools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from mor.engine.outputs import StepOutput
from mor.engine.params import SamplingParams
from mor.serve.answers import ApiError, Service, depths_of
from mor.serve.protocol import ChatRequest, chat_logprobs, head_of, usage_of
from mor.serve.tools import Scanner, format_of


class Chats:
    """Answers to one endpoint's bodies."""

    def __init__(self, service: Service) -> None:
        self.service, self.tokenizer = service, service.tokenizer
        self.tool_format = format_of(service.template.source)
        mark = "" if self.tool_format is None else self.tool_format.start
        self._is_mark_special = self.tokenizer.token_ids.get(mark) in self.tokenizer.special_ids

    def ids(self, body: ChatRequest) -> list[int]:
        """Return the prompt; where a tool has to be called, it ends with how a call begins."""
        ids = self.service.template_ids(body.messages, body.offered())
        try:
            forced = body.forced()
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        if forced and self.tool_format is not None:
            mark = self.tokenizer.token_ids.get(self.tool_format.lead)
            ids += self.tokenizer.encode(self.tool_format.lead) if mark is None else [mark]
        return ids

    def params(self, body: ChatRequest) -> SamplingParams:
        stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
        update: dict[str, Any] = {"stop": [*stops, *self.service.template.stop]}
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        more: dict[str, Any] = {"max_tokens": most}
        if body.logprobs:
            more["logprobs"] = body.top_logprobs or 0
        try:
            forced = body.forced()
            if body.offered() and self.tool_format is None:
                raise ValueError("tools: this model's chat template knows none")
            if body.offered() and self.tool_format is not None and self._is_mark_special:
                update["skip_special_tokens"] = False
            if forced and self.tool_format is not None:
                more["constraint"] = self.service.grammars.of_schema(
                    self.tool_format.schema(forced)
                )
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return self.service.params(body.model_copy(update=update), **more)

    def scanner(self, body: ChatRequest) -> Scanner | None:
        """Return what finds calls of tools in one answer; None where none can be."""
        tools = body.offered()
        if not tools or self.tool_format is None:
            return None
        names = [tool.function.name for tool in tools]
        most = 0 if body.parallel_tool_calls else 1
        return Scanner(self.tool_format, names, most=most, is_inside=bool(body.forced()))

    async def whole(
        self, body: ChatRequest, ids: list[int], params: SamplingParams, request_id: str
    ) -> dict[str, Any]:
        output = await self.service.whole(ids, params, request_id)
        choices = []
        for answer in output.outputs:
            message: dict[str, Any] = {"role": "assistant", "content": answer.text}
            scanner = self.scanner(body)
            if scanner is not None:
                text, calls = scanner.push(answer.text, is_last=True)
                message["content"] = text or (None if calls else "")
                if calls:
                    message["tool_calls"] = calls
            told: dict[str, Any] = {
                "index": answer.index,
                "message": message,
                "logprobs": chat_logprobs(answer.logprobs, self.tokenizer.token_bytes)
                if body.logprobs and answer.logprobs is not None
                else None,
                "finish_reason": finish_reason(answer.finish_reason, scanner),
                "stop_reason": answer.stop_reason,
            }
            if body.return_depths:
                told |= {"depths": answer.depths, "prompt_depths": output.prompt_depths}
            choices.append(told)
        head = head_of("chat.completion", request_id, self.service.config.served_model_name)
        return {**head, "choices": choices, "usage": usage_of([output]) | self.service.told(params)}

    def stream(
        self, body: ChatRequest, ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncIterator[str]:
        """Return the events of a turn; ApiError before any for what cannot be served."""
        self.service.check([ids], params)
        return self._stream_events(body, ids, params, request_id)

    async def _stream_events(
        self, body: ChatRequest, ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncIterator[str]:
        head = head_of("chat.completion.chunk", request_id, self.service.config.served_model_name)
        scanners = [self.scanner(body) for _ in range(body.n)]
        begun: set[int] = set()

        def choice(place: int, piece: StepOutput) -> dict[str, Any]:
            scanner, text, delta = scanners[piece.index], piece.text, dict[str, Any]()
            if piece.index not in begun:  # not before: clients take the first event for a token
                begun.add(piece.index)
                delta |= {"role": "assistant", "content": ""}
            if scanner is not None:
                first = scanner.num_calls
                text, calls = scanner.push(text, is_last=piece.finish_reason is not None)
                if calls:
                    numbered = [{"index": first + i, **call} for i, call in enumerate(calls)]
                    delta["tool_calls"] = numbered
            if text:
                delta["content"] = text
            told: dict[str, Any] = {
                "index": piece.index,
                "delta": delta,
                "logprobs": chat_logprobs(piece.logprobs, self.tokenizer.token_bytes)
                if body.logprobs and piece.logprobs
                else None,
                "finish_reason": finish_reason(piece.finish_reason, scanner),
            }
            return told | (depths_of(piece) if body.return_depths else {})

        found = self.service.events(body, [ids], params, request_id, head, choice)
        async with aclosing(found) as events:  # pyrefly: ignore
            async for one in events:
                yield one


def finish_reason(reason: str | None, scanner: Scanner | None) -> str | None:
    """Return OpenAI's word for why an answer ended."""
    is_call = reason == "stop" and scanner is not None and scanner.num_calls > 0
    return "tool_calls" if is_call else reason
