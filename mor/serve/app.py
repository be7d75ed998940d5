"""The web application: routes, limits, errors in OpenAI's shape.

An event loop that never waits for a tick: the engine steps in a thread of its own
(`mor/engine/stream.py`), handlers await its pieces.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mor
from mor.engine.params import SamplingParams
from mor.log import logger
from mor.serve.answers import ApiError, Service
from mor.serve.chats import Chats
from mor.serve.completions import Completions
from mor.serve.config import Keys, ServeConfig
from mor.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

OPEN_PATHS = ("/health", "/ready", "/")
"""need no key"""
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def build_app(service: Service, config: ServeConfig, keys: Keys) -> FastAPI:
    """Return the application around a service that is up."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        warm = asyncio.create_task(_warm_up(app, service))
        yield
        warm.cancel()
        await service.engine.close()

    about = {"title": "mor", "version": mor.__version__}
    app = FastAPI(**about, lifespan=life, docs_url=None, redoc_url=None)
    app.state.is_ready = False
    app.add_middleware(Gate, config=config, keys=keys)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client sends many of its own
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    _errors(app)
    _routes(app, service, config)
    return app


async def _warm_up(app: FastAPI, service: Service) -> None:
    """Draw a few tokens, so that the first request finds everything in place."""
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    try:
        async for _ in service.engine.generate([0, 0, 0], params, request_id="warm-up"):
            pass
    except Exception as error:
        logger.error("warming up failed: %s", error)
        return
    app.state.is_ready = True


def _errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else {}
        return JSONResponse(error.body, error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return JSONResponse(ApiError(400, message).body, 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code)


def _routes(app: FastAPI, service: Service, config: ServeConfig) -> None:
    name = config.served_model_name
    completions, chats = Completions(service), Chats(service)

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.engine.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine has ended"}, 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        if app.state.is_ready and service.engine.is_alive:
            return JSONResponse({"status": "ready"})
        status = "warming up" if service.engine.is_alive else "the engine has ended"
        return JSONResponse({"status": status}, 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        about = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "mor",
            "max_model_len": service.max_model_len,
            "num_recursions": service.num_recursions,
            "trained_depth": service.trained_depth,
            "depth_points": service.depth_points,
        }
        return {"object": "list", "data": [about]}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if body.messages:
            tools = body.tools or ()
            ids = await asyncio.to_thread(service.template_ids, body.messages, tools)
        elif body.prompt is not None:
            ids = await asyncio.to_thread(service.prompt_ids, body.prompt)
        else:
            raise ApiError(400, "give prompt or messages")
        return {"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        last = service.vocab_size - 1
        outside = [token for token in body.tokens if not 0 <= token <= last]
        if outside:
            raise ApiError(400, f"tokens: {outside[0]} is no token; ids go from 0 to {last}")
        return {"prompt": service.tokenizer.decode(body.tokens)}

    async def answer(
        request: Request, body: Any, count: int, endpoint: Any, request_id: str
    ) -> Response:
        """Answer whole or as a stream; its room is taken until it is done with.

        endpoint  Completions or Chats, whose bodies and ids go together
        """
        service.take_room(count)
        is_kept = False
        try:
            # In a thread: a long text, a template or a grammar must not keep others waiting.
            prompts, params = await asyncio.to_thread(
                lambda: (endpoint.ids(body), endpoint.params(body))
            )
            if not body.stream:
                work = endpoint.whole(body, prompts, params, request_id)
                return await _while_connected(request, work)
            events = endpoint.stream(body, prompts, params, request_id)
            is_kept = True
            return EventStream(events, config, on_end=lambda: service.give_room(count))
        finally:
            if not is_kept:
                service.give_room(count)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Any:
        service.check_model(body.model)
        count = len(body.prompts())
        if not count:
            raise ApiError(400, "prompt is empty; give a text, token ids, or a list of them")
        request_id = f"cmpl-{request.state.request_id}"
        return await answer(request, body, count * max(body.n, 1), completions, request_id)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        service.check_model(body.model)
        request_id = f"chatcmpl-{request.state.request_id}"
        return await answer(request, body, max(body.n, 1), chats, request_id)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = files("mor.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _policy(text)})


def _policy(page: str) -> str:
    """Allow the page its own script and style, by their hashes, and nothing else."""
    import base64
    import re

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        sums = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{one}'" for one in sums)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    )


async def _while_connected(request: Request, work: Awaitable[dict[str, Any]]) -> JSONResponse:
    """Await an answer, and end it when the client goes."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away", code="cancelled")
        return JSONResponse(task.result())
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events that ends with its client, and with one that stalls."""

    def __init__(
        self, events: AsyncIterator[str], config: ServeConfig, *, on_end: Callable[[], None]
    ) -> None:
        """on_end: told once, when nothing more is sent."""
        super().__init__()
        self.events, self.config, self.on_end = events, config, on_end
        self.sending_since = math.inf
        """since when a piece waits for its reader; infinite while none does"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        watch = asyncio.create_task(gone())
        work = asyncio.create_task(self._send(send))
        guard = asyncio.create_task(self._guard())
        try:
            await asyncio.wait({watch, work, guard}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for one in (watch, work, guard):
                one.cancel()
            await asyncio.gather(watch, work, guard, return_exceptions=True)
            try:
                await self.events.aclose()  # pyrefly: ignore
            finally:
                self.on_end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        async for one in self.events:
            self.sending_since = time.monotonic()
            await send(_body(one.encode(), more=True))
            self.sending_since = math.inf
        await send(_body(b"", more=False))

    async def _guard(self) -> None:
        """Return when the reader has taken nothing for too long."""
        limit_s = self.config.stall_timeout_s
        while (waited_s := time.monotonic() - self.sending_since) < limit_s:
            await asyncio.sleep(min(limit_s, limit_s - waited_s))
        logger.warning("a reader took no piece for %g s and is let go", limit_s)


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Gate:
    """What every request passes: its id, its key, the size of its body, a line in the log."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys) -> None:
        self.app, self.config, self.keys = app, config, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        is_fine = 0 < len(given) <= 64 and all(c.isalnum() or c in "-_." for c in given)
        # Two requests may bring one id; the engine's names must differ.
        request_id = uuid.uuid4().hex
        shown = given if is_fine else request_id
        scope.setdefault("state", {})["request_id"] = request_id
        start_s, status, seen = time.perf_counter(), 0, 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", shown.encode("latin-1")),
                ]
            await send(message)

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.config.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        try:
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            if scope["path"] not in OPEN_PATHS and not self.keys.allow(authorization):
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await self._refuse(error, scope, receive, answer)
                return
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self.config.max_body_bytes:
                await self._refuse(ApiError(413, self._too_large), scope, receive, answer)
                return
            await self.app(scope, limited, answer)
        except Exception:
            logger.exception("a handler failed")
            if status:  # a part is out: the connection breaks, which tells its reader
                status = 500
                raise
            told = ApiError(500, "the server failed on this request", kind="server_error")
            await self._refuse(told, scope, receive, answer)
        finally:
            if scope["path"].startswith("/v1/") or status >= 400:
                line = {
                    "id": shown,
                    "path": scope["path"],
                    "status": status or 499,
                    "seconds": round(time.perf_counter() - start_s, 4),
                }
                logger.info("%s", json.dumps(line))

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.config.max_body_bytes} bytes"

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(error.body, error.status)(scope, receive, send)
