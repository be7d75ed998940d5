"""Token choice: one decision per token, after the prelude, says how many recursions it takes.

The decision reads the token's own state, so one rule serves training and everything else.
Shapes: B sequences, N rows, D width, R recursions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mor.config import ModelConfig
from mor.model.router import Routing, Rule, WideModule, make_body
from mor.model.rows import Rows


class TokenChoice(NamedTuple):
    """What the router decided about all rows."""

    depth_N: Tensor
    """recursions to take, 1..R"""
    step_gate_NR: Tensor | None
    """factor on what each recursion makes of the state it got; None for 1"""
    exit_gate_N1: Tensor | None
    """factor at the exit, where the last result joins what recursion 1 got; None for 1"""
    loss: Tensor | None
    """weighted losses, summed over rows; None outside training or without any"""

    def routing(self, recursion: int, x_ND: Tensor, origin_N: Tensor) -> Routing:
        """Say who of a recursion's candidates goes on; origin_N is their place among all rows."""
        index_A, num_active = None, len(x_ND)
        if recursion > 0:
            index_A = (self.depth_N[origin_N] > recursion).nonzero()[:, 0]
            origin_N, num_active = origin_N[index_A], len(index_A)
        gate_A1 = None
        if self.step_gate_NR is not None:
            gate_A1 = self.step_gate_NR[origin_N, recursion, None]
        no_logits, passing = x_ND.new_empty(0), torch.tensor(num_active)
        return Routing(index_A, None, gate_A1, no_logits, None, passing)


class TokenRouter(WideModule):
    """Scores every depth and picks the best.

    s = softmax(W x) or sigmoid(W x); depth = argmax_i (s_i + b_i)
    weighted  h_r = alpha s_r f_r(h_(r-1)), h_0 = x; the result is x + h_depth
    residual  h_r = f_r(h_(r-1)); the result is x + g (h_depth - x), g = R s_depth (sigmoid: 2)
    additive and none: h_r as in residual; x + h_depth, and h_depth
    Source: token choice, arXiv 2507.10524 Eq. 2.2 (the public code gates at the exit alone); the
    bias b after Wang et al., arXiv 2408.15664.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.body = make_body(config)
        self.register_buffer("balance", torch.zeros(config.num_recursions))
        self.balance: Tensor

    def scores(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and scores of every depth, fp32 or wider also under autocast."""
        with torch.autocast(x_ND.device.type, enabled=False):
            wide = torch.promote_types(x_ND.dtype, torch.float32)
            logit_NR = self.body(x_ND.to(wide))
        if self.config.router_score == "softmax":
            return logit_NR, logit_NR.softmax(-1)
        return logit_NR, logit_NR.sigmoid()

    def forward(self, x_ND: Tensor, rows: Rows, *, rule: Rule) -> TokenChoice:
        """Decide for all rows; x_ND is what recursion 1 gets."""
        logit_NR, score_NR = self.scores(x_ND)
        choice = self.choose(score_NR)
        if rule != "train":
            return choice
        return choice._replace(loss=self.loss(logit_NR, score_NR, choice.depth_N - 1, rows))

    def choose(self, score_NR: Tensor) -> TokenChoice:
        """Pick every row's depth by its scores, and the gates that go with it."""
        choice_N = (score_NR.detach() + self.balance).argmax(-1)
        step_gate_NR = exit_gate_N1 = None
        if self.config.gating == "weighted":
            step_gate_NR = self.config.router_alpha * score_NR
        if self.config.gating == "residual":  # 1 at zero weights
            even = self.config.num_recursions if self.config.router_score == "softmax" else 2
            exit_gate_N1 = even * score_NR.gather(-1, choice_N[:, None])
        return TokenChoice(choice_N + 1, step_gate_NR, exit_gate_N1, None)

    def loss(
        self, logit_NR: Tensor, score_NR: Tensor, choice_N: Tensor, rows: Rows
    ) -> Tensor | None:
        """Sum the weighted losses over rows.

        Balance: sum_i P_i f_i of each sequence, with P_i its mean score of depth i and f_i R times
        the share of its tokens that pick i; a sequence counts as often as it has tokens.
        z-loss: logsumexp(z) squared.
        """
        config, loss = self.config, None
        if config.router_balance == "loss":
            shape = (rows.num_sequences, config.num_recursions)
            picks_BR = score_NR.new_zeros(shape)
            picks_BR.index_put_(
                (rows.sequence_N, choice_N), score_NR.new_ones(len(rows)), accumulate=True
            )
            total_BR = score_NR.new_zeros(shape).index_add(0, rows.sequence_N, score_NR)
            count_B1 = rows.count_B[:, None].clamp(min=1)
            # tokens x (total / tokens) x (R picks / tokens)
            balance = (total_BR * picks_BR / count_B1).sum() * config.num_recursions
            loss = config.router_balance_loss_coef * balance
        if config.router_z_loss_coef:
            z_loss = config.router_z_loss_coef * logit_NR.logsumexp(-1).square().sum()
            loss = z_loss if loss is None else loss + z_loss
        return loss

    @torch.no_grad()
    def after_step(self, picks_R: Tensor) -> None:
        """Move the balancing bias: b_i += rate sign(mean load - load_i).

        picks_R  tokens of the optimizer step that picked each depth
        """
        if self.config.router_balance == "bias":
            picks_R = picks_R.to(self.balance)
            self.balance += self.config.router_balance_rate * (picks_R.mean() - picks_R).sign()
