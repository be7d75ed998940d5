"""The fast stack gives the outputs and gradients of its readable twin, whatever the model."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support_model import KINDS, OPTIONS, assert_same, random_ids, small_model

from mor.model.stack import Stack


@pytest.mark.parametrize("rule", ["train", "causal"])
@pytest.mark.parametrize(("router", "gating"), KINDS)
def test_fast_equals_reference_with_documents_and_ragged_rows(router, gating, rule):
    model = small_model(router, gating)
    ids = random_ids(3, 20)
    segments = (random_ids(3, 20, seed=1) < 6).cumsum(1)
    lengths = torch.tensor([20, 7, 13])
    for options in (
        {},
        {"lengths": lengths},
        {"segments": segments},
        {"segments": segments, "lengths": lengths},
    ):
        assert_same(model, ids, rule=rule, **options)


@pytest.mark.parametrize("rule", ["train", "causal"])
@pytest.mark.parametrize(("router", "options"), OPTIONS)
def test_fast_equals_reference_with_every_option_of_a_router(router, options, rule):
    model = small_model(router, **options)
    if model.config.capacity_warmup_steps:
        for r in range(3):
            model.model.router(r).steps_done.fill_(2)  # half-way
    ids = random_ids(3, 20)
    assert_same(model, ids, rule=rule)
    assert_same(model, ids, rule=rule, lengths=torch.tensor([20, 7, 13]))


@given(st.data())
def test_fast_equals_reference_for_random_small_models(data):
    draw = data.draw
    router, gating = draw(st.sampled_from(KINDS))
    recursions = draw(st.integers(2 if router != "fixed" else 1, 4))
    sharings = ["cycle", "middle_cycle", "none"]
    if router == "fixed":
        sharings += ["sequence", "middle_sequence"]
    sharing = draw(st.sampled_from(sharings))
    block = draw(st.integers(1, 2))
    shares = sorted(
        draw(st.lists(st.floats(0.05, 1.0), min_size=recursions - 1, max_size=recursions - 1)),
        reverse=True,
    )
    groups = draw(st.sampled_from([(4, 4), (4, 2), (3, 1)]))
    apart: dict[str, Any] = {}
    if recursions > 1 and "cycle" in sharing:
        strategies = ["per_recursion", "shared", *(["hybrid"] if router != "fixed" else [])]
        apart = {
            "kv_strategy": draw(st.sampled_from(strategies)),
            "relax_norms": draw(st.booleans()),
            "recursion_encoding": draw(st.booleans()),
            "lora_rank": draw(st.integers(0, 2)),
            "lora_targets": ("q_proj", "down_proj"),
        }
    if router != "fixed":
        apart["exit_maps"] = draw(st.booleans())
    model = small_model(
        router,
        gating,
        seed=draw(st.integers(0, 3)),
        num_recursions=recursions,
        sharing=sharing,
        num_hidden_layers=block * recursions + (0 if sharing in ("cycle", "sequence") else 2),
        capacity=(1.0, *shares) if router not in ("fixed", "token_choice") else (),
        num_attention_heads=groups[0],
        num_key_value_heads=groups[1],
        tie_word_embeddings=draw(st.booleans()),
        **apart,
    )
    model.model.recompute = draw(st.sampled_from(["none", "recursion", "layer"]))
    if router != "token_choice":
        model.model.depth_limit = draw(st.integers(1, recursions))
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    options = {"rule": draw(st.sampled_from(["train", "causal"]))}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
        if sum(lengths):
            options["lengths"] = torch.tensor(lengths)
    if draw(st.booleans()):
        options["segments"] = (random_ids(B, T, seed=2) < 15).cumsum(1)
    assert_same(model, random_ids(B, T), **options)


def test_the_block_sees_active_rows_only(monkeypatch):
    """Real skipping: the rows that enter the shared block are the active ones, no more."""
    seen, run = [], Stack._run

    def counting(stack, layers, x_ND, *rest, **options):
        seen.append(len(x_ND))
        return run(stack, layers, x_ND, *rest, **options)

    monkeypatch.setattr(Stack, "_run", counting)
    model = small_model()
    model(random_ids(2, 12), rule="train")
    assert seen == [24, 24, 16, 8, 24]  # prelude, recursions 1 to 3, coda


def saved_bytes(model, ids):
    """Run a training forward; returns its output and the bytes kept for the backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(ids, labels=ids, rule="train")
    for param in model.parameters():
        storages.pop(param.untyped_storage().data_ptr(), None)
    return out, sum(storages.values())


def test_skipped_tokens_cost_no_activations():
    """What is saved for the backward pass shrinks with the active share."""

    ids = random_ids(4, 48)
    full, third = (
        saved_bytes(small_model(num_hidden_layers=14, capacity=capacity), ids)[1]
        for capacity in ((1.0, 1.0, 1.0), (1.0, 1 / 3, 1 / 3))
    )
    # 2 own layers + 4 x (1 + 1/3 + 1/3) of 2 + 12
    assert third / full < 0.75


@pytest.mark.parametrize("kv_strategy", ["per_recursion", "shared", "hybrid"])
def test_recomputing_gives_the_same_bits_and_keeps_less(kv_strategy):
    """Gradients with activation checkpointing are those without; a recursion keeps its input."""
    ids, kept, grads = random_ids(2, 24), {}, {}
    for recompute in ("none", "recursion", "layer"):
        model = small_model(num_hidden_layers=14, kv_strategy=kv_strategy)
        model.model.recompute = recompute
        out, kept[recompute] = saved_bytes(model, ids)
        (out.loss_sum + out.router_loss_sum).backward()
        grads[recompute] = [p.grad for p in model.parameters()]
    for recompute in ("recursion", "layer"):
        for a, b in zip(grads["none"], grads[recompute], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert kept[recompute] < 0.5 * kept["none"]


def test_recursion_one_takes_every_token_and_depth_counts_recursions():
    model = small_model()
    out = model(random_ids(2, 12), rule="train")
    assert out.recursions[0].num_active == 24
    counts = [int((out.depth >= r).sum()) for r in (1, 2, 3)]
    assert counts == [24, 16, 8] == [stats.num_active for stats in out.recursions]


@pytest.mark.parametrize("kv_strategy", ["per_recursion", "shared", "hybrid"])
def test_nobody_active_is_fine(kv_strategy):
    model = small_model(kv_strategy=kv_strategy)
    for r in (1, 2):
        model.model.router(r).threshold.fill_(2.0)
    ids = random_ids(2, 5)
    out = assert_same(model, ids, rule="causal")
    assert out.depth.tolist() == [[1] * 5] * 2


def test_bfloat16_autocast_runs_and_keeps_scores_in_fp32():
    model = small_model().float()
    ids = random_ids(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids, rule="train")
    assert out.recursions[1].score_N.dtype == torch.float32
    (out.loss_sum + out.router_loss_sum).backward()
    half = small_model().to(torch.bfloat16)
    assert half.model.router(0).body.weight.dtype == torch.float32
    assert torch.isfinite(half(ids, rule="causal").logits.float()).all()
