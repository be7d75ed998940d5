"""AdamW, Muon beside it, and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mor.ops.device import pick_product_dtype
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


def decays(name: str, param: torch.Tensor) -> bool:
    """Tell the parameters with weight decay: matrices, but no gains, low-rank parts or encodings.

    Gains go by name, since those of a recursion each stand in a matrix too.
    """
    is_small = name.endswith("norm.weight") or "recursion_" in name
    return param.dim() >= 2 and not is_small


def is_projection(name: str, param: torch.Tensor) -> bool:
    """Tell the matrices inside the layers, which Muon trains where it is chosen."""
    return param.dim() == 2 and ".layers." in name and name.endswith("_proj.weight")


def rate_scale(name: str, config: TrainConfig) -> float:
    """Return a parameter's learning rate over the recipe's."""
    if is_aux_router(name):
        return AUX_LR_SCALE
    if ".routers." in name:
        return config.router_lr_scale
    return config.lora_lr_scale if "recursion_A" in name or "recursion_B" in name else 1.0


def orthogonal(
    matrix_MN: Tensor, *, coefficients: tuple[float, float, float], steps: int
) -> Tensor:
    """Return about U V^T of a matrix U S V^T by Newton-Schulz steps, in the matrix's type.

    The quintic's coefficients give singular values near 1, not 1: arXiv 2502.16982.
    """
    a, b, c = coefficients
    is_tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x_SL = matrix_MN.T if is_tall else matrix_MN
    x_SL = x_SL / x_SL.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram_SS = x_SL @ x_SL.T
        x_SL = torch.addmm(
            x_SL, torch.addmm(gram_SS, gram_SS, gram_SS, beta=b, alpha=c), x_SL, beta=a
        )
    return x_SL.T if is_tall else x_SL


class Muon(torch.optim.Muon):
    """PyTorch's Muon with its products in the device's fast type.

    PyTorch's are always bfloat16, which a processor without such products emulates at a tenth of
    the speed of float32 (docs/LOG.md). Updates have AdamW's size: arXiv 2502.16982.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, lr=lr, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every matrix once; a closure is evaluated first, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            dtype = pick_product_dtype("auto", group["params"][0].device)
            momentum = group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param.grad)
                average = state["momentum_buffer"].lerp_(param.grad, 1 - momentum)
                update = param.grad.lerp(average, momentum)
                update = orthogonal(
                    update.to(dtype),
                    coefficients=group["ns_coefficients"],
                    steps=group["ns_steps"],
                )
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(param.shape)))
        return loss


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer; both work on its groups (Muon's first) and its state."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.muon, self.adamw = muon, adamw
        self.num_muon_groups = len(muon.param_groups)

    def step(self, closure: Any = None) -> Any:
        """Update every parameter once; a closure is evaluated first, and its loss returned."""
        # Groups and state anew each time: load_state_dict replaces them.
        self.muon.param_groups = self.param_groups[: self.num_muon_groups]
        self.adamw.param_groups = self.param_groups[self.num_muon_groups :]
        self.muon.state = self.adamw.state = self.state
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return fused AdamW, or Muon for the layers' projections beside it.

    Groups have an `lr_scale`; auxiliary routers learn at ten times the rate, as in the paper.
    Muon's updates have the size of AdamW's, so that one rate and one decay serve both.
    Source: arXiv 2502.16982 for Muon at AdamW's rate
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        is_muon = config.optimizer == "muon" and is_projection(name, param)
        lr_scale = rate_scale(name, config)
        decay = config.weight_decay if decays(name, param) else 0.0
        groups.setdefault((is_muon, lr_scale, decay), []).append(param)

    def groups_of(muon: bool) -> list[dict[str, Any]]:
        return [
            {"params": params, "weight_decay": decay, "lr_scale": lr_scale}
            for (is_muon, lr_scale, decay), params in groups.items()
            if is_muon == muon
        ]

    adamw = torch.optim.AdamW(
        groups_of(False), lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )
    if config.optimizer == "adamw":
        return adamw
    return MuonAndAdamW(Muon(groups_of(True), lr=config.lr), adamw)


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
