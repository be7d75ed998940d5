"""/v1/completions: prompts as text or ids, one or several, whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from mor.engine.outputs import CompletionOutput, RequestOutput, StepOutput
from mor.engine.params import SamplingParams
from mor.serve.answers import Service, depths_of
from mor.serve.protocol import CompletionRequest, completion_logprobs, head_of, usage_of


class Completions:
    """Answers to one endpoint's bodies."""

    def __init__(self, service: Service) -> None:
        self.service, self.tokenizer = service, service.tokenizer
        self.token_text = service.token_text

    def params(self, body: CompletionRequest) -> SamplingParams:
        more: dict[str, Any] = {"max_tokens": body.max_tokens, "logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            more["prompt_logprobs"] = body.logprobs
        return self.service.params(body, **more)

    async def whole(self, body: CompletionRequest, request_id: str) -> dict[str, Any]:
        prompts = [self.service.prompt_ids(prompt) for prompt in body.prompts()]
        params = self.params(body)
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
        pieces = self.tokenizer.pieces(answer.token_ids)[: len(answer.logprobs)]
        told = completion_logprobs(answer.logprobs, pieces, len(echoed), self.token_text)
        if not body.echo or output.prompt_logprobs is None:
            return told
        first = [place for place in output.prompt_logprobs if place is not None]
        names = self.tokenizer.pieces(output.prompt_token_ids)
        before = completion_logprobs(first, names[len(names) - len(first) :], 0, self.token_text)
        head = names[: len(names) - len(first)]
        return {
            "tokens": [*head, *before["tokens"], *told["tokens"]],
            "token_logprobs": [
                *(None for _ in head),
                *before["token_logprobs"],
                *told["token_logprobs"],
            ],
            "top_logprobs": [
                *(None for _ in head),
                *before["top_logprobs"],
                *told["top_logprobs"],
            ],
            "text_offset": [
                *(0 for _ in head),
                *(len("".join(head)) + at for at in before["text_offset"]),
                *told["text_offset"],
            ],
        }

    def stream(self, body: CompletionRequest, request_id: str) -> AsyncIterator[str]:
        """Return the events of one prompt or several; ApiError before any for what cannot be."""
        prompts = [self.service.prompt_ids(prompt) for prompt in body.prompts()]
        params = self.params(body)
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
        offsets: dict[int, int] = {}

        def choice(place: int, piece: StepOutput) -> dict[str, Any]:
            index = place * body.n + piece.index
            text, logprobs = piece.text, None
            if body.echo and index not in offsets:
                text = self._prompt_text(body, place, prompts[place])
                offsets[index] = len(text)
                text += piece.text
            if body.logprobs is not None and piece.logprobs:
                names = [self.token_text(p.token) for p in piece.logprobs]
                at = offsets.get(index, 0)
                logprobs = completion_logprobs(piece.logprobs, names, at, self.token_text)
                offsets[index] = at + sum(map(len, names))
            told: dict[str, Any] = {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": piece.finish_reason,
            }
            return told | (depths_of(piece) if body.return_depths else {})

        async for one in self.service.events(body, prompts, params, request_id, head, choice):
            yield one
