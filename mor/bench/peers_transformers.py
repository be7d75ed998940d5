"""transformers' generation on the twin's weights: one static batch, and continuous batching.

Loaded when peers are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import ERROR, getLogger
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from mor.bench.peers import new_llama
from mor.model.mor import MoR

PAGE_TOKENS = 32


class StaticBatch:
    """`generate` with equal prompts in one batch."""

    name = "transformers generate"
    is_exact = True

    def __init__(self, twin: MoR) -> None:
        logging.set_verbosity_error()
        getLogger("ContinuousBatchingLogger").setLevel(ERROR)
        self.device = twin.device
        llama = new_llama(twin.config).to(twin.model.embed_tokens.weight.dtype)
        llama.load_state_dict(twin.state_dict(), strict=False)
        self.llama: Any = llama.to(self.device).eval()

    def settings(self, new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        ids_BT = torch.tensor(prompts, device=self.device)
        out_BT = self.llama.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=self.settings(new_tokens),
        )
        return out_BT[:, ids_BT.shape[1] :].tolist()

    def close(self) -> None:
        pass


class ContinuousBatch(StaticBatch):
    """`generate_batch`, which pages keys and values and refills the batch."""

    name = "transformers continuous batching"
    held: tuple[int, int] | None = None
    """requests and tokens that the manager was made for; it is kept between runs, as ours is"""

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        longest = len(prompts[0]) + new_tokens
        if self.held != (len(prompts), new_tokens):
            self.close()
            self.held = len(prompts), new_tokens
        outputs = self.llama.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=self.settings(new_tokens),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=len(prompts) * (-(-longest // PAGE_TOKENS) + 1),
                max_batch_tokens=512,
                max_requests_per_batch=len(prompts),
                allow_block_sharing=False,
            ),
            persistent_manager=True,
        )
        return [output.generated_tokens for output in outputs.values()]

    def close(self) -> None:
        if self.held is not None:
            self.llama.destroy_cached_continuous_batching_manager()
        self.held = None
