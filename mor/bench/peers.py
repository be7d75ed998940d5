"""The model that others would use: transformers' Llama of the same shape, stepped the same way.

The only module of the benchmarks that knows transformers; loaded when a peer is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mor.bench.contender import Contender, Job
from mor.config import ModelConfig
from mor.model.mor import MoR
from mor.ops.device import autocast
from mor.train.optim import build_optimizer, clip_gradients

LOGIT_TOLERANCE = 1e-4
"""largest difference of a logit, in float32"""


class LlamaContender(Contender):
    """transformers' LlamaForCausalLM with its own loss, our optimizer and clipping."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.model = new_llama(self.recipe.model).to(self.device).train()
        self.optimizer = build_optimizer(self.model, self.recipe.train)

    @property
    def module(self) -> nn.Module:
        return self.model

    def step(self, step: int) -> float:
        config = self.recipe.train
        loss = self._loss(step * config.batch_rows)
        loss.backward()
        grad_norm = clip_gradients(self.model, config.grad_clip)
        losses = float(loss.detach()), float(grad_norm)  # read, as `train_step` does
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses[0]

    def forward(self) -> Tensor:
        return self._loss(0)

    def _loss(self, first_sample: int) -> Tensor:
        """Mean cross-entropy; with labels = inputs transformers moves them by one itself."""
        batch = self.batches.batch(first_sample, self.recipe.train.batch_rows).to(self.device)
        ids_BT = batch.input_ids_BT
        with autocast(self.device, self.dtype):
            return self.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss


def new_llama(config: ModelConfig) -> Any:
    """Build transformers' model of a vanilla model's shape."""
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    llama._attn_implementation = "sdpa"
    return LlamaForCausalLM(llama)


def save_llama(model: MoR, folder: Path) -> None:
    """Write a vanilla model as transformers' own, weights in bf16."""
    logging.disable_progress_bar()
    llama = new_llama(model.config).to(torch.bfloat16)
    llama.load_state_dict(model.state_dict(), strict=False)
    llama.save_pretrained(folder)


@torch.no_grad()
def copy_weights(ours: MoR, peer: LlamaContender) -> None:
    """Give the peer our weights; RuntimeError unless both then compute the same logits."""
    missing, unknown = peer.model.load_state_dict(ours.state_dict(), strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    ids_BT = peer.batches.batch(0, 1).to(peer.device).input_ids_BT
    mine = ours(ids_BT, rule="causal").logits
    theirs = peer.model(input_ids=ids_BT, use_cache=False).logits
    off = float((mine - theirs).abs().max())
    if not off <= LOGIT_TOLERANCE:
        raise RuntimeError(f"vanilla and transformers' Llama differ by {off:.2g} in a logit")
