"""Settings of the engine, with vLLM's names. Imports no torch."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from mor.config import check_choice

Backend = Literal["auto", "native", "triton", "torch"]
Capture = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much runs at a time. Raises ValueError, in one line, for values that do not fit."""

    max_num_seqs: int = 32
    """requests that run at a time"""
    max_num_batched_tokens: int = 512
    """rows of one call of the block: decode rows and prompt rows together"""
    max_model_len: int = 0
    """longest prompt and answer together, in tokens; 0 for the model's context"""
    block_size: int = 0
    """tokens in a page of the shared block's keys and values, and between prefix cache entries; 0
    for 16, or the next number with which pages of all layers have the same bytes"""
    kv_cache_bytes: int = 0
    """bytes of all keys and values; 0 for all requests at full length and depth, at most 2 GiB"""
    enable_prefix_caching: bool = True
    """keep keys and values of finished prompts and answers for requests that begin alike"""
    coda_period: int = 0
    """ticks from one call of the coda to the next; 0 for what measured times say"""
    backend: Backend = "auto"
    """native: compiled for the CPU; triton: on a GPU; torch: plain; auto: the fastest to be had"""
    capture: Capture = "auto"
    """whether ticks that only decode run on the device alone, captured as CUDA graphs; auto: on a
    GPU, where the model allows it. `on` takes such ticks on a CPU too, for tests"""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if not (isinstance(value, int) and 1 <= value < 2**20):
                raise ValueError(f"{name} is {value!r}; give a whole number from 1 to 1048575")
        if not (isinstance(self.block_size, int) and 0 <= self.block_size < 2**20):
            raise ValueError(
                f"block_size is {self.block_size!r}; give 0 (automatic), or up to 1048575"
            )
        for name in ("kv_cache_bytes", "max_model_len", "coda_period"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 0):
                raise ValueError(f"{name} is {value!r}; give 0 (automatic) or more")
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} leaves no row for prompts "
                f"beside max_num_seqs {self.max_num_seqs} decode rows; give a larger one"
            )
        check_choice("backend", self.backend, typing.get_args(Backend))
        check_choice("capture", self.capture, typing.get_args(Capture))
