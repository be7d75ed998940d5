"""Tiled prefill gives what plain attention over the same pages gives, row by row."""

import pytest
import torch
from support_paged import Paged, make_paged, paged_attention_reference

pytest.importorskip("triton.language", reason="triton is not installed")
from mor.ops.triton.prefill import KEYS, paged_prefill, plan_tiles, rows_per_tile


def check(
    paged: Paged, tables: list[int], counts: list[int], *, group: int, close, dtype, device: str
) -> None:
    G, K = paged.kv.shape[2], paged.kv.shape[4]
    table_N = torch.tensor(tables, dtype=torch.int32, device=device)
    count_N = torch.tensor(counts, dtype=torch.int32, device=device)
    q_NHK = torch.randn(len(tables), G * group, K).to(device, dtype)
    tiles = plan_tiles(tables, group=group, num_tiles=9).to(torch.device(device))
    out_NHK = paged_prefill(q_NHK, *paged, count_N, tiles)
    expected_NHK = paged_attention_reference(q_NHK, *paged, table_N, count_N)
    torch.testing.assert_close(out_NHK, expected_NHK, **close)


@pytest.mark.parametrize(("group", "K", "P"), [(1, 64, 16), (3, 64, 5), (5, 32, 1), (3, 24, 100)])
def test_chunks_are_plain_attention(group, K, P, dtype, close, device):
    long = KEYS + 3
    paged = make_paged([long, 30, 1], G=1, K=K, P=P, dtype=dtype, device=device)
    # the end of a long prompt over more than one tile, a whole short prompt, a decoded token
    late = rows_per_tile(group) + 2
    tables = [0] * late + [1] * 30 + [2]
    counts = [*range(long - late + 1, long + 1), *range(1, 31), 1]
    check(paged, tables, counts, group=group, close=close, dtype=dtype, device=device)


def test_counts_may_jump_fall_and_be_none(dtype, close, device):
    paged = make_paged([200, 9], G=2, K=32, P=16, dtype=dtype, device=device)
    tables = [0] * 8 + [1, 0, 1]
    counts = [0, 200, 3, 0, 64, 65, 199, 1, 0, 128, 9]
    check(paged, tables, counts, group=3, close=close, dtype=dtype, device=device)


def test_tiles_cover_every_row_once_and_share_one_table():
    tables = [4] * 50 + [7] + [4] * 3
    tiles = plan_tiles(tables, group=3, num_tiles=8)
    seen = []
    for start, rows, table in zip(*(part_W.tolist() for part_W in tiles), strict=True):
        assert rows <= 21 and tables[start : start + rows] == [table] * rows
        seen += range(start, start + rows)
    assert seen == list(range(54)) and len(tiles.rows_W) == 8
    assert plan_tiles([], group=1).start_W.shape == (0,)


def test_rows_of_no_tile_are_left_alone(device):
    paged = make_paged([5], G=1, K=32, P=4, dtype=torch.float32, device=device)
    out_NHK = torch.full((4, 1, 32), 7.0, device=device)
    count_N = torch.tensor([1, 2, 3, 4], dtype=torch.int32, device=device)
    tiles = plan_tiles([0, 0], group=1, num_tiles=3).to(torch.device(device))
    paged_prefill(torch.randn(4, 1, 32, device=device), *paged, count_N, tiles, out_NHK=out_NHK)
    assert (out_NHK[:2] != 7).all() and (out_NHK[2:] == 7).all()
