"""What a server costs: the same requests on the bare engine and over HTTP, in turns.

The server runs in a process of its own, as a user would start it; the load generator stands in this
one and takes from the same processor, so its time is told apart.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mor.bench.load import load_requests, send_load
from mor.bench.load_config import BenchServeConfig
from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.log import logger
from mor.ops.device import pick_device, pick_dtype

START_S = 300.0


def bench_bare(folder: Path, config: BenchServeConfig) -> dict[str, Any]:
    """Run rounds of both; returns tokens a second of each round, their ratio and the medians.

    Every round has requests of its own, so that no prefix cache serves the later ones.
    Raises ValueError when the server does not start
    """
    device = pick_device("auto")
    slots = config.concurrency
    settings = EngineConfig(max_num_seqs=slots, max_num_batched_tokens=max(512, 2 * slots))
    engine = Engine.load(folder, settings, dtype=pick_dtype("auto", device), device=device)
    rounds, served = [], dict[str, Any]()
    with started(folder, slots) as url:
        for place in range(config.rounds + 1):
            one = dataclasses.replace(config, url=url, bare=None, seed=config.seed + place)
            bare = _run_bare(engine, one)
            served = asyncio.run(send_load(one))
            if served["errors"]:
                raise ValueError(f"the server failed: {served['errors']}")
            logger.info(
                "round %d: bare %.1f tokens/s, served %.1f, generator %.1f s of processor time",
                place,
                bare,
                served["tokens_per_s"],
                served["client_cpu_s"],
            )
            if place:  # the first warms up
                rounds.append(
                    {
                        "bare_tokens_per_s": bare,
                        "served_tokens_per_s": served["tokens_per_s"],
                        "ratio": served["tokens_per_s"] / bare,
                        "seconds": served["seconds"],
                        "client_cpu_s": served["client_cpu_s"],
                    }
                )
    last = {name: value for name, value in served.items() if name != "url"}
    return {**last, "rounds": rounds, "ratio": statistics.median(one["ratio"] for one in rounds)}


def _run_bare(engine: Engine, config: BenchServeConfig) -> float:
    """Run a round's requests on the engine alone; returns tokens a second."""
    requests = load_requests(config)
    asked = [
        SamplingParams(max_tokens=one.output_len, temperature=0, ignore_eos=True)
        for one in requests
    ]
    prompts = [list(one.prompt_ids) for one in requests]
    engine.generate(prompts[: config.warmup], asked[: config.warmup])
    start_s = time.perf_counter()
    outputs = engine.generate(prompts[config.warmup :], asked[config.warmup :])
    drawn = sum(len(output.outputs[0].token_ids) for output in outputs)
    return drawn / (time.perf_counter() - start_s)


@contextmanager
def started(folder: Path, slots: int) -> Iterator[str]:
    """Run `mor serve` in a process of its own while the block runs; yields its address."""
    command = [sys.executable, "-m", "mor", "serve", str(folder), "--port", "0"]
    command += ["--max-num-seqs", str(slots)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield _address(server)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _address(server: subprocess.Popen[str]) -> str:
    """Wait until the server is ready; its later lines are read and dropped, or it would block."""
    assert server.stderr is not None
    end_s, url, said = time.monotonic() + START_S, "", ""
    while not url:
        line = server.stderr.readline()
        if not line:
            raise ValueError(f"the server did not start: {said.strip() or 'it said nothing'}")
        said, found = line, re.search(r"http://[^ ]+:\d+", line)
        url = found.group() if found else ""
    lines = server.stderr
    threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return url
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ValueError(f"the server was not ready after {START_S:.0f} s")
