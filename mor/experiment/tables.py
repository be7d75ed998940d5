"""Results as tables: one for each budget and size, models as rows, seeds averaged."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from mor.experiment.members import SWEEP
from mor.experiment.results import Result, key_of
from mor.experiment.stats import Difference, difference, seed_noise, spread
from mor.log import human_bytes, human_count
from mor.train.config import with_defaults

DEPTH_TOLERANCE = 0.02
"""mean depths that differ by less are equal"""
SIZE_TOLERANCE = 0.05
"""numbers of parameters that differ by less are equal"""
OWN_SETTINGS = {
    "lr", "seed", "router_seed", "budget_tokens", "budget_flops", "compile", "micro_batch_tokens",
    "recompute", "log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints",
}  # fmt: skip
"""what each row may have its own of: rate and budget, and what changes rounding at most"""
BUDGET_WORDS = {
    "same_flops": "the same training FLOPs",
    "same_tokens": "the same tokens",
    "same_time_s": "the same training time",
    "tokens_per_param": "the same tokens per parameter",
}


class Row(NamedTuple):
    """A model's results under one budget, by seed."""

    model: str
    label: str
    kind: str
    results: list[Result]
    at_edge: bool = False
    """its rate is the lowest or highest of its sweep, so a better one may lie beyond"""

    def mean(self, field: str) -> float:
        return fmean(result[field] for result in self.results)

    @property
    def by_seed(self) -> dict[int, list[float]]:
        """Losses by row of text of each seed."""
        return {result["seed"]: result["row_loss"] for result in self.results}

    @property
    def wanted_depth(self) -> float:
        """Mean depth that the capacities ask for."""
        return sum(self.results[0]["recipe"]["model"]["capacity"])

    @property
    def is_at_depth(self) -> bool:
        return abs(self.mean("mean_depth") / self.wanted_depth - 1) <= DEPTH_TOLERANCE


class Table(NamedTuple):
    """All rows of a budget and size."""

    budget: str
    kind: str
    size: str
    rows: list[Row]
    experiment: list[list[Row]]
    """rows of all tables of the experiment"""

    @property
    def title(self) -> str:
        size = f", size {self.size}" if self.size else ""
        return f"{self.budget}: {BUDGET_WORDS[self.kind]}{size}"

    def of_kind(self, kind: str) -> list[Row]:
        """Return the rows of a kind."""
        return [row for row in self.rows if row.kind == kind]

    def first(self, kind: str) -> Row | None:
        """Return the first row of a kind."""
        return next(iter(self.of_kind(kind)), None)

    def twin_of(self, ours: Row) -> Row | None:
        """Return the vanilla model that a row is compared with.

        The largest of those that were trained alike, or of all where none was.
        """
        found = self.of_kind("vanilla")
        alike = [row for row in found if not other_training(row, ours)]
        return max(alike or found, key=lambda row: row.mean("params_nonembedding"), default=None)

    def plain_of_size(self, ours: Row) -> Row | None:
        """Return a vanilla model of as many parameters as a row, which spends all on tokens."""
        size = ours.mean("params_nonembedding")
        found = [
            row
            for row in self.of_kind("vanilla")
            if abs(row.mean("params_nonembedding") / size - 1) <= SIZE_TOLERANCE
        ]
        return min(found, key=lambda row: len(other_training(row, ours)), default=None)

    def control(self, ours: Row, kind: str) -> Row | None:
        """Return the row of a kind that differs from another in the fewest settings."""
        found = self.of_kind(kind)
        return min(found, key=lambda row: len(other_settings(row, ours)), default=None)

    def compare(self, ours: Row | None, other: Row | None) -> Difference | None:
        """Return the difference of two rows over the seeds that both have; None without one.

        How much a seed moves a row is estimated over all rows of the experiment that have these.
        """
        if ours is None or other is None or ours.model == other.model:
            return None
        seeds = sorted(ours.by_seed.keys() & other.by_seed.keys())
        if not seeds:
            return None
        noise = None
        if len(seeds) > 1:
            noise = seed_noise(self._losses(seeds))
        a, b = ([row.by_seed[seed] for seed in seeds] for row in (ours, other))
        return difference(a, b, noise)

    def _losses(self, seeds: Sequence[int]) -> list[list[list[float]]]:
        """Return losses by table, row and seed; a training that serves two tables counts once."""
        counted, found = set(), []
        for rows in self.experiment:
            found.append([])
            for row in (row for row in rows if row.by_seed.keys() >= set(seeds)):
                training = key_of(next(one for one in row.results if one["seed"] == seeds[0]))
                if training not in counted:
                    counted.add(training)
                    found[-1].append([fmean(row.by_seed[seed]) for seed in seeds])
        return found


def other_settings(row: Row, other: Row) -> list[str]:
    """Return the settings of model and training in which two rows differ, but for rate and seed."""
    return [*_differing(row, other, "model"), *other_training(row, other)]


def other_training(row: Row, other: Row) -> list[str]:
    """Return the settings of training in which two rows differ, but for budget, rate and pace."""
    return _differing(row, other, "train")


def _differing(row: Row, other: Row, table: str) -> list[str]:
    mine, theirs = (with_defaults(one.results[0]["recipe"])[table] for one in (row, other))
    found = (name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    return sorted(name for name in found if name not in OWN_SETTINGS)


def tables(results: Sequence[Result]) -> list[Table]:
    """Group the finished trainings, in the order in which they stand."""
    swept: dict[tuple[str, str], set[float]] = {}
    for result in results:
        if result.get("budget") == SWEEP and result["outcome"] == "done":
            swept.setdefault((result["model"], result["size"]), set()).add(result["lr"])

    def at_edge(name: str, some: list[Result]) -> bool:
        lrs = swept.get((name, some[0]["size"]), set())
        return len(lrs) > 1 and some[0]["lr"] in (min(lrs), max(lrs))

    grouped: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for result in results:
        if result["outcome"] != "done" or result.get("budget") in (None, SWEEP):
            continue
        place = (result["budget"], result["budget_kind"], result["size"])
        grouped.setdefault(place, {}).setdefault(result["model"], []).append(result)
    rows = {
        place: [
            Row(
                name,
                some[0]["label"],
                some[0]["row"],
                sorted(some, key=lambda r: r["seed"]),
                at_edge(name, some),
            )
            for name, some in models.items()
        ]
        for place, models in grouped.items()
    }
    return [Table(*place, some, list(rows.values())) for place, some in rows.items()]


HEAD = (
    "model", "parameters without embedding", "tokens", "per such parameter", "FLOPs", "rate",
    "causal loss", "of repeats, of others",
    "minus vanilla", "mean depth", "top-k minus causal", "train s", "peak memory", "KV per token",
)  # fmt: skip


def cells(table: Table) -> list[list[str]]:
    """Return a table's rows as text, under HEAD."""
    out = []
    for row in table.rows:
        leak = [r["top_k_loss"] - r["val_loss"] for r in row.results if "top_k_loss" in r]
        off = "" if row.is_at_depth else f" (asked {row.wanted_depth:.2f})"
        seeds = len(row.results)
        out.append(
            [
                f"{row.label} ({seeds} seed{'s' if seeds > 1 else ''})",
                human_count(row.mean("params_nonembedding")),
                human_count(row.mean("tokens")),
                f"{row.mean('tokens_per_param'):.1f}",
                human_count(row.mean("train_flops")),
                f"{row.mean('lr'):g}{' (edge)' if row.at_edge else ''}",
                spread([r["val_loss"] for r in row.results]),
                _repeats(row),
                told(table.compare(row, table.twin_of(row))),
                f"{row.mean('mean_depth'):.2f}{off}",
                f"{fmean(leak):+.4f}" if leak else "",
                f"{row.mean('train_seconds'):.0f}",
                human_bytes(row.mean("peak_bytes")),
                human_bytes(row.mean("kv_bytes_per_token")),
            ]
        )
    return out


def _repeats(row: Row) -> str:
    """Loss of what stood in the row before, and of the rest; nothing where a result lacks it."""
    found = [r.get("repeats") for r in row.results]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return ""
    return ", ".join(f"{fmean(one[name] for one in known):.3f}" for name in ("loss", "others"))


def told(gap: Difference | None) -> str:
    """Return a difference with its interval."""
    return "" if gap is None else f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def failures(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Return members that failed and why."""
    return [(one["member"], one["error"]) for one in results if one.get("outcome") == "failed"]
