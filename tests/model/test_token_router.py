"""Token choice from its formulas alone, its balancing, and what it learns."""

import math
from typing import cast

import pytest
import torch
from support_model import naive_attention, random_ids, small_model

from mor.model.layers import Attend, rotary_angles
from mor.model.rows import Rows
from mor.model.token_router import TokenRouter


def router_of(model) -> TokenRouter:
    return cast(TokenRouter, model.model.routers[0])


def naive_token_choice(model, x_TD):
    """One sequence, token by token: states, depths and the balancing loss over tokens."""
    config, stack = model.config, model.model
    T, R = len(x_TD), config.num_recursions
    weight_RD = router_of(model).get_parameter("body.weight")
    scores = []
    for x_D in x_TD:
        z = [float(w @ x_D) for w in weight_RD]
        if config.router_score == "softmax":
            total = sum(math.exp(v) for v in z)
            scores.append([math.exp(v) / total for v in z])
        else:
            scores.append([1 / (1 + math.exp(-v)) for v in z])
    bias = router_of(model).balance.tolist()
    depth = [1 + max(range(R), key=lambda i, s=s: s[i] + bias[i]) for s in scores]
    h_TD = x_TD
    for r in range(R):
        chosen = [t for t in range(T) if depth[t] > r]
        block = h_TD[chosen]
        rotary = rotary_angles(torch.tensor(chosen), config, dtype=x_TD.dtype)
        for layer in stack.block(r):
            block = layer(block, rotary, Attend(naive_attention))
        h_TD = h_TD.clone()
        for row, t in enumerate(chosen):
            gate = config.router_alpha * scores[t][r] if config.gating == "weighted" else 1.0
            h_TD[t] = gate * block[row]
    out_TD = x_TD.clone()
    for t in range(T):
        score = scores[t][depth[t] - 1]
        if config.gating == "weighted":
            out_TD[t] = x_TD[t] + h_TD[t]
        elif config.gating == "residual":
            gate = score * (R if config.router_score == "softmax" else 2)
            out_TD[t] = x_TD[t] + gate * (h_TD[t] - x_TD[t])
        elif config.gating == "additive":
            out_TD[t] = x_TD[t] + h_TD[t]
        else:
            out_TD[t] = h_TD[t]
    balance = sum(sum(s[i] for s in scores) / T * (R * depth.count(i + 1) / T) for i in range(R))
    return out_TD, depth, balance


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gating", ["weighted", "residual", "additive", "none"])
@torch.no_grad()
def test_choice_gate_and_balance_follow_the_formulas(gating, score):
    model = small_model("token_choice", gating, router_score=score, seed=1)
    router_of(model).balance.copy_(torch.tensor([0.0, -0.02, 0.05]))
    ids = random_ids(1, 12)
    x_TD = model.model.embed_tokens(ids[0])
    rotary = rotary_angles(torch.arange(12), model.config, dtype=x_TD.dtype)
    for layer in model.model.prelude:
        x_TD = layer(x_TD, rotary, Attend(naive_attention))
    x_TD, depth, balance = naive_token_choice(model, x_TD)
    for layer in model.model.coda:
        x_TD = layer(x_TD, rotary, Attend(naive_attention))
    logits = model.model.norm(x_TD) @ model.head_weight_VD.T

    out = model(ids, rule="train")
    assert out.depth[0].tolist() == depth
    assert set(depth) == {1, 2, 3}, "the test would prove little"
    torch.testing.assert_close(out.logits[0], logits, rtol=1e-9, atol=1e-9)
    assert float(out.router_loss_sum) / 12 == pytest.approx(0.1 * balance, rel=1e-9)


def test_the_choice_is_the_same_in_training_and_outside():
    model = small_model("token_choice")
    ids = random_ids(2, 12)
    assert torch.equal(model(ids, rule="train").depth, model(ids, rule="causal").depth)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_residual_gate_is_one_at_zero_weights(score):
    model = small_model("token_choice", "residual", router_score=score)
    torch.nn.init.zeros_(router_of(model).get_parameter("body.weight"))
    choice = router_of(model)(*_some_rows(model), rule="causal")
    torch.testing.assert_close(choice.exit_gate_N1, torch.ones(6, 1).double())


def _some_rows(model):
    ids = random_ids(1, 6)
    rows, _ = Rows.pack(ids)
    return model.model.embed_tokens(rows.token_N), rows


def test_the_balancing_bias_moves_against_the_load_and_picks_only():
    """Crowded depths lose, empty ones gain; the gate keeps the score without the bias."""
    model = small_model("token_choice", router_balance="bias", router_balance_rate=0.25)
    router = router_of(model)
    router.after_step(torch.tensor([10, 2, 6]))
    assert router.balance.tolist() == [-0.25, 0.25, 0.0]
    router.balance.copy_(torch.tensor([0.0, 0.0, 5.0]))
    out = router(*_some_rows(model), rule="train")
    assert out.depth_N.tolist() == [3] * 6
    score_NR = router.scores(_some_rows(model)[0])[1]
    torch.testing.assert_close(out.step_gate_NR, score_NR)
    assert out.loss is None
    assert "model.routers.0.balance" in model.state_dict()


def test_the_stack_counts_the_picks_of_all_micro_batches():
    model = small_model("token_choice", router_balance="bias", router_balance_rate=0.5)
    parts = [model(random_ids(2, 12, seed=s), rule="train") for s in (0, 1)]
    model.model.after_step([out.recursions for out in parts])
    depth = torch.cat([out.depth.flatten() for out in parts])
    load = torch.bincount(depth, minlength=4)[1:].double()
    assert router_of(model).balance.tolist() == (0.5 * (load.mean() - load).sign()).tolist()


def test_the_router_learns_through_gate_and_balance():
    model = small_model("token_choice")
    ids = random_ids(2, 12)
    out = model(ids, labels=ids, rule="train")
    weight = router_of(model).get_parameter("body.weight")
    for loss in (out.loss_sum, out.router_loss_sum):
        (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert grad.abs().sum() > 0
