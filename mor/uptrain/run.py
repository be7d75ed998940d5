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
from mor.convert.convert import convert
from mor.data.loader import PreparedData
from mor.files import atomic_folder, only_one, read_json, write_json
from mor.log import logger
from mor.ops.device import pick_device, pick_dtype
from mor.train.config import Recipe
from mor.train.heldout import measure_loss
from mor.train.trainer import Teaching, held_batches, train
from mor.uptrain.config import SELF, Stage, UptrainConfig, UptrainRecipe, load_uptrain_recipe
from mor.uptrain.self_text import write_self_text

ASKED = "asked.json"
"""what parent, start and data were made from"""
TAKEN_ALONG = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""files of a converted folder that a training does not write"""


def uptrain(parent: str, config: UptrainConfig) -> dict[str, Any]:
    """Make a MoR of a parent; returns bits per byte of both, mean depth and the model's folder.

    Raises ValueError for a parent, recipe, data or folder that does not fit; Interrupted after
    Ctrl-C, and the same command goes on
    """
    recipe = load_uptrain_recipe(config.recipe)
    wanted = _wanted(config, recipe)
    config.out.mkdir(parents=True, exist_ok=True)
    with only_one(config.out):
        asked = _asked(parent, config, recipe)
        _hold_to_first(config.out, asked)
        plain = dataclasses.replace(recipe.convert, **_PLAIN)
        for name, how in (("parent", plain), ("start", recipe.convert)):
            if not (config.out / name).is_dir():
                logger.info("%s: converting %s", name, parent)
                convert(parent, config.out / name, how)
            _note(config.out, name, asked)
        data = _data(config, recipe)
        _note(config.out, "data", asked)
        measured = _parent_bits(config, recipe.stages[-1], data)
        before, rows = config.out / "start", []
        for stage in recipe.stages:
            if stage.name in wanted:
                rows.append(_stage(config, stage, before, data))
                logger.info(
                    "%s: %.4f bits per byte at mean depth %.2f; the parent's %.4f",
                    stage.name,
                    rows[-1]["bits_per_byte"],
                    rows[-1]["mean_depth"],
                    measured["bits_per_byte"],
                )
            before = config.out / stage.name / "model"
        if before.is_dir():
            _publish(before, config.out)
    result = {"parent_bits_per_byte": measured["bits_per_byte"], "stages": rows}
    if rows:
        result |= {
            "model": str(config.out / "model"),
            "bits_per_byte": rows[-1]["bits_per_byte"],
            "mean_depth": rows[-1]["mean_depth"],
            "lost": rows[-1]["bits_per_byte"] / measured["bits_per_byte"] - 1,
        }
    write_json(config.out / "uptrain.json", result)
    return result


_PLAIN: dict[str, Any] = {"num_recursions": 1}


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


def _parent_bits(config: UptrainConfig, stage: Stage, data: PreparedData) -> dict[str, Any]:
    """Measure the parent on the validation text that the last stage is measured on, once."""
    file = config.out / "parent.json"
    if file.is_file():
        return read_json(file)
    device = pick_device(config.device)
    dtype = pick_dtype(stage.train.dtype, device)
    model = load_model(config.out / "parent", device=device)
    held = held_batches(data, "val", Recipe(model=model.config, train=stage.train))
    result = measure_loss(model, held, dtype=dtype)
    val = data.split("val")
    bits = result.bits_per_byte(val.tokens / val.bytes)
    measured = {"loss": result.loss, "bits_per_byte": bits}
    write_json(file, measured)
    return measured


def _stage(config: UptrainConfig, stage: Stage, before: Path, data: PreparedData) -> dict[str, Any]:
    """Run a stage, or what is left of it; returns its summary."""
    out = config.out / stage.name
    if not before.is_dir():
        raise ValueError(f"{before} is missing; run the stages before {stage.name} first")
    settings = dataclasses.replace(stage.train, device=config.device)
    if config.max_tokens:
        tokens = min(stage.train.budget_tokens or config.max_tokens, config.max_tokens)
        settings = dataclasses.replace(settings, budget_tokens=tokens, budget_flops=0)
    model = stage.config(ModelConfig.load(config.out / "start"))
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
    )
    return {"stage": stage.name, **summary._asdict()}


def _publish(model: Path, out: Path) -> None:
    """Copy the last stage's model to OUT/model, with what the parent's folder had beside it."""
    with atomic_folder(out / "model") as part:
        for file in sorted(model.iterdir()):
            shutil.copy2(file, part / file.name)
        for name in TAKEN_ALONG:
            if (out / "start" / name).is_file():
                shutil.copy2(out / "start" / name, part / name)
