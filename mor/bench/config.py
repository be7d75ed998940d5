"""What is timed beside what: shapes, rows, and the settings of a benchmark. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from mor.config import ModelConfig

ShapeName = Literal["small", "135m", "360m"]
RowName = Literal["vanilla", "rec3", "mor2", "mor3", "mor4"]

PEER = "transformers"
"""name of the row of transformers' model"""
MIN_ROUNDS = 9
"""fewer per-round ratios have no quartiles worth printing"""
DEFAULT_ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Shape:
    """A vanilla model and the batch it is stepped on; every row has the same unrolled layers."""

    model: ModelConfig
    context: int
    batch_rows: int
    quick_batch_rows: int


# 2 own layers and 12 or 24 others: they divide by 2, 3 and 4 recursions.
SHAPES: dict[ShapeName, Shape] = {
    "small": Shape(
        ModelConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=14,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        context=512,
        batch_rows=8,
        quick_batch_rows=4,
    ),
    "135m": Shape(
        ModelConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=26,
            num_attention_heads=9,
            num_key_value_heads=3,
        ),
        context=1024,
        batch_rows=16,
        quick_batch_rows=2,
    ),
    "360m": Shape(
        ModelConfig(
            vocab_size=49152,
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=26,
            num_attention_heads=15,
            num_key_value_heads=5,
        ),
        context=2048,
        batch_rows=8,
        quick_batch_rows=1,
    ),
}

ROWS: dict[RowName, int] = {"vanilla": 1, "rec3": 3, "mor2": 2, "mor3": 3, "mor4": 4}
"""Recursions of each row."""


def row_config(shape: Shape, name: RowName) -> ModelConfig:
    """Return a row's model: mor rows route by expert choice, the others take the full depth."""
    return dataclasses.replace(
        shape.model,
        num_recursions=ROWS[name],
        router="expert_choice" if name.startswith("mor") else "fixed",
        gating="auto",
        capacity=(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTrainConfig:
    """Settings of `mor bench train`. Raises ValueError, in one line, for values that do not fit."""

    shape: ShapeName = "small"
    """small: 14 layers, width 256; 135m and 360m: the sizes of SmolLM with 26 layers"""
    rounds: int = 0
    """rounds that are timed, 9 or more; 0 for 15, or 9 when quick"""
    quick: bool = False
    """a smaller batch and 9 rounds; shape small ends within three minutes on two cores"""
    rows: tuple[RowName, ...] = tuple(ROWS)
    """models to time; vanilla always runs, the others are compared to it in the same round"""
    peer: Literal["auto", "transformers", "none"] = "auto"
    """time transformers' Llama with the same weights too; auto: where transformers is installed"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the matrix products; weights stay fp32"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    seed: int = 0
    """seed of weights and tokens"""

    def __post_init__(self) -> None:
        if self.rounds and self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}; give {MIN_ROUNDS} or more, or 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to 2**63 - 1")

    @property
    def num_rounds(self) -> int:
        return self.rounds or (MIN_ROUNDS if self.quick else DEFAULT_ROUNDS)

    @property
    def row_names(self) -> list[RowName]:
        """Rows in the order of the table, vanilla first."""
        return [name for name in ROWS if name == "vanilla" or name in self.rows]
