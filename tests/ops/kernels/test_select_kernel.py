"""Lists of rows made on the device are those that the host would make, in the same order."""

import math

import pytest
import torch

from mor.ops import select as plain

pytest.importorskip("triton.language", reason="triton is not installed")
from mor.ops.triton.reference import (
    gather_rows_reference,
    go_on_reference,
    scatter_rows_reference,
)
from mor.ops.triton.select import gather_rows, go_on, hash_uniform, scatter_rows


@pytest.mark.parametrize("num_rows", [0, 1, 7, 64, 2600])
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.float64])
def test_rows_that_go_on_and_that_leave_keep_their_order(num_rows, score_dtype, device):
    score_N = torch.rand(num_rows, dtype=score_dtype, device=device).round(decimals=1)
    threshold_N = torch.rand(num_rows, dtype=score_dtype, device=device).round(decimals=1)
    is_active_N = torch.rand(num_rows, device=device) < 0.8
    made = go_on(score_N, threshold_N, is_active_N)
    for part, expected in zip(
        made, go_on_reference(score_N, threshold_N, is_active_N), strict=True
    ):
        assert part.dtype == expected.dtype and torch.equal(part, expected)


def test_all_none_ties_and_nan(device):
    half_N = torch.full((5,), 0.5, device=device)
    active_N = torch.ones(5, dtype=torch.bool, device=device)
    every = [0, 1, 2, 3, 4]
    assert go_on(half_N + 0.1, half_N, active_N).index_N.tolist() == every
    ties = go_on(half_N, half_N, active_N)
    assert ties.index_N.tolist() == [-1] * 5 and ties.leaving_N.tolist() == every
    assert ties.count_1.item() == 0 and ties.num_leaving_1.item() == 5
    nan = go_on(half_N * math.nan, half_N, active_N)
    assert nan.leaving_N.tolist() == every
    away = go_on(half_N * math.nan, half_N, ~active_N)
    assert away.index_N.tolist() == away.leaving_N.tolist() == [-1] * 5


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 5), (6, 3, 7), (6, 1030)])
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64])
def test_gather_and_scatter_skip_what_is_not_listed(shape, row_dtype, device):
    x = (100 * torch.randn(shape)).to(device, row_dtype)
    index_A = torch.tensor([4, 0, 3, -1, -1], device=device)
    for fill in (0, -1):
        gathered = gather_rows(x, index_A, fill=fill)
        assert torch.equal(gathered, gather_rows_reference(x, index_A, fill=fill))
    into, expected = (torch.full(shape, 7, dtype=row_dtype, device=device) for _ in range(2))
    scatter_rows(gathered, index_A.int(), into)
    scatter_rows_reference(gathered, index_A, expected)
    assert torch.equal(into, expected)


def test_gather_reads_parts_of_wider_rows(device):
    wide = torch.randn(4, 10, device=device)
    index_A = torch.tensor([3, 1], device=device)
    assert torch.equal(gather_rows(wide[:, 2:5], index_A), wide[:, 2:5][index_A])


def test_whole_numbers_beyond_doubles_are_gathered_exactly(device):
    slot_N = torch.tensor([2**62 + 1, -(2**62) - 1], device=device)
    index_A = torch.tensor([1, 0, -1], device=device)
    assert gather_rows(slot_N, index_A, fill=-1).tolist() == [*slot_N.flip(0).tolist(), -1]


@pytest.mark.parametrize("seed", [0, 1, 16, 123456789, 2**63 - 1, -5])
def test_random_draws_equal_those_of_training_bit_by_bit(seed, device):
    position_N = torch.cat([torch.arange(290), torch.tensor([2**31 - 1, 2**40])]).to(device)
    token_N = torch.randint(0, 2**17, position_N.shape, device=device)
    recursion_N = torch.randint(0, 4, position_N.shape, device=device)
    each_N = hash_uniform(position_N, token_N, seed=seed, recursion=recursion_N)
    for recursion in range(4):
        drawn_N = plain.hash_uniform(position_N, token_N, seed=seed, recursion=recursion)
        made_N = hash_uniform(position_N, token_N, seed=seed, recursion=recursion)
        assert made_N.dtype == drawn_N.dtype and torch.equal(made_N, drawn_N)
        here_N = recursion_N == recursion
        assert torch.equal(each_N[here_N], drawn_N[here_N])
    small_N = hash_uniform(position_N[:9].int(), token_N[:9].int(), seed=seed, recursion=1)
    assert torch.equal(
        small_N, plain.hash_uniform(position_N[:9], token_N[:9], seed=seed, recursion=1)
    )
