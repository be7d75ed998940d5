"""Promises of distillation: the parent's own numbers, gradients by definition, exact resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mor.checkpoint import load_model, save_model
from mor.config import ModelConfig
from mor.data.loader import PreparedData, TrainLoader
from mor.model.mor import MoR
from mor.train import trainer
from mor.train.config import Recipe, TrainConfig
from mor.train.distill import DistillConfig
from mor.train.metrics import read_metrics
from mor.train.optim import build_optimizer
from mor.train.teacher import Teacher, layers_at_ends
from mor.train.trainer import Teaching, train

SHAPE: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_hidden_layers": 8,
    "initializer_range": 0.2,
}
STUDENT = ModelConfig(
    **SHAPE,
    num_recursions=3,
    router="expert_choice",
    gating="residual",
    bos_token_id=5,
    eos_token_id=7,
)
CPU = torch.device("cpu")


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_model(MoR(ModelConfig(**SHAPE)), tmp_path / "parent")
    return tmp_path / "parent"


@pytest.fixture
def start(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    save_model(MoR(STUDENT), tmp_path / "start")
    return tmp_path / "start"


def recipe(**more: Any) -> Recipe:
    settings: dict[str, Any] = {"budget_tokens": 512, "context": 32, "batch_tokens": 128}
    fixed: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "log_every": 1,
        "eval_tokens": 256,
    }
    return Recipe(model=STUDENT, train=TrainConfig(**{**settings, **fixed, **more}))


def teacher_of(parent: Path, **weights: float) -> Teacher:
    config = DistillConfig(**weights)  # pyrefly: ignore
    return Teacher(parent, STUDENT, config, dtype=torch.float32, device=CPU)


def test_losses_are_what_whole_logits_say(parent: Path, tiny_data: Path):
    teacher = teacher_of(parent, label_weight=0.25, teacher_weight=0.75, state_weight=0.5)
    student = MoR(STUDENT)
    data = PreparedData.open(tiny_data)
    loader = TrainLoader(data.split("train"), row_tokens=32, seed=0, eos_token_id=0)
    batch = loader.batch(0, 4)
    out = student(batch.input_ids_BT, segments=batch.segment_BT, rule="train", keep_states=True)
    taught = teacher.losses(student, batch, out)
    whole = student(batch.input_ids_BT, segments=batch.segment_BT, rule="train")
    ours = whole.logits.log_softmax(-1)
    theirs = teacher.parent(batch.input_ids_BT, segments=batch.segment_BT).logits.log_softmax(-1)
    entropy = F.cross_entropy(ours.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")
    divergence = (theirs.exp() * (theirs - ours)).sum()
    torch.testing.assert_close(taught.cross_entropy, entropy.detach(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(taught.divergence, divergence.detach(), rtol=1e-4, atol=1e-3)
    assert float(taught.state_gap) > 0
    loss = 0.25 * entropy + 0.75 * divergence + 0.5 * taught.state_gap
    torch.testing.assert_close(taught.loss, loss, rtol=1e-4, atol=1e-3)


def test_a_student_that_is_its_parent_has_nothing_to_learn(parent: Path):
    """Own layers, full depth, gate 1: the same model, so no divergence and equal states."""
    config = dataclasses.replace(
        STUDENT, sharing="none", router="expert_choice", capacity=(1.0, 1.0, 1.0)
    )
    student = MoR(config)
    weights = load_model(parent).state_dict()
    routers = {k: torch.zeros_like(v) for k, v in student.state_dict().items() if k not in weights}
    student.load_state_dict({**weights, **routers})
    teacher = Teacher(
        parent,
        config,
        DistillConfig(label_weight=0, teacher_weight=1, state_weight=1),
        dtype=torch.float32,
        device=CPU,
    )
    from mor.data.loader import Batch

    ids = torch.randint(280, (2, 16))
    segments = torch.zeros_like(ids)
    batch = Batch(input_ids_BT=ids, labels_BT=ids, segment_BT=segments)
    out = student(ids, segments=segments, rule="train", keep_states=True)
    taught = teacher.losses(student, batch, out)
    assert float(taught.divergence) == pytest.approx(0, abs=1e-3)
    assert float(taught.state_gap) == pytest.approx(0, abs=1e-6)


def test_recursions_end_at_the_parents_layers():
    assert layers_at_ends(STUDENT, 8) == [3, 5, 7]
    assert layers_at_ends(STUDENT, 16) == [6, 10, 14]


def test_a_run_begins_with_its_start_and_learns_from_the_parent(
    parent: Path, start: Path, tiny_data: Path, tmp_path: Path
):
    data = PreparedData.open(tiny_data)
    teaching = Teaching(parent, DistillConfig(label_weight=0, teacher_weight=1))
    settings = recipe(budget_tokens=12800, lr=5e-3, eval_every=50)
    train(settings, data=data, out=tmp_path / "run", start=start, teacher=teaching)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    divergence = [line["divergence"] for line in lines if "divergence" in line]
    assert sum(divergence[-10:]) < 0.7 * sum(divergence[:10])
    assert any("parent_heldout_loss" in line for line in lines)
    model = load_model(tmp_path / "run" / "model")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (5, 7)


def test_top_tokens_are_kept_and_the_parent_runs_once(
    parent: Path, start: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = PreparedData.open(tiny_data)
    learnt = DistillConfig(label_weight=0, teacher_weight=1, top_k=8)
    teaching = Teaching(parent, learnt, tmp_path / "cache")
    first = train(recipe(), data=data, out=tmp_path / "a", start=start, teacher=teaching)
    files = sorted((tmp_path / "cache").iterdir())
    assert files
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "_states", lambda *args: pytest.fail("the parent ran again"))
        again = train(recipe(), data=data, out=tmp_path / "b", start=start, teacher=teaching)
    assert again.val_loss == first.val_loss
    everything = DistillConfig(label_weight=0, teacher_weight=1, top_k=280)
    few, whole = (
        train(recipe(), data=data, out=tmp_path / name, start=start, teacher=Teaching(parent, how))
        for name, how in (
            ("c", everything),
            ("d", DistillConfig(label_weight=0, teacher_weight=1)),
        )
    )
    assert few.val_loss == pytest.approx(whole.val_loss, rel=1e-4)
    files[0].write_bytes(b"x")
    with pytest.raises(ValueError, match="is broken; remove it"):
        train(recipe(), data=data, out=tmp_path / "e", start=start, teacher=teaching)


@pytest.mark.parametrize("learnt", [{"top_k": 8}, {}, {"state_weight": 0.1}], ids=str)
def test_every_way_to_learn_runs_in_bfloat16(
    learnt: dict[str, Any], parent: Path, start: Path, tiny_data: Path, tmp_path: Path
):
    data = PreparedData.open(tiny_data)
    losses = []
    for dtype in ("float32", "bfloat16"):
        teaching = Teaching(parent, DistillConfig(**learnt), tmp_path / f"cache-{dtype}")
        settings = recipe(dtype=dtype)
        out = tmp_path / dtype
        losses.append(train(settings, data=data, out=out, start=start, teacher=teaching).val_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_routed_parent_teaches_as_it_generates(start: Path, tiny_data: Path):
    data = PreparedData.open(tiny_data)
    batch = TrainLoader(data.split("train"), row_tokens=16, seed=0, eos_token_id=0).batch(0, 2)
    student = load_model(start)
    learnt = DistillConfig(label_weight=0, teacher_weight=1)
    teacher = Teacher(start, STUDENT, learnt, dtype=torch.float32, device=CPU)
    out = student(batch.input_ids_BT, segments=batch.segment_BT, rule="causal", keep_states=True)
    assert float(teacher.losses(student, batch, out).divergence) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="states are learnt from a vanilla model"):
        Teacher(start, STUDENT, DistillConfig(state_weight=1), dtype=torch.float32, device=CPU)


def test_without_steps_to_speak_of_the_start_is_kept(start: Path, tiny_data: Path, tmp_path: Path):
    data = PreparedData.open(tiny_data)
    train(recipe(lr=1e-12, budget_tokens=128), data=data, out=tmp_path / "run", start=start)
    before, after = load_model(start), load_model(tmp_path / "run" / "model")
    for name, weight in before.named_parameters():
        torch.testing.assert_close(weight, dict(after.named_parameters())[name], atol=1e-8, rtol=0)


def test_a_taught_run_resumes_to_the_same_bits(
    parent: Path, start: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = PreparedData.open(tiny_data)
    teaching = Teaching(parent, DistillConfig(state_weight=0.1))
    settings = recipe(checkpoint_every=2, shallow_share=0.5)
    whole = train(settings, data=data, out=tmp_path / "a", start=start, teacher=teaching)
    step = trainer.train_step

    def stop_at_2(*args: Any, **kwargs: Any) -> Any:
        if args[3] == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        train(settings, data=data, out=tmp_path / "b", start=start, teacher=teaching)
    monkeypatch.setattr(trainer, "train_step", step)
    again = train(
        settings, data=data, out=tmp_path / "b", start=start, teacher=teaching, resume=True
    )
    assert again.val_loss == whole.val_loss
    other = Teaching(parent, DistillConfig(state_weight=0.2))
    with pytest.raises(ValueError, match="other weights or another parent"):
        train(settings, data=data, out=tmp_path / "b", start=start, teacher=other, resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 300}, "vocabulary of 300, the student one of 280"),
        ({"hidden_size": 64}, "has width 64, the student 32"),
        ({"num_recursions": 3, "router": "threshold"}, "has 3 recursions"),
    ],
)
def test_a_parent_that_cannot_teach_is_refused(tmp_path: Path, change: dict[str, Any], said: str):
    save_model(MoR(ModelConfig(**{**SHAPE, **change})), tmp_path / "parent")
    with pytest.raises(ValueError, match=said):
        teacher_of(tmp_path / "parent", state_weight=1)


def test_weights_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="give one of them above 0"):
        DistillConfig(label_weight=0, teacher_weight=0)
    with pytest.raises(ValueError, match="state_weight is -1"):
        DistillConfig(state_weight=-1)


def test_routers_and_additions_have_rates_of_their_own():
    config = dataclasses.replace(STUDENT, lora_rank=2)
    settings = TrainConfig(budget_tokens=1, router_lr_scale=3.0, lora_lr_scale=5.0)
    model = MoR(config)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in build_optimizer(model, settings).param_groups:
        for param in group["params"]:
            name = names[id(param)]
            wanted = 3.0 if ".routers." in name else 5.0 if "recursion_" in name else 1.0
            assert group["lr_scale"] == wanted, name
