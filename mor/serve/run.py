"""`mor serve`: open a model folder, put the application over it, listen until told to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import uvicorn

from mor.chat_template import ChatTemplate
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
    service = open_service(folder, config)
    app = build_app(service, config, keys)
    if config.host not in ("127.0.0.1", "localhost", "::1") and not keys.are_wanted:
        logger.warning("%s is open to others and no API key is wanted", config.host)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(config.drain_s)),
            server_header=False,
        )
    )
    logger.info("http://%s:%d serves %s; Ctrl-C ends it", config.host, config.port, folder)
    server.run()
    return {"model": str(folder)}


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
    metrics = Metrics(engine.model.config.num_recursions)
    watch(metrics, engine)
    return Service(
        AsyncEngine(engine),
        tokenizer,
        ChatTemplate.load(folder, tokenizer),
        config,
        metrics,
        trained_depth=engine.model.config.capacity_depth,
        full_depth=engine.model.config.num_recursions,
        bos_token_id=engine.model.config.bos_token_id,
        eos_token_id=engine.model.config.eos_token_id,
        max_model_len=engine.max_model_len,
    )


def watch(metrics: Metrics, engine: Engine) -> None:
    """Let `/metrics` read the engine's state; plain reads of numbers, which no tick waits for."""
    metrics.gauge(
        "mor_requests_running", "Requests that run", lambda: len(engine.scheduler.running)
    )
    metrics.gauge(
        "mor_requests_waiting", "Requests that wait", lambda: len(engine.scheduler.waiting)
    )
    metrics.gauge(
        "mor_pages_free", "Free pages of keys and values", lambda: len(engine.blocks.free)
    )
    metrics.gauge("mor_pages", "Pages of keys and values", lambda: engine.blocks.num_pages)
    for r in range(engine.model.config.num_recursions):
        metrics.gauge(
            "mor_active_share",
            "Share of tokens active at a recursion, running mean",
            lambda r=r: float(engine.scheduler.active_share[r]),
            recursion=str(r + 1),
        )
