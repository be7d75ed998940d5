"""From parameters and prompts to the engine and back, for every endpoint.

Errors are raised as `ApiError`; `app.py` gives them OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from mor.chat_template import ChatTemplate
from mor.engine.outputs import RequestOutput, StepOutput
from mor.engine.params import SamplingParams
from mor.engine.stream import AsyncEngine, EngineFault
from mor.log import logger
from mor.serve.config import ServeConfig
from mor.serve.metrics import Metrics
from mor.serve.protocol import (
    ChatMessage,
    Common,
    DepthPoints,
    usage_of,
)
from mor.serve.tools import Tool
from mor.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mor.serve.grammar import Grammars


MOST_STOPS, LONGEST_STOP = 64, 1024
"""of a request: every token of every answer is searched for them"""


class ApiError(Exception):
    """An error with a status and OpenAI's words for it."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": None,
                "code": self.code or None,
            }
        }


class Service:
    """The engine and what a served model needs beside it."""

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        config: ServeConfig,
        metrics: Metrics,
        *,
        vocab_size: int,
        num_recursions: int,
        trained_depth: float,
        depth_points: DepthPoints,
        bos_token_id: int | None,
        eos_token_id: int | None,
        max_model_len: int,
    ) -> None:
        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self.config, self.metrics = config, metrics
        self.vocab_size = vocab_size
        self.num_recursions, self.trained_depth = num_recursions, trained_depth
        self.depth_points = depth_points
        self.bos_token_id, self.max_model_len = bos_token_id, max_model_len
        self.eos_token_id = eos_token_id
        self.num_held = 0
        """answers that are asked for and not done with"""

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Made when the first request asks for a grammar."""
        from mor.serve.grammar import Grammars

        ends = [self.tokenizer.eos_token_id]
        return Grammars(self.tokenizer, ends if self.eos_token_id is None else [self.eos_token_id])

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.config.served_model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has "
                f"{self.config.served_model_name!r}",
                code="model_not_found",
            )

    def take_room(self, count: int) -> None:
        """Count so many answers until `give_room`; refuse what goes beyond the bounds."""
        most = self.config.max_num_seqs + self.config.max_queue
        if count > most:
            raise ApiError(400, f"{count} answers are asked for; this server holds {most} at most")
        if self.num_held + count > most:
            self.metrics.refused.inc()
            said = "the queue is full; try again later"
            raise ApiError(429, said, kind="rate_limit_error", code="queue_full")
        self.num_held += count

    def give_room(self, count: int) -> None:
        self.num_held -= count

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """Return a prompt's ids; a text begins with the first token, as in `mor generate`."""
        if not isinstance(prompt, str):
            return prompt
        first = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*first, *self.tokenizer.encode(prompt)]

    def template_ids(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[int]:
        """Return a conversation's ids; ApiError for one that the template refuses."""
        try:
            ids = self.template.encode(
                [message.plain() for message in messages],
                tools=[tool.model_dump(exclude_none=True) for tool in tools],
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        # The plain template names no first token; others write theirs.
        is_bare = self.template.is_plain and self.bos_token_id is not None
        return [self.bos_token_id, *ids] if is_bare else ids  # pyrefly: ignore

    def loaded_depth(self) -> float | None:
        """Return the mean depth that the queue leaves a new request; None for the model's own."""
        floor = self.config.load_aware_depth
        over = self.num_held - 1 - self.config.max_num_seqs
        if not floor or over <= 0 or floor >= self.trained_depth:
            return None
        pressure = min(1.0, over / max(1, self.config.max_queue))
        return self.trained_depth - (self.trained_depth - floor) * pressure

    def params(self, body: Common, **more: Any) -> SamplingParams:
        depth = None
        if body.depth is None and body.max_recursions is None:
            depth = self.loaded_depth()
        if depth is not None:
            body = body.model_copy(update={"depth": depth})
            more["cache_prefix"] = False
        try:
            form = body.response_format
            schema = None if form is None else form.schema_asked()
            if (schema is not None or "constraint" in more) and (
                body.min_tokens or body.ignore_eos
            ):
                raise ValueError(
                    "min_tokens and ignore_eos go on where a grammar has ended; leave them out, or "
                    "response_format and the forced call"
                )
            stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
            if len(stops) > MOST_STOPS or any(len(one) > LONGEST_STOP for one in stops):
                raise ValueError(
                    f"stop takes {MOST_STOPS} texts of {LONGEST_STOP} characters at most"
                )
            if schema is not None and "constraint" not in more:
                more["constraint"] = self.grammars.of_schema(schema)
            return body.params(self.depth_points, **more)
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def check(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """Refuse prompts that the engine would, before a stream has begun."""
        try:
            for ids in prompts:
                self.engine.check(ids, params)
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    async def pieces(
        self, ids: list[int], params: SamplingParams, request_id: str, *, only_last: bool = False
    ) -> AsyncIterator[StepOutput]:
        """Yield a request's pieces within its deadline, and count what came of it."""
        found = self.engine.generate(ids, params, request_id=request_id, only_last=only_last)
        ends_at = asyncio.get_running_loop().time() + self.config.request_timeout_s
        try:
            async with aclosing(found) as stream:
                while True:
                    # Around the wait alone: a reader that pauses is not cut while it is sent to.
                    async with asyncio.timeout_at(ends_at):
                        piece = await anext(stream, None)
                    if piece is None:
                        break
                    self.metrics.piece(request_id, piece)
                    if piece.error is not None:
                        raise ApiError(500, piece.error, kind="server_error", code="engine_error")
                    yield piece
                    if piece.result is not None and self.config.log_prompts:
                        self._log(request_id, piece.result)
        except ValueError as error:
            self.metrics.end(request_id, "refused")
            raise ApiError(400, str(error)) from error
        except EngineFault as error:
            self.metrics.end(request_id, "failed")
            raise ApiError(500, str(error), kind="server_error", code="engine_fault") from error
        except TimeoutError as error:
            self.metrics.end(request_id, "timeout")
            raise ApiError(
                504,
                f"the request took longer than {self.config.request_timeout_s:g} s",
                kind="server_error",
                code="timeout",
            ) from error
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.end(request_id, "cancelled")
            raise
        except ApiError:
            self.metrics.end(request_id, "failed")
            raise
        self.metrics.end(request_id, "done")

    def _log(self, request_id: str, result: RequestOutput) -> None:
        """Write what was asked and answered; only where the server was told to."""
        prompt = self.tokenizer.decode(result.prompt_token_ids)
        answers = [answer.text for answer in result.outputs]
        line = {"id": request_id, "prompt": prompt, "answers": answers}
        logger.info("%s", json.dumps(line, ensure_ascii=False))

    def told(self, params: SamplingParams) -> dict[str, Any]:
        """Return what `usage` says of a depth that the queue chose."""
        if not self.config.load_aware_depth:
            return {}
        return {"load_aware_depth": None if params.cache_prefix else params.target_depth}

    async def whole(self, ids: list[int], params: SamplingParams, request_id: str) -> RequestOutput:
        """Return a request's answers when all are there."""
        result = None
        found = self.pieces(ids, params, request_id, only_last=True)
        async with aclosing(found) as pieces:  # pyrefly: ignore
            async for piece in pieces:
                result = piece.result or result
        if result is None:
            raise ApiError(500, "the engine gave no result", kind="server_error")
        return result

    async def events(
        self,
        body: Common,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request_id: str,
        head: dict[str, Any],
        choice: Callable[[int, StepOutput], dict[str, Any]],
    ) -> AsyncIterator[str]:
        """Yield the events of several prompts as they come, usage and end behind them."""
        results: list[RequestOutput] = []
        try:
            async with aclosing(self._merged(prompts, params, request_id)) as pieces:  # pyrefly: ignore
                async for place, piece in pieces:
                    if piece.result is not None:
                        results.append(piece.result)
                    if piece.text or piece.finish_reason or piece.logprobs or body.return_depths:
                        yield event({**head, "choices": [choice(place, piece)]})
        except ApiError as error:
            yield event(error.body)
            return
        if body.includes_usage:
            usage = usage_of(results) | self.told(params)
            yield event({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    async def _merged(
        self, prompts: Sequence[list[int]], params: SamplingParams, request_id: str
    ) -> AsyncIterator[tuple[int, StepOutput]]:
        """Yield the pieces of all prompts with the prompt's place, as they come."""
        if len(prompts) == 1:
            async with aclosing(self.pieces(prompts[0], params, f"{request_id}-0")) as stream:  # pyrefly: ignore
                async for piece in stream:
                    yield 0, piece
            return
        found: asyncio.Queue[tuple[int, StepOutput | ApiError | None]] = asyncio.Queue()

        async def follow(place: int, ids: list[int]) -> None:
            try:
                name = f"{request_id}-{place}"
                async with aclosing(self.pieces(ids, params, name)) as stream:  # pyrefly: ignore
                    async for piece in stream:
                        found.put_nowait((place, piece))
            except ApiError as error:
                found.put_nowait((place, error))
            except Exception as error:  # a fault of ours: nobody may wait for what never comes
                logger.exception("an answer failed")
                told = ApiError(500, f"the server failed ({type(error).__name__})")
                found.put_nowait((place, told))
            finally:
                found.put_nowait((place, None))

        tasks = [asyncio.create_task(follow(place, ids)) for place, ids in enumerate(prompts)]
        try:
            left = len(tasks)
            while left:
                place, piece = await found.get()
                if isinstance(piece, ApiError):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield place, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def depths_of(piece: StepOutput) -> dict[str, Any]:
    """Return the tokens of a piece, and depths that are known by now: the prompt's come first."""
    return {"token_ids": piece.token_ids, "depths": piece.depths}


def event(body: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
