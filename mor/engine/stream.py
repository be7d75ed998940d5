"""The engine for asyncio: one thread steps it, readers await their pieces.

The event loop never waits for a tick. A reader that is slow holds its pieces in a queue of its own,
which is as long as its answer; nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from mor.engine.engine import Engine
from mor.engine.intake import Prompt
from mor.engine.outputs import StepOutput
from mor.engine.params import SamplingParams
from mor.log import logger


class EngineFault(RuntimeError):
    """A tick raised: the requests that were running are lost, the engine goes on."""


class _Reader(NamedTuple):
    """Who waits for the pieces of a request."""

    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[StepOutput | BaseException]
    wants_all: bool
    """every piece, or only the last of each answer"""


class AsyncEngine:
    """Owns an engine and the thread that steps it. Use it as `async with`, or `close` it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._readers: dict[str, _Reader] = {}
        self._is_closed = False
        self._door = threading.Lock()
        """held to close, and to order while it is open: no order comes too late to be seen"""
        self._thread = threading.Thread(target=self._run, name="mor-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        only_last: bool = False,
    ) -> AsyncGenerator[StepOutput, None]:
        """Yield the pieces of a request's answers as ticks bring them.

        only_last  yield the last piece of each answer alone; the event loop sleeps meanwhile
        Leaving the iterator, or cancelling the task, ends the request within a tick.
        Raises ValueError for what cannot be served, EngineFault when a tick failed
        """
        loop = asyncio.get_running_loop()
        reader = _Reader(loop, asyncio.Queue(), not only_last)
        added: asyncio.Future[str] = loop.create_future()

        def add() -> None:
            try:
                if self._is_closed:
                    raise EngineFault("the engine is closed")
                name = self._engine.add(prompt, params, request_id=request_id)
            except Exception as error:
                _call(loop, _settle, added, error)
                return
            self._readers[name] = reader
            _call(loop, _settle, added, name)

        self._order(add)
        try:
            name = await added
        except asyncio.CancelledError:
            self._let_go(lambda: self._forget_reader(reader))
            raise
        left = (params or SamplingParams()).n
        try:
            while left:
                piece = await reader.pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.finish_reason is not None
                yield piece
        finally:
            self._let_go(lambda: self._forget(name))

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raise the ValueError with which `generate` would refuse a request; queues nothing."""
        self._engine.intake.requests("check", prompt, params)

    @property
    def num_open(self) -> int:
        """Requests that somebody waits for."""
        return len(self._readers)

    async def abort(self, request_id: str) -> None:
        """End a request; its reader gets a last piece with the reason `abort`."""
        self._order(lambda: self._abort(request_id))

    async def close(self) -> None:
        """End the thread; readers of requests that still run get an EngineFault."""
        with self._door:
            if not self._is_closed:
                self._is_closed = True
                self._orders.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _order(self, order: Callable[[], None]) -> None:
        with self._door:
            if self._is_closed:
                raise EngineFault("the engine is closed")
            self._orders.put(order)

    def _let_go(self, order: Callable[[], None]) -> None:
        """Order what an engine that closes does anyway."""
        with self._door:
            if not self._is_closed:
                self._orders.put(order)

    def _run(self) -> None:
        """Work until told to end; should that fail too, nobody waits for what never comes."""
        try:
            self._work()
        except BaseException as error:
            logger.exception("the engine ended")
            with self._door:
                self._is_closed = True
            fault = EngineFault(f"the engine ended: {type(error).__name__}: {error}")
            for name, reader in list(self._readers.items()):
                _call(reader.loop, reader.pieces.put_nowait, fault)
                self._readers.pop(name)
            with contextlib.suppress(queue.Empty):
                while True:
                    order = self._orders.get(block=False)
                    if order is not None:
                        with contextlib.suppress(Exception):
                            order()  # whoever adds a request is told

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_closed

    def _work(self) -> None:
        """Carry out orders and step while there is work, until told to end."""
        while True:
            try:
                order = self._orders.get(block=not self._engine.has_work)
                if order is None:
                    self._fail(EngineFault("the engine was closed"))
                    return
                order()
                continue  # all orders that are there come before the next tick
            except queue.Empty:
                pass
            try:
                self._deliver(self._engine.step())
            except Exception as error:
                logger.exception("a tick failed; its requests are lost")
                fault = EngineFault(f"a tick failed: {type(error).__name__}: {error}")
                try:
                    self._engine.reset(str(fault))
                finally:
                    self._fail(fault)

    def _deliver(self, pieces: list[StepOutput]) -> None:
        """Hand out a tick's pieces with one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, StepOutput]]] = {}
        last = {p.request_id: p for p in pieces if p.finish_reason is not None}
        for name, piece in last.items():  # one of a request's pieces alone has its result
            if name in self._readers and self._engine.is_done(name):
                piece.result = self._engine.result(name)
        for piece in pieces:
            reader = self._readers.get(piece.request_id)
            if reader is not None and (reader.wants_all or piece.finish_reason is not None):
                by_loop.setdefault(reader.loop, []).append((reader, piece))
        for loop, handed in by_loop.items():
            _call(loop, _put_all, handed)

    def _abort(self, request_id: str) -> None:
        self._deliver(self._engine.abort(request_id))

    def _forget(self, request_id: str) -> None:
        self._readers.pop(request_id, None)
        self._engine.forget(request_id)

    def _forget_reader(self, reader: _Reader) -> None:
        """Forget a request whose reader went before it knew the request's name."""
        for name in [name for name, other in self._readers.items() if other is reader]:
            self._forget(name)

    def _fail(self, fault: EngineFault) -> None:
        for name, reader in list(self._readers.items()):
            _call(reader.loop, reader.pieces.put_nowait, fault)
            self._forget(name)


def _put_all(handed: list[tuple[_Reader, StepOutput]]) -> None:
    for reader, piece in handed:
        reader.pieces.put_nowait(piece)


def _settle(future: asyncio.Future[str], result: str | Exception) -> None:
    if future.done():
        return  # its task was cancelled
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _call(loop: asyncio.AbstractEventLoop, what: Callable[..., object], *args: object) -> None:
    """Call in an event loop, unless that has ended."""
    if not loop.is_closed():
        with contextlib.suppress(RuntimeError):  # it closed just now
            loop.call_soon_threadsafe(what, *args)
