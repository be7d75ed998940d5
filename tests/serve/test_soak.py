"""Mixed load for a while: answers stay what they were, memory and pages stay flat.

MOR_SOAK_S sets how long (seconds), MOR_SOAK_LOG a CSV file for what was seen, a line a minute at
most.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.serve.test_failures import LONG, started
from tests.serve.test_fuzz import broken
from tests.serve.test_grammar import SCHEMA, asked

SECONDS = float(os.environ.get("MOR_SOAK_S", "20"))
WORKERS = 6
PAUSE_S = 0.3
"""of a worker between two requests, on average"""
KINDS = ("whole", "stream", "cancel", "chat", "schema", "broken", "many", "depth")


class Soak:
    """What is sent, and what came of it."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self.wanted = ""
        self.seen = dict.fromkeys(KINDS, 0)
        self.faults: list[str] = []

    async def post(self, path: str, body: Any) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"Content-Type": "application/json"}
        async with self.session.post(path, data=data, headers=head) as response:
            return response.status, await response.text()

    async def one(self, kind: str, draw: random.Random) -> None:
        """Send a request of a kind and check its answer."""
        if kind == "broken":
            path, data = broken(draw)
            status, text = await self.post(path, data)
            assert status < 500, (data, text)
        elif kind == "cancel":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.random() * 0.02):
                    await self.post("/v1/completions", {**LONG, "stream": draw.random() < 0.5})
        elif kind == "schema":
            status, text = await self.post("/v1/chat/completions", asked(SCHEMA))
            assert set(json.loads(json.loads(text)["choices"][0]["message"]["content"])) == {
                *("name", "old")
            }
        elif kind == "chat":
            turn = {"role": "user", "content": "the dog " * draw.randrange(1, 4)}
            status, text = await self.post(
                "/v1/chat/completions", {"messages": [turn], "max_tokens": 8}
            )
            assert status == 200, text
        elif kind == "many":
            body = {**LONG, "prompt": ["the cat"] * 3, "n": 2, "temperature": 0.7}
            status, text = await self.post("/v1/completions", body)
            assert status == 200 and len(json.loads(text)["choices"]) == 6, text
        else:
            body: dict[str, Any] = {**LONG, "stream": kind == "stream"}
            if kind == "depth":
                body["depth"] = draw.choice([1, "low", "medium", "max", 2.5])
            status, text = await self.post("/v1/completions", body)
            assert status == 200, text
            if kind == "stream":
                events = [json.loads(one[6:]) for one in text.split("\n\n")[:-2]]
                assert "".join(e["choices"][0]["text"] for e in events) == self.wanted
            elif kind == "whole":
                assert json.loads(text)["choices"][0]["text"] == self.wanted
        self.seen[kind] += 1

    async def work(self, number: int, end_s: float) -> None:
        draw = random.Random(number)
        while time.monotonic() < end_s and not self.faults:
            kind = draw.choice(KINDS)
            try:
                await self.one(kind, draw)
            except Exception as error:
                self.faults.append(f"{kind}: {type(error).__name__}: {error}")
            await asyncio.sleep(PAUSE_S * 2 * draw.random())

    async def watch(self, pid: int, end_s: float) -> list[dict[str, float]]:
        """Note memory and the server's own figures at moments."""
        rows, begin_s = [], time.monotonic()
        every_s = min(60.0, SECONDS / 10)
        while time.monotonic() < end_s and not self.faults:
            await asyncio.sleep(every_s)
            async with self.session.get("/metrics") as response:
                lines = (await response.text()).splitlines()
            told = {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}
            pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
            rows.append(
                {
                    "seconds": round(time.monotonic() - begin_s),
                    "rss_mib": round(int(pages) * os.sysconf("SC_PAGESIZE") / 2**20, 1),
                    "files_open": len(os.listdir(f"/proc/{pid}/fd")),
                    "running": told["mor_requests_running"],
                    "waiting": told["mor_requests_waiting"],
                    "pages_free": told["mor_pages_free"],
                    "tokens": told["mor_tokens_total"],
                    **{
                        name: told[f'mor_requests_total{{outcome="{name}"}}']
                        for name in ("done", "cancelled", "refused", "failed", "timeout")
                    },
                }
            )
        return rows


@pytest.mark.slow
def test_mixed_load_leaves_memory_and_pages_flat(tiny_run: Path):
    server, port = started(tiny_run / "model")
    assert server.stderr is not None
    reader = threading.Thread(target=server.stderr.read)  # else its log would fill the pipe
    reader.start()
    try:
        rows, soak = asyncio.run(_soak(server.pid, port))
    finally:
        server.kill()
        server.wait()
        reader.join()
        server.stderr.close()
    if "MOR_SOAK_LOG" in os.environ:
        with open(os.environ["MOR_SOAK_LOG"], "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    assert not soak.faults, soak.faults
    assert all(count > 0 for count in soak.seen.values()), soak.seen
    assert rows[-1]["failed"] == rows[-1]["timeout"] == 0
    warm = rows[len(rows) // 4]
    assert rows[-1]["rss_mib"] < 1.05 * warm["rss_mib"] + 8, (warm, rows[-1])
    assert rows[-1]["files_open"] <= warm["files_open"] + 2 * WORKERS


async def _soak(pid: int, port: int) -> tuple[list[dict[str, float]], Soak]:
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as session:
        soak = Soak(session)
        _, text = await soak.post("/v1/completions", LONG)
        soak.wanted = json.loads(text)["choices"][0]["text"]
        end_s = time.monotonic() + SECONDS
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(soak.watch(pid, end_s))
            for number in range(WORKERS):
                group.create_task(soak.work(number, end_s))
        rows = watch.result()
        _, text = await soak.post("/v1/completions", LONG)
        assert json.loads(text)["choices"][0]["text"] == soak.wanted
        async with session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        running = [line for line in lines if line.startswith("mor_requests_running ")]
        assert running == ["mor_requests_running 0.0"]
    return rows, soak
