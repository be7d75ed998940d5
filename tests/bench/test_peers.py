"""The peer is the same model: same weights, same logits, the same kind of step."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from mor.bench import memory
from mor.bench import train as bench
from mor.bench.config import PEER, BenchTrainConfig, Shape
from mor.bench.contender import OurContender
from mor.bench.peers import LlamaContender, copy_weights
from mor.config import ModelConfig


def contenders(*, tied: bool = True) -> tuple[OurContender, LlamaContender]:
    model = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=5000.0,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    shape = Shape(model, context=24, batch_rows=2, quick_batch_rows=1)
    config = BenchTrainConfig(rows=(), peer=PEER, device="cpu")
    ours, peer = bench.make_jobs(config, shape, device="cpu", batch_rows=2)
    return OurContender(ours), LlamaContender(peer)


@pytest.mark.parametrize("tied", [True, False])
def test_the_peer_computes_the_same_logits_with_our_weights(tied):
    ours, peer = contenders(tied=tied)
    copy_weights(ours.model, peer)
    assert sum(p.numel() for p in peer.model.parameters()) == sum(
        p.numel() for p in ours.model.parameters()
    )


def test_a_peer_that_computes_something_else_is_refused():
    ours, peer = contenders()
    layer = ours.model.model.prelude[0]
    copy_weights(ours.model, peer)
    forward = type(layer.mlp).forward
    layer.mlp.forward = lambda x_ND, recursion=0: 1.01 * forward(layer.mlp, x_ND)
    with pytest.raises(RuntimeError, match="differ by"):
        copy_weights(ours.model, peer)


def test_the_peer_takes_the_same_step():
    """Both see the same tokens: only the last label of a row is ours alone."""
    ours, peer = contenders()
    copy_weights(ours.model, peer)
    before = peer.model.get_parameter("model.norm.weight").clone()
    mine, theirs = ours.step(0), peer.step(0)
    assert math.isclose(mine, theirs, rel_tol=0.1) and mine != theirs
    assert not torch.equal(before, peer.model.get_parameter("model.norm.weight"))
    assert all(p.grad is None for p in peer.model.parameters())


def test_the_peer_stands_at_the_end_of_the_table(monkeypatch):
    ours, peer = contenders()
    monkeypatch.setattr(bench, "measure_in_child", memory.measure)
    shape = Shape(ours.recipe.model, context=24, batch_rows=2, quick_batch_rows=1)
    config = BenchTrainConfig(rows=(), peer=PEER, device="cpu", quick=True)
    rows = bench.bench_train(config, shape=shape)["rows"]
    assert [row["name"] for row in rows] == ["vanilla", PEER]
    assert rows[1]["flops_ratio"] == 1.0 and rows[1]["time_ratio"] > 0
    assert rows[1]["saved_bytes"] > 0
    assert peer.name == PEER
