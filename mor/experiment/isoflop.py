"""Sizes x budgets: for each budget the size that is best, by a parabola through log parameters.

Source: the second approach of arXiv 2203.15556, as the paper's own scaling figure uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mor.experiment.tables import Table
from mor.log import human_count
from mor.report import Section, curves_svg, table_html

LEAST_SIZES = 3


class Fit(NamedTuple):
    """The best size of one model under one budget."""

    budget: str
    model: str
    label: str
    flops: float
    params: tuple[float, ...]
    losses: tuple[float, ...]
    best_params: float
    """nan when the parabola has no lowest point within a factor 4 of the sizes"""
    best_loss: float


def fits(tables: Sequence[Table]) -> list[Fit]:
    """Fit every model of budgets in FLOPs that has three sizes or more."""
    points: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    labels = {}
    for table in tables:
        if table.kind != "same_flops":
            continue
        for row in table.rows:
            labels[row.model] = row.label
            points.setdefault((table.budget, row.model), []).append(
                (row.mean("params_nonembedding"), row.mean("val_loss"), row.mean("train_flops"))
            )
    out = []
    for (budget, model), some in points.items():
        if len({params for params, _, _ in some}) < LEAST_SIZES:
            continue
        some.sort()
        params, losses = [p for p, _, _ in some], [loss for _, loss, _ in some]
        best = _lowest(params, losses)
        flops = some[0][2]
        out.append(Fit(budget, model, labels[model], flops, tuple(params), tuple(losses), *best))
    return out


def _lowest(params: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    a, b, c = np.polyfit(np.log(params), losses, 2)
    if a <= 0:
        return math.nan, min(losses)
    at = -b / (2 * a)
    if not math.log(min(params) / 4) <= at <= math.log(max(params) * 4):
        return math.nan, min(losses)
    return float(math.exp(at)), float(c - b * b / (4 * a))


def sections(tables: Sequence[Table]) -> list[Section]:
    """Return the plot and the table; nothing without three sizes."""
    found = fits(tables)
    if not found:
        return []
    series = {f"{fit.label}, {fit.budget}": (fit.params, fit.losses) for fit in found}
    rows = [
        [
            f"{fit.label}, {fit.budget}",
            human_count(fit.flops),
            "at the edge" if math.isnan(fit.best_params) else human_count(fit.best_params),
            f"{fit.best_loss:.4f}",
        ]
        for fit in found
    ]
    plot = curves_svg(series, x_label="non-embedding parameters", y_label="causal loss", log_x=True)
    heads = ["model and budget", "FLOPs", "best parameters", "loss there"]
    return [Section("Same FLOPs over sizes", plot + table_html(heads, rows))]
