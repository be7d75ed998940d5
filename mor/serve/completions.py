"""/v1/completions: prompts as text or ids, one or several, whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from mor.engine.outputs import CompletionOutput, RequestOutput, StepOutput
from mor.engine.params import SamplingParams
from mor.serve.answers import ApiError, Service, depths_of
from mor.serve.protocol import (
    CompletionRequest,
    Offsets,
    completion_logprobs,
    head_of,
    usage_of,
)


class Completions:
    """Answers to one endpoint's bodies."""

    def __init__(self, service: Service) -> None:
        self.service, self.tokenizer = service, service.tokenizer

    def params(self, body: CompletionRequest) -> SamplingParams:
        more: dict[str, Any] = {"max_tokens": body.max_tokens, "logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            more["prompt_logprobs"] = body.logprobs
        return self.service.params(body, **more)

    def ids(self, body: CompletionRequest) -> list[list[int]]:
        """Return the ids of every prompt."""
        return [self.service.prompt_ids(prompt) for prompt in body.prompts()]

    async def whole(
        self,
        body: CompletionRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request_id: str,
    ) -> dict[str, Any]:
        names = [f"{request_id}-{place}" for place in range(len(prompts))]
        tasks = [
            asyncio.create_task(self.service.whole(ids, params, name))
            for ids, name in zip(prompts, names, strict=True)
        ]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        choices = []
        for place, output in enumerate(outputs):
            echoed = self._prompt_text(body, place, prompts[place]) if body.echo else ""
            for answer in output.outputs:
                choice: dict[str, Any] = {
                    "index": len(choices),
                    "text": echoed + answer.text,
                    "logprobs": self._logprobs(body, output, answer, echoed),
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
                if body.return_depths:
                    choice |= {"depths": answer.depths, "prompt_depths": output.prompt_depths}
                choices.append(choice)
        head = head_of("text_completion", request_id, self.service.config.served_model_name)
        return {**head, "choices": choices, "usage": usage_of(outputs) | self.service.told(params)}

    def _prompt_text(self, body: CompletionRequest, place: int, ids: list[int]) -> str:
        prompt = body.prompts()[place]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)

    def _logprobs(
        self,
        body: CompletionRequest,
        output: RequestOutput,
        answer: CompletionOutput,
        echoed: str,
    ) -> dict[str, Any] | None:
        if body.logprobs is None or answer.logprobs is None:
            return None
        special, none = self.tokenizer.special_ids, frozenset[int]()
        hidden = special if body.skip_special_tokens else none
        own = answer.token_ids[: len(answer.logprobs)]
        bytes_of = self.tokenizer.token_bytes
        if not body.echo or output.prompt_logprobs is None:
            offsets = Offsets(len(echoed))
            return completion_logprobs(answer.logprobs, own, offsets, bytes_of, hidden)
        # A prompt of text begins with a token that it does not show, or with a space.
        is_text = isinstance(body.prompts()[0], str)
        offsets = Offsets(drops_space=is_text and not echoed.startswith(" "))
        in_prompt = special if is_text else none
        before = completion_logprobs(
            output.prompt_logprobs, output.prompt_token_ids, offsets, bytes_of, in_prompt
        )
        told = completion_logprobs(answer.logprobs, own, offsets, bytes_of, hidden)
        return {name: [*before[name], *told[name]] for name in told}

    def stream(
        self,
        body: CompletionRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request_id: str,
    ) -> AsyncIterator[str]:
        """Return the events of one prompt or several; ApiError before any for what cannot be."""
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "a stream has no logprobs of the prompt; leave out echo or stream")
        self.service.check(prompts, params)
        return self._stream_events(body, prompts, params, request_id)

    async def _stream_events(
        self,
        body: CompletionRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request_id: str,
    ) -> AsyncIterator[str]:
        """Yield events; a choice's index counts through all answers to all prompts."""
        head = head_of("text_completion", request_id, self.service.config.served_model_name)
        offsets: dict[int, Offsets] = {}
        hidden = self.tokenizer.special_ids if body.skip_special_tokens else frozenset[int]()

        def choice(place: int, piece: StepOutput) -> dict[str, Any]:
            index = place * body.n + piece.index
            text, logprobs = piece.text, None
            if index not in offsets:
                echoed = self._prompt_text(body, place, prompts[place]) if body.echo else ""
                offsets[index] = Offsets(len(echoed))
                text = echoed + piece.text
            if body.logprobs is not None and piece.logprobs:
                drawn, own = [p.token for p in piece.logprobs], offsets[index]
                bytes_of = self.tokenizer.token_bytes
                logprobs = completion_logprobs(piece.logprobs, drawn, own, bytes_of, hidden)
            told: dict[str, Any] = {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": piece.finish_reason,
            }
            return told | (depths_of(piece) if body.return_depths else {})

        found = self.service.events(body, prompts, params, request_id, head, choice)
        async with aclosing(found) as events:  # pyrefly: ignore
            async for one in events:
                yield one
