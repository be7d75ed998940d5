"""Who attends to whom within one forward pass without a cache: the views of training and scoring.

Documents are laid out by themselves, those of similar length together, so that no product is spent
on a pair of different documents; the padding of a group is at most the longest's half.
Shapes: N rows, A active rows, D documents of a group, M rows and Q queries of its longest, S keys,
G key heads, H query heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mor.config import ModelConfig
from mor.model.layers import Attend
from mor.model.rows import Rows
from mor.ops.attention import attention

QUERY_TILE = 64


class View(Protocol):
    """Gives every layer of a group its attention."""

    def layer(self, index: int) -> Attend: ...


class Keys(Protocol):
    """Where a forward pass keeps keys and values; a view of them for each group of layers."""

    @property
    def own(self) -> View:
        """What prelude and coda see."""
        ...

    def recursion(self, recursion: int, rows: Rows, origin_A: Tensor) -> View:
        """Return what the active rows of a recursion see; origin_A is their place among all."""
        ...


class LocalKeys:
    """Keys of the rows at hand: nothing came before them, nothing is kept."""

    def __init__(self, config: ModelConfig, rows: Rows) -> None:
        self.strategy = config.kv_strategy
        self.own = self.last = LocalView(rows)
        self.first: FirstView | None = None

    def recursion(self, recursion: int, rows: Rows, origin_A: Tensor) -> View:
        if self.strategy == "per_recursion":
            if len(rows) < len(self.last.rows):
                self.last = LocalView(rows)
            return self.last
        if self.first is None:
            self.first = FirstView(self.own)
            return self.first
        return LaterView(self.first, rows, origin_A, takes_keys=self.strategy == "hybrid")


class LocalView:
    """Rows attend among themselves, causally, within their sequence and document."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.groups: list[tuple[Tensor, Tensor]] = []  # row of each place (D, M), places in use
        if rows.is_dense and rows.segment_N is None:
            return
        starts, lengths = _runs(rows)
        for members in _by_size(lengths.tolist()):
            first_D, length_D = starts[members], lengths[members]
            self.groups.append(_layout(first_D, length_D, int(length_D.max())))
        self.inverse_N = _inverse(self.groups)

    def layer(self, index: int) -> Attend:
        return Attend(self.attend)

    def attend(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        rows = self.rows
        if not self.groups:
            q, k, v = (rows.pad(x, None) for x in (q_NHK, k_NGK, v_NGK))
            return rows.unpad(attention(q, k, v, is_causal=True), None)
        parts = []
        for row_DM, used in self.groups:
            out_DMHK = attention(q_NHK[row_DM], k_NGK[row_DM], v_NGK[row_DM], is_causal=True)
            parts.append(out_DMHK.flatten(0, 1)[used])
        return torch.cat(parts)[self.inverse_N]


class FirstView:
    """Recursion 1's view, which remembers keys and values for the recursions after it."""

    def __init__(self, view: LocalView) -> None:
        self.view = view
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.starts_D, self.lengths_D = _runs(view.rows)

    def layer(self, index: int) -> Attend:
        def attend(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            self.kv[index] = k_NGK, v_NGK
            return self.view.attend(q_NHK, k_NGK, v_NGK)

        return Attend(attend)


class _Tile(NamedTuple):
    """Queries of some documents that are computed together, and the keys the last of them sees."""

    query_DQ: Tensor
    """active row of each place"""
    used: Tensor
    """places in use, flat"""
    key_DS: Tensor
    """row of each key"""
    visible_DQS: Tensor


class LaterView:
    """Active rows attend to all earlier rows of their document, by keys of recursion 1.

    takes_keys  an active row's own key and value of this recursion stand in for its first ones
                (`hybrid`); otherwise none are made (`shared`)

    Queries go in tiles of 64, each to the keys up to its last query: what a mask drops is less than
    one tile's width.
    """

    def __init__(self, first: FirstView, rows: Rows, origin_A: Tensor, *, takes_keys: bool) -> None:
        self.first, self.rows, self.origin_A = first, rows, origin_A
        self.takes_keys = takes_keys
        self.tiles: list[_Tile] = []
        if len(rows) == len(first.view.rows):
            return  # everyone is active: recursion 1's own view does
        starts_D, lengths_D = first.starts_D, first.lengths_D
        document_A = torch.searchsorted(starts_D, origin_A, right=True) - 1
        place_A = origin_A - starts_D[document_A]
        counts_D = torch.bincount(document_A, minlength=len(starts_D))
        first_D = counts_D.cumsum(0) - counts_D
        for members in _by_size(lengths_D.tolist()):
            most = int(counts_D[members].max())
            for begin in range(0, most, QUERY_TILE):
                index_D = starts_D.new_tensor(members)
                index_D = index_D[counts_D[index_D] > begin]
                count_D = (counts_D[index_D] - begin).clamp(max=QUERY_TILE)
                query_DQ, used = _layout(first_D[index_D] + begin, count_D, min(most - begin, 64))
                place_DQ = place_A[query_DQ]
                key_S = torch.arange(int(place_DQ.max()) + 1, device=origin_A.device)
                last_D1 = (starts_D + lengths_D - 1)[index_D, None]
                key_DS = torch.minimum(starts_D[index_D, None] + key_S, last_D1)
                visible_DQS = key_S <= place_DQ[..., None]
                self.tiles.append(_Tile(query_DQ, used, key_DS, visible_DQS))
        self.inverse_A = _inverse([(tile.query_DQ, tile.used) for tile in self.tiles])

    def layer(self, index: int) -> Attend:
        def attend(q_AHK: Tensor, k_AGK: Tensor | None, v_AGK: Tensor | None) -> Tensor:
            k_NGK, v_NGK = self.first.kv[index]
            if k_AGK is not None and v_AGK is not None:
                k_NGK = k_NGK.index_copy(0, self.origin_A, k_AGK)
                v_NGK = v_NGK.index_copy(0, self.origin_A, v_AGK)
            if not self.tiles:
                return self.first.view.attend(q_AHK, k_NGK, v_NGK)
            parts = []
            for query_DQ, used, key_DS, visible_DQS in self.tiles:
                out_DQHK = attention(
                    q_AHK[query_DQ], k_NGK[key_DS], v_NGK[key_DS], visible_BQS=visible_DQS
                )
                parts.append(out_DQHK.flatten(0, 1)[used])
            return torch.cat(parts)[self.inverse_A]

        return Attend(attend, self.takes_keys)


def _runs(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return first row and length of every stretch of rows of one sequence and document."""
    N = len(rows)
    differs_N = torch.ones(N, dtype=torch.bool, device=rows.sequence_N.device)
    differs_N[1:] = rows.sequence_N.diff() != 0
    if rows.segment_N is not None:
        differs_N[1:] |= rows.segment_N.diff() != 0
    starts = differs_N.nonzero()[:, 0]
    return starts, torch.diff(starts, append=starts.new_tensor([N]))


def _by_size(lengths: Sequence[int]) -> list[list[int]]:
    """Group documents whose lengths lie between the same powers of two."""
    by_size: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_size.setdefault((length - 1).bit_length(), []).append(index)
    return list(by_size.values())


def _layout(first_D: Tensor, count_D: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lay stretches of rows out as (D, width), the last row repeated; and the places in use."""
    place_M = torch.arange(width, device=first_D.device)
    row_DM = first_D[:, None] + torch.minimum(place_M, count_D[:, None] - 1)
    return row_DM, (place_M < count_D[:, None]).flatten().nonzero()[:, 0]


def _inverse(groups: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return where each row landed once the groups' places in use are joined."""
    return torch.argsort(torch.cat([row_DM.flatten()[used] for row_DM, used in groups]))
