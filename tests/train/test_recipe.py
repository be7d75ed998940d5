"""Promises of recipes and training settings: the same fields as the flags, a later flag wins."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tyro

from mor.commands import Plan
from mor.config import ModelConfig
from mor.model.cost import num_shallow_steps, training_flops, training_flops_per_token
from mor.train.config import (
    Recipe,
    TrainConfig,
    load_recipe,
    read_recipe,
    recipe_flags,
    recipe_to_dict,
)

MODEL = ModelConfig()
STEP = training_flops_per_token(MODEL, 512)
RECIPE = """
[model]
num_hidden_layers = 8
num_recursions = 3
router = "expert_choice"
capacity = [1, 0.5, 0.25]
tie_word_embeddings = false
eos_token_id = 3
rope_theta = 1e5

[train]
budget_tokens = 1_000_000
schedule = "cosine"
lr = 3e-4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_as_flags_is_the_recipe_itself(recipe: Path) -> None:
    flags = recipe_flags(read_recipe(recipe))
    parsed = tyro.cli(Plan, args=[str(recipe), *flags])
    loaded = load_recipe(recipe)
    assert (parsed.model, parsed.train) == (loaded.model, loaded.train)
    assert loaded.model.capacity == (1.0, 0.5, 0.25)
    assert not loaded.model.tie_word_embeddings


def test_a_flag_after_the_recipe_wins(recipe: Path) -> None:
    flags = recipe_flags(read_recipe(recipe))
    own = ["--train.lr", "0.5", "--model.capacity", "1", "1", "0.75", "--model.tie-word-embeddings"]
    parsed = tyro.cli(Plan, args=[str(recipe), *flags, *own])
    assert parsed.train.lr == 0.5
    assert parsed.model.capacity == (1.0, 1.0, 0.75)
    assert parsed.model.tie_word_embeddings


def test_what_a_run_remembers_reads_back(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    remembered = recipe_to_dict(loaded)
    assert TrainConfig(**remembered["train"]) == loaded.train
    assert type(loaded.model).from_dict(remembered["model"]) == loaded.model


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"budget_tokens": 10_000, "batch_tokens": 1024, "context": 512}, 10),
        ({"budget_flops": 10.2 * 1024 * STEP, "batch_tokens": 1024, "context": 512}, 10),
        ({"budget_tokens": 1, "batch_tokens": 1024, "context": 512}, 1),
        ({"budget_flops": 1, "batch_tokens": 1024, "context": 512}, 1),
    ],
)
def test_a_budget_becomes_steps(fields: Any, steps: int) -> None:
    assert TrainConfig(**fields).num_steps(MODEL) == steps


def test_steps_in_which_capacities_warm_up_cost_more() -> None:
    routed: dict[str, Any] = {
        "num_hidden_layers": 32,
        "num_recursions": 3,
        "router": "expert_choice",
    }
    plain = ModelConfig(**routed)
    warm = dataclasses.replace(plain, capacity_warmup_steps=40)
    sizes = {"steps": 100, "batch_tokens": 1024}
    flops, whole = training_flops(plain, 512, **sizes), training_flops(warm, 512, **sizes)
    full = training_flops_per_token(dataclasses.replace(plain, capacity=(1.0, 1.0, 1.0)), 512)
    half = 40 * 1024 * (full - training_flops_per_token(plain, 512)) / 2
    assert whole - flops == pytest.approx(half, rel=0.1)  # a cosine spends half of the way up
    for steps in (7, 40, 41, 100):
        spent = training_flops(warm, 512, steps=steps, batch_tokens=1024)
        budget = {"budget_flops": 1.0001 * spent, "batch_tokens": 1024, "context": 512}
        assert TrainConfig(**budget).num_steps(warm) == steps


@pytest.mark.parametrize("warmup", [0, 15])
def test_shallow_steps_cost_what_one_recursion_costs(warmup: int) -> None:
    fields: dict[str, Any] = {"num_hidden_layers": 32, "num_recursions": 3}
    deep = ModelConfig(**fields, router="expert_choice", capacity_warmup_steps=warmup)
    once = ModelConfig(num_hidden_layers=12)
    sizes = {"batch_tokens": 1024}
    spent = training_flops(deep, 512, steps=100, shallow_steps=60, **sizes)
    expected = training_flops(deep, 512, steps=40, **sizes)
    expected += training_flops(once, 512, steps=60, **sizes)
    assert spent == pytest.approx(expected, rel=1e-3)  # the routers are the rest
    for steps in (1, 7, 10, 100):
        shallow = num_shallow_steps(steps, 0.6)
        spent = training_flops(deep, 512, steps=steps, shallow_steps=shallow, **sizes)
        budget = {"budget_flops": 1.0001 * spent, "context": 512, "shallow_share": 0.6}
        assert TrainConfig(**budget, **sizes).num_steps(deep) == steps


def test_what_is_frozen_costs_no_gradients() -> None:
    model = ModelConfig(prelude_layers=10, num_hidden_layers=32, num_recursions=3)
    whole = training_flops_per_token(model, 512)
    head = 2 * model.hidden_size * model.vocab_size
    of_layers = (whole - 3 * head) / 32
    embedding = training_flops_per_token(model, 512, freeze="embedding")
    prelude = training_flops_per_token(model, 512, freeze="prelude")
    assert whole - embedding == pytest.approx(head)
    assert embedding - prelude == pytest.approx(2 / 3 * 10 * of_layers)
    budget = {"context": 512, "batch_tokens": 1024, "budget_flops": 1e6 * prelude}
    steps = TrainConfig(**budget, freeze="prelude").num_steps(model)
    assert steps == round(1e6 / 1024)
    assert TrainConfig(**budget).num_steps(model) < steps


def test_token_choice_has_no_shallow_steps() -> None:
    model = ModelConfig(num_hidden_layers=32, num_recursions=3, router="token_choice")
    with pytest.raises(ValueError, match=r"shallow_share is 0\.5, but token_choice decides"):
        Recipe(model=model, train=TrainConfig(budget_tokens=1, shallow_share=0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget_tokens": 0}, "give exactly one"),
        ({"budget_flops": 5}, "give exactly one"),
        ({"budget_tokens": math.nan}, "budget_tokens is nan"),
        ({"budget_tokens": math.inf}, "budget_tokens is inf"),
        ({"budget_tokens": -1}, "budget_tokens is -1"),
        ({"lr": 0}, "lr is 0; give a number above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"grad_clip": 0}, "grad_clip is 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"warmup_share": 1.5}, "warmup_share is 1.5"),
        ({"shallow_share": 1}, "no step would recurse"),
        ({"repeat_share": -0.1}, "repeat_share is -0.1"),
        ({"context": 0}, "context is 0"),
        ({"batch_tokens": 1000}, "batch_tokens is 1000; give a multiple of context 512"),
        ({"micro_batch_tokens": 100}, "micro_batch_tokens is 100"),
        ({"micro_batch_tokens": 5120}, "no multiple of micro_batch_tokens"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"optimizer": "moun"}, "did you mean muon"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**dict[str, Any](budget_tokens=1) | fields)


def test_every_field_says_what_it_is() -> None:
    """The line below a field is its help text."""
    source = Path(__file__).parents[2].joinpath("mor/train/config.py").read_text()
    for field in dataclasses.fields(TrainConfig):
        after = source.split(f"\n    {field.name}: ")[1].split("\n")[1]
        assert after.strip().startswith('"""'), field.name
