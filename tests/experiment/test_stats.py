"""Promises of comparisons: paired over texts and seeds, a tie unless both leave no doubt."""

from __future__ import annotations

import numpy as np
import pytest

from mor.experiment.evaluate import class_of
from mor.experiment.isoflop import _lowest
from mor.experiment.stats import difference, seed_noise, spread


def losses(shift: float, noise: float, seed: int) -> list[float]:
    texts = np.random.default_rng(0).normal(3.0, 1.0, 200)
    return list(texts + shift + np.random.default_rng(seed).normal(0, noise, 200))


def test_a_small_gap_shows_where_texts_are_the_same():
    gap = difference([losses(-0.05, 0.02, 1)], [losses(0.0, 0.02, 2)])
    assert gap.side == -1 and gap.low < gap.mean < gap.high < 0
    assert gap.mean == pytest.approx(-0.05, abs=0.01)
    assert difference([losses(0.05, 0.02, 1)], [losses(0.0, 0.02, 2)]).side == 1


def test_one_seed_gives_no_sign():
    assert difference([losses(-0.5, 0.02, 1)], [losses(0.0, 0.02, 2)]).sign == 0


def test_two_seeds_of_one_pair_say_little_and_more_models_say_more():
    ours = [losses(-0.2, 0.01, 1), losses(-0.1, 0.01, 2)]
    other = [losses(0.0, 0.01, 3), losses(0.0, 0.01, 4)]
    assert difference(ours, other).sign == 0
    noise = seed_noise([[[3.0 + m + 0.02 * s for s in (0, 1)] for m in range(9)]])
    assert noise.freedom == 8 and noise.deviation == pytest.approx(0, abs=1e-12)
    gap = difference(ours, other, noise)
    assert gap.sign == -1 and gap.mean == pytest.approx(-0.15, abs=0.01)


def test_the_noise_of_seeds_is_found_whatever_models_and_seeds_share():
    draw = np.random.default_rng(0)
    tables = [
        (draw.normal(3, 1, (9, 1)) + draw.normal(0, 1, 2) + draw.normal(0, 0.02, (9, 2))).tolist()
        for _ in range(200)
    ]
    noise = seed_noise(tables)
    assert noise.freedom == 1600 and noise.deviation == pytest.approx(0.02, rel=0.06)
    with pytest.raises(ValueError, match="says nothing of the noise"):
        seed_noise([[[1.0], [2.0]]])


def test_texts_next_to_each_other_count_as_one():
    """Blocks of 8 rows that are the same tell no more than their number says."""
    once = np.random.default_rng(5).normal(0.1, 1.0, 64)
    wide = difference([list(np.repeat(once, 8))], [[0.0] * 512])
    plain = difference([list(np.random.default_rng(5).normal(0.1, 1.0, 512))], [[0.0] * 512])
    assert wide.high - wide.low > 2 * (plain.high - plain.low)


def test_noise_is_a_tie():
    assert difference([losses(0.001, 0.3, 1)], [losses(0.0, 0.3, 2)]).sign == 0


def test_seeds_that_disagree_are_a_tie():
    gap = difference(
        [losses(-0.2, 0.01, 1), losses(0.05, 0.01, 2)], [losses(0, 0.01, 3), losses(0, 0.01, 4)]
    )
    assert gap.sign == 0
    assert [round(one, 2) for one in gap.by_seed] == [-0.2, 0.05]


def test_the_interval_covers_what_it_says():
    """95 % of intervals over 200 texts hold the true mean; 3 standard errors are let pass."""
    hits = 0
    for draw in range(300):
        rows = np.random.default_rng(draw).normal(0.1, 1.0, 200)
        gap = difference([list(rows)], [[0.0] * 200])
        hits += gap.low <= 0.1 <= gap.high
    assert abs(hits / 300 - 0.95) < 3 * (0.95 * 0.05 / 300) ** 0.5 + 0.01


def test_losses_of_other_texts_are_not_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        difference([[1.0, 2.0]], [[1.0]])


def test_spread_names_the_farthest_seed():
    assert spread([2.0]) == "2.0000"
    assert spread([2.0, 2.2]) == "2.1000 ±0.1000"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "function word"),
        ("The", "function word"),
        ("the", "rest of a word"),
        (" cell", "other word"),
        ("ing", "rest of a word"),
        (" 12", "number"),
        (", ", "punctuation"),
        ("\n\n", "space"),
    ],
)
def test_tokens_have_a_class(text: str, kind: str):
    assert class_of(text) == kind


def test_the_best_size_is_found_or_said_to_be_outside():
    sizes = [1e6, 2e6, 4e6]
    at, loss = _lowest(sizes, [2.0 + (np.log(size / 2.5e6)) ** 2 for size in sizes])
    assert at == pytest.approx(2.5e6, rel=1e-6) and loss == pytest.approx(2.0)
    at, loss = _lowest(sizes, [3.0, 2.0, 1.5])
    assert loss == 1.5 or at > 4e6
    assert np.isnan(_lowest(sizes, [1.0, 2.0, 1.0])[0])
