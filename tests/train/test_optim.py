"""Promises of the optimizer: the schedules' shape, which weights decay, which Muon trains."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from mor.config import ModelConfig
from mor.model.mor import MoR
from mor.train import optim
from mor.train.config import TrainConfig
from mor.train.optim import build_optimizer, learning_rate


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(budget_tokens=1, lr=1.0, **fields)


def test_trapezoid_warms_up_holds_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 100, config(warmup_share=0.1)) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    assert 0 < rates[-1] <= 0.05  # the step after the last would have 0


def test_cosine_warms_up_and_falls_to_a_tenth() -> None:
    rates = [
        learning_rate(step, 1000, config(schedule="cosine", warmup_share=0.05))
        for step in range(1000)
    ]
    assert rates[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert max(rates) == 1.0
    assert rates[525] == pytest.approx(0.55, abs=1e-3)  # half-way down
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[50:]))


@pytest.mark.parametrize("schedule", ["trapezoid", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_runs_have_a_rate_above_zero(schedule: Any, num_steps: int) -> None:
    rates = [learning_rate(s, num_steps, config(schedule=schedule)) for s in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)


def small_model(**fields: Any) -> MoR:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_recursions": 2,
        "router": "expert_choice",
    }
    return MoR(ModelConfig(**sizes | fields))


def groups_by_name(model: MoR, **fields: Any) -> dict[str, dict[str, Any]]:
    """The settings that the optimizer has for every parameter; each is in one group."""
    names = {param: name for name, param in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in build_optimizer(model, config(**fields)).param_groups:
        for param in group["params"]:
            assert names[param] not in found
            found[names[param]] = group
    assert found.keys() == set(names.values())
    return found


def is_muon(group: dict[str, Any]) -> bool:
    return "adjust_lr_fn" in group


PROJECTIONS = {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(3)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}


def test_norm_gains_do_not_decay() -> None:
    model = small_model()
    matrices, vectors = build_optimizer(model, config(weight_decay=0.3)).param_groups
    assert matrices["weight_decay"] == 0.3
    assert vectors["weight_decay"] == 0.0
    gains = {id(p) for name, p in model.named_parameters() if "norm" in name}
    assert {id(p) for p in vectors["params"]} == gains
    assert len(matrices["params"]) + len(gains) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_no_weight_matrix_does_not_decay_in_any_shape(optimizer: str) -> None:
    """Gains of each recursion, encodings and low-rank parts may have two dimensions."""
    model = small_model(
        router_body="mlp",
        router_bias=True,
        relax_norms=True,
        recursion_encoding=True,
        lora_rank=2,
    )
    groups = groups_by_name(model, optimizer=optimizer, weight_decay=0.3)
    free = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert all(groups[name]["weight_decay"] == 0.3 for name in groups.keys() - free)
    parts = ("norm.weight", "recursion_A", "recursion_B", "recursion_encoding", "bias")
    assert free == {name for name in groups if name.endswith(parts)}
    assert not any(is_muon(groups[name]) for name in free)


def test_muon_takes_the_layers_projections_and_nothing_else() -> None:
    model = small_model(tie_word_embeddings=False, router_aux="router", router_body="mlp")
    groups = groups_by_name(model, optimizer="muon", weight_decay=0.3)
    assert {name for name, group in groups.items() if is_muon(group)} == PROJECTIONS
    assert {name for name, group in groups.items() if group["lr_scale"] == 10} == {
        f"model.routers.{r}.aux_body.{part}.weight" for r in (0, 1) for part in (0, 2)
    }
    assert all(groups[name]["weight_decay"] == 0.3 for name in PROJECTIONS)
    assert groups["lm_head.weight"]["weight_decay"] == 0.3
    adamw = groups_by_name(model, optimizer="adamw")
    assert not any(is_muon(group) for group in adamw.values())


def take_step(model: MoR, optimizer: torch.optim.Optimizer) -> None:
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()


def test_a_step_of_muon_turns_projections_and_moves_the_rest_as_adamw() -> None:
    """A first step of AdamW moves every number by the rate; Muon's has singular values near 1
    times 0.2 of the root of the larger side."""
    model = small_model(router_aux="router")
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    take_step(model, build_optimizer(model, config(optimizer="muon", weight_decay=0)))
    for name, param in model.named_parameters():
        moved = (param.detach() - before[name]).double()
        if name in PROJECTIONS:
            values = torch.linalg.svdvals(moved) / (0.01 * 0.2 * max(moved.shape) ** 0.5)
            assert values.median() > 0.6 and values.max() < 1.3, name
        else:
            rate = 0.1 if "aux_body" in name else 0.01
            assert moved.abs().median().item() == pytest.approx(rate, rel=0.01), name


def test_muons_state_goes_into_a_fresh_optimizer() -> None:
    """The usual way of torch, which other tools take."""
    model = small_model()
    optimizer = build_optimizer(model, config(optimizer="muon"))
    take_step(model, optimizer)
    other = small_model()
    other.load_state_dict(model.state_dict())
    fresh = build_optimizer(other, config(optimizer="muon"))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    for some_model, some_optimizer in ((model, optimizer), (other, fresh)):
        torch.manual_seed(1)
        take_step(some_model, some_optimizer)
    for name, param in model.named_parameters():
        assert torch.equal(param, other.get_parameter(name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_steps_as_pytorchs_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit in bfloat16, the type of PyTorch's; nearly in float32."""
    monkeypatch.setattr(optim, "pick_product_dtype", lambda name, device: dtype)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(24, 8), (8, 24), (8, 8)]]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    groups = ([{"params": params, "weight_decay": 0.1}] for params in (ours, theirs))
    steppers = (
        optim.Muon(next(groups), lr=0.03),
        torch.optim.Muon(next(groups), lr=0.03, adjust_lr_fn="match_rms_adamw"),
    )
    before = [param.detach().clone() for param in ours]
    for _ in range(3):
        for mine, their in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            their.grad = mine.grad.clone()
        for stepper in steppers:
            stepper.step()
    for mine, their, start in zip(ours, theirs, before, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(mine, their)
        gap = (mine - their).norm() / (their - start).norm()
        assert gap < 0.02, float(gap)
