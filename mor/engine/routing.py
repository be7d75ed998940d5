"""The causal rule for rows of mixed depth: who goes on, and with which gate.

The decisions are those of `mor.model.router` and `mor.model.token_router`; here each row may stand
at another recursion and follow the thresholds of its own request.
Shapes: N rows, D width, R recursions.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from mor.model.mor import MoR
from mor.model.router import join
from mor.model.token_router import TokenRouter
from mor.ops.select import hash_uniform


class Entry(NamedTuple):
    """What is decided when rows leave the prelude."""

    gate_N: Tensor | None
    """gate of recursion 1; None where it has none, or where all are known"""
    gates_NR: Tensor | None
    """gates of all recursions (token choice)"""
    exit_gate_N: Tensor | None
    """gate at the exit (token choice)"""
    depth_N: Tensor | None
    """recursions to take, where that is known now (token choice)"""


class Decision(NamedTuple):
    """What is decided after a recursion."""

    goes_on_N: Tensor
    gate_N: Tensor | None
    """gate of the next recursion"""


class DepthRouter:
    """Routers of a model, asked for rows of all depths."""

    def __init__(self, model: MoR) -> None:
        self.config = model.config
        self.stack = model.model
        self.is_token_choice = self.config.router == "token_choice"
        self.has_gate = self.config.has_router and not self.is_token_choice
        self.num_recursions = self.config.num_recursions

    def thresholds(self) -> tuple[float, ...]:
        """Return the thresholds of the model folder, one a recursion; 0 where there are none."""
        if not self.has_gate or self.config.router == "random":
            return (0.0,) * self.num_recursions
        return tuple(float(self.stack.router(r).threshold) for r in range(self.num_recursions))

    def enter(self, x_ND: Tensor) -> Entry:
        """Decide what can be decided on states that leave the prelude."""
        if self.is_token_choice:
            router = cast(TokenRouter, self.stack.routers[0])
            choice = router.choose(router.scores(x_ND)[1])
            exit_gate = choice.exit_gate_N1
            return Entry(
                None,
                choice.step_gate_NR,
                None if exit_gate is None else exit_gate[:, 0],
                choice.depth_N,
            )
        if not self.has_gate:
            return Entry(None, None, None, None)
        router = self.stack.router(0)
        return Entry(router.gate(router.logits(x_ND)[0]), None, None, None)

    def decide(
        self,
        recursion: int,
        x_ND: Tensor,
        *,
        threshold_N: Tensor,
        position_N: Tensor,
        token_N: Tensor,
    ) -> Decision:
        """Decide about rows that may take a recursion (from 0); token choice has decided before.

        threshold_N  fp32, each row's own threshold of this recursion
        """
        if not self.has_gate:
            everyone = torch.ones(len(x_ND), dtype=torch.bool, device=x_ND.device)
            return Decision(everyone, None)
        router = self.stack.router(recursion)
        logit_N, causal_N = router.logits(x_ND)
        if self.config.router == "random":
            draw_N = hash_uniform(
                position_N, token_N, seed=self.config.router_seed, recursion=recursion
            )
            share = router.capacity(recursion) / router.capacity(recursion - 1)
            return Decision(draw_N < share, router.gate(logit_N))
        return Decision(torch.sigmoid(causal_N) > threshold_N, router.gate(logit_N))

    def join(self, x_ND: Tensor, block_ND: Tensor, gate_N: Tensor | None) -> Tensor:
        """Join a recursion's result to the stream."""
        gating = self.config.gating
        if self.is_token_choice:
            gating = "scaled" if gating == "weighted" else "none"
        return join(x_ND, block_ND, None if gate_N is None else gate_N[:, None], gating)

    def leave(self, start_ND: Tensor, x_ND: Tensor, exit_gate_N: Tensor | None) -> Tensor:
        """Join what token choice made of a row to what it got; other routers have done so."""
        if not self.is_token_choice:
            return x_ND
        gating = self.config.gating
        at_exit = "additive" if gating == "weighted" else gating
        gate = None if exit_gate_N is None else exit_gate_N[:, None]
        return join(start_ND, x_ND, gate, at_exit)
