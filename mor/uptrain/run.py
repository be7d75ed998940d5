"""`mor uptrain`, to be read top to bottom: convert -> text -> stages -> one model folder.

Every stage is a run of `mor/train/trainer.py` that begins with the weights of the one before and
learns from the parent. What is done stays done: the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from mor.checkpoint import load_model
from mor.config import ModelConfig
from mor.convert.config import ConvertConfig
from mor.convert.convert import convert
from mor.data.loader import PreparedData
from mor.files import atomic_folder, only_one, read_json, remove_leftovers, write_json
from mor.log import logger
from mor.ops.device import pick_device, pick_product_dtype
from mor.train.config import Recipe, TrainConfig, check_context, check_routing
from mor.train.heldout import measure_loss
from mor.train.trainer import SUMMARY, Teaching, held_batches, train
from mor.uptrain.config import SELF, Stage, UptrainConfig, UptrainRecipe, load_uptrain_recipe
from mor.uptrain.self_text import write_self_text

ASKED = "asked.json"
"""what parent, start and data were made from"""
TAKEN_ALONG = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""files of a converted folder that a training does not write"""


def uptrain(parent: str, config: UptrainConfig) -> dict[str, Any]:
    """Make a MoR of a parent; returns bits per byte of both, mean depth and each stage's results.

    Once all stages are done, `model` is the folder of what came out.

    Raises ValueError for a parent, recipe, data or folder that does not fit; Interrupted after
    Ctrl-C, and the same command goes on
    """
    recipe = load_uptrain_recipe(config.recipe)
    wanted = _wanted(config, recipe)
    config.out.mkdir(parents=True, exist_ok=True)
    with only_one(config.out):
        remove_leftovers(config.out)
        asked = _asked(parent, config, recipe)
        _hold_to_first(config.out, asked)
        how = recipe.convert
        plain = ConvertConfig(
            num_recursions=1, tokenizer=how.tokenizer, dtype=how.dtype, seed=how.seed
        )
        for name, settings in (("parent", plain), ("start", how)):
            if not (config.out / name).is_dir():
                logger.info("%s: converting %s", name, parent)
                convert(parent, config.out / name, settings)
            _note(config.out, name, asked)
        models = _stage_models(recipe, ModelConfig.load(config.out / "start"))
        data = _data(config, recipe)
        _note(config.out, "data", asked)
        before, rows = config.out / "start", []
        for stage, model in zip(recipe.stages, models, strict=True):
            start, before = before, config.out / stage.name / "model"
            if stage.name in wanted:
                row = _stage(config, stage, model, start, data)
            elif (config.out / stage.name / SUMMARY).is_file():
                row = read_json(config.out / stage.name / SUMMARY)
            else:
                continue
            parent_bits = _parent_bits(config, stage, data)
            row |= {"stage": stage.name, "parent_bits_per_byte": parent_bits}
            row["lost"] = row["bits_per_byte"] / parent_bits - 1
            rows.append(row)
            logger.info(
                "%s: %.4f bits per byte at mean depth %.2f; the parent's %.4f",
                *(stage.name, row["bits_per_byte"], row["mean_depth"], parent_bits),
            )
        result: dict[str, Any] = {"stages": rows}
        if rows:
            told = ("bits_per_byte", "parent_bits_per_byte", "lost", "mean_depth")
            result |= {name: rows[-1][name] for name in told}
        if len(rows) == len(recipe.stages):
            _publish(before, config.out)
            result["model"] = str(config.out / "model")
    write_json(config.out / "uptrain.json", result)
    return result


def _asked(parent: str, config: UptrainConfig, recipe: UptrainRecipe) -> dict[str, Any]:
    """Return what decides each of the folders that stages build on, as JSON gives it back."""
    told: dict[str, Any] = {"parent": parent, "start": dataclasses.asdict(recipe.convert)}
    told["data"] = config.data
    if config.data == SELF:
        told["data"] = {SELF: dataclasses.asdict(recipe.self_text)}
    return json.loads(json.dumps(told, default=str))


def _hold_to_first(out: Path, asked: dict[str, Any]) -> None:
    """Refuse another parent, conversion or text than those that are there.

    The stages hold themselves to their settings.
    """
    before = read_json(out / ASKED) if (out / ASKED).is_file() else {}
    for name, value in asked.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"{name} is {value}, {out} was begun with {before[name]}; give the same, or "
                "another --out"
            )


def _note(out: Path, name: str, asked: dict[str, Any]) -> None:
    """Write down what one of the folders was made from, once it is there."""
    before = read_json(out / ASKED) if (out / ASKED).is_file() else {}
    write_json(out / ASKED, {**before, name: asked[name]})


def _wanted(config: UptrainConfig, recipe: UptrainRecipe) -> set[str]:
    names = [stage.name for stage in recipe.stages]
    for name in config.stages:
        if name not in names:
            raise ValueError(f"stage {name!r} is not in {config.recipe}; it has {', '.join(names)}")
    return set(config.stages or names)


def _data(config: UptrainConfig, recipe: UptrainRecipe) -> PreparedData:
    """Open the prepared text, or have the parent write it."""
    if config.data != SELF:
        return PreparedData.open(Path(config.data))
    folder = config.out / "data"
    if not (folder / "manifest.json").is_file():
        write_self_text(config.out / "parent", folder, recipe.self_text, device=config.device)
    return PreparedData.open(folder)


def _stage_models(recipe: UptrainRecipe, start: ModelConfig) -> list[ModelConfig]:
    """Return the model of every stage; ValueError, before any training, for one that is off."""
    models = []
    for stage in recipe.stages:
        models.append(stage.config(start))
        try:
            Recipe(model=models[-1], train=stage.train)
            check_context(models[-1], stage.train)
            check_routing(models[-1], stage.train)
            for name in ("num_routers", "router_outputs"):
                if getattr(models[-1], name) != getattr(start, name):
                    raise ValueError(
                        f"router {models[-1].router} has other weights than {start.router} of "
                        "[convert]; name there the one that the last stage needs"
                    )
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error
    return models


def _parent_bits(config: UptrainConfig, stage: Stage, data: PreparedData) -> float:
    """Measure the parent on the validation text that a stage is measured on, once."""
    file = config.out / "parent.json"
    known = read_json(file) if file.is_file() else {}
    key = f"context {stage.train.context}, {stage.train.eval_tokens} tokens, {stage.train.dtype}"
    if key in known:
        return known[key]
    device = pick_device(config.device)
    dtype = pick_product_dtype(stage.train.dtype, device)
    model = load_model(config.out / "parent", device=device)
    held = held_batches(data, "val", Recipe(model=model.config, train=stage.train))
    result = measure_loss(model, held, dtype=dtype)
    val = data.split("val")
    bits = result.bits_per_byte(val.tokens / val.bytes)
    write_json(file, {**known, key: bits})
    return bits


def _stage(
    config: UptrainConfig, stage: Stage, model: ModelConfig, before: Path, data: PreparedData
) -> dict[str, Any]:
    """Run a stage, or what is left of it; returns its summary."""
    out = config.out / stage.name
    if not before.is_dir():
        raise ValueError(f"{before} is missing; run the stages before {stage.name} first")
    settings = dataclasses.replace(stage.train, device=config.device)
    if config.max_tokens:
        tokens = min(stage.train.budget_tokens or config.max_tokens, config.max_tokens)
        settings = dataclasses.replace(settings, budget_tokens=tokens, budget_flops=0)
        model = _warm_within(model, settings)
    teacher = None
    if stage.distill is not None:
        cache = config.teacher_cache or config.out / "teacher"
        teacher = Teaching(config.out / "parent", stage.distill, cache)
    summary = train(
        Recipe(model=model, train=settings),
        data=data,
        out=out,
        resume=(out / "run.json").is_file(),
        start=before,
        teacher=teacher,
        go_on="the same command goes on",
    )
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of a stage that is done: gigabytes
    return summary._asdict()


def _warm_within(model: ModelConfig, train: TrainConfig) -> ModelConfig:
    """Return a model whose capacities reach their target within a training that was cut short."""
    warmup = min(model.capacity_warmup_steps, train.num_deep_steps(model))
    return dataclasses.replace(model, capacity_warmup_steps=warmup)


def _publish(model: Path, out: Path) -> None:
    """Copy the last stage's model to OUT/model, with what the parent's folder had beside it."""
    with atomic_folder(out / "model") as part:
        for file in sorted(model.iterdir()):
            shutil.copy2(file, part / file.name)
        for name in TAKEN_ALONG:
            if (out / "start" / name).is_file():
                shutil.copy2(out / "start" / name, part / name)
