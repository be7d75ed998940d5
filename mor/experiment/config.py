"""What an experiment is: models x sizes x budgets x seeds in one TOML file. Imports no torch.

seeds = [0, 1]                       [model] [train]       what all models have
[sweep] lrs, share                   every model takes its best rate of a short training
[[models]] name, label, model, train         vanilla twin, fixed depth, MoR, random router
[[sizes]] name, model                        optional
[[budgets]] name, one of same_flops, same_tokens, same_time_s, tokens_per_param; models, seeds
[[bench]] name, args                         `mor bench ARGS --json`, kept as a result
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mor.config import ModelConfig, check_choice
from mor.train.config import RECIPE_TABLES, Recipe, TrainConfig, check_fields

Kind = Literal["vanilla", "recursive", "mor", "random"]
KINDS: dict[Kind, str] = {
    "vanilla": "vanilla twin: num_recursions 1",
    "recursive": "fixed-depth recursive: router fixed",
    "mor": "MoR: a learnt router",
    "random": "random router",
}
BUDGETS = ("same_flops", "same_tokens", "same_time_s", "tokens_per_param")
EVAL_TOKENS = 131072


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """Settings of `mor experiment`."""

    data: Path | None = None
    """folder that `mor prepare` wrote; trainings need it"""
    out: Path | None = None
    """folder for the run: members, results.jsonl and report.html"""
    results: Path | None = None
    """file of results to add to instead of OUT/results.jsonl, such as one that is kept"""
    only: tuple[str, ...] = ()
    """members to run, whole names or beginnings; all unless given. Their rates are swept first"""
    max_hours: float = 0
    """begin no member after so many hours, 0 for no limit; the same command goes on later"""
    list: bool = False
    """say which members there are and what each costs, and end"""
    render: tuple[Path, ...] = ()
    """write these Markdown files from the kept results and end; one with claim marks keeps the
    rest of its text"""
    kept: Path = Path("results")
    """folder of kept results that --render reads"""

    def __post_init__(self) -> None:
        if not self.max_hours >= 0:
            raise ValueError(f"max_hours is {self.max_hours}; give 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model, or a size, and what it changes."""

    name: str
    label: str
    model: dict[str, Any]
    train: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much every model gets."""

    name: str
    kind: str
    amount: float
    models: tuple[str, ...]
    """names; all unless given"""
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Learning rates that every model tries on a share of the first budget."""

    lrs: tuple[float, ...]
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A benchmark of the `mor` command whose JSON is a result."""

    name: str
    args: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One TOML file, checked."""

    name: str
    note: str
    """how the data was prepared, for the reader"""
    model: dict[str, Any]
    train: dict[str, Any]
    eval_tokens: int
    sweep: Sweep | None
    models: tuple[Entry, ...]
    sizes: tuple[Entry, ...]
    budgets: tuple[Budget, ...]
    bench: tuple[Bench, ...]

    def recipe(self, model: Entry, size: Entry, **train: Any) -> Recipe:
        """Build what a member is trained from; ValueError names the model that does not fit."""
        tables = {**self.model, **size.model, **model.model}
        if "capacity" in tables:
            tables["capacity"] = tuple(tables["capacity"])
        try:
            return Recipe(
                model=ModelConfig(**tables),
                train=TrainConfig(**{**self.train, **size.train, **model.train, **train}),
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: model {model.name}: {error}") from error


def kind_of(config: ModelConfig) -> Kind:
    """Return which kind of row a model is."""
    if config.num_recursions == 1:
        return "vanilla"
    if config.router == "fixed":
        return "recursive"
    return "random" if config.router == "random" else "mor"


def load_experiment(path: Path) -> Experiment:
    """Read a recipe of an experiment.

    Raises ValueError, in one line, for what is not TOML, an unknown key, a value of the wrong type,
    names that repeat, a missing kind of row
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    where = str(path)
    _check_keys(
        where,
        data,
        {
            "note": str,
            "seeds": list,
            "eval_tokens": int,
            "model": dict,
            "train": dict,
            "sweep": dict,
            "models": list,
            "sizes": list,
            "budgets": list,
            "bench": list,
        },
    )
    for table in ("model", "train"):
        check_fields(f"{where}: [{table}]", RECIPE_TABLES[table], data.get(table, {}))
    for given in ("budget_tokens", "budget_flops", "seed"):
        if given in data.get("train", {}):
            raise ValueError(f"{where}: train.{given} is for [[budgets]] and seeds; leave it out")
    seeds = _numbers(where, "seeds", data.get("seeds", [0]), int)
    models = _entries(where, "models", data.get("models", []))
    experiment = Experiment(
        name=path.stem,
        note=data.get("note", ""),
        model=data.get("model", {}),
        train=data.get("train", {}),
        eval_tokens=data.get("eval_tokens", EVAL_TOKENS),
        sweep=_sweep(where, data.get("sweep")),
        models=models,
        sizes=_entries(where, "sizes", data.get("sizes", [])) or (_NO_SIZE,),
        budgets=tuple(
            _budget(where, table, [model.name for model in models], seeds)
            for table in _tables(where, "budgets", data.get("budgets", []))
        ),
        bench=tuple(
            _bench(where, table) for table in _tables(where, "bench", data.get("bench", []))
        ),
    )
    _check_whole(where, experiment)
    return experiment


_NO_SIZE = Entry(name="", label="", model={}, train={})


def _check_whole(where: str, experiment: Experiment) -> None:
    for what in ("models", "sizes", "budgets", "bench"):
        names = [one.name for one in getattr(experiment, what)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{where}: {name!r} stands twice in [[{what}]]; rename one")
    if experiment.eval_tokens < 1:
        raise ValueError(f"{where}: eval_tokens is {experiment.eval_tokens}; give 1 or more")
    if not experiment.models:
        if not experiment.bench:
            raise ValueError(f"{where} has no [[models]]; describe at least one of each kind")
        return
    if not experiment.budgets:
        raise ValueError(f"{where} has no [[budgets]]; give one, such as same_flops = 1e13")
    kinds = {
        kind_of(experiment.recipe(model, size, budget_tokens=1).model)
        for model in experiment.models
        for size in experiment.sizes
    }
    for kind, words in KINDS.items():
        if kind not in kinds:
            raise ValueError(
                f"{where} has no model of the kind {kind} ({words}); every set has all four, so "
                "that its table shows what the router is worth"
            )


def _sweep(where: str, data: dict[str, Any] | None) -> Sweep | None:
    if data is None:
        return None
    _check_keys(f"{where}: [sweep]", data, {"lrs": list, "share": float})
    sweep = Sweep(
        lrs=_numbers(where, "sweep.lrs", data.get("lrs", []), float),
        share=float(data.get("share", 0.1)),
    )
    if not 0 < sweep.share <= 1:
        raise ValueError(f"{where}: sweep.share is {sweep.share}; give a share in (0, 1]")
    if min(sweep.lrs) <= 0:
        raise ValueError(f"{where}: sweep.lrs holds {min(sweep.lrs)}; give numbers above 0")
    return sweep


def _entries(where: str, what: str, tables: list[Any]) -> tuple[Entry, ...]:
    entries = []
    for table in _tables(where, what, tables):
        at = f"{where}: [[{what}]] {table.get('name', '')}".rstrip()
        _check_keys(at, table, {"name": str, "label": str, "model": dict, "train": dict})
        for fields in ("model", "train"):
            check_fields(f"{at}: {fields}", RECIPE_TABLES[fields], table.get(fields, {}))
        name = _name(at, table)
        entries.append(
            Entry(
                name=name,
                label=table.get("label", name),
                model=table.get("model", {}),
                train=table.get("train", {}),
            )
        )
    return tuple(entries)


def _budget(where: str, table: dict[str, Any], models: list[str], seeds: tuple[int, ...]) -> Budget:
    at = f"{where}: [[budgets]] {table.get('name', '')}".rstrip()
    amounts: dict[str, type] = dict.fromkeys(BUDGETS, float)
    _check_keys(at, table, {"name": str, "models": list, "seeds": list, **amounts})
    given = [kind for kind in BUDGETS if kind in table]
    if len(given) != 1:
        raise ValueError(f"{at} gives {given or 'no amount'}; give exactly one of {list(BUDGETS)}")
    if not 0 < table[given[0]] < float("inf"):
        raise ValueError(f"{at}: {given[0]} is {table[given[0]]}; give a number above 0")
    asked = table.get("models", models)
    for name in asked:
        check_choice(f"{at}: model", name, models)
    if "models" in table and (not asked or len(set(asked)) != len(asked)):
        raise ValueError(f"{at}: models is {asked}; give each once, at least one")
    return Budget(
        name=_name(at, table),
        kind=given[0],
        amount=float(table[given[0]]),
        models=tuple(asked),
        seeds=_numbers(at, "seeds", table["seeds"], int) if "seeds" in table else seeds,
    )


def _bench(where: str, table: dict[str, Any]) -> Bench:
    at = f"{where}: [[bench]] {table.get('name', '')}".rstrip()
    _check_keys(at, table, {"name": str, "args": list})
    args = table.get("args", [])
    if not args or not all(isinstance(arg, str) for arg in args):
        raise ValueError(f"{at}: args is {args}; give what follows `mor bench`, as texts")
    return Bench(name=_name(at, table), args=tuple(args))


def _tables(where: str, what: str, tables: list[Any]) -> list[dict[str, Any]]:
    for table in tables:
        if not isinstance(table, dict):
            raise ValueError(f"{where}: {what} holds {table!r}; write [[{what}]] tables")
    return tables


def _name(at: str, table: Mapping[str, Any]) -> str:
    name = table.get("name", "")
    if not name or not all(c.isascii() and (c.isalnum() or c in "-.") for c in name):
        raise ValueError(f"{at}: name is {name!r}; give letters, digits, - and .")
    if name in ("sweep", "pace"):
        raise ValueError(f"{at}: {name} is what results call something else; give another name")
    return name


def _check_keys(at: str, table: Mapping[str, Any], known: Mapping[str, type]) -> None:
    for key, value in table.items():
        check_choice(f"{at}: key", key, list(known))
        wanted: Any = (int, float) if known[key] is float else known[key]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{at}: {key} is {value!r}; give a value of {known[key].__name__}")


def _numbers(where: str, name: str, values: list[Any], kind: Any) -> tuple[Any, ...]:
    wanted = (int, float) if kind is float else kind
    bad = [v for v in values if not isinstance(v, wanted) or isinstance(v, bool)]
    if bad or not values:
        raise ValueError(f"{where}: {name} is {values}; give at least one {kind.__name__}")
    if len(set(values)) != len(values):
        raise ValueError(f"{where}: {name} is {values}; give each once")
    return tuple(kind(value) for value in values)


def recipe_toml(recipe: Recipe, *, about: str) -> str:
    """Return a recipe as the TOML file that `mor train` reads."""
    lines = [f"# {about}"]
    for table, config in (("model", recipe.model), ("train", recipe.train)):
        lines.append(f"[{table}]")
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value is not None and value != field.default:
                lines.append(f"{field.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
