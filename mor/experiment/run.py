"""Running an experiment: every member is trained by `mor train` in its own process, then measured.

What is done stays done: a member whose result is kept is not run again, one that was stopped goes
on from its checkpoint. A member that fails is reported and the others go on.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mor
from mor.checkpoint import load_model
from mor.config import check_choice
from mor.data.loader import PreparedData
from mor.experiment.child import MemberFailed, run_mor
from mor.experiment.config import (
    Entry,
    Experiment,
    ExperimentConfig,
    load_experiment,
    recipe_toml,
)
from mor.experiment.evaluate import evaluate
from mor.experiment.members import SWEEP, Member, budget_members, planned_members, sweep_members
from mor.experiment.pace import measure_paces
from mor.experiment.page import write_report
from mor.experiment.results import Result, Results
from mor.files import only_one, read_json, write_text
from mor.log import finite, human_count, logger
from mor.model.cost import count_params
from mor.ops.device import describe_machine, pick_device
from mor.report import require_report_extra
from mor.train.config import load_recipe
from mor.train.metrics import read_metrics
from mor.train.trainer import DIVERGED

CURVE_POINTS = 60


class OutOfTime(Exception):
    """--max-hours have passed."""


def run_experiment(path: Path, config: ExperimentConfig) -> dict[str, Any]:
    """Run what is not done yet; returns the summary, with `failure` when a member failed.

    Raises ValueError for a recipe, data or folder that does not fit; KeyboardInterrupt after Ctrl-C
    """
    if config.out is None:
        raise ValueError("--out is missing; give a folder for members and report")
    experiment = load_experiment(path)
    data, _ = _asked_for(experiment, config)
    require_report_extra()
    config.out.mkdir(parents=True, exist_ok=True)
    with only_one(config.out):
        results = Results(config.results or config.out / "results.jsonl")
        run = _Run(experiment, path, config, data, results)
        try:
            run.all()
        except OutOfTime:
            logger.info("%g hours have passed; the same command goes on", config.max_hours)
        report = write_report(config.out, experiment, list(results.by_name.values()))
    return run.summary(report)


def list_members(path: Path, config: ExperimentConfig) -> dict[str, Any]:
    """Say what an experiment would train, with rates as the recipe has them."""
    experiment = load_experiment(path)
    _, members = _asked_for(experiment, config)
    rows: list[dict[str, Any]] = []
    for member in members:
        if member.kind == "same_time_s":
            rows.append({"member": member.name, "tokens": None})
            logger.info("%-40s tokens follow from the measured pace", member.name)
            continue
        tokens = member.recipe.train.budget_tokens
        rows.append(
            {
                "member": member.name,
                "params_nonembedding": count_params(member.recipe.model).nonembedding,
                "tokens": tokens,
                "tokens_per_param": member.tokens_per_param,
                "train_flops": member.train_flops,
            }
        )
        logger.info(
            "%-40s %8s tokens, %5.1f per parameter, %8sFLOPs",
            member.name,
            human_count(tokens),
            member.tokens_per_param,
            human_count(member.train_flops),
        )
    bench = [one for one in experiment.bench if _is_named(one.name, config.only)]
    for one in bench:
        logger.info("%-40s mor bench %s", one.name, shlex.join(one.args))
    return {"members": rows, "bench": [one.name for one in bench]}


def _is_named(name: str, only: Sequence[str]) -> bool:
    return not only or any(name.startswith(one) for one in only)


def _asked_for(
    experiment: Experiment, config: ExperimentConfig
) -> tuple[PreparedData | None, list[Member]]:
    """Open the data and plan the members that --only names, those of their sweeps first.

    Raises ValueError for data that is missing, a name that no member or benchmark begins with
    """
    data, planned = None, []
    if experiment.models:
        if config.data is None:
            raise ValueError("--data is missing; give the folder that mor prepare wrote")
        data = PreparedData.open(config.data)
        planned = planned_members(experiment, data)
    finals = [one for one in planned if one.budget != SWEEP]
    names = [one.name for one in (*finals, *experiment.bench)]
    for one in config.only:
        if not any(name.startswith(one) for name in names):
            check_choice("--only", one, names)
    swept = {(one.size, one.model) for one in finals if _is_named(one.name, config.only)}
    sweeps = [one for one in planned if one.budget == SWEEP and (one.size, one.model) in swept]
    return data, [*sweeps, *(one for one in finals if _is_named(one.name, config.only))]


class _Run:
    """One pass over an experiment."""

    def __init__(
        self,
        experiment: Experiment,
        path: Path,
        config: ExperimentConfig,
        data: PreparedData | None,
        results: Results,
    ) -> None:
        self.experiment, self.path, self.config = experiment, path, config
        self.data, self.results = data, results
        self.start_s = time.monotonic()
        self.failed: dict[str, str] = {}
        self.num_run = self.num_kept = 0
        self.rates: dict[tuple[str, str], float | None] = {}
        self.paces: dict[tuple[str, str], float] = {}

    def all(self) -> None:
        if self.data is not None:
            self._trainings(self.data)
        for bench in self.experiment.bench:
            if not _is_named(bench.name, self.config.only):
                continue
            if self._is_kept(bench.name, args=list(bench.args)):
                self.num_kept += 1
                continue
            about = {"member": bench.name, "row": "bench", "args": list(bench.args)}
            self._attempt(about, lambda args=bench.args: self._bench(args))

    def _trainings(self, data: PreparedData) -> None:
        """Run the members of all budgets; a rate is swept when the first that needs it comes."""

        def rate(model: Entry, size: Entry) -> float | None:
            asked = [self._begins(b.name, size, model) for b in self.experiment.budgets]
            if (size.name, model.name) not in self.rates and any(asked):
                self.rates[size.name, model.name] = self._sweep(data, model, size)
            return self.rates.get((size.name, model.name))

        for member in budget_members(
            self.experiment, data, lr_of=rate, pace_of=lambda *which: self._pace(data, *which)
        ):
            if not _is_named(member.name, self.config.only):
                continue
            if self.experiment.sweep and self.rates.get((member.size, member.model)) is None:
                if self._is_kept(member.name):
                    self.num_kept += 1
                else:
                    self._fail(member.about, self._no_rate(member))
                continue
            self._member(member, data)

    def _no_rate(self, member: Member) -> str:
        """Say why a member has no rate."""
        swept = "_".join(part for part in (SWEEP, member.size, member.model, "lr") if part)
        failed = [why for name, why in self.failed.items() if name.startswith(swept)]
        if failed and all(DIVERGED in why for why in failed):
            return "all rates of its sweep diverged; give lower ones in sweep"
        return "its sweep is not whole; the same command goes on"

    def _sweep(self, data: PreparedData, model: Entry, size: Entry) -> float | None:
        """Return the rate with the least held-out loss.

        None without a sweep, when all diverge, or when one came to no result for another reason:
        it would be the best another day, and the members of this day in its way.
        """
        losses = {}
        for member in sweep_members(self.experiment, data, model, size):
            result = self._member(member, data)
            if result is not None:
                losses[member.recipe.train.lr] = result["heldout_loss"]
            elif DIVERGED not in self.failed[member.name]:
                return None
        if not losses:
            return None
        best = min(losses, key=lambda lr: losses[lr])
        told = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items())
        logger.info("%s takes the rate %g (held-out losses %s)", model.name, best, told)
        if len(losses) > 2 and best in (min(losses), max(losses)):
            logger.warning("%s: the best rate %g is at the edge of the sweep", model.name, best)
        return best

    def _pace(self, data: PreparedData, model: Entry, size: Entry) -> float:
        """Return tokens a second, measured for all models of a size in turn, once.

        Models that came later are measured by themselves, and a line says so: the others' trainings
        were sized by the paces that are kept
        """
        if (size.name, model.name) not in self.paces:
            name = f"pace_{size.name}" if size.name else "pace"
            kept = self.results.by_name.get(name, {})
            about = {"data_sha256": data.manifest.corpus_sha256}
            names = {one.name for one in self.experiment.models}
            known = {}  # a line from before the hash was kept is of this data: so are its members
            if kept.get("data_sha256", about["data_sha256"]) == about["data_sha256"]:
                known = kept.get("tokens_per_s", {})
            if not known.keys() >= names:
                recipes = {
                    one.name: self.experiment.recipe(one, size, budget_tokens=1)
                    for one in self.experiment.models
                    if one.name not in known  # a model's pace decides its members: it stays
                }
                if known:
                    logger.warning(
                        "the paces of %s are of an earlier measurement; only %s is measured now, "
                        "perhaps on a machine that is busier or less so",
                        *(", ".join(sorted(some)) for some in (known, recipes)),
                    )
                paces = measure_paces(recipes, data)
                paces["tokens_per_s"] = {**known, **paces["tokens_per_s"]}
                kept = self.results.add(
                    {
                        **self._head(),
                        **about,
                        "member": name,
                        "row": "pace",
                        "outcome": "done",
                        **paces,
                    }
                )
            self.paces |= {
                (size.name, one): kept["tokens_per_s"][one] for one in kept["tokens_per_s"]
            }
        return self.paces[size.name, model.name]

    def _begins(self, budget: str, size: Entry, model: Entry) -> bool:
        """Tell whether a member of a model may be asked for."""
        name = "_".join(part for part in (budget, size.name, model.name) if part) + "_s"
        only = self.config.only
        return not only or any(name.startswith(one) or one.startswith(name) for one in only)

    def _is_kept(self, name: str, **about: Any) -> bool:
        kept = self.results.by_name.get(name, {})
        return kept.get("outcome") == "done" and all(kept.get(k) == v for k, v in about.items())

    def _member(self, member: Member, data: PreparedData) -> Result | None:
        """Return a member's result, run if need be; None when it failed."""
        settings = member.settings(data, self.experiment.eval_tokens)
        known = self.results.done(member.name, settings)
        if known is not None:
            self.num_kept += 1
            if known["member"] == member.name:
                return known
            return self.results.add({**known, **member.about, "same_as": known["member"]})
        about = {**member.about, **settings}
        return self._attempt(about, lambda: self._train(member, data))

    def _attempt(self, about: dict[str, Any], work: Callable[[], dict[str, Any]]) -> Result | None:
        hours = (time.monotonic() - self.start_s) / 3600
        if self.config.max_hours and hours >= self.config.max_hours:
            raise OutOfTime
        logger.info("%s", about["member"])
        try:
            outcome = work()
        except MemberFailed as error:
            return self._fail(about, str(error))
        self.num_run += 1
        return self.results.add({**self._head(), **about, "outcome": "done", **finite(outcome)})

    def _fail(self, about: dict[str, Any], why: str) -> None:
        self.failed[about["member"]] = why
        logger.error("%s failed: %s; the others go on", about["member"], why)
        self.results.add({**self._head(), **about, "outcome": "failed", "error": why})

    def _head(self) -> dict[str, Any]:
        """What every result says of where it comes from."""
        return {
            "experiment": self.experiment.name,
            "note": self.experiment.note,
            "mor": mor.__version__,
            "machine": describe_machine(),
        }

    def _train(self, member: Member, data: PreparedData) -> dict[str, Any]:
        assert self.config.out is not None
        folder = self.config.out / "members" / member.name
        folder.parent.mkdir(exist_ok=True)
        recipe = folder.parent / f"{member.name}.toml"
        if folder.is_dir() and not (recipe.is_file() and load_recipe(recipe) == member.recipe):
            raise ValueError(
                f"{folder} is a training of other settings; remove it, or give another --out"
            )
        about = f"{member.label}, member {member.name} of {self.experiment.name}"
        write_text(recipe, recipe_toml(member.recipe, about=about))
        command = ["train", str(recipe), "--data", str(data.folder), "--out", str(folder)]
        if (folder / "run.json").is_file():  # a finished one too: it is held to its data
            command.append("--resume")
        run_mor(command)
        summary = read_json(folder / "summary.json")
        try:
            model = load_model(folder / "model", device=pick_device(member.recipe.train.device))
            start_s = time.monotonic()
            measured = evaluate(
                model,
                data,
                context=member.recipe.train.context,
                eval_tokens=self.experiment.eval_tokens,
            )
        except ValueError as error:
            raise MemberFailed(str(error)) from error
        params = count_params(member.recipe.model)
        lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        return {
            "data_tokens": data.split("train").tokens,
            "vocab_size": data.manifest.vocab_size,
            "params_unique": params.unique,
            "params_nonembedding": params.nonembedding,
            "steps": summary["steps"],
            "tokens": summary["tokens"],
            "tokens_per_param": member.tokens_per_param,
            "train_flops": summary["train_flops"],
            "train_seconds": summary["train_seconds"],
            "peak_bytes": summary["peak_bytes"],
            "eval_seconds": time.monotonic() - start_s,
            "curve": curve(lines),
            **measured,
        }

    def _bench(self, args: Sequence[str]) -> dict[str, Any]:
        out = run_mor(["bench", *args, "--json"])
        try:
            return {"report": json.loads(out.strip().splitlines()[-1])}
        except (IndexError, json.JSONDecodeError) as error:
            raise MemberFailed(f"the benchmark printed no JSON ({error})") from error

    def summary(self, report: Path) -> dict[str, Any]:
        """Return what the command prints."""
        logger.info(
            "%d run, %d kept from before, %d failed; %s",
            self.num_run,
            self.num_kept,
            len(self.failed),
            report,
        )
        failure = None
        if self.failed:
            name, why = next(iter(self.failed.items()))
            failure = f"{len(self.failed)} members failed, the first is {name}: {why}"
        return {
            "run": self.num_run,
            "kept": self.num_kept,
            "failed": self.failed,
            "results": str(self.results.path),
            "report": str(report),
            "failure": failure,
        }


def curve(lines: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return [tokens, training loss, FLOPs] of CURVE_POINTS stretches at most, losses averaged."""
    size = -(-len(lines) // CURVE_POINTS) if lines else 1
    points = []
    for first in range(0, len(lines), size):
        part = lines[first : first + size]
        loss = round(sum(x["loss"] for x in part) / len(part), 4)
        points.append([part[-1]["tokens"], loss, part[-1]["train_flops"]])
    return points
