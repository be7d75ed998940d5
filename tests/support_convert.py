"""A small parent's shape, and conversion with what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mor.checkpoint import load_model
from mor.config import ModelConfig
from mor.convert.config import ConvertConfig
from mor.convert.convert import convert

SHAPE: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PLAIN = ModelConfig(**SHAPE, sharing="cycle")
IDS = torch.tensor([[5, 9, 60, 3, 8, 21, 40, 200, 7, 7]])


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(IDS).logits


def go(parent: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return convert(str(parent), out, ConvertConfig(**settings))
