"""Paged keys for tests: pages full of NaN but for what was stored, and the plain twins.

Shapes: N rows, H query heads, G key heads, K head size, T tables, M pages of a table, P tokens of a
page. kv is one layer's pages, (pages, 2, G, P, K).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Paged(NamedTuple):
    kv: Tensor
    tables_TM: Tensor


def store_reference(k_NGK: Tensor, v_NGK: Tensor, kv: Tensor, slot_N: Tensor) -> None:
    """Write every row's keys and values to its slot, -1 for none."""
    P = kv.shape[3]
    for row, slot in enumerate(slot_N.tolist()):
        if slot >= 0:
            kv[slot // P, 0, :, slot % P] = k_NGK[row]
            kv[slot // P, 1, :, slot % P] = v_NGK[row]


def paged_attention_reference(
    q_NHK: Tensor, kv: Tensor, tables_TM: Tensor, table_N: Tensor, count_N: Tensor
) -> Tensor:
    """Attend row by row in fp32, over the first count tokens of each row's table."""
    out_NHK = torch.zeros_like(q_NHK)
    group, P = q_NHK.shape[1] // kv.shape[2], kv.shape[3]
    for row, (table, count) in enumerate(zip(table_N.tolist(), count_N.tolist(), strict=True)):
        if not count:
            continue
        pages = tables_TM[table, : -(-count // P)].long()
        k_GSK, v_GSK = (
            kv[pages, side].transpose(0, 1).flatten(1, 2)[:, :count].float() for side in (0, 1)
        )
        q_GgK = q_NHK[row].float().unflatten(0, (-1, group))
        score_GgS = q_GgK @ k_GSK.transpose(1, 2) / math.sqrt(q_NHK.shape[2])
        out_NHK[row] = (score_GgS.softmax(-1) @ v_GSK).flatten(0, 1).to(q_NHK.dtype)
    return out_NHK


def make_paged(
    lengths: list[int], *, G: int, K: int, P: int, dtype: torch.dtype, device: str, layers: int = 2
) -> Paged:
    """Fill one layer of a pool with tables of these lengths, their pages shuffled.

    Places that hold no token are NaN, and so are the other layers; table entries behind the last
    page name no page at all.
    """
    num_pages = [-(-length // P) for length in lengths]
    order = (torch.randperm(sum(num_pages) + 1) if num_pages else torch.zeros(1)).int()
    pool = torch.full((len(order), layers, 2, G, P, K), math.nan)
    tables_TM = torch.full((len(lengths), max(num_pages, default=0) + 1), 2**30, dtype=torch.int32)
    start = 0
    for table, (length, pages) in enumerate(zip(lengths, num_pages, strict=True)):
        tables_TM[table, :pages] = order[start : start + pages]
        start += pages
        for token in range(length):
            page = int(tables_TM[table, token // P])
            pool[page, layers - 1, :, :, token % P] = torch.randn(2, G, K)
    return Paged(pool.to(device, dtype)[:, layers - 1], tables_TM.to(device))
