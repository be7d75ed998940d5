"""A real server on a free port of this machine, over the tiny model."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn

from mor.serve.answers import Service
from mor.serve.app import build_app
from mor.serve.config import Keys, ServeConfig
from mor.serve.run import open_service


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = [line[6:] for line in self.text.split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


class Client:
    """Asks one server."""

    def __init__(self, port: int, service: Service) -> None:
        self.port, self.service = port, service

    def get(self, path: str, **headers: str) -> Answer:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask("POST", path, data, {"Content-Type": "application/json", **headers})

    def _ask(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            told = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, told, response.read().decode())
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def wait_idle(self) -> None:
        """Wait until no request is open and every page that no cache keeps is free."""
        end_s = time.monotonic() + 20
        engine = self.service.engine._engine
        while self.service.engine.num_open or engine.requests:
            assert time.monotonic() < end_s, "a request did not end"
            time.sleep(0.01)
        engine.scheduler.check_integrity()


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Client]:
    """Serve a folder while the block runs."""
    config = ServeConfig(device="cpu", dtype="float32", backend="torch", **settings)
    keys = Keys(config)
    service = open_service(folder, config)
    app = build_app(service, config, keys)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started or not app.state.is_ready:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Client(port, service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(tiny_run: Path) -> Iterator[Client]:
    with running(tiny_run / "model", max_num_seqs=4, max_queue=8) as one:
        yield one


@pytest.fixture
def start(tiny_run: Path) -> Callable[..., Any]:
    return lambda **settings: running(tiny_run / "model", **settings)


def slowly(step: Callable[[], Any], seconds: float = 0.02) -> Callable[[], Any]:
    """Return a step of the engine that waits first."""

    def wait_and_step() -> Any:
        time.sleep(seconds)
        return step()

    return wait_and_step
