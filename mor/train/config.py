"""How a model is trained, and recipes: TOML files of the same fields as the flags. No torch."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mor.config import ModelConfig, check_choice
from mor.model.cost import FREEZE, Freeze, num_shallow_steps, steps_for


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run: give budget_tokens or budget_flops, the rest has defaults.

    Raises ValueError, in one line, for values that do not fit.
    """

    budget_tokens: float = 0
    """tokens to train on"""
    budget_flops: float = 0
    """FLOPs to train for instead, forward and backward, head and attention counted"""
    context: int = 512
    """tokens of a packed row"""
    batch_tokens: int = 16384
    """tokens of an optimizer step; a multiple of context"""
    micro_batch_tokens: int = 0
    """tokens of one forward pass, gradients add up; 0 for the whole batch at once"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the layers' projections and leaves the rest to adamw; one rate serves both"""
    lr: float = 3e-3
    """peak learning rate"""
    router_lr_scale: float = 1.0
    """learning rate of the routers over that of the rest"""
    lora_lr_scale: float = 1.0
    """learning rate of the recursions' low-rank additions over that of the rest"""
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    """trapezoid: warm up, hold, fall linearly to 0; cosine: warm up, fall to a tenth"""
    warmup_share: float = 0.05
    """share of the steps that warm up"""
    decay_share: float = 0.2
    """share of the steps in which the trapezoid falls"""
    shallow_share: float = 0.0
    """share of the steps, the first ones, in which every token takes one recursion alone"""
    repeat_share: float = 0.0
    """share of the steps, the first ones, in which every other row repeats its beginning: small
    models learn to copy much sooner"""
    weight_decay: float = 0.1
    """decay of matrices; norms have none"""
    freeze: Freeze = "none"
    """what keeps its weights: embedding and head, or these and the prelude; for uptraining"""
    fit_tokens: int = 0
    """tokens on which exit maps and routers are fitted before the first step; for uptraining"""
    beta1: float = 0.9
    """AdamW's first beta"""
    beta2: float = 0.95
    """AdamW's second beta"""
    grad_clip: float = 1.0
    """largest gradient norm"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """type of the matrix products; weights stay fp32. auto: bfloat16 where that is quicker"""
    recompute: Literal["none", "recursion", "layer"] = "none"
    """what the backward pass computes again instead of keeping: less memory, a third more time"""
    compile: bool = False
    """compile the layers with torch.compile; needs a C++ compiler, pays in long runs"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    seed: int = 0
    """seed of the weights and of the order of the data"""
    log_every: int = 10
    """steps between metrics lines"""
    eval_every: int = 0
    """steps between passes over held-out text; 0 for ten in a run"""
    eval_tokens: int = 65536
    """tokens of such a pass, of setting thresholds and of the last validation, spread evenly"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0 for ten in a run"""
    keep_checkpoints: int = 2
    """checkpoints that stay on disk"""

    def __post_init__(self) -> None:
        budgets = (self.budget_tokens, self.budget_flops)
        if sum(1 for budget in budgets if budget) != 1:
            raise ValueError(
                f"budget_tokens is {budgets[0]:g} and budget_flops is {budgets[1]:g}; "
                "give exactly one of them"
            )
        for name in ("budget_tokens", "budget_flops", "weight_decay", "beta1", "beta2"):
            _check_number(name, getattr(self, name), 0)
        for name in ("lr", "grad_clip", "router_lr_scale", "lora_lr_scale"):
            _check_number(name, getattr(self, name), 0, is_open=True)
        for name in ("warmup_share", "decay_share", "shallow_share", "repeat_share"):
            value = getattr(self, name)
            _check_number(name, value, 0)
            if value > 1:
                raise ValueError(f"{name} is {value}; give a share from 0 to 1")
        if self.shallow_share == 1:
            raise ValueError("shallow_share is 1, no step would recurse; give less than 1")
        for name in ("context", "batch_tokens", "log_every", "eval_tokens", "keep_checkpoints"):
            _check_number(name, getattr(self, name), 1)
        for name in ("micro_batch_tokens", "eval_every", "checkpoint_every", "seed", "fit_tokens"):
            _check_number(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}; give a number below 2**63")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number in [0, 1)")
        for name in ("batch_tokens", "micro_batch_tokens"):
            if getattr(self, name) % self.context:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; give a multiple of context {self.context}"
                )
        if self.micro_batch_tokens and self.batch_tokens % self.micro_batch_tokens:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is no multiple of micro_batch_tokens "
                f"{self.micro_batch_tokens}"
            )
        check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        check_choice("freeze", self.freeze, FREEZE)
        check_choice("schedule", self.schedule, ("trapezoid", "cosine"))
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_choice("recompute", self.recompute, ("none", "recursion", "layer"))

    @property
    def batch_rows(self) -> int:
        return self.batch_tokens // self.context

    @property
    def micro_batch_rows(self) -> int:
        return (self.micro_batch_tokens or self.batch_tokens) // self.context

    def num_steps(self, model: ModelConfig) -> int:
        """Optimizer steps that the budget allows a model, at least one."""
        if self.budget_tokens:
            return max(1, round(self.budget_tokens / self.batch_tokens))
        return max(1, round(self.steps_for(model, self.budget_flops)))

    def num_deep_steps(self, model: ModelConfig) -> int:
        """Optimizer steps in which tokens may take more than one recursion."""
        steps = self.num_steps(model)
        return steps - num_shallow_steps(steps, self.shallow_share)

    def steps_for(self, model: ModelConfig, flops: float) -> float:
        """Optimizer steps that so many FLOPs pay for, the last of them in part."""
        return steps_for(
            model,
            self.context,
            flops=flops,
            batch_tokens=self.batch_tokens,
            shallow_share=self.shallow_share,
            freeze=self.freeze,
        )


def _check_number(name: str, value: float, least: float, *, is_open: bool = False) -> None:
    if not math.isfinite(value) or value < least or (is_open and value == least):
        bound = f"above {least}" if is_open else f"of {least} or more"
        raise ValueError(f"{name} is {value}; give a number {bound}")


def check_fit(config: ModelConfig) -> None:
    """Raise ValueError, naming the setting, for a model whose exits cannot be fitted."""
    for name, value, wanted in (
        ("exit_maps", config.exit_maps, (True,)),
        ("gating", config.gating, ("none",)),
        ("router", config.router, ("expert_choice", "random")),
        ("router_body", config.router_body, ("linear",)),
    ):
        if value not in wanted:
            raise ValueError(f"fit_tokens needs {name} {wanted[0]}, it is {value}")


def check_routing(model: ModelConfig, train: TrainConfig) -> None:
    """Raise ValueError when a training would not bring routing to where it is to be.

    Exits that cannot be fitted, capacities that do not reach their target within its steps
    """
    if train.fit_tokens:
        check_fit(model)
    warmup, left = model.capacity_warmup_steps, train.num_deep_steps(model)
    if warmup > left:
        raise ValueError(
            f"capacity_warmup_steps is {warmup}, the training has {left} steps for it: capacities "
            "would not reach their target; give fewer"
        )


def check_context(model: ModelConfig, train: TrainConfig) -> None:
    """Raise ValueError when rows are longer than the model's longest context."""
    if train.context > model.max_position_embeddings:
        raise ValueError(
            f"context {train.context} is longer than the model's max_position_embeddings "
            f"{model.max_position_embeddings}; lower one or raise the other"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model and how to train it."""

    model: ModelConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        if self.train.shallow_share and self.model.router == "token_choice":
            raise ValueError(
                f"shallow_share is {self.train.shallow_share}, but token_choice decides every "
                "depth at once; use 0, or another router"
            )
        is_whole = self.model.shares_block or self.model.num_recursions == 1
        if self.train.shallow_share and not is_whole:
            raise ValueError(
                f"shallow_share is {self.train.shallow_share}, but with sharing "
                f"{self.model.sharing} one recursion does not hold all layers; use 0"
            )


RECIPE_TABLES: dict[str, type] = {"model": ModelConfig, "train": TrainConfig}


def read_recipe(path: Path) -> dict[str, dict[str, Any]]:
    """Read a recipe's tables and check keys and types, not yet the values together.

    Raises ValueError naming the nearest known key for one that is unknown.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    if "budgets" in data:
        raise ValueError(f"{path} describes an experiment; use mor experiment {path}")
    if "stages" in data:
        raise ValueError(f"{path} is for uptraining; use mor uptrain PARENT --recipe {path}")
    for table, fields in data.items():
        check_choice(f"{path}: table", table, list(RECIPE_TABLES))
        check_fields(f"{path}: [{table}]", RECIPE_TABLES[table], fields)
    return data


def check_fields(where: str, kind: type, fields: Any) -> None:
    """Raise ValueError unless fields are a table of a dataclass's keys and types."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is {fields!r}; write a table")
    hints = typing.get_type_hints(kind)
    for key, value in fields.items():
        check_choice(f"{where}: key", key, list(hints))
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise ValueError(f"{where}: {key} is {value!r}; give a value of {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a TOML value has the type of a field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str if hint is Path else hint)


def recipe_flags(tables: dict[str, dict[str, Any]]) -> list[str]:
    """Turn a recipe's tables into flags; placed before the user's, so that his win."""
    flags = []
    for table, fields in tables.items():
        for key, value in fields.items():
            name = f"{table}.{key}".replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{name}" if value else f"--{table}.no-{key}".replace("_", "-"))
            else:
                items = value if isinstance(value, list) else [value]
                flags += [f"--{name}", *map(str, items)]
    return flags


def load_recipe(path: Path) -> Recipe:
    """Read a recipe as it stands, without flags."""
    tables = read_recipe(path)
    model = dict(tables.get("model", {}))
    if "capacity" in model:
        model["capacity"] = tuple(model["capacity"])
    return Recipe(model=ModelConfig(**model), train=TrainConfig(**tables.get("train", {})))


def with_defaults(run: dict[str, Any]) -> dict[str, Any]:
    """Fill in the fields that were not there yet when a recipe's tables were written."""
    filled = dict(run)
    for table, kind in RECIPE_TABLES.items():
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        filled[table] = {**defaults, **run.get(table, {})}
    return filled


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return what a run folder remembers of its recipe."""
    return {"model": recipe.model.to_dict(), "train": dataclasses.asdict(recipe.train)}
