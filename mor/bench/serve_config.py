"""What is served beside what: shapes, lengths and the settings of decode and prefill benchmarks.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from mor.config import ModelConfig

ServeShape = Literal["small", "135m", "360m"]
Routing = Literal["paper", "ours"]
Dtype = Literal["auto", "float32", "bfloat16"]

MIN_ROUNDS = 3
"""fewer per-round ratios have no quartiles"""
QUICK_ROUNDS = 5
DEFAULT_ROUNDS = 9
REQUESTS_PER_SLOT = 4
"""requests of a run for each that is in flight, so that most of a run has a full batch"""
MAX_SLOTS = 3
"""most requests that MoR is tried with, over those in flight, in the search for the largest"""
MAX_EFFICIENCY = 1.02
"""a run that is quicker than its prediction by more than this was not measured right"""
EFFICIENCY_TARGET = 0.95
BLOCK_SIZE = 16
"""tokens of a page in calls of kernels that are timed alone, as in most engines"""


class Lengths(NamedTuple):
    """Log-normal lengths in tokens: the median, and where they are cut."""

    median: int
    least: int
    most: int


class Mix(NamedTuple):
    """Lengths of prompts and of answers."""

    prompt: Lengths
    output: Lengths


FULL_MIX = Mix(Lengths(96, 32, 512), Lengths(96, 32, 256))
QUICK_MIX = Mix(Lengths(48, 16, 128), Lengths(48, 16, 128))

_BASES: dict[ServeShape, ModelConfig] = {
    "small": ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=14,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    "135m": ModelConfig(),
    "360m": ModelConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ),
}
_LAYERS: dict[tuple[ServeShape, int], int] = {("135m", 3): 32, ("360m", 4): 34}
"""unrolled layers where the paper's vanilla depth does not divide, as in recipes/paper-*.toml"""


def served_config(shape: ServeShape, recursions: int, routing: Routing = "paper") -> ModelConfig:
    """Return the MoR of a shape: the paper's layers, depths drawn by the random router.

    Raises ValueError where the shape's layers do not divide
    """
    base = _BASES[shape]
    is_ours = routing == "ours"
    return dataclasses.replace(
        base,
        num_hidden_layers=_LAYERS.get((shape, recursions), base.num_hidden_layers),
        num_recursions=recursions,
        router="random",
        gating="residual" if is_ours else "weighted",
        capacity=tuple(0.25**r for r in range(recursions)) if is_ours else (),
        kv_strategy="shared" if is_ours else "per_recursion",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Settings that both benchmarks have. Raises ValueError, in one line, for what does not fit."""

    shape: ServeShape = "135m"
    """small: 14 layers, width 128; 135m and 360m: the paper's"""
    routing: Routing = "paper"
    """shares of tokens at each recursion: paper, (R - r) / R; ours, 1/4 of those before, and the
    keys and values of recursion 1 alone, as in recipes/experiments/goal-cpu.toml"""
    recursions: tuple[int, ...] = (3,)
    """models to time, by their recursions, each beside its vanilla twin"""
    model: Path | None = None
    """folder of a trained MoR instead of a shape: depths are then its router's own"""
    text: Path | None = None
    """UTF-8 file to cut prompts from, for trained weights; random ids without"""
    rounds: int = 0
    """rounds that are timed, 3 or more; 0 for 9, or 5 when quick"""
    quick: bool = False
    """short prompts and answers, 5 rounds; 135m ends within five minutes on two cores"""
    max_num_batched_tokens: int = 512
    """rows of one call of the block: decode rows and prompt rows together"""
    dtype: Dtype = "auto"
    """type of weights, keys and values; auto is bfloat16 where the processor multiplies it"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    seed: int = 0
    """seed of weights, lengths, prompts and drawn depths"""

    def __post_init__(self) -> None:
        if self.rounds and self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}; give {MIN_ROUNDS} or more, or 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to 2**63 - 1")
        if not self.recursions or min(self.recursions) < 2:
            raise ValueError(
                f"recursions is {list(self.recursions)}; give numbers of 2 or more, the twin of "
                "one recursion runs beside each"
            )
        if self.text is not None and self.model is None:
            raise ValueError("text is for trained weights; give --model too")
        if self.model is None:
            for recursions in self.recursions:
                served_config(self.shape, recursions, self.routing)
        elif self.routing != "paper":
            raise ValueError("routing is for shapes; a trained model has its own")

    @property
    def num_rounds(self) -> int:
        return self.rounds or (QUICK_ROUNDS if self.quick else DEFAULT_ROUNDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchDecodeConfig(ServeSettings):
    """Settings of `mor bench decode`."""

    in_flight: tuple[int, ...] = (32,)
    """requests that run at a time, rows that wait for the coda included"""
    kv_cache_bytes: int = 0
    """bytes of keys and values for each model; 0 for what the twin fills at its fullest"""
    trace: Path | None = None
    """JSONL of requests instead of drawn lengths: prompt_len, output_len, arrival_s, depths"""
    peers: bool = False
    """time other engines that are installed on the twin's weights too"""
    vllm_python: Path | None = None
    """Python of an environment with vLLM's CPU build, for peers; its pins are not ours"""
    openvino_python: Path | None = None
    """Python of an environment with openvino-genai and optimum-intel, for peers"""

    def __post_init__(self) -> None:
        # super() without arguments does not work in a slotted dataclass
        super(BenchDecodeConfig, self).__post_init__()
        if not self.in_flight or min(self.in_flight) < 1:
            raise ValueError(f"in_flight is {list(self.in_flight)}; give numbers of 1 or more")
        if self.kv_cache_bytes < 0:
            raise ValueError(f"kv_cache_bytes is {self.kv_cache_bytes}; give 0 or more")
        if 2 * MAX_SLOTS * max(self.in_flight) >= 2**19:
            raise ValueError(f"in_flight is {max(self.in_flight)}; give fewer than 87381")
        for name in ("vllm_python", "openvino_python"):
            python = getattr(self, name)
            if python is not None and not python.is_file():
                raise ValueError(f"{name} is {python}, which is no file; give a Python")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPrefillConfig(ServeSettings):
    """Settings of `mor bench prefill`."""

    prompt_lens: tuple[int, ...] = (128, 512, 1024)
    """tokens of the prompts; quick leaves those above 512 out"""
    batch_tokens: int = 4096
    """prompt tokens of a run, in whole prompts; one prompt at least"""

    def __post_init__(self) -> None:
        super(BenchPrefillConfig, self).__post_init__()
        if not self.prompt_lens or min(self.prompt_lens) < 1:
            raise ValueError(f"prompt_lens is {list(self.prompt_lens)}; give numbers of 1 or more")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; give 1 or more")

    @property
    def lens(self) -> tuple[int, ...]:
        short = tuple(n for n in self.prompt_lens if n <= 512)
        return short if self.quick and short else self.prompt_lens
