"""AdamW and its learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from mor.train.config import TrainConfig

AUX_LR_SCALE = 10.0


def is_aux_router(name: str) -> bool:
    """Tell the parameters of auxiliary routers, which are trained apart."""
    return ".aux_body." in name


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Clip the model's gradients to a norm, auxiliary routers by themselves; returns the norm."""
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, param in model.named_parameters():
        parts[is_aux_router(name)].append(param)
    if parts[True]:
        torch.nn.utils.clip_grad_norm_(parts[True], limit)
    return torch.nn.utils.clip_grad_norm_(parts[False], limit)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return fused AdamW; matrices decay, vectors (norm gains) do not.

    Auxiliary routers learn at ten times the rate, as in the paper; `lr_scale` says so.
    """
    decay = config.weight_decay
    groups = []
    for is_aux, lr_scale in ((False, 1.0), (True, AUX_LR_SCALE)):
        params = [p for name, p in model.named_parameters() if is_aux_router(name) == is_aux]
        matrices = [p for p in params if p.dim() >= 2]
        vectors = [p for p in params if p.dim() < 2]
        groups.append({"params": matrices, "weight_decay": decay, "lr_scale": lr_scale})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr_scale": lr_scale})
    groups = [group for group in groups if group["params"]]
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
