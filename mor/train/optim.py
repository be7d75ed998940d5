"""AdamW and its learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from mor.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return fused AdamW; matrices decay, vectors (norm gains) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Learning rate of a step counted from 0.

    trapezoid  linear warm-up, hold, linear to 0 over the last decay_share of the steps
    cosine     linear warm-up, half a cosine to a tenth of the peak
    """
    warmup = max(1, round(config.warmup_share * num_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, num_steps - warmup)
        return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
    decay = max(1, round(config.decay_share * num_steps))
    return config.lr * min(1.0, (num_steps - step) / decay)
