"""Keys and values in pages: storing rows and attending to them, as plain torch.

A page holds some tokens of every layer of a group. A layer's view of the pool is `kv_P2GSK`: page,
key or value, key head, place in the page, head size. A slot is page x page_tokens + place.
Shapes: N rows, H query heads, G key heads, K head size, P pages, S places of a page, T tables,
M pages of the longest table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.ops.attention import attention


def store_reference(k_NGK: Tensor, v_NGK: Tensor, kv_P2GSK: Tensor, slot_N: Tensor) -> None:
    """Write every row's key and value into its slot; a row of slot -1 leaves nothing."""
    kept = (slot_N >= 0).nonzero()[:, 0]
    page, place = slot_N[kept] // kv_P2GSK.shape[3], slot_N[kept] % kv_P2GSK.shape[3]
    kv_P2GSK[page, 0, :, place] = k_NGK[kept].to(kv_P2GSK.dtype)
    kv_P2GSK[page, 1, :, place] = v_NGK[kept].to(kv_P2GSK.dtype)


def paged_attention_reference(
    q_NHK: Tensor, kv_P2GSK: Tensor, tables_TM: Tensor, table_N: Tensor, count_N: Tensor
) -> Tensor:
    """Attend from every row to the first count tokens of its table.

    tables_TM  int32, pages of each table; token i is in page i // S at place i % S
    table_N    int32, the table of each row
    count_N    int32, keys that a row sees, its own included; 0 gives zeros (a row that is no row)
    Returns    (N, H, K) in the type of q
    Cost       reads each key once for a stretch of rows with the same table
    """
    out_NHK, device = torch.zeros_like(q_NHK), q_NHK.device
    tables, lengths = torch.unique_consecutive(table_N, return_counts=True)
    single, begin = [], 0
    for table, length in zip(tables.tolist(), lengths.tolist(), strict=True):
        rows = slice(begin, begin + length)
        begin += length
        if length == 1:
            single.append(rows.start)
            continue
        counts = count_N[rows]
        k_SGK, v_SGK = _gather(
            kv_P2GSK, tables_TM[table], torch.arange(int(counts.max()), device=device)
        )
        visible_1QS = torch.arange(len(k_SGK), device=device) < counts[None, :, None]
        visible_1QS[0, counts == 0] = True  # any key will do; the row is zeroed
        if len(k_SGK):
            out = attention(q_NHK[rows][None], k_SGK[None], v_SGK[None], visible_BQS=visible_1QS)
            out_NHK[rows] = out[0].masked_fill((counts == 0)[:, None, None], 0)
    if single:
        index = torch.tensor(single, device=q_NHK.device)
        index = index[count_N[index] > 0]
        counts = count_N[index].long()
        if len(index):
            # Places behind a row's last key repeat it: what nobody wrote is never read.
            place_NS = torch.arange(int(counts.max()), device=device).minimum(counts[:, None] - 1)
            k_NSGK, v_NSGK = _gather(kv_P2GSK, tables_TM[table_N[index].long()], place_NS)
            visible_N1S = (torch.arange(k_NSGK.shape[1], device=device) < counts[:, None])[:, None]
            out = attention(q_NHK[index][:, None], k_NSGK, v_NSGK, visible_BQS=visible_N1S)
            out_NHK[index] = out[:, 0]
    return out_NHK


def store_unasked(k_NGK: Tensor, v_NGK: Tensor, kv_P2GSK: Tensor, slot_N: Tensor) -> None:
    """Do what `store_reference` does without asking the device which rows have a slot.

    A row of slot -1 repeats the write of the first row that has one, or what is in slot 0.
    """
    is_kept_N = slot_N >= 0
    row_N = torch.arange(len(slot_N), device=slot_N.device)
    source_N = torch.where(is_kept_N, row_N, is_kept_N.int().argmax(0, keepdim=True))
    is_kept_N11, slot_N = is_kept_N[source_N, None, None], slot_N[source_N].clamp(min=0)
    page_N, place_N = slot_N // kv_P2GSK.shape[3], slot_N % kv_P2GSK.shape[3]
    for side, made_NGK in enumerate((k_NGK, v_NGK)):
        kept_NGK = kv_P2GSK[page_N, side, :, place_N]
        new_NGK = torch.where(is_kept_N11, made_NGK[source_N].to(kv_P2GSK.dtype), kept_NGK)
        kv_P2GSK[page_N, side, :, place_N] = new_NGK


def paged_decode_unasked(
    q_NHK: Tensor, kv_P2GSK: Tensor, tables_TM: Tensor, table_N: Tensor, count_N: Tensor
) -> Tensor:
    """Do what `paged_attention_reference` does without asking the device how many keys there are.

    table_N  in range for every row, whatever its count
    Cost     every row reads as many keys as the longest table has places
    """
    place_S = torch.arange(tables_TM.shape[1] * kv_P2GSK.shape[3], device=q_NHK.device)
    count_N1 = count_N.long()[:, None]
    # Places behind a row's last key repeat it: what nobody wrote is never read.
    place_NS = place_S.minimum((count_N1 - 1).clamp(min=0))
    k_NSGK, v_NSGK = _gather(kv_P2GSK, tables_TM[table_N.long()], place_NS)
    visible_N1S = (place_S < count_N1.clamp(min=1))[:, None]
    out_N1HK = attention(q_NHK[:, None], k_NSGK, v_NSGK, visible_BQS=visible_N1S)
    return out_N1HK[:, 0].masked_fill((count_N1 == 0)[..., None], 0)


def _gather(kv_P2GSK: Tensor, table: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values at places (.., S) of tables (.., M), each (.., S, G, K)."""
    size = kv_P2GSK.shape[3]
    page = table.long().gather(-1, place // size)
    return kv_P2GSK[page, 0, :, place % size], kv_P2GSK[page, 1, :, place % size]
