"""Members of an experiment: one training each, with a name and a budget in tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mor.config import ModelConfig
from mor.data.loader import PreparedData
from mor.experiment.config import Budget, Entry, Experiment, kind_of
from mor.model.cost import count_params
from mor.train.config import Recipe, recipe_to_dict
from mor.train.trainer import fit_to_data, flops_of

SWEEP = "sweep"
"""budget of the trainings that choose a rate"""
UNKNOWN_PACE = 1e9
"""tokens a second, where they are not measured yet"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One training. Its recipe has the budget in tokens, whole steps of them."""

    name: str
    budget: str
    kind: str
    """what is equal between models: one of BUDGETS"""
    model: str
    size: str
    label: str
    seed: int
    recipe: Recipe

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of its member."""
        return {
            "member": self.name,
            "budget": self.budget,
            "budget_kind": self.kind,
            "model": self.model,
            "size": self.size,
            "label": self.label,
            "row": kind_of(self.recipe.model),
            "seed": self.seed,
            "lr": self.recipe.train.lr,
        }

    def settings(self, data: PreparedData, eval_tokens: int) -> dict[str, Any]:
        """Return what decides the result, as the result keeps it."""
        return {
            "recipe": recipe_to_dict(self.recipe),
            "data_sha256": data.manifest.corpus_sha256,
            "tokenizer_sha256": data.manifest.tokenizer_sha256,
            "eval_tokens": eval_tokens,
        }

    @property
    def train_flops(self) -> float:
        return flops_of(self.recipe, self.recipe.train.num_steps(self.recipe.model))

    @property
    def tokens_per_param(self) -> float:
        return self.recipe.train.budget_tokens / count_params(self.recipe.model).nonembedding


def fitted_model(recipe: Recipe, data: PreparedData) -> ModelConfig:
    """Return a recipe's model with the vocabulary of the data."""
    return fit_to_data(recipe.model, data, recipe)


def sweep_members(
    experiment: Experiment, data: PreparedData, model: Entry, size: Entry
) -> list[Member]:
    """Return the short trainings that choose a model's rate; none without a sweep."""
    if experiment.sweep is None:
        return []
    budget = dataclasses.replace(
        experiment.budgets[0], amount=experiment.budgets[0].amount * experiment.sweep.share
    )
    if budget.kind == "same_time_s":
        raise ValueError(
            f"{experiment.name}: a sweep takes a share of the first budget, which is in seconds; "
            "put a budget in FLOPs or tokens first"
        )
    seed = experiment.budgets[0].seeds[0]
    return [
        dataclasses.replace(
            _member(
                experiment,
                data,
                budget,
                model,
                size,
                seed=seed,
                lr=lr,
                share=experiment.sweep.share,
            ),
            name=_joined(SWEEP, size.name, model.name, f"lr{lr:g}"),
            budget=SWEEP,
        )
        for lr in experiment.sweep.lrs
    ]


def budget_members(
    experiment: Experiment,
    data: PreparedData,
    *,
    lr_of: Callable[[Entry, Entry], float | None],
    pace_of: Callable[[Entry, Entry], float],
) -> Iterator[Member]:
    """Yield the members of all budgets, first seeds first.

    lr_of    rate of (model, size); None leaves the recipe's
    pace_of  tokens a second of (model, size), for budgets in seconds
    """
    most = max((len(budget.seeds) for budget in experiment.budgets), default=0)
    for place in range(most):
        for budget in experiment.budgets:
            for size in experiment.sizes:
                for model in experiment.models:
                    if model.name not in budget.models or place >= len(budget.seeds):
                        continue
                    pace = pace_of(model, size) if budget.kind == "same_time_s" else None
                    yield _member(
                        experiment,
                        data,
                        budget,
                        model,
                        size,
                        seed=budget.seeds[place],
                        lr=lr_of(model, size),
                        pace=pace,
                    )


def planned_members(experiment: Experiment, data: PreparedData) -> list[Member]:
    """Return all members with rates as the recipe has them, those of the sweeps first.

    Raises ValueError for a budget that is too small for one step. Budgets in seconds are not known
    in tokens yet: their members have many.
    """
    sweeps = [
        member
        for size in experiment.sizes
        for model in experiment.models
        for member in sweep_members(experiment, data, model, size)
    ]
    finals = budget_members(
        experiment, data, lr_of=lambda *_: None, pace_of=lambda *_: UNKNOWN_PACE
    )
    return [*sweeps, *finals]


def _member(
    experiment: Experiment,
    data: PreparedData,
    budget: Budget,
    model: Entry,
    size: Entry,
    *,
    seed: int,
    lr: float | None,
    pace: float | None = None,
    share: float = 1.0,
) -> Member:
    """Build a member. A share of a budget warms capacities up in that share of the steps."""
    more: dict[str, Any] = {} if lr is None else {"lr": lr}
    recipe = experiment.recipe(model, size, budget_tokens=1, seed=seed, **more)
    config = fitted_model(recipe, data)
    warmup = round(share * config.capacity_warmup_steps)
    config = dataclasses.replace(config, router_seed=seed, capacity_warmup_steps=warmup)
    train = recipe.train
    tokens = budget.amount
    if budget.kind == "same_flops":
        tokens = train.batch_tokens * train.steps_for(config, budget.amount)
    elif budget.kind == "tokens_per_param":
        tokens = budget.amount * count_params(config).nonembedding
    elif budget.kind == "same_time_s":
        assert pace is not None
        if train.shallow_share:
            raise ValueError(
                f"{experiment.name}: budget {budget.name} counts seconds by the pace of the first "
                f"steps, but {model.name} has shallow_share {train.shallow_share}; use same_flops "
                "or same_tokens"
            )
        tokens = budget.amount * pace
    steps = round(tokens / train.batch_tokens)
    if steps < 1:
        raise ValueError(
            f"{experiment.name}: budget {budget.name} gives {model.name} {tokens:.0f} tokens, less "
            f"than a step of {train.batch_tokens}; raise {budget.kind} or lower batch_tokens"
        )
    return Member(
        name=_joined(budget.name, size.name, model.name, f"s{seed}"),
        budget=budget.name,
        kind=budget.kind,
        model=model.name,
        size=size.name,
        label=model.label,
        seed=seed,
        recipe=Recipe(
            model=config,
            train=dataclasses.replace(train, budget_tokens=steps * train.batch_tokens),
        ),
    )


def _joined(*parts: str) -> str:
    return "_".join(part for part in parts if part)
