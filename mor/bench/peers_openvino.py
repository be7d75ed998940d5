"""OpenVINO GenAI's continuous batching on the twin's weights, read from a GGUF file.

Loaded when peers are asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mor.bench.peers_llama_cpp import write_gguf
from mor.model.mor import MoR

CACHE_GIB = 1


class OpenVino:
    """Weights in fp16, as its reader has no bf16; products in bf16 where the processor has it."""

    name = "OpenVINO GenAI"
    is_exact = True

    def __init__(self, twin: MoR, *, max_rows: int, max_requests: int) -> None:
        import openvino  # pyrefly: ignore
        import openvino_genai  # pyrefly: ignore

        self.ov: Any = openvino
        self.genai: Any = openvino_genai
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "twin.gguf"
        write_gguf(twin, path, half=True, vocabulary=True)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_batched_tokens = max_rows
        scheduler.max_num_seqs = max_requests
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "KV_CACHE_PRECISION": "bf16"}
        self.pipe: Any = openvino_genai.ContinuousBatchingPipeline(
            str(path), scheduler, "CPU", settings
        )

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        config = self.genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = [self.ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        outputs = self.pipe.generate(ids, [config] * len(ids))
        return [list(output.m_generation_ids[0]) for output in outputs]

    def close(self) -> None:
        self.pipe = None
        self.folder.cleanup()
