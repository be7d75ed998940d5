"""Paged stores and attention that ask the device nothing give what their plain twins give."""

from __future__ import annotations

import math

import pytest
import torch
from support_paged import make_paged

from mor.ops.paged import (
    paged_attention_reference,
    paged_decode_unasked,
    store_reference,
    store_unasked,
)


@pytest.mark.parametrize(("group", "K", "P"), [(1, 8, 16), (3, 4, 5), (2, 8, 1)])
def test_decode_without_a_question_reads_no_place_that_nobody_wrote(
    group: int, K: int, P: int
) -> None:
    lengths = [1, 23, 16, 7]
    paged = make_paged(lengths, G=2, K=K, P=P, dtype=torch.float64, device="cpu")
    tables_TM = paged.tables_TM.clamp(max=len(paged.kv) - 1)  # the twin may look up any entry
    table_N = torch.tensor([0, 1, 2, 3, 1, 0], dtype=torch.int32)
    count_N = torch.tensor([1, 23, 16, 7, 9, 0], dtype=torch.int32)
    q_NHK = torch.randn(6, 2 * group, K, dtype=torch.float64)
    out_NHK = paged_decode_unasked(q_NHK, paged.kv, tables_TM, table_N, count_N)
    expected_NHK = paged_attention_reference(q_NHK, paged.kv, tables_TM, table_N, count_N)
    torch.testing.assert_close(out_NHK, expected_NHK, rtol=1e-12, atol=1e-12)
    assert not out_NHK[5].any()


@pytest.mark.parametrize("slots", [[7, -1, 0, 3, -1], [-1, -1, 11, -1, -1], [-1] * 5])
def test_a_store_without_a_question_writes_the_same_places(slots: list[int]) -> None:
    k_NGK, v_NGK = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    slot_N = torch.tensor(slots)
    pages = [torch.full((3, 2, 2, 4, 4), math.nan, dtype=torch.float64) for _ in range(2)]
    for kv, store in zip(pages, (store_unasked, store_reference), strict=True):
        store(k_NGK, v_NGK, kv, slot_N)
    torch.testing.assert_close(pages[0], pages[1], rtol=0, atol=0, equal_nan=True)
