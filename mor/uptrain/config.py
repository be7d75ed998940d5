"""A recipe of uptraining: how a parent is converted, and the stages that heal it. No torch.

[convert]     fields of `mor convert`: sharing, num_recursions, init, lora_rank ..
[train]       what all stages have; fields of `mor train`
[distill]     label_weight, teacher_weight, state_weight, top_k
[self]        text that the parent writes, where --data is self: tokens, text_tokens, temperature
[[stages]]    name, and what is its own in model, train and distill
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.config import ModelConfig, check_choice
from mor.convert.config import ConvertConfig
from mor.train.config import TrainConfig, check_fields
from mor.train.distill import DistillConfig

SELF = "self"
STAGE_FIELDS = (
    "router",
    "router_alpha",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_threshold_rate",
    "router_seed",
    "capacity",
    "capacity_warmup_steps",
    "gating",
    "kv_strategy",
)
"""what a stage may change of the model; the rest is decided by conversion"""


@dataclass(frozen=True, slots=True, kw_only=True)
class UptrainConfig:
    """Settings of `mor uptrain`."""

    recipe: Path
    """TOML file of conversion and stages, such as recipes/uptrain-smollm2-cpu.toml"""
    out: Path
    """folder for parent, converted model, stages and the final model; the same command goes on"""
    data: str = SELF
    """folder that `mor prepare --tokenizer PARENT` wrote, or self: text that the parent writes"""
    stages: tuple[str, ...] = ()
    """stages to run now, in their order; all that are not done unless given"""
    teacher_cache: Path | None = None
    """folder for what the parent says, where [distill] has top_k; OUT/teacher unless given, and
    shared by runs on the same text"""
    max_tokens: float = 0
    """tokens of a stage at most, to try a recipe; 0 for what it says"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfConfig:
    """Text that the parent writes, from its first token on."""

    tokens: int = 400_000
    """tokens to write"""
    text_tokens: int = 256
    """tokens of a text at most"""
    temperature: float = 1.0
    """1 draws from the parent's own distribution"""
    seed: int = 0
    """seed of the draws"""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("text_tokens", 2), ("temperature", 0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; give {least} or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One training of a recipe: what it changes in model and training, and what it learns from."""

    name: str
    model: dict[str, Any]
    train: TrainConfig
    distill: DistillConfig | None
    """None learns from the text alone"""

    def config(self, converted: ModelConfig) -> ModelConfig:
        """Return the converted model with the stage's routing; ValueError where it does not fit."""
        try:
            return dataclasses.replace(converted, **self.model)
        except ValueError as error:
            raise ValueError(f"stage {self.name}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class UptrainRecipe:
    """One TOML file, checked."""

    convert: ConvertConfig
    self_text: SelfConfig
    stages: tuple[Stage, ...]


def load_uptrain_recipe(path: Path) -> UptrainRecipe:
    """Read a recipe.

    Raises ValueError, in one line, for what is not TOML, an unknown key, a value that does not fit
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    for table in data:
        known = ["convert", "train", "distill", "self", "stages"]
        check_choice(f"{path}: table", table, known)
    stages = data.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(one, dict) for one in stages):
        raise ValueError(f"{path}: stages is {stages!r}; write [[stages]] tables")
    if not stages:
        raise ValueError(f"{path} has no [[stages]]; describe at least one training")
    recipe = UptrainRecipe(
        convert=_build(path, "[convert]", ConvertConfig, data.get("convert", {})),
        self_text=_build(path, "[self]", SelfConfig, data.get("self", {})),
        stages=tuple(_stage(path, data, one) for one in stages),
    )
    names = [stage.name for stage in recipe.stages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: {name!r} stands twice in [[stages]]; rename one")
    return recipe


def _stage(path: Path, data: dict[str, Any], table: dict[str, Any]) -> Stage:
    name = table.get("name", "")
    at = f"[[stages]] {name}".rstrip()
    for key in table:
        check_choice(f"{path}: {at}: key", key, ["name", "model", "train", "distill"])
    if not isinstance(name, str) or not name or not name.replace("-", "").isalnum():
        raise ValueError(f"{path}: {at}: name is {name!r}; give letters, digits and -")
    if name in ("parent", "start", "model", "data", "teacher"):
        raise ValueError(f"{path}: {at}: {name} is the name of another folder; rename the stage")
    model = table.get("model", {})
    check_fields(f"{path}: {at}: model", ModelConfig, model)
    for field in model:
        if field not in STAGE_FIELDS:
            raise ValueError(
                f"{path}: {at}: {field} is decided by [convert]; a stage changes routing alone"
            )
    train = _merged(f"{path}: {at}: train", data.get("train", {}), table.get("train", {}))
    check_fields(f"{path}: {at}: train", TrainConfig, train)
    try:
        built = TrainConfig(**train)
    except ValueError as error:
        raise ValueError(f"{path}: {at}: {error}") from error
    if "capacity" in model:
        model = {**model, "capacity": tuple(model["capacity"])}
    distill = None
    if "distill" in data or "distill" in table:
        told = _merged(f"{path}: {at}: distill", data.get("distill", {}), table.get("distill", {}))
        distill = _build(path, f"{at}: distill", DistillConfig, told)
    return Stage(name=name, model=model, train=built, distill=distill)


def _merged(where: str, common: Any, own: Any) -> dict[str, Any]:
    """Return what all stages have with a stage's own in its place; ValueError for no tables."""
    for one in (common, own):
        if not isinstance(one, dict):
            raise ValueError(f"{where} is {one!r}; write a table")
    return {**common, **own}


def _build(path: Path, at: str, kind: Any, values: dict[str, Any]) -> Any:
    """Make a dataclass of a table; ValueError names what does not fit."""
    check_fields(f"{path}: {at}", kind, values)
    hints = typing.get_type_hints(kind)
    made: dict[str, Any] = {}
    for key, value in values.items():
        made[key] = tuple(value) if isinstance(value, list) else value
        if hints[key] == Path | None:
            made[key] = Path(value)
    try:
        return kind(**made)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {at}: {error}") from error
