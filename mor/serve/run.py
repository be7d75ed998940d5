"""`mor serve`: open a model folder, put the application over it, listen until told to end."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import uvicorn

from mor.chat_template import ChatTemplate
from mor.config import ModelConfig
from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.stream import AsyncEngine
from mor.log import logger
from mor.ops.device import pick_device, pick_dtype
from mor.serve.answers import Service
from mor.serve.app import build_app
from mor.serve.config import Keys, ServeConfig
from mor.serve.metrics import Metrics


def serve(folder: Path, config: ServeConfig) -> dict[str, Any]:
    """Serve a model folder until SIGTERM or Ctrl-C; running requests may end first.

    Raises ValueError for a folder or settings that do not fit
    """
    keys = Keys(config)
    with bind(config.host, config.port) as listener:  # first: loading takes longer than a mistake
        _run(open_service(folder, config), config, keys, listener)
    return {"model": str(folder)}


def _run(service: Service, config: ServeConfig, keys: Keys, listener: socket.socket) -> None:
    app = build_app(service, config, keys)
    if config.host not in ("127.0.0.1", "localhost", "::1") and not keys.are_wanted:
        logger.warning("%s is open to others and no API key is wanted", config.host)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(config.drain_s)),
            server_header=False,
        )
    )
    host = f"[{config.host}]" if ":" in config.host else config.host
    port, name = listener.getsockname()[1], config.served_model_name
    logger.info("http://%s:%d serves %s; Ctrl-C ends it", host, port, name)
    server.run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """Take an address without listening yet; ValueError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(
            f"{host} port {port} cannot be had ({error.strerror or error}); "
            "give others with --host and --port"
        ) from error
    return listener


def open_service(folder: Path, config: ServeConfig) -> Service:
    """Load the model and start the engine's thread."""
    device = pick_device(config.device)
    settings = EngineConfig(
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        kv_cache_bytes=config.kv_cache_bytes,
        max_num_batched_tokens=max(512, 2 * config.max_num_seqs),
        backend=config.backend,
    )
    engine = Engine.load(folder, settings, dtype=pick_dtype(config.dtype, device), device=device)
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json; a server needs one")
    metrics = Metrics()
    watch(metrics, engine)
    return Service(
        AsyncEngine(engine),
        tokenizer,
        ChatTemplate.load(folder, tokenizer, bos_token_id=engine.model.config.bos_token_id),
        config,
        metrics,
        vocab_size=engine.model.config.vocab_size,
        num_recursions=engine.model.config.num_recursions,
        trained_depth=engine.model.config.capacity_depth,
        depth_points=depth_points(folder, engine.model.config),
        bos_token_id=engine.model.config.bos_token_id,
        eos_token_id=engine.model.config.eos_token_id,
        max_model_len=engine.max_model_len,
    )


def depth_points(folder: Path, config: ModelConfig) -> dict[str, float | None]:
    """Return the mean depths that names stand for; None for the thresholds as trained.

    With m the trained mean depth: low 1 + (m - 1) / 3, medium 1 + 2 (m - 1) / 3, high as trained,
    max every recursion for every token. `depths.json` of the folder, an object of names and mean
    depths, adds to them or puts others in their place. Raises ValueError for a file that does not
    fit
    """
    trained, full = config.capacity_depth, config.num_recursions
    points: dict[str, float | None] = {"high": None}
    if config.router in ("expert_choice", "threshold"):
        points = {"low": 1 + (trained - 1) / 3, "medium": 1 + 2 * (trained - 1) / 3, "high": None}
        points["max"] = float(full)
    elif config.router == "fixed":
        points["max"] = None
    path = folder / "depths.json"
    if path.is_file():
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(own, dict):
            raise ValueError(f"{path} does not hold an object of names and mean depths")
        for name, depth in own.items():
            if not isinstance(depth, int | float) or not 1 <= depth <= full:
                raise ValueError(f"{path}: {name} is {depth}; give a mean depth from 1 to {full}")
            points[name] = float(depth)
    return points


def watch(metrics: Metrics, engine: Engine) -> None:
    """Let `/metrics` read the engine's state; plain reads of numbers, which no tick waits for.

    What a reset builds anew (scheduler, blocks) is looked up at every read.
    """
    gauge, counter = metrics.gauge, metrics.counter
    gauge("mor_requests_running", "Requests that run", lambda: len(engine.scheduler.running))
    gauge("mor_requests_waiting", "Requests that wait", lambda: len(engine.scheduler.waiting))
    gauge("mor_pages_free", "Free pages of keys and values", lambda: len(engine.blocks.free))
    gauge("mor_pages", "Pages of keys and values", lambda: engine.blocks.num_pages)
    metrics.depths(lambda: engine.scheduler.depth_counts.tolist())
    counter("mor_tokens", "Tokens drawn", lambda: engine.num_drawn)
    counter("mor_ticks", "Ticks of the engine", lambda: engine.scheduler.tick)
    counter("mor_rows", "Rows of all ticks", lambda: engine.scheduler.num_rows_run)
    counter("mor_preemptions", "Requests put off", lambda: engine.scheduler.num_preemptions)
    gauge(
        "mor_active_share",
        "Share of tokens active at a recursion, running mean",
        lambda: {str(r + 1): float(s) for r, s in enumerate(engine.scheduler.active_share)},
        label="recursion",
    )
    gauge(
        "mor_kv_bytes",
        "Keys and values of running requests; recursion 0 is the layers outside the block",
        lambda: {str(r): float(n) for r, n in enumerate(engine.kv_bytes_by_table)},
        label="recursion",
    )
