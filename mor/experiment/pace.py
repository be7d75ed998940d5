"""How many tokens a second each model trains on, in turn in one process: for budgets in seconds."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

from mor.data.loader import PreparedData, TrainLoader
from mor.log import progress
from mor.ops.device import pick_device, pick_product_dtype
from mor.train.config import Recipe
from mor.train.metrics import RoutingMeter
from mor.train.optim import build_optimizer
from mor.train.trainer import fit_to_data, new_model, train_step

ROUNDS = 7
WARM_ROUNDS = 2


def measure_paces(recipes: Mapping[str, Recipe], data: PreparedData) -> dict[str, Any]:
    """Time training steps, a step of each model a round; returns `tokens_per_s` by name."""
    steppers = {name: _Stepper(recipe, data) for name, recipe in recipes.items()}
    times: dict[str, list[float]] = {name: [] for name in recipes}
    with progress("pace of training", ROUNDS) as bar:
        for round_ in range(ROUNDS):
            for name, stepper in steppers.items():
                times[name].append(stepper.step(round_))
            bar.advance()
    return {
        "tokens_per_s": {
            name: recipes[name].train.batch_tokens / statistics.median(seconds[WARM_ROUNDS:])
            for name, seconds in times.items()
        }
    }


class _Stepper:
    """A model in training."""

    def __init__(self, recipe: Recipe, data: PreparedData) -> None:
        recipe = dataclasses.replace(recipe, model=fit_to_data(recipe.model, data, recipe))
        self.recipe = recipe
        self.device = pick_device(recipe.train.device)
        self.dtype = pick_product_dtype(recipe.train.dtype, self.device)
        self.model = new_model(recipe, self.device)
        self.optimizer = build_optimizer(self.model, recipe.train)
        self.meter = RoutingMeter(self.model, recipe.train.context)
        self.loader = TrainLoader(
            data.split("train"),
            row_tokens=recipe.train.context,
            seed=recipe.train.seed,
            eos_token_id=data.manifest.eos_token_id,
        )

    def step(self, step: int) -> float:
        """Do a training step, reading its loss ends it; returns seconds."""
        start_s = time.perf_counter()
        train_step(
            self.model,
            self.optimizer,
            self.loader,
            step,
            self.recipe,
            self.device,
            self.dtype,
            self.meter,
        )
        return time.perf_counter() - start_s
