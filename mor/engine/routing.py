"""The causal rule for rows of mixed depth: who goes on, and with which gate.

The decisions are those of `mor.model.router` and `mor.model.token_router`; here each row may stand
at another recursion and follow the thresholds of its own request.
Shapes: N rows, D width, R recursions.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mor.model.mor import MoR
from mor.model.router import Router, join
from mor.model.token_router import TokenChoice, TokenRouter
from mor.ops.select import hash_uniform


class Decision(NamedTuple):
    """What is decided about rows that may take a recursion."""

    goes_on_N: Tensor | None
    """None for everyone"""
    gate_N: Tensor | None
    """gate of that recursion; None for none"""


class DepthRouter:
    """Routers of a model, asked for rows of all depths."""

    def __init__(self, model: MoR) -> None:
        self.config = model.config
        self.stack = model.model
        self.is_token_choice = self.config.router == "token_choice"
        self.has_gate = self.config.has_router and not self.is_token_choice
        if self.config.router == "random":
            routers = [self._router(r) for r in range(self.config.num_recursions)]
            shares = [
                router.capacity(r) / router.capacity(r - 1) for r, router in enumerate(routers)
            ]
            self.shares_R = torch.tensor(shares, dtype=torch.float64, device=model.device)
        self.joined_RD = self.joined_bias_R = None
        if self.has_gate and self.config.router_body == "linear" and not self.config.has_aux_router:
            bodies = [cast(nn.Linear, self._router(r).body) for r in range(self.config.num_routers)]
            self.joined_RD = torch.cat([body.weight for body in bodies])
            if self.config.router_bias:
                self.joined_bias_R = torch.cat([cast(Tensor, body.bias) for body in bodies])

    def _router(self, recursion: int) -> Router:
        return self.stack.router(recursion)

    def thresholds(self) -> tuple[float, ...]:
        """Return the model's thresholds of scores, one a recursion; 0 where there are none."""
        if not self.has_gate or self.config.router == "random":
            return (0.0,) * self.config.num_recursions
        return tuple(float(self._router(r).threshold) for r in range(self.config.num_recursions))

    def choose(self, x_ND: Tensor) -> TokenChoice:
        """Decide for all recursions, on states that leave the prelude (token choice)."""
        router = cast(TokenRouter, self.stack.routers[0])
        return router.choose(router.scores(x_ND)[1])

    def decide(
        self,
        recursion_N: Tensor,
        x_ND: Tensor,
        *,
        threshold_N: Tensor,
        position_N: Tensor,
        token_N: Tensor,
        asks_all: bool = False,
    ) -> Decision:
        """Decide about rows that may take a recursion (from 0, int64); not for token choice.

        threshold_N  fp64, each row's own threshold of that recursion's logits
        asks_all     ask every router about every row, rather than the device which rows are whose
        """
        if not self.has_gate:
            return Decision(None, None)
        logit_N, causal_N = self._logits(recursion_N, x_ND, asks_all=asks_all)
        gate_N = self._router(0).gate(logit_N)
        if self.config.router == "random":
            return Decision(self._draws(recursion_N, position_N, token_N), gate_N)
        return Decision(causal_N > threshold_N, gate_N)

    def _logits(
        self, recursion_N: Tensor, x_ND: Tensor, *, asks_all: bool
    ) -> tuple[Tensor, Tensor]:
        """Score each row by the router of its recursion: for the gate, and for the rule."""
        if self.joined_RD is not None:
            wide = torch.promote_types(x_ND.dtype, torch.float32)
            logit_NR = F.linear(x_ND.to(wide), self.joined_RD, self.joined_bias_R)
            logit_N = logit_NR.gather(1, recursion_N[:, None])[:, 0]
            return logit_N, logit_N
        if asks_all:
            each = [self._router(r).logits(x_ND) for r in range(self.config.num_recursions)]
            logit_NR, causal_NR = (torch.stack(part, 1) for part in zip(*each, strict=True))
            at_N1 = recursion_N[:, None]
            return logit_NR.gather(1, at_N1)[:, 0], causal_NR.gather(1, at_N1)[:, 0]
        wide = self._router(0).threshold.dtype
        logit_N, causal_N = (x_ND.new_empty(len(x_ND), dtype=wide) for _ in range(2))
        for recursion in range(self.config.num_recursions):
            at = (recursion_N == recursion).nonzero()[:, 0]
            if len(at):
                logit_N[at], causal_N[at] = self._router(recursion).logits(x_ND[at])
        return logit_N, causal_N

    def _draws(self, recursion_N: Tensor, position_N: Tensor, token_N: Tensor) -> Tensor:
        config = self.config
        draw_N = hash_uniform(position_N, token_N, seed=config.router_seed, recursion=recursion_N)
        return draw_N < self.shares_R[recursion_N]

    def join(self, x_ND: Tensor, block_ND: Tensor, gate_N: Tensor | None) -> Tensor:
        """Join a recursion's result to the stream."""
        gating = self.config.gating
        if self.is_token_choice:
            gating = "scaled" if gating == "weighted" else "none"
        return join(x_ND, block_ND, None if gate_N is None else gate_N[:, None], gating)

    def leave(self, start_ND: Tensor, x_ND: Tensor, exit_gate_N: Tensor | None) -> Tensor:
        """Join what token choice made of a row to what it got."""
        at_exit = "additive" if self.config.gating == "weighted" else self.config.gating
        gate_N1 = None if exit_gate_N is None else exit_gate_N[:, None]
        return join(start_ND, x_ND, gate_N1, at_exit)
