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
from mor.model.rows import Rows
from mor.ops.select import hash_uniform, top_k_count, top_k_mask

Rule = Literal["train", "causal"]


class Routing(NamedTuple):
    """What a router decided about the candidates of one recursion."""

    index_A: Tensor | None
    """rows that are active, ascending; None when all candidates are"""
    equal_count: int | None
    """active rows of every sequence, when that is known without asking the device"""
    gate_A1: Tensor
    """factor on what the recursion contributes, fp32 or wider"""
    score_N: Tensor
    """detached sigmoid scores of the candidates"""
    loss: Tensor | None
    """sum over candidates of the auxiliary loss, over c_(r-1); None without one"""


class Router(nn.Module):
    """The router of one recursion (numbered from 0): a linear score, a gate and a threshold.

    Source: expert choice, arXiv 2507.10524 Eq. 2.1 and its auxiliary loss.
    """

    def __init__(self, config: ModelConfig, recursion: int) -> None:
        super().__init__()
        self.body = nn.Linear(config.hidden_size, 1, bias=False)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.threshold: Tensor
        self.config = config
        self.recursion = recursion
        self.capacity = config.capacity[recursion]
        self.capacity_before = config.capacity[max(recursion - 1, 0)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move as other modules do, but never go below fp32: scores decide."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device, torch.float32) if moved.dtype.itemsize < 4 else moved

        return super()._apply(keep_wide, recurse)

    def logit(self, x_ND: Tensor) -> Tensor:
        """Score rows before the sigmoid, in fp32 or wider also under autocast. Returns (N,)."""
        with torch.autocast(x_ND.device.type, enabled=False):
            wide = torch.promote_types(x_ND.dtype, self.body.weight.dtype)
            return F.linear(x_ND.to(wide), self.body.weight.to(wide))[..., 0]

    def gate(self, logit: Tensor) -> Tensor:
        """Turn logits into the factor that `join` applies."""
        if self.config.gating == "residual":
            return 2 * torch.sigmoid(logit)
        return self.config.router_alpha * torch.sigmoid(logit)

    def forward(self, x_ND: Tensor, rows: Rows, *, rule: Rule) -> Routing:
        """Decide which of the candidate rows x_ND are active at this recursion."""
        logit_N = self.logit(x_ND)
        score_N = torch.sigmoid(logit_N.detach())
        index_A, equal_count = None, rows.max_count if rows.is_dense else None
        if self.recursion > 0:
            index_A, equal_count = self._choose(score_N, rows, rule)
        active_logit = logit_N if index_A is None else logit_N[index_A]
        loss = None
        if rule == "train" and self.config.router == "expert_choice":
            member_N = torch.ones_like(logit_N)
            if index_A is not None:
                member_N = torch.zeros_like(logit_N).index_fill(0, index_A, 1.0)
            loss = F.binary_cross_entropy_with_logits(logit_N, member_N, reduction="sum")
            loss = loss / self.capacity_before
        return Routing(index_A, equal_count, self.gate(active_logit)[:, None], score_N, loss)

    def _choose(self, score_N: Tensor, rows: Rows, rule: Rule) -> tuple[Tensor, int | None]:
        if self.config.router != "expert_choice" or rule == "causal":
            return self.passes(score_N, rows).nonzero()[:, 0], None
        if rows.is_dense and rows.equal_length is not None:
            # Equal sequences keep equal counts: no question to the device.
            score_BC = score_N.view(rows.num_sequences, rows.max_count)
            k = int(top_k_count(torch.tensor([rows.equal_length]), self.capacity))
            order_BC = torch.argsort(score_BC, dim=1, descending=True, stable=True)
            first_B1 = torch.arange(rows.num_sequences, device=score_N.device)[:, None]
            index_Bk = order_BC[:, :k].sort(dim=1).values + first_B1 * rows.max_count
            return index_Bk.flatten(), min(k, rows.max_count)
        slot_N = rows.slot_N()
        score_BC = rows.pad(score_N, slot_N, fill=float("-inf"))
        mask_BC = top_k_mask(score_BC, top_k_count(rows.length_B, self.capacity))
        return rows.unpad(mask_BC, slot_N).nonzero()[:, 0], None

    @torch.no_grad()
    def move_threshold(self, score_N: Tensor, *, is_first: bool = False) -> None:
        """Move the threshold towards the quantile that would have let c_r / c_(r-1) through.

        For the `threshold` router, after an optimizer step, with the scores of all its candidates.
        is_first  take the quantile itself
        """
        if self.config.router != "threshold" or self.recursion == 0 or not len(score_N):
            return
        share = self.capacity / self.capacity_before
        target = -1.0 if share == 1 else torch.quantile(score_N.float(), 1 - share)
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
            return draw_N < self.capacity / self.capacity_before
        return score_N > self.threshold


def join(x_AD: Tensor, block_AD: Tensor, gate_A1: Tensor | None, gating: str) -> Tensor:
    """Join a recursion's result to the stream.

    weighted  x + g block(x), with g = alpha sigmoid(z)          (the paper's)
    residual  x + g (block(x) - x), with g = 2 sigmoid(z)        (1 at zero router weights)
    additive  x + block(x)                                        (the paper's, no gate)
    none      block(x)                                            (a hard decision)
    """
    if gating == "additive":
        return x_AD + block_AD
    if gate_A1 is None or gating == "none":
        return block_AD
    gate_A1 = gate_A1.to(x_AD.dtype)
    if gating == "residual":
        return x_AD + gate_A1 * (block_AD - x_AD)
    return x_AD + gate_A1 * block_AD
