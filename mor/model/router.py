"""Who goes on to the next recursion, and how much of its result joins the stream.

`train` is the rule of training: top-k over the sequence, which looks at the whole of it. `causal`
is the one rule of evaluation, prefill, decode and server: a token's own score against a threshold.
Shapes: B sequences, N candidate rows, A active rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mor.config import ModelConfig
from mor.model.cost import warm_share
from mor.model.rows import Rows
from mor.ops.select import hash_uniform, top_k_count, top_k_mask

Rule = Literal["train", "causal"]


class Routing(NamedTuple):
    """What a router decided about the candidates of one recursion."""

    index_A: Tensor | None
    """rows that are active, ascending; None when all candidates are"""
    equal_count: int | None
    """active rows of every sequence, when that is known without asking the device"""
    gate_A1: Tensor | None
    """factor on what the recursion contributes, fp32 or wider; None where that comes later"""
    logit_N: Tensor
    """detached logits of the candidates that the causal rule asks; their sigmoids are the scores"""
    loss: Tensor | None
    """weighted losses of the candidates, summed, over c_(r-1); None without any"""
    num_passing: Tensor
    """candidates that the causal rule lets through"""


class WideModule(nn.Module):
    """A module whose numbers decide: it moves as others do, but never goes below fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if is_narrow else moved

        return super()._apply(keep_wide, recurse)


class Router(WideModule):
    """The router of one recursion (numbered from 0): a score, a gate and a threshold.

    Source: expert choice, arXiv 2507.10524 Eq. 2.1 and its auxiliary losses.
    """

    def __init__(self, config: ModelConfig, recursion: int) -> None:
        super().__init__()
        self.body = make_body(config)
        self.aux_body = make_body(config) if config.has_aux_router else None
        self.register_buffer("threshold", torch.tensor(0.5))
        self.threshold: Tensor
        if config.capacity_warmup_steps:
            self.register_buffer("steps_done", torch.tensor(0))
        self.config = config
        self.recursion = recursion

    def capacity(self, recursion: int) -> float:
        """Share of tokens that a recursion takes; falls from 1 while capacities warm up."""
        share, warmup = self.config.capacity[max(recursion, 0)], self.config.capacity_warmup_steps
        return warm_share(share, int(self.get_buffer("steps_done")), warmup) if warmup else share

    def logits(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Score rows before the sigmoid: what gates them, and what the causal rule asks.

        Both are (N,), fp32 or wider also under autocast, and the same without an auxiliary router.
        """
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
            gating_N = self.body(x_ND)[..., 0]
            if self.aux_body is None:
                return gating_N, gating_N
            return gating_N, self.aux_body(x_ND.detach())[..., 0]

    def gate(self, logit: Tensor) -> Tensor:
        """Turn logits into the factor that `join` applies."""
        factor = 2.0 if self.config.gating == "residual" else self.config.router_alpha
        return factor * torch.sigmoid(logit)

    def forward(self, x_ND: Tensor, rows: Rows, *, rule: Rule) -> Routing:
        """Decide which of the candidate rows x_ND are active at this recursion."""
        logit_N, causal_N = self.logits(x_ND)
        score_N = torch.sigmoid(causal_N.detach())
        index_A, equal_count = None, rows.max_count if rows.is_dense else None
        if self.recursion > 0:
            index_A, equal_count = self._choose(logit_N.detach(), score_N, rows, rule)
        active_logit = logit_N if index_A is None else logit_N[index_A]
        loss = None
        if rule == "train":
            member_N = torch.ones_like(logit_N)
            if index_A is not None:
                member_N = torch.zeros_like(logit_N).index_fill(0, index_A, 1.0)
            loss = self.loss(logit_N, causal_N, member_N)
        gate_A1, passing = self.gate(active_logit)[:, None], self.passes(score_N, rows).sum()
        return Routing(index_A, equal_count, gate_A1, causal_N.detach(), loss, passing)

    def loss(self, logit_N: Tensor, causal_N: Tensor, member_N: Tensor) -> Tensor | None:
        """Sum the weighted losses of candidates, over c_(r-1); None where there are none.

        Membership: binary cross-entropy of the causal rule's logits. z-loss: the squared logit.
        """
        config, loss = self.config, None
        if config.router == "expert_choice":
            loss = config.router_aux_loss_coef * F.binary_cross_entropy_with_logits(
                causal_N, member_N, reduction="sum"
            )
        if config.router_z_loss_coef:
            loss = config.router_z_loss_coef * logit_N.square().sum() + (
                0 if loss is None else loss
            )
        return None if loss is None else loss / self.capacity(self.recursion - 1)

    def _choose(
        self, logit_N: Tensor, score_N: Tensor, rows: Rows, rule: Rule
    ) -> tuple[Tensor, int | None]:
        if self.config.router != "expert_choice" or rule == "causal":
            return self.passes(score_N, rows).nonzero()[:, 0], None
        if rows.is_dense and rows.equal_length is not None:
            # Equal sequences keep equal counts: no question to the device.
            score_BC = logit_N.view(rows.num_sequences, rows.max_count)
            k = int(top_k_count(torch.tensor([rows.equal_length]), self.capacity(self.recursion)))
            order_BC = torch.argsort(score_BC, dim=1, descending=True, stable=True)
            first_B1 = torch.arange(rows.num_sequences, device=score_N.device)[:, None]
            index_Bk = order_BC[:, :k].sort(dim=1).values + first_B1 * rows.max_count
            return index_Bk.flatten(), min(k, rows.max_count)
        slot_N = rows.slot_N()
        score_BC = rows.pad(logit_N, slot_N, fill=float("-inf"))
        mask_BC = top_k_mask(score_BC, top_k_count(rows.length_B, self.capacity(self.recursion)))
        return rows.unpad(mask_BC, slot_N).nonzero()[:, 0], None

    @torch.no_grad()
    def after_step(self, score_N: Tensor, *, is_first: bool = False) -> None:
        """Count an optimizer step and, for the `threshold` router, move its threshold.

        It moves towards the quantile that would have let c_r / c_(r-1) of the candidates through.
        score_N   scores of all candidates of the step
        is_first  take the quantile itself
        """
        if self.config.capacity_warmup_steps:
            self.get_buffer("steps_done").add_(1)
        if self.config.router != "threshold" or self.recursion == 0 or not len(score_N):
            return
        share = self.capacity(self.recursion) / self.capacity(self.recursion - 1)
        target: Tensor | float = -1.0
        if share < 1:  # below the best score: the last ones may all be 1
            best = torch.nextafter(score_N.float().max(), score_N.new_zeros((), dtype=torch.float))
            target = torch.minimum(torch.quantile(score_N.float(), 1 - share), best)
        rate = 1.0 if is_first or share == 1 else self.config.router_threshold_rate
        self.threshold += rate * (target - self.threshold)

    def passes(self, score_N: Tensor, rows: Rows) -> Tensor:
        """Apply the causal rule: True where a candidate goes on, from that candidate alone."""
        if self.config.router == "random":
            draw_N = hash_uniform(
                rows.position_N,
                rows.token_N,
                seed=self.config.router_seed,
                recursion=self.recursion,
            )
            return draw_N < self.capacity(self.recursion) / self.capacity(self.recursion - 1)
        return score_N > self.threshold


def make_body(config: ModelConfig) -> nn.Module:
    """Build what turns (N, D) states into (N, router_outputs) logits."""
    d, bias, outputs = config.hidden_size, config.router_bias, config.router_outputs
    if config.router_body == "linear":
        return nn.Linear(d, outputs, bias=bias)
    hidden = config.router_hidden_size
    return nn.Sequential(
        nn.Linear(d, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, outputs, bias=bias)
    )


def join(x_AD: Tensor, block_AD: Tensor, gate_A1: Tensor | None, gating: str) -> Tensor:
    """Join a recursion's result to the stream.

    weighted  x + g block(x), with g = alpha sigmoid(z)          (the paper's)
    residual  x + g (block(x) - x), with g = 2 sigmoid(z)        (1 at zero router weights)
    additive  x + block(x)                                        (the paper's, no gate)
    none      block(x)                                            (a hard decision)
    scaled    g block(x)                                          (token choice, before its exit)
    """
    if gating == "additive":
        return x_AD + block_AD
    if gate_A1 is None or gating == "none":
        return block_AD
    gate_A1 = gate_A1.to(x_AD.dtype)
    if gating == "scaled":
        return gate_A1 * block_AD
    if gating == "residual":
        return x_AD + gate_A1 * (block_AD - x_AD)
    return x_AD + gate_A1 * block_AD
