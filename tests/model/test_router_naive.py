"""An independent expert-choice router and its loss, written from the formulas alone.

z_t = W_r x_t;  p_t = alpha sigmoid(z_t);  k_r = max(1, int(c_r T))
A_r = top-k_r of p over the sequence among the tokens active at r - 1
x_t <- x_t + p_t f_r(x)_t  for t in A_r ("weighted");  others keep x_t
loss = sum over r of the mean over candidates of BCE(z_t, t in A_r)
"""

import math

import pytest
import torch
from support_model import KINDS, OPTIONS, naive_attention, random_ids, small_model

from mor.model.layers import Attend, rotary_angles


def naive_recursions(model, x_TD, gating):
    """One sequence, token by token, in plain Python; returns states, depths and the loss."""
    config, stack = model.config, model.model
    T = len(x_TD)
    active = list(range(T))
    depth, loss = [0] * T, 0.0
    for r in range(config.num_recursions):
        weight = stack.router(r).body.weight[0]
        z = {t: float(weight @ x_TD[t]) for t in active}
        p = {t: config.router_alpha / (1 + math.exp(-z[t])) for t in active}
        k = max(1, int(config.capacity[r] * T + 1e-9))
        chosen = sorted(sorted(active, key=lambda t: (-p[t], t))[:k])
        bce = [
            math.log1p(math.exp(-z[t])) if t in chosen else math.log1p(math.exp(z[t]))
            for t in active
        ]
        loss += sum(bce) / len(active)
        block = x_TD[chosen]
        rotary = rotary_angles(torch.tensor(chosen), config, dtype=x_TD.dtype)
        for layer in stack.block(r):
            block = layer(block, rotary, Attend(naive_attention))
        x_TD = x_TD.clone()
        for row, t in enumerate(chosen):
            if gating == "weighted":
                x_TD[t] = x_TD[t] + p[t] * block[row]
            else:
                gate = 2 / (1 + math.exp(-z[t]))
                x_TD[t] = x_TD[t] + gate * (block[row] - x_TD[t])
            depth[t] = r + 1
        active = chosen
    return x_TD, depth, loss


@pytest.mark.parametrize("gating", ["weighted", "residual"])
@torch.no_grad()
def test_router_and_loss_follow_the_formulas(gating):
    model = small_model("expert_choice", gating)
    ids = random_ids(1, 12)
    x_TD = model.model.embed_tokens(ids[0])
    rotary = rotary_angles(torch.arange(12), model.config, dtype=x_TD.dtype)
    for layer in model.model.prelude:
        x_TD = layer(x_TD, rotary, Attend(naive_attention))
    x_TD, depth, loss = naive_recursions(model, x_TD, gating)
    for layer in model.model.coda:
        x_TD = layer(x_TD, rotary, Attend(naive_attention))
    logits = model.model.norm(x_TD) @ model.head_weight_VD.T

    out = model(ids, rule="train")
    assert out.depth[0].tolist() == depth
    torch.testing.assert_close(out.logits[0], logits, rtol=1e-9, atol=1e-9)
    assert float(out.router_loss_sum) / out.num_tokens == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize(("router", "options"), [*((r, {"gating": g}) for r, g in KINDS), *OPTIONS])
def test_losses_sum_over_micro_batches(router, options):
    """Sums over tokens: splitting a batch changes neither loss nor gradients."""
    ids = random_ids(4, 12)
    results = []
    for parts in (1, 2, 4):
        model = small_model(router, **options)
        total = 0.0
        for part in ids.chunk(parts):
            out = model(part, labels=part, rule="train")
            loss = out.loss_sum / ids.numel()
            if out.router_loss_sum is not None:
                loss = loss + 0.1 * out.router_loss_sum / ids.numel()
            loss.backward()
            total += float(loss.detach())
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((total, grads))
    for total, grads in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-12)
        assert grads.keys() == results[0][1].keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-9, atol=1e-10)


def test_router_learns_through_gate_and_loss():
    model = small_model()
    ids = random_ids(2, 12)
    out = model(ids, labels=ids, rule="train")
    out.loss_sum.backward(retain_graph=True)
    through_gate = _router_grads(model)
    assert all(grad > 0 for grad in through_gate)
    model.zero_grad()
    out.router_loss_sum.backward()
    assert all(grad > 0 for grad in _router_grads(model))


def test_the_threshold_router_trains_by_the_rule_that_it_serves_by():
    """Its choice in training is causal: the future moves nothing, and no loss is added."""
    model = small_model("threshold", "weighted")
    model.model.router(1).threshold.fill_(0.4)
    ids = random_ids(2, 12)
    other = ids.clone()
    other[:, 6:] = random_ids(2, 6, seed=9)
    with torch.no_grad():
        before, after = model(ids, rule="train"), model(other, rule="train")
        assert torch.equal(before.depth, model(ids, rule="causal").depth)
    assert torch.equal(before.depth[:, :6], after.depth[:, :6])
    assert before.router_loss_sum is None
    assert len(set(before.depth.flatten().tolist())) > 1


def test_a_threshold_stays_below_scores_that_are_all_one():
    router = small_model("threshold", "weighted").model.router(2)
    router.after_step(torch.ones(64), is_first=True)
    assert float(router.threshold) < 1


def test_a_threshold_moves_towards_the_share_that_it_should_let_through():
    router = small_model("threshold", "weighted").model.router(2)  # 1/3 of 2/3: half go on
    scores = torch.linspace(0, 1, 101)
    router.after_step(scores, is_first=True)
    assert float(router.threshold) == pytest.approx(0.5, abs=1e-6)
    router.after_step(scores + 1)
    assert float(router.threshold) == pytest.approx(0.6, abs=1e-6)
    router.after_step(scores[:0])  # nobody came: nothing is learnt
    assert float(router.threshold) == pytest.approx(0.6, abs=1e-6)


def _router_grads(model):
    grads = [model.model.router(r).body.weight.grad for r in range(3)]
    return [0.0 if grad is None else float(grad.abs().sum()) for grad in grads]


def test_an_auxiliary_router_decides_at_inference_and_leaves_the_trunk_alone():
    """It learns membership on detached states; the main router keeps the gate and the top-k."""
    model = small_model(router_aux="router")
    ids = random_ids(2, 12)
    out = model(ids, labels=ids, rule="train")
    out.router_loss_sum.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {f"model.routers.{r}.aux_body.weight" for r in range(3)}
    before = model(ids, rule="causal")
    for r in range(3):
        torch.nn.init.zeros_(model.get_parameter(f"model.routers.{r}.aux_body.weight"))
        model.model.router(r).threshold.fill_(0.9)
    assert set(model(ids, rule="causal").depth.flatten().tolist()) == {1}
    assert before.depth.max() > 1


def test_capacities_warm_up_on_half_a_cosine():
    model = small_model(capacity_warmup_steps=4)
    ids = random_ids(1, 12)
    seen = []
    for _ in range(6):
        out = model(ids, rule="train")
        seen.append([stats.num_active for stats in out.recursions])
        for r in range(3):
            model.model.router(r).after_step(out.recursions[r].score_N)

    def count(share, step):
        warm = share + (1 - share) * 0.5 * (1 + math.cos(math.pi * min(1, step / 4)))
        return max(1, int(warm * 12 + 1e-9))

    assert seen == [[12, count(2 / 3, s), count(1 / 3, s)] for s in range(6)]
    assert seen[0] == [12, 12, 12]
    assert seen[4] == seen[5] == [12, 8, 4]


def test_z_loss_is_the_mean_squared_logit_over_recursions():
    plain, with_z = small_model(), small_model(router_z_loss_coef=0.5)
    ids = random_ids(1, 12)
    a, b = plain(ids, rule="train"), with_z(ids, rule="train")
    expected = sum(float(stats.score_N.logit().square().mean()) for stats in a.recursions)
    gap = float((b.router_loss_sum - a.router_loss_sum).detach()) / 12
    assert gap == pytest.approx(0.5 * expected, rel=1e-9)
