"""The coda's period follows the measured times."""

import pytest

from mor.engine.coda import Costs, best_period, tokens_per_s

ROWS = [1, 2, 4, 8, 16, 32]
SHARES = [1.0, 2 / 3, 1 / 3]


def test_with_time_in_proportion_to_rows_waiting_gains_nothing() -> None:
    costs = Costs(ROWS, [0.01 * n for n in ROWS], [0.02 * n for n in ROWS])
    speeds = [tokens_per_s(costs, SHARES, 32, period) for period in (1, 2, 3)]
    assert speeds == pytest.approx([1 / (0.01 * 2 + 0.02)] * 3, rel=0.03)


def test_ends_that_cost_the_same_for_any_rows_are_called_seldom() -> None:
    costs = Costs(ROWS, [0.01 * n for n in ROWS], [1.0] * len(ROWS))
    assert best_period(costs, SHARES, 32) == 3


def test_a_block_that_costs_the_same_for_any_rows_is_kept_full() -> None:
    costs = Costs(ROWS, [1.0] * len(ROWS), [0.01 * n for n in ROWS])
    assert best_period(costs, SHARES, 32) == 1
