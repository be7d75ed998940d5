"""Promises of an experiment's recipe: what does not fit is said in one line before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_experiment import EXPERIMENT

from mor.config import ModelConfig
from mor.data.loader import PreparedData
from mor.experiment.config import KINDS, kind_of, load_experiment, recipe_toml
from mor.experiment.members import budget_members, planned_members
from mor.model.cost import training_flops_per_token
from mor.train.config import load_recipe

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted(ROOT.glob("recipes/experiments/*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_load_and_open_with_their_purpose(path: Path):
    experiment = load_experiment(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert experiment.note


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[sweep]", "[[sweep]", "is not TOML"),
        ("eval_tokens = 512", "evaltokens = 512", "'evaltokens'.*did you mean"),
        ("eval_tokens = 512", "eval_tokens = 0", "eval_tokens is 0; give 1 or more"),
        ("eval_tokens = 512", "eval_tokens = '5'", "eval_tokens is '5'; give a value of int"),
        ('name = "same-flops"', 'name = "sweep"', "sweep is what results call something else"),
        ("same_flops = 4e8", "same_flops = 4e8\nmodels = []", r"models is \[\]; give each once"),
        ("seeds = [0, 1]", "seeds = []", "seeds is .*; give at least one int"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "give each once"),
        ("lrs = [2e-3, 4e-3]", "lrs = [0.0]", "sweep.lrs holds 0.0; give numbers above 0"),
        ("share = 0.5", "share = 1.5", "sweep.share is 1.5; give a share"),
        ("name = 'mor3'", "name = 'mor 3'", "name is 'mor 3'; give letters"),
        ("name = 'rec3'", "name = 'twin'", "'twin' stands twice in .*models"),
        ("same_flops = 4e8", "same_flops = 0", "same_flops is 0; give a number above 0"),
        ("same_flops = 4e8", "same_flops = 4e8\nsame_tokens = 9", "give exactly one of"),
        ("same_flops = 4e8", "", "gives no amount; give exactly one of"),
        ("same_flops = 4e8", "same_flops = 4e8\nmodels = ['mor4']", "model.*'mor4'"),
        ("router = 'random'", "router = 'fixed'", "no model of the kind random"),
        ("num_recursions = 3, router = 'random'", "num_recursions = 4", "model random3: "),
        ("hidden_size = 32", "hidden_sizes = 32", "'hidden_sizes'"),
        ("lr = 4e-3", "lr = 4e-3\nbudget_tokens = 9", "budget_tokens is for .*budgets"),
        ("args = ['decode']", "args = []", "args is .*; give what follows"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, said: str):
    assert old in EXPERIMENT
    path = tmp_path / "exp.toml"
    path.write_text(EXPERIMENT.replace(old, new, 1))
    with pytest.raises(ValueError, match=said) as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value).partition(" is not TOML")[0]


def test_every_kind_of_row_is_told_from_the_model():
    models = {
        "vanilla": ModelConfig(num_recursions=1),
        "recursive": ModelConfig(num_recursions=2),
        "mor": ModelConfig(num_recursions=2, router="threshold"),
        "random": ModelConfig(num_recursions=2, router="random"),
    }
    assert {kind: kind_of(model) for kind, model in models.items()} == {k: k for k in KINDS}


def test_budgets_give_what_they_say(experiment: Path, tiny_data: Path):
    described = load_experiment(experiment)
    data = PreparedData.open(tiny_data)
    members = list(
        budget_members(described, data, lr_of=lambda *_: None, pace_of=lambda *_: 1000.0)
    )
    names = [member.name for member in members]
    assert names[:4] == [f"same-flops_{m}_s0" for m in ("twin", "rec3", "mor3", "random3")]
    assert "same-tokens_mor3_s0" in names and "same-tokens_mor3_s1" not in names
    for member in members:
        train, step = member.recipe.train, member.recipe.train.batch_tokens
        flops = training_flops_per_token(member.recipe.model, train.context)
        assert train.budget_tokens % step == 0
        if member.budget == "same-flops":
            assert abs(train.budget_tokens * flops - 4e8) <= step * flops / 2
        if member.budget == "same-tokens":
            assert train.budget_tokens == 768
        if member.budget == "per-param":
            assert member.tokens_per_param == pytest.approx(0.1, rel=0.3)
        if member.budget == "same-time":
            assert train.budget_tokens == 256


def test_a_sweep_warms_capacities_up_in_its_share_of_the_steps(tmp_path: Path, tiny_data: Path):
    path = tmp_path / "exp.toml"
    router = "router = 'expert_choice'"
    path.write_text(EXPERIMENT.replace(router, f"{router}, capacity_warmup_steps = 40"))
    members = planned_members(load_experiment(path), PreparedData.open(tiny_data))
    steps = {m.budget: m.recipe.model.capacity_warmup_steps for m in members if m.model == "mor3"}
    assert steps["sweep"] == 20 and steps["same-flops"] == 40


def test_a_budget_too_small_for_a_step_is_said_before_anything_runs(
    tmp_path: Path, tiny_data: Path
):
    path = tmp_path / "exp.toml"
    path.write_text(EXPERIMENT.replace("same_tokens = 768", "same_tokens = 40"))
    with pytest.raises(
        ValueError, match="budget same-tokens gives twin 40 tokens, less than a step"
    ):
        planned_members(load_experiment(path), PreparedData.open(tiny_data))


def test_seconds_are_no_budget_where_steps_differ_in_pace(tmp_path: Path, tiny_data: Path):
    path = tmp_path / "exp.toml"
    path.write_text(EXPERIMENT.replace("[train]", "[train]\nshallow_share = 0.5"))
    with pytest.raises(ValueError, match=r"but twin has shallow_share 0\.5; use same_flops"):
        planned_members(load_experiment(path), PreparedData.open(tiny_data))


def test_a_members_recipe_is_read_back_as_it_was(experiment: Path, tiny_data: Path, tmp_path: Path):
    for member in planned_members(load_experiment(experiment), PreparedData.open(tiny_data)):
        path = tmp_path / "recipe.toml"
        path.write_text(recipe_toml(member.recipe, about="a member"))
        assert load_recipe(path) == member.recipe
