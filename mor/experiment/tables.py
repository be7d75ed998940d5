"""Results as tables: one for each budget and size, models as rows, seeds averaged."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from mor.experiment.members import SWEEP
from mor.experiment.results import Result
from mor.experiment.stats import Difference, difference, spread
from mor.log import human_bytes, human_count
from mor.train.config import with_defaults

DEPTH_TOLERANCE = 0.02
"""mean depths that differ by less are equal"""
SIZE_TOLERANCE = 0.05
"""numbers of parameters that differ by less are equal"""
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

    def mean(self, field: str) -> float:
        return fmean(result[field] for result in self.results)

    @property
    def wanted_depth(self) -> float:
        """Mean depth that the capacities ask for."""
        return sum(self.results[0]["recipe"]["model"]["capacity"])

    @property
    def shallow_share(self) -> float:
        """Share of the steps that had one recursion alone."""
        return self.results[0]["recipe"].get("train", {}).get("shallow_share", 0.0)

    @property
    def is_at_depth(self) -> bool:
        return abs(self.mean("mean_depth") / self.wanted_depth - 1) <= DEPTH_TOLERANCE


class Table(NamedTuple):
    """All rows of a budget and size."""

    budget: str
    kind: str
    size: str
    rows: list[Row]

    @property
    def title(self) -> str:
        size = f", size {self.size}" if self.size else ""
        return f"{self.budget}: {BUDGET_WORDS[self.kind]}{size}"

    def first(self, kind: str) -> Row | None:
        """Return the first row of a kind."""
        return next((row for row in self.rows if row.kind == kind), None)

    @property
    def twin(self) -> Row | None:
        """The vanilla model that the others are compared with: the largest, where there are two."""
        found = [row for row in self.rows if row.kind == "vanilla"]
        return max(found, key=lambda row: row.mean("params_nonembedding"), default=None)

    def plain_of_size(self, ours: Row) -> Row | None:
        """Return a vanilla model of as many parameters as a row, which spends all on tokens."""
        size = ours.mean("params_nonembedding")
        for row in self.rows:
            share = row.mean("params_nonembedding") / size
            if row.kind == "vanilla" and abs(share - 1) <= SIZE_TOLERANCE:
                return row
        return None

    def control(self, ours: Row, kind: str) -> Row | None:
        """Return the row of a kind that differs from another in the fewest settings."""
        found = [row for row in self.rows if row.kind == kind]
        return min(found, key=lambda row: _num_other_settings(row, ours), default=None)

    def row(self, model: str) -> Row | None:
        return next((row for row in self.rows if row.model == model), None)


def _num_other_settings(row: Row, other: Row) -> int:
    """Count the settings of model and training in which two rows differ."""
    mine, theirs = (with_defaults(one.results[0]["recipe"]) for one in (row, other))
    return sum(
        mine[table].get(name) != theirs[table].get(name)
        for table in ("model", "train")
        for name in {*mine[table], *theirs[table]}
    )


def tables(results: Sequence[Result]) -> list[Table]:
    """Group the finished trainings, in the order in which they stand."""
    grouped: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for result in results:
        if result["outcome"] != "done" or result.get("budget") in (None, SWEEP):
            continue
        place = (result["budget"], result["budget_kind"], result["size"])
        grouped.setdefault(place, {}).setdefault(result["model"], []).append(result)
    return [
        Table(
            *place,
            [
                Row(name, some[0]["label"], some[0]["row"], sorted(some, key=lambda r: r["seed"]))
                for name, some in models.items()
            ],
        )
        for place, models in grouped.items()
    ]


def compare(ours: Row | None, other: Row | None) -> Difference | None:
    """Return the difference of two rows over the seeds that both have; None without one."""
    if ours is None or other is None or ours.model == other.model:
        return None
    theirs = {result["seed"]: result["row_loss"] for result in other.results}
    pairs = [(r["row_loss"], theirs[r["seed"]]) for r in ours.results if r["seed"] in theirs]
    if not pairs:
        return None
    return difference([a for a, _ in pairs], [b for _, b in pairs])


HEAD = (
    "model", "parameters", "tokens", "per parameter", "FLOPs", "rate", "causal loss",
    "minus vanilla", "mean depth", "top-k minus causal", "train s", "peak memory", "KV per token",
)  # fmt: skip


def cells(table: Table) -> list[list[str]]:
    """Return a table's rows as text, under HEAD."""
    vanilla = table.twin
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
                f"{row.mean('lr'):g}",
                spread([r["val_loss"] for r in row.results]),
                told(compare(row, vanilla)),
                f"{row.mean('mean_depth'):.2f}{off}",
                f"{fmean(leak):+.4f}" if leak else "",
                f"{row.mean('train_seconds'):.0f}",
                human_bytes(row.mean("peak_bytes")),
                human_bytes(row.mean("kv_bytes_per_token")),
            ]
        )
    return out


def told(gap: Difference | None) -> str:
    """Return a difference with its interval over texts."""
    return "" if gap is None else f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def failures(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Return members that failed and why."""
    return [(one["member"], one["error"]) for one in results if one.get("outcome") == "failed"]
