"""Promises of the training loop: it learns, adds up micro-batches, logs all, keeps what it has."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mor.config import ModelConfig
from mor.data.loader import Batch, PreparedData, TrainLoader
from mor.model.mor import MoR
from mor.train import state, trainer
from mor.train.config import Recipe, TrainConfig, load_recipe
from mor.train.metrics import RoutingMeter, read_metrics
from mor.train.optim import build_optimizer
from mor.train.trainer import new_model, train

ROUTINGS = [
    ("expert_choice", "weighted"),
    ("expert_choice", "residual"),
    ("threshold", "weighted"),
    ("token_choice", "weighted"),
    ("random", "weighted"),
    ("fixed", "none"),
]


def small_recipe(router: str = "expert_choice", gating: str = "auto", **train: Any) -> Recipe:
    model: dict[str, Any] = {"router": router, "gating": gating}
    settings: dict[str, Any] = {
        "budget_tokens": 1,
        "context": 32,
        "batch_tokens": 128,
        "dtype": "float32",
        "device": "cpu",
    }
    return Recipe(
        model=ModelConfig(
            vocab_size=280,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            num_recursions=3,
            router_aux_loss_coef=0.5,
            **model,
        ),
        train=TrainConfig(**settings | train),
    )


def run_steps(recipe: Recipe, data: PreparedData, count: int, *, same: bool = False) -> Any:
    """Train a float64 model for count steps; returns it and the figures of every step."""
    torch.manual_seed(0)
    model = MoR(recipe.model).double()
    optimizer = build_optimizer(model, recipe.train)
    manifest = data.manifest
    loader = TrainLoader(
        data.split("train"), row_tokens=32, seed=0, eos_token_id=manifest.eos_token_id
    )
    meter = RoutingMeter(model, 32)
    device, dtype = torch.device("cpu"), torch.float32
    losses = []
    for step in range(count):
        at = 0 if same else step
        losses.append(
            trainer.train_step(model, optimizer, loader, at, recipe, device, dtype, meter)
        )
    return model, losses


@pytest.mark.parametrize(("router", "gating"), ROUTINGS)
def test_micro_batches_add_up_to_their_batch(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, router: str, gating: str
) -> None:
    """Gradients, router loss included, are those of the whole batch, in 1, 2 and 4 parts."""
    data = PreparedData.open(tiny_data)
    grads: list[dict[str, torch.Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters: Any, max_norm: float) -> Any:
        model = kept_model[-1]
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return clip(parameters, max_norm)

    kept_model: list[MoR] = []
    build = build_optimizer

    def remember(model: MoR, config: TrainConfig) -> Any:
        kept_model.append(model)
        return build(model, config)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    monkeypatch.setitem(globals(), "build_optimizer", remember)
    all_losses = []
    for parts in (1, 2, 4):
        recipe = small_recipe(router, gating, micro_batch_tokens=128 // parts)
        all_losses.append(run_steps(recipe, data, 1)[1][0])
    assert all_losses[0]["loss"] > 0
    for part_grads, losses in zip(grads[1:], all_losses[1:], strict=True):
        assert losses == pytest.approx(all_losses[0], rel=1e-6)
        assert part_grads.keys() == grads[0].keys()
        for name, grad in part_grads.items():
            torch.testing.assert_close(grad, grads[0][name], rtol=1e-9, atol=1e-12, msg=name)
    if router == "expert_choice":
        assert all_losses[0]["router_loss"] > 0
        assert grads[0]["model.routers.2.body.weight"].abs().max() > 0


def train_short(data: Path, out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Train eight steps through the public function; returns the weights."""
    recipe = small_recipe(budget_tokens=8 * 128, eval_tokens=64, **settings)
    train(recipe, data=PreparedData.open(data), out=out)
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("recompute", ["recursion", "layer"])
def test_recomputing_changes_no_bit_of_a_run(
    tiny_data: Path, tmp_path: Path, recompute: str
) -> None:
    plain = train_short(tiny_data, tmp_path / "plain")
    again = train_short(tiny_data, tmp_path / "again", recompute=recompute)
    assert all(torch.equal(plain[name], again[name]) for name in plain.keys() | again.keys())


@pytest.mark.parametrize("freeze", ["embedding", "prelude"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_frozen_parts_keep_their_bits_and_the_rest_learns(
    freeze: Any, is_tied: bool, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(budget_tokens=1024, freeze=freeze, weight_decay=0.1)
    model = dataclasses.replace(recipe.model, tie_word_embeddings=is_tied)
    recipe = dataclasses.replace(recipe, model=model)
    train(recipe, data=PreparedData.open(tiny_data), out=tmp_path / "run")
    before = new_model(recipe, torch.device("cpu")).state_dict()
    after = load_file(tmp_path / "run/model/model.safetensors")
    kept = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    frozen = {name for name in after if "embed_tokens" in name or "lm_head" in name}
    if freeze == "prelude":
        frozen |= {name for name in after if ".layers.0." in name}
    assert frozen and kept - {name for name in kept if "router" in name} == frozen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler reads .grad of what is no leaf
def test_a_compiled_run_comes_to_the_same_weights(tiny_data: Path, tmp_path: Path) -> None:
    plain = train_short(tiny_data, tmp_path / "plain")
    compiled = train_short(tiny_data, tmp_path / "compiled", compile=True)
    for name in plain.keys() | compiled.keys():
        torch.testing.assert_close(plain[name], compiled[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("router", "gating", "optimizer"),
    [(*routing, "adamw") for routing in ROUTINGS] + [("expert_choice", "weighted", "muon")],
)
def test_one_batch_can_be_learnt_by_heart(
    tiny_data: Path, router: str, gating: str, optimizer: str
) -> None:
    recipe = small_recipe(router, gating, optimizer=optimizer, lr=1e-2, weight_decay=0.0)
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, router_aux_loss_coef=0.001)
    )
    _, losses = run_steps(recipe, PreparedData.open(tiny_data), 80, same=True)
    assert losses[0]["loss"] > 5
    assert losses[-1]["loss"] < 0.25 * losses[0]["loss"]


def test_rows_repeat_in_the_first_steps_alone_and_in_parts_as_in_one(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight steps of four samples, three repeat: samples 0 to 11 are asked for, and no other."""
    made: list[int] = []
    repeat_rows = trainer.repeat_rows

    def watch(batch: Any, *, seed: int, first_sample: int) -> Any:
        made.extend(range(first_sample, first_sample + len(batch.input_ids_BT)))
        return repeat_rows(batch, seed=seed, first_sample=first_sample)

    monkeypatch.setattr(trainer, "repeat_rows", watch)
    runs = []
    for parts in (1, 4):
        settings = {"budget_tokens": 8 * 128, "micro_batch_tokens": 128 // parts}
        recipe = small_recipe(repeat_share=0.375, **settings)
        runs.append(run_steps(recipe, PreparedData.open(tiny_data), 8)[1])
    assert made == [*range(12), *range(12)]
    plain = run_steps(small_recipe(budget_tokens=8 * 128), PreparedData.open(tiny_data), 1)[1]
    assert runs[0][0]["loss"] != plain[0]["loss"]
    for whole, part in zip(*runs, strict=True):
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_metrics_hold_all_that_a_run_measures(tiny_run: Path) -> None:
    lines = read_metrics(tiny_run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    for line in steps:
        assert {
            "tokens",
            "train_flops",
            "lr",
            "loss",
            "router_loss",
            "grad_norm",
            "tokens_per_s",
            "flops_per_s",
            "peak_share",
            "peak_memory_bytes",
            "active_share",
            "drift",
            "dead_share",
        } <= line.keys()
        assert line["tokens"] == 128 * line["step"]
        assert line["active_share"] == pytest.approx([1, 21 / 32, 10 / 32])  # top-k of 32 tokens
        assert len(line["drift"]) == 3 and line["drift"][0] == 0
        assert 0 <= line["dead_share"] <= 1
        assert line["tokens_per_s"] > 0 and line["peak_share"] > 0
        assert line["peak_memory_bytes"] > 1e6
        assert line["flops_per_s"] == pytest.approx(
            line["tokens_per_s"] * line["train_flops"] / line["tokens"]
        )
    heldout = [line["step"] for line in lines if "heldout_loss" in line]
    assert heldout == [5, 10]


def test_dead_share_and_drift_are_counted_from_the_routing(tiny_data: Path) -> None:
    """Drift is what the causal rule would take less what top-k took, per candidate."""
    recipe = small_recipe()
    torch.manual_seed(0)
    model = MoR(recipe.model).train()
    ids = torch.randint(0, 280, (2, 32))
    meter = RoutingMeter(model, 32)
    out = model(ids, labels=ids, rule="train")
    meter.add(out)
    read = meter.read()
    passing = (out.recursions[1].score_N > 0.5).sum().item()
    assert read["drift"][1] == pytest.approx((passing - 2 * 21) / 64)
    full = (out.depth == 3).any(0).sum().item()
    assert read["dead_share"] == pytest.approx(1 - full / 32)
    meter.reset()
    assert meter.read()["active_share"] == [0, 0, 0]


def test_a_finished_run_leaves_model_calibration_and_summary(tiny_run: Path) -> None:
    names = {path.name for path in (tiny_run / "model").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "calibration.json",
        "README.md",
    }
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["tokens"] == 1536
    assert summary["model"] == str(tiny_run / "model")
    assert math.isfinite(summary["bits_per_byte"]) and 1 <= summary["mean_depth"] <= 3
    checkpoints = sorted(path.name for path in (tiny_run / "checkpoints").iterdir())
    assert checkpoints == ["step-00000008", "step-00000012"]  # the last two of three


def test_validation_text_that_is_too_short_is_said_before_training(
    tiny_data: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PreparedData.open(tiny_data)
    whole = data.split

    def short(name: str) -> Any:
        if name == "val":
            raise ValueError("split val has 9 tokens, fewer than context 32")
        return whole(name)

    monkeypatch.setattr(PreparedData, "split", lambda self, name: short(name))
    with pytest.raises(ValueError, match="split val has 9 tokens"):
        train(load_recipe(tiny_recipe), data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_nan_is_named_and_the_last_good_checkpoint_stays(
    tiny_data: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = TrainLoader.batch
    recipe, data = load_recipe(tiny_recipe), PreparedData.open(tiny_data)
    forward = MoR.forward

    def poisoned(self: MoR, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if poison and out.loss_sum is not None:
            return out._replace(loss_sum=out.loss_sum * math.nan)
        return out

    poison: list[bool] = []

    def watch(self: TrainLoader, first: int, count: int) -> Batch:
        if first >= 6 * 4:  # step 7 of 4 rows a step
            poison.append(True)
        return batch(self, first, count)

    monkeypatch.setattr(MoR, "forward", poisoned)
    monkeypatch.setattr(TrainLoader, "batch", watch)
    with pytest.raises(ValueError, match=r"step 7: loss is nan.* checkpoint of step 4 is kept"):
        train(recipe, data=data, out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    assert not (tmp_path / "run/model").exists()
    monkeypatch.undo()
    trainer_summary = train(recipe, data=data, out=tmp_path / "run", resume=True)
    assert math.isfinite(trainer_summary.val_loss)


def test_a_bad_step_changes_no_weight(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PreparedData.open(tiny_data)
    before, _ = run_steps(small_recipe(), data, 0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    after, losses = run_steps(small_recipe(), data, 2)
    assert losses[0]["grad_norm"] == math.inf
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(
    tiny_data: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, data = load_recipe(tiny_recipe), PreparedData.open(tiny_data)
    save = state.save_tensors

    def full(tensors: Any, path: Path) -> None:
        if "step-00000008" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            train(recipe, data=data, out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    train(recipe, data=data, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_the_vocabulary_and_end_of_document_come_from_the_data(tiny_run: Path) -> None:
    config = ModelConfig.load(tiny_run / "model")
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (280, 0, 0)
