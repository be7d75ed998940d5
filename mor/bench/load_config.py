"""Settings of `mor bench serve`: who is asked, for what, and how often. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mor.bench.serve_config import FULL_MIX, Mix


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchServeConfig:
    """Settings of `mor bench serve`. Raises ValueError, in one line, for what does not fit."""

    url: str = "http://127.0.0.1:8000"
    """server that speaks OpenAI's API, without the /v1"""
    bare: Path | None = None
    """model folder: start a server of it, run the same requests on its bare engine in turns with
    it, and say what the server loses; instead of --url"""
    rounds: int = 3
    """turns with --bare"""
    model: str = ""
    """name of the model; the first that the server lists unless given"""
    endpoint: Literal["completions", "chat"] = "completions"
    """which of the two is asked"""
    num_requests: int = 128
    """requests to send, after those that warm up"""
    rate: float = math.inf
    """requests a second, at random moments (Poisson); inf sends as many as --concurrency allows"""
    concurrency: int = 32
    """requests that are open at a time at most"""
    stream: bool = True
    """ask for server-sent events, which times first tokens; --no-stream asks for whole answers"""
    trace: Path | None = None
    """JSONL of requests instead of drawn lengths: prompt_len, output_len, arrival_s"""
    text: Path | None = None
    """UTF-8 file to cut prompts from, four bytes a token; random token ids without it"""
    vocab_size: int = 1000
    """random token ids are below this"""
    warmup: int = 4
    """requests that are sent first and not counted"""
    timeout_s: float = 600.0
    """seconds after which an answer counts as an error"""
    api_key_env: str = "OPENAI_API_KEY"
    """environment variable with the key, where the server wants one"""
    seed: int = 0
    """seed of lengths, prompts and moments"""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; give one with http:// or https://")
        for name in ("num_requests", "concurrency", "vocab_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; give 0 or more")
        for name in ("rate", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.bare is not None and (self.endpoint == "chat" or self.text or self.trace):
            raise ValueError("bare compares completions of random token ids; leave out the others")
        if self.bare is not None and self.rate != float("inf"):
            raise ValueError(f"rate is {self.rate}, but bare asks as fast as it can; leave one out")
        if self.endpoint == "chat" and self.text is None:
            raise ValueError("chat takes text, not token ids; give --text FILE")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to 2**63 - 1")

    @property
    def mix(self) -> Mix:
        return FULL_MIX
