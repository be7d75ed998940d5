"""Split decode gives what plain attention over the same pages gives."""

import pytest
import torch
from support_paged import make_paged, paged_attention_reference

pytest.importorskip("triton.language", reason="triton is not installed")
from mor.ops.triton.decode import KEYS, paged_decode, pick_splits


@pytest.mark.parametrize(
    ("group", "K", "P", "num_splits"),
    [(1, 64, 16, 1), (3, 64, 16, 3), (5, 32, 7, 4), (3, 32, 1, 2), (1, 24, 37, 5), (17, 32, 16, 2)],
)
def test_decode_is_plain_attention_at_any_page_group_and_split(
    group, K, P, num_splits, dtype, close, device
):
    G = 1 if K == 64 else 2
    lengths = [1, 3 * KEYS + 5, 2 * KEYS, 31]
    paged = make_paged(lengths, G=G, K=K, P=P, dtype=dtype, device=device)
    # a row without keys, full tables, a row that sees a part of its table, a table read twice
    table_N = torch.tensor([0, 0, 1, 2, 3, 1, 2], dtype=torch.int32, device=device)
    counts = [0, 1, lengths[1], lengths[2], 31, KEYS + 1, KEYS]
    count_N = torch.tensor(counts, dtype=torch.int32, device=device)
    q_NHK = torch.randn(7, G * group, K).to(device, dtype)
    out_NHK = paged_decode(q_NHK, *paged, table_N, count_N, num_splits=num_splits)
    expected_NHK = paged_attention_reference(q_NHK, *paged, table_N, count_N)
    torch.testing.assert_close(out_NHK, expected_NHK, **close)
    assert not out_NHK[0].any()


def test_padded_rows_read_no_table_and_change_nothing(device):
    paged = make_paged([40], G=1, K=32, P=16, dtype=torch.float32, device=device)
    q_NHK = torch.randn(3, 3, 32, device=device)
    q_NHK[1:] = float("nan")
    table_N = torch.tensor([0, 2**30, -5], dtype=torch.int32, device=device)
    count_N = torch.tensor([40, 0, 0], dtype=torch.int32, device=device)
    for num_splits in (1, 3):
        alone_NHK = paged_decode(q_NHK[:1], *paged, table_N[:1], count_N[:1], num_splits=num_splits)
        out_NHK = paged_decode(q_NHK, *paged, table_N, count_N, num_splits=num_splits)
        assert torch.equal(out_NHK[:1], alone_NHK) and not out_NHK[1:].any()


def test_scores_far_from_zero_stay_exact(device):
    paged = make_paged([100], G=1, K=32, P=16, dtype=torch.float32, device=device)
    q_NHK = 300 * torch.randn(2, 1, 32, device=device)
    table_N = torch.zeros(2, dtype=torch.int32, device=device)
    count_N = torch.tensor([100, 70], dtype=torch.int32, device=device)
    out_NHK = paged_decode(q_NHK, *paged, table_N, count_N, num_splits=2)
    expected_NHK = paged_attention_reference(q_NHK, *paged, table_N, count_N)
    torch.testing.assert_close(out_NHK, expected_NHK, atol=1e-3, rtol=1e-3)


def test_queries_and_output_may_be_parts_of_wider_tensors(device):
    paged = make_paged([20], G=2, K=32, P=8, dtype=torch.float32, device=device)
    wide_NX = torch.randn(2, 10 * 32, device=device)
    q_NHK = wide_NX[:, : 6 * 32].view(2, 6, 32)
    table_N = torch.zeros(2, dtype=torch.int32, device=device)
    count_N = torch.tensor([20, 9], dtype=torch.int32, device=device)
    out_NHK = torch.full((4, 6, 32), 7.0, device=device)
    for num_splits in (1, 2):
        returned = paged_decode(
            q_NHK, *paged, table_N, count_N, num_splits=num_splits, out_NHK=out_NHK[1:3]
        )
        expected_NHK = paged_attention_reference(q_NHK, *paged, table_N, count_N)
        torch.testing.assert_close(returned, expected_NHK, atol=2e-5, rtol=1e-5)
        assert returned.data_ptr() == out_NHK[1].data_ptr()
        assert (out_NHK[0] == 7).all() and (out_NHK[3] == 7).all()


def test_splits_fill_the_gpu_and_no_more():
    assert pick_splits(1, 3, max_count=8192, num_processors=132) == 32  # bound by the keys
    assert pick_splits(16, 3, max_count=8192, num_processors=132) == 6
    assert pick_splits(512, 3, max_count=8192, num_processors=132) == 1
    assert pick_splits(1, 1, max_count=10, num_processors=132) == 1
