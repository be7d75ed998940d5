"""Promises of what is measured of a member: causal, by row, with depth that can be limited."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mor.checkpoint import load_model
from mor.data.loader import Batch, PreparedData
from mor.evals.depth import bounded_depth
from mor.experiment.evaluate import evaluate, repeats_of
from mor.model.mor import MoR


@pytest.fixture
def model(tiny_run: Path) -> MoR:
    return load_model(tiny_run / "model")


def test_a_member_is_measured_under_the_causal_rule(model: MoR, tiny_data: Path):
    data = PreparedData.open(tiny_data)
    result = evaluate(model, data, context=32, eval_tokens=512)
    assert result["val_tokens"] == 512 and len(result["row_loss"]) == 16
    assert result["active_share"][0] == 1
    assert sum(result["active_share"]) == pytest.approx(result["mean_depth"])
    assert result["loss_up_to_depth"][-1] == pytest.approx(result["val_loss"])
    assert result["top_k_loss"] != result["val_loss"]
    classes = result["depth_by_class"]
    assert sum(one["share"] for one in classes.values()) == pytest.approx(1)
    depth = sum(one["share"] * one["mean_depth"] for one in classes.values())
    assert depth == pytest.approx(result["mean_depth"])
    loss = sum(one["share"] * one["loss"] for one in classes.values())
    assert loss == pytest.approx(result["val_loss"], rel=1e-5)
    assert all(1 <= mean <= 3 and count >= 20 for _, mean, count in result["deepest"])
    repeats = result["repeats"]
    share = repeats["share"]
    assert 0 < share < 1
    whole = share * repeats["loss"] + (1 - share) * repeats["others"]
    assert whole == pytest.approx(result["val_loss"], rel=1e-5)
    # own layers once, the block once for each recursion that a token is active in
    one_layer = 2 * 16 * 1 * 2
    own, block = 2, 1
    assert result["kv_bytes_per_token"] == pytest.approx(
        one_layer * (own + block * result["mean_depth"])
    )


def test_repeats_are_pairs_seen_before_in_the_same_document():
    ids = torch.tensor([[5, 6, 7, 5, 6, 5, 6], [5, 6, 5, 6, 5, 6, 5]])
    segments = torch.tensor([[0] * 6, [0, 0, 0, 1, 1, 1]])
    batch = Batch(ids[:, :-1], ids[:, 1:], segments)
    assert repeats_of(batch).int().tolist() == [[0, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 1]]
    assert repeats_of(batch._replace(segment_BT=None))[1].tolist() == [False] * 2 + [True] * 4


def test_a_limit_of_depth_holds_and_leaves_the_model_as_it_was(model: MoR):
    model.eval()
    for r in range(1, 3):
        model.model.router(r).threshold.fill_(0)
    ids = torch.randint(model.config.vocab_size, (2, 32))
    before = model(ids).depth
    assert before.max() == 3
    for most in (1, 2):
        with bounded_depth(model, most=most):
            assert model(ids).depth.max() == most
    assert torch.equal(model(ids).depth, before)
