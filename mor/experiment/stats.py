"""How far apart two models are, and how sure that is: over texts and over seeds.

Losses stand by row of validation text, the same rows for all, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
COVERED = 0.95


class Difference(NamedTuple):
    """Mean of `ours - other` in nats per token."""

    mean: float
    low: float
    high: float
    """95 % over texts: rows drawn again with replacement, seeds averaged"""
    by_seed: tuple[float, ...]

    @property
    def sign(self) -> int:
        """-1 or 1 when texts and every seed agree, 0 for a tie."""
        for sign in (-1, 1):
            sides = (self.low, self.high, *self.by_seed)
            if all(sign * side > 0 for side in sides):
                return sign
        return 0


def difference(ours: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Difference:
    """Compare losses by seed and row.

    Raises ValueError when seeds or rows are not the same
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(other, dtype=float)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"losses of {a.shape} and {b.shape} cannot be paired; evaluate alike")
    gap = a - b
    rows = gap.mean(axis=0)
    draws = np.random.default_rng(0).integers(len(rows), size=(DRAWS, len(rows)))
    means = rows[draws].mean(axis=1)
    edge = (1 - COVERED) / 2
    low, high = np.quantile(means, [edge, 1 - edge])
    return Difference(
        float(rows.mean()), float(low), float(high), tuple(float(x) for x in gap.mean(axis=1))
    )


def spread(values: Sequence[float]) -> str:
    """Return the mean and, with more than one value, how far the farthest is from it."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ±{max(abs(value - mean) for value in values):.4f}"
