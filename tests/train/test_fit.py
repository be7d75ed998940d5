"""Promises of the fit of exits: least squares, costs by definition, and nothing left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mor.checkpoint import load_model, save_model
from mor.config import ModelConfig
from mor.data.loader import Batch, PreparedData, TrainLoader
from mor.model.layers import ExitMaps
from mor.model.mor import MoR
from mor.train import fit, trainer
from mor.train.config import Recipe, TrainConfig
from mor.train.fit import fit_exits, fit_map, fit_router
from mor.train.trainer import Interrupted, train

CONFIG = ModelConfig(
    vocab_size=280,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    num_hidden_layers=8,
    initializer_range=0.2,
    num_recursions=3,
    sharing="none",
    router="expert_choice",
    gating="none",
    exit_maps=True,
    bos_token_id=5,
    eos_token_id=7,
)


def new_model(**changes: Any) -> MoR:
    torch.manual_seed(0)
    return MoR(dataclasses.replace(CONFIG, **changes)).double()


def maps_of(model: MoR) -> ExitMaps:
    maps = model.model.exit_maps
    assert maps is not None
    return maps


def batches(data: PreparedData, count: int) -> list[Batch]:
    loader = TrainLoader(data.split("train"), row_tokens=16, seed=0, eos_token_id=7)
    return [loader.batch(8 * n, 8) for n in range(count)]


@pytest.fixture
def data(tiny_data: Path) -> PreparedData:
    return PreparedData.open(tiny_data)


def test_a_linear_way_to_full_depth_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "MAP_RIDGE", 0.0)
    x_ND = torch.randn(200, 12, dtype=torch.float64)
    weight_DD = torch.randn(12, 12, dtype=torch.float64)
    found_DD = fit_map(x_ND, x_ND + x_ND @ weight_DD.T)
    torch.testing.assert_close(found_DD, weight_DD)


def test_scores_are_in_the_order_of_the_costs() -> None:
    x_ND, true_D = torch.randn(400, 12), torch.randn(12)
    score_N = x_ND @ fit_router(x_ND, (x_ND @ true_D).exp())
    ranks = torch.stack([score_N, x_ND @ true_D]).argsort(-1).argsort(-1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.99


@pytest.mark.parametrize("r", [1, 2])
def test_costs_are_the_slope_of_the_divergence(data: PreparedData, r: int) -> None:
    """Their sum is how fast the divergence grows as all exits move away from full depth."""
    model = new_model()
    torch.nn.init.normal_(maps_of(model).weight, std=0.05)
    (batch,) = batches(data, 1)

    with fit._everyone_goes_on(model):
        seen = fit._see(model, batch, None)
        cost_N = fit._cost_of_leaving(model, seen, r, None)

        def divergence(step: float) -> float:
            def move(_: object, inputs: object, left_ND: Tensor) -> Tensor:
                return left_ND + step * (left_ND - seen.end_RND[-1])

            handle = maps_of(model).register_forward_hook(move)
            model.model.depth_limit = r
            leaving = model(batch.input_ids_BT, segments=batch.segment_BT).logits.log_softmax(-1)
            handle.remove()
            model.model.depth_limit = 3
            full = (seen.head_ND.double() @ model.head_weight_VD.T).log_softmax(-1)
            return float((full.exp() * (full - leaving.flatten(0, 1))).sum())

        slope = (divergence(1e-4) - divergence(-1e-4)) / 2e-4
    assert float(cost_N.double().sum()) == pytest.approx(slope, rel=1e-3)


def test_exits_come_nearer_to_full_depth_and_nothing_else_changes(data: PreparedData) -> None:
    model = new_model().train()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = batches(data, 12)

    def gap() -> float:
        with fit._everyone_goes_on(model), torch.no_grad():
            ids, segments = held[-1].input_ids_BT, held[-1].segment_BT
            full = model(ids, segments=segments).logits
            model.model.depth_limit = 1
            near = model(ids, segments=segments).logits
            model.model.depth_limit = 3
        return float((full - near).square().mean())

    was = gap()
    fit_exits(model, held[:-1])
    assert gap() < 0.7 * was
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {
        "model.exit_maps.weight",
        "model.routers.1.body.weight",
        "model.routers.2.body.weight",
    }
    assert model.training and model.model.depth_limit == 3
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "model.embed_tokens.weight"
    ]


def test_the_random_router_gets_maps_alone(data: PreparedData) -> None:
    model = new_model(router="random")
    before = model.model.router(1).body.get_parameter("weight").clone()
    fit_exits(model, batches(data, 3))
    assert torch.equal(model.model.router(1).body.get_parameter("weight"), before)
    assert maps_of(model).weight.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exit_maps": False}, "fit_tokens needs exit_maps True, it is False"),
        ({"gating": "residual"}, "fit_tokens needs gating none, it is residual"),
        ({"router_body": "mlp"}, "fit_tokens needs router_body linear, it is mlp"),
    ],
)
def test_a_model_that_is_not_fitted_like_this_is_refused(
    data: PreparedData, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = TrainConfig(context=16, batch_tokens=64, budget_tokens=64, fit_tokens=64)
    recipe = Recipe(model=dataclasses.replace(CONFIG, **changes), train=config)
    with pytest.raises(ValueError, match=said):
        train(recipe, data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_the_fit_and_goes_on_without(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(new_model().float(), tmp_path / "start")
    config = TrainConfig(
        context=16, batch_tokens=64, budget_tokens=128, fit_tokens=500, checkpoint_every=1, lr=1e-5
    )
    recipe = Recipe(model=CONFIG, train=config)
    calls: list[int] = []
    real = trainer.fit_exits

    def count(model: MoR, batches: list[Batch], **more: Any) -> None:
        calls.append(sum(batch.input_ids_BT.numel() for batch in batches))
        real(model, batches, **more)

    def stop(*args: Any, **more: Any) -> Any:
        raise Interrupted("stopped")

    monkeypatch.setattr(trainer, "fit_exits", count)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_finish", stop)
        with pytest.raises(Interrupted):
            train(recipe, data=data, out=tmp_path / "run", start=tmp_path / "start")
    train(recipe, data=data, out=tmp_path / "run", start=tmp_path / "start", resume=True)
    assert calls == [512], "whole micro-batches, once"
    assert maps_of(load_model(tmp_path / "run/model")).weight.abs().max() > 1e-3
