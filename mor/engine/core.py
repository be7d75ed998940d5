"""The engine's nouns: a request, its flights through the model, and what one tick runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mor.engine.params import SamplingParams
from mor.engine.prefix import Entry
from mor.engine.sampler import SampleRow, TokenLogprobs
from mor.engine.stops import StopChecker

Ints = npt.NDArray[np.int64]


class DepthPolicy(NamedTuple):
    """Who goes on, for one request. Keys and values are shared between equal policies only."""

    max_recursions: int
    thresholds: tuple[float, ...]
    """a token goes on at recursion r if its logit exceeds thresholds[r]; unused by some routers"""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence: a prompt, what was drawn after it, and how far it went through the model."""

    request_id: str
    index: int
    """which of the n answers to the prompt"""
    prompt_ids: list[int]
    params: SamplingParams
    policy: DepthPolicy
    stops: StopChecker
    sample_row: SampleRow
    """what the sampler keeps of it; reads the token lists below"""
    output_ids: list[int]
    arrival_s: float = field(default_factory=time.perf_counter)

    # scheduler
    slot: int = -1
    """row of the tables; -1 while waiting"""
    num_started: int = 0
    """tokens that entered the model"""
    entry: Entry | None = None
    """last entry of the prefix cache that these tokens made or met"""
    num_kept: int = 0
    """tokens up to that entry"""
    is_cacheable: bool = True
    num_cached_tokens: int = 0
    """prompt tokens that the prefix cache gave at admission"""
    num_preemptions: int = 0

    # tokens
    num_tokens: int = field(init=False)
    """of prompt and output together"""
    depths: list[int] = field(default_factory=list)
    """depth of each token that went through the model, first token first; kept at preemption"""
    num_told: int = 0
    """depths that were handed out"""
    num_done: int = 0
    """tokens that went through the model since the last (re)start"""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    text: str = ""
    first_token_s: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that are known and have not entered the model."""
        return self.num_tokens - self.num_started

    def untold_depths(self) -> list[int]:
        """Return depths that were not handed out yet, those that the prefix cache knew first."""
        fresh = self.depths[self.num_told :]
        self.num_told = len(self.depths)
        return fresh

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return tokens of prompt and output together."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : stop - split]
        return self.prompt_ids[start:stop] + self.output_ids[: max(stop - split, 0)]


@dataclass(slots=True, eq=False)
class Flight:
    """Consecutive tokens of a request on their way through the model: one, or a prompt's chunk."""

    request: Request
    start: int
    """position of the first token"""
    rows: Ints
    """state row of every token"""
    active: Ints
    """state rows of the tokens still in the block, in order of position"""
    recursion: int = 0
    """recursions done by the active tokens"""

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)

    @property
    def wants_logits(self) -> bool:
        """Whether the last token's logits say what comes next."""
        return self.stop == self.request.num_tokens


class Batch(NamedTuple):
    """What one tick runs."""

    copies: list[tuple[int, int]]
    """pages to copy before anything is written"""
    entering: list[Flight]
    """flights that pass the prelude in this tick"""
    in_block: list[Flight]
    """flights that pass the block, those that enter among them"""
