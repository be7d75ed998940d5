"""Tiny shapes for the benchmarks of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mor.bench import decode, serve_config
from mor.bench.serve_config import Lengths, Mix
from mor.config import ModelConfig

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=14,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
MIX = Mix(Lengths(10, 4, 20), Lengths(10, 6, 20))


@contextmanager
def tiny_shapes() -> Iterator[None]:
    """Make `small` tiny and quick requests short, on one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(serve_config._BASES, "small", TINY)
        patch.setattr(decode, "QUICK_MIX", MIX)
        patch.setattr("mor.bench.tables.ROWS", (1, 4))
        torch.set_num_threads(1)  # a second one only waits, for layers as small as these
        yield
        torch.set_num_threads(threads)
