"""The readable twin of the stack: every token through every recursion, masks decide.

Slow on purpose and obviously right; `Stack.forward` must give the same numbers and gradients.
Shapes: B sequences, T tokens (padded), N packed rows, D width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mor.model.layers import Attend, rotary_angles
from mor.model.router import Rule, join
from mor.model.rows import Rows
from mor.ops.attention import attention_reference
from mor.ops.select import hash_uniform, top_k_count

if TYPE_CHECKING:
    from mor.model.stack import Stack, StackOutput


def reference_stack(stack: Stack, x_ND: Tensor, rows: Rows, *, rule: Rule) -> StackOutput:
    """Same output as `stack(x_ND, rows, rule=rule)`, computed on full squares under masks."""
    from mor.model.stack import RecursionStats, StackOutput

    config = stack.config
    slot_N = rows.slot_N()

    def pad(value_N: Tensor) -> Tensor:
        return rows.pad(value_N, slot_N)

    x_BTD = pad(x_ND)
    real_BT = pad(torch.ones_like(rows.position_N)).bool()
    rotary = rotary_angles(pad(rows.position_N), config, dtype=x_ND.dtype)
    segment_BT = pad(
        torch.zeros_like(rows.position_N) if rows.segment_N is None else rows.segment_N
    )
    same_BTT = (segment_BT[:, :, None] == segment_BT[:, None, :]).tril()

    def attend_among(member_BT: Tensor) -> Attend:
        diagonal_TT = torch.eye(member_BT.shape[1], dtype=torch.bool, device=x_ND.device)
        visible_BTT = same_BTT & member_BT[:, None, :] | diagonal_TT

        def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
            return attention_reference(q_BTHK, k_BTGK, v_BTGK, visible_BQS=visible_BTT)

        return attend

    for layer in stack.prelude:
        x_BTD = layer(x_BTD, rotary, attend_among(real_BT))

    active_BT = real_BT
    depth_BT = torch.zeros_like(segment_BT)
    router_loss: Tensor | None = None
    stats = []
    for r in range(config.num_recursions):
        gate_BT1, score_N, score_BT, candidate_BT = None, x_ND.new_empty(0), None, active_BT
        if config.has_router:
            router = stack.router(r)
            logit_BT, causal_BT = router.logits(x_BTD)
            score_BT = torch.sigmoid(causal_BT.detach())
            score_N = score_BT[candidate_BT]
            gate_BT1 = router.gate(logit_BT)[..., None]
            if r > 0:
                is_top_k = rule == "train" and config.router == "expert_choice"
                by_BT = logit_BT.detach() if is_top_k else score_BT
                active_BT = candidate_BT & _chosen(stack, r, by_BT, candidate_BT, rows, rule)
            if rule == "train":
                loss = router.loss(
                    logit_BT[candidate_BT],
                    causal_BT[candidate_BT],
                    active_BT[candidate_BT].to(logit_BT.dtype),
                )
                if loss is not None:
                    router_loss = loss + (0 if router_loss is None else router_loss)
        passing = x_ND.new_empty(0)
        if score_BT is not None:
            passes_BT = _chosen(stack, r, score_BT, candidate_BT, rows, "causal")
            passing = (candidate_BT & passes_BT).sum()
        stats.append(
            RecursionStats(int(candidate_BT.sum()), int(active_BT.sum()), passing, score_N)
        )
        block_BTD = x_BTD
        for layer in stack.block(r):
            block_BTD = layer(block_BTD, rotary, attend_among(active_BT))
        joined_BTD = join(x_BTD, block_BTD, gate_BT1, config.gating)
        x_BTD = torch.where(active_BT[..., None], joined_BTD, x_BTD)
        depth_BT = depth_BT + active_BT

    for layer in stack.coda:
        x_BTD = layer(x_BTD, rotary, attend_among(real_BT))
    return StackOutput(stack.norm(x_BTD)[real_BT], depth_BT[real_BT], router_loss, stats)


def _chosen(
    stack: Stack,
    recursion: int,
    score_BT: Tensor,
    candidate_BT: Tensor,
    rows: Rows,
    rule: Rule,
) -> Tensor:
    """Mark the tokens that recursion takes, before asking whether they are candidates."""
    config, router = stack.config, stack.router(recursion)
    if config.router == "random":
        slot_N = rows.slot_N()
        draw_BT = hash_uniform(
            rows.pad(rows.position_N, slot_N),
            rows.pad(rows.token_N, slot_N),
            seed=config.router_seed,
            recursion=recursion,
        )
        return draw_BT < router.capacity(recursion) / router.capacity(recursion - 1)
    if rule == "causal" or config.router == "threshold":
        return score_BT > router.threshold
    # A token is among the k best when fewer than k candidates beat it; the earlier wins a tie.
    score_BT = score_BT.masked_fill(~candidate_BT, -math.inf)
    better_BTT = score_BT[:, None, :] > score_BT[:, :, None]
    tie_BTT = (score_BT[:, None, :] == score_BT[:, :, None]).tril(-1)
    rank_BT = (better_BTT | tie_BTT).sum(-1)
    return rank_BT < top_k_count(rows.length_B, router.capacity(recursion))[:, None]
