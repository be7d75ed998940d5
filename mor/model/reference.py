"""The readable twin of the stack: every token through every recursion, masks decide.

Slow on purpose and obviously right; `Stack.forward` must give the same numbers and gradients.
Shapes: B sequences, T tokens (padded), N packed rows, D width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mor.model.layers import Attend, rotary_angles
from mor.model.router import Rule, join
from mor.model.rows import Rows
from mor.model.token_router import TokenRouter
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

    diagonal_TT = torch.eye(x_BTD.shape[1], dtype=torch.bool, device=x_ND.device)
    first_keys: dict[int, tuple[Tensor, Tensor]] = {}

    def attend_among(member_BT: Tensor) -> Attend:
        visible_BTT = same_BTT & member_BT[:, None, :] | diagonal_TT
        return Attend(lambda q, k, v: attention_reference(q, k, v, visible_BQS=visible_BTT))

    def attend_in_block(index: int, r: int, active_BT: Tensor) -> Attend:
        """Let a layer of recursion r see what the strategy of keys and values says."""
        if config.kv_strategy == "per_recursion":
            return attend_among(active_BT)
        among_all = attend_among(real_BT)

        def run(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
            if r == 0:
                first_keys[index] = k_BTGK, v_BTGK
            first_k, first_v = first_keys[index]
            own_BT11 = active_BT[..., None, None] & (config.kv_strategy == "hybrid")
            k_BTGK = torch.where(own_BT11, k_BTGK, first_k)
            v_BTGK = torch.where(own_BT11, v_BTGK, first_v)
            return among_all.run(q_BTHK, k_BTGK, v_BTGK)

        return Attend(run)

    for layer in stack.prelude:
        x_BTD = layer(x_BTD, rotary, attend_among(real_BT))

    start_BTD, token_score_BTR, token_depth_BT = x_BTD, None, None
    active_BT = real_BT
    depth_BT = torch.zeros_like(segment_BT)
    router_loss: Tensor | None = None
    if config.router == "token_choice":
        token_depth_BT, token_score_BTR, router_loss = _token_choice(stack, x_BTD, real_BT, rule)
    stats = []
    for r in range(stack.depth_limit):
        gate_BT1, logit_N, score_BT, candidate_BT = None, x_ND.new_empty(0), None, active_BT
        passing = x_ND.new_empty(0)
        if token_depth_BT is not None:
            active_BT = candidate_BT & (token_depth_BT > r)
            passing = active_BT.sum()
        elif config.has_router:
            router = stack.router(r)
            logit_BT, causal_BT = router.logits(x_BTD)
            score_BT = torch.sigmoid(causal_BT.detach())
            logit_N = causal_BT.detach()[candidate_BT]
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
            passes_BT = _chosen(stack, r, score_BT, candidate_BT, rows, "causal")
            passing = (candidate_BT & passes_BT).sum()
        stats.append(
            RecursionStats(int(candidate_BT.sum()), int(active_BT.sum()), passing, logit_N)
        )
        block_BTD = x_BTD
        for index, layer in enumerate(stack.block(r)):
            block_BTD = layer(block_BTD, rotary, attend_in_block(index, r, active_BT), r)
        if stack.recursion_encoding is not None:
            block_BTD = block_BTD * stack.recursion_encoding[r]
        if token_score_BTR is None:
            joined_BTD = join(x_BTD, block_BTD, gate_BT1, config.gating)
        elif config.gating == "weighted":
            joined_BTD = config.router_alpha * token_score_BTR[..., r, None] * block_BTD
        else:
            joined_BTD = block_BTD
        x_BTD = torch.where(active_BT[..., None], joined_BTD, x_BTD)
        depth_BT = depth_BT + active_BT
    if token_score_BTR is not None and config.gating in ("weighted", "additive"):
        x_BTD = start_BTD + x_BTD
    if token_score_BTR is not None and config.gating == "residual":
        even = config.num_recursions if config.router_score == "softmax" else 2
        gate_BT1 = even * token_score_BTR.gather(-1, depth_BT.clamp(min=1)[..., None] - 1)
        x_BTD = start_BTD + gate_BT1 * (x_BTD - start_BTD)
    if stack.exit_maps is not None:
        for r, weight_DD in enumerate(stack.exit_maps.weight, start=1):
            mapped_BTD = x_BTD + x_BTD @ weight_DD.T
            x_BTD = torch.where((depth_BT == r)[..., None], mapped_BTD, x_BTD)

    for layer in stack.coda:
        x_BTD = layer(x_BTD, rotary, attend_among(real_BT))
    return StackOutput(stack.norm(x_BTD)[real_BT], depth_BT[real_BT], router_loss, stats, [])


def _token_choice(
    stack: Stack, x_BTD: Tensor, real_BT: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return every token's depth and scores, and the weighted losses in training."""
    config, router = stack.config, cast(TokenRouter, stack.routers[0])
    logit_BTR, score_BTR = router.scores(x_BTD)
    biased_BTR = score_BTR + (router.balance if config.router_balance == "bias" else 0)
    choice_BT = biased_BTR.argmax(-1)
    loss = None
    if rule == "train" and config.router_balance == "loss":
        loss = torch.zeros((), dtype=x_BTD.dtype, device=x_BTD.device)
        for real_T, choice_T, score_TR in zip(real_BT, choice_BT, score_BTR, strict=True):
            tokens = real_T.sum()
            for depth in range(config.num_recursions if tokens else 0):
                share = (choice_T[real_T] == depth).to(score_TR.dtype).mean()
                mean_score = score_TR[real_T][:, depth].mean()
                balance = config.num_recursions * share * mean_score
                loss = loss + balance * tokens * config.router_balance_loss_coef
    if rule == "train" and config.router_z_loss_coef:
        z_loss = config.router_z_loss_coef * logit_BTR[real_BT].logsumexp(-1).square().sum()
        loss = z_loss if loss is None else loss + z_loss
    return choice_BT + 1, score_BTR, loss


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
