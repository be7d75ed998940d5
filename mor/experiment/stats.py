"""How far apart two models are, and how sure that is: over texts and over seeds.

Losses stand by row of validation text, the same rows for all, so differences are paired. Rows next
to each other come from one book, so whole blocks of them are drawn again. What a seed does to a
model is estimated over all rows of a table: two seeds of one pair would say next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
COVERED = 0.95
BLOCK = 16
"""rows of text that are drawn together"""
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""97.5 % of Student's t with 1, 2, .. 20 degrees of freedom; the last serves for more"""


class SeedNoise(NamedTuple):
    """What chance does to a trained model's loss, apart from what all models of a seed share."""

    deviation: float
    freedom: int
    """degrees of freedom that it was estimated with"""


class Difference(NamedTuple):
    """Mean of `ours - other` in nats per token."""

    mean: float
    low: float
    high: float
    """95 % over texts, and over seeds where there are two or more"""
    by_seed: tuple[float, ...]

    @property
    def side(self) -> int:
        """-1 or 1 when the whole interval is on that side, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    @property
    def sign(self) -> int:
        """The side where seeds are counted in; one seed alone tells nothing of them, so 0."""
        return self.side if len(self.by_seed) > 1 else 0


def seed_noise(tables: Sequence[Sequence[Sequence[float]]]) -> SeedNoise:
    """Estimate the noise of seeds from tables of losses by model and seed.

    What is left of them when each model's mean and each seed's is taken off.
    Raises ValueError unless some table has two models and two seeds
    """
    squares, freedom = 0.0, 0
    for losses in tables:
        if not losses:
            continue
        loss_MS = np.asarray(losses, dtype=float)
        left_MS = loss_MS - loss_MS.mean(1, keepdims=True) - loss_MS.mean(0) + loss_MS.mean()
        squares += float((left_MS**2).sum())
        freedom += (loss_MS.shape[0] - 1) * (loss_MS.shape[1] - 1)
    if not freedom:
        raise ValueError("one model or one seed says nothing of the noise of seeds")
    return SeedNoise(math.sqrt(squares / freedom), freedom)


def difference(
    ours: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    noise: SeedNoise | None = None,
) -> Difference:
    """Compare losses by seed and row.

    noise  of seeds, from more models than these two; with two seeds or more these two say it else
    Raises ValueError when seeds or rows are not the same
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(other, dtype=float)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"losses of {a.shape} and {b.shape} cannot be paired; evaluate alike")
    gap = a - b
    seeds, rows = len(gap), gap.mean(axis=0)
    mean = float(rows.mean())
    low, high = _over_texts(rows)
    chance = 0.0
    if seeds > 1:
        noise = noise or seed_noise([[a.mean(axis=1), b.mean(axis=1)]])
        student = STUDENT[min(noise.freedom, len(STUDENT)) - 1]
        chance = student * noise.deviation * math.sqrt(2 / seeds)
    return Difference(
        mean,
        mean - math.hypot(mean - low, chance),
        mean + math.hypot(high - mean, chance),
        tuple(float(x) for x in gap.mean(axis=1)),
    )


def _over_texts(rows: np.ndarray) -> tuple[float, float]:
    """Return 95 % of the mean of blocks of rows drawn again; the last row's next is the first."""
    block = max(1, min(BLOCK, len(rows) // 8))
    around = np.concatenate([rows, rows[: block - 1]])
    means = np.convolve(around, np.full(block, 1 / block), mode="valid")
    draws = np.random.default_rng(0).integers(len(rows), size=(DRAWS, round(len(rows) / block)))
    edge = (1 - COVERED) / 2
    low, high = np.quantile(means[draws].mean(axis=1), [edge, 1 - edge])
    return float(low), float(high)


def spread(values: Sequence[float]) -> str:
    """Return the mean and, with more than one value, how far the farthest is from it."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ±{max(abs(value - mean) for value in values):.4f}"
