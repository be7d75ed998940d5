"""Who attends to whom within one forward pass without a cache: the views of training and scoring.

Documents are laid out by themselves, those of similar length together, so that no product is spent
on a pair of different documents; the padding of a group is at most the longest's half.
Shapes: N rows, A active rows, D documents of a group, M rows and Q queries of its longest, S keys,
G key heads, H query heads, K head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mor.config import ModelConfig
from mor.model.layers import Attend
from mor.model.rows import Rows
from mor.ops.attention import attention, documents_attention, serves_documents
from mor.ops.device import in_autocast_type
from mor.ops.gather import lay_out, take_back

QUERY_TILE = 64
GPU_QUERY_TILE = 256
"""A GPU waits for launches sooner than for the keys that a mask drops."""


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
        self.documents: _Documents | None = None
        if not (rows.is_dense and rows.segment_N is None):
            self.documents = _Documents(*_runs(rows))

    def layer(self, index: int) -> Attend:
        return Attend(self.attend)

    def attend(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        rows = self.rows
        if self.documents is not None:
            return self.documents.attend(q_NHK, k_NGK, v_NGK)
        q, k, v = (rows.pad(x, None) for x in (q_NHK, k_NGK, v_NGK))
        return rows.unpad(attention(q, k, v, is_causal=True), None)


class _Documents:
    """Attention within documents that lie one after the other."""

    def __init__(self, starts_D: Tensor, lengths_D: Tensor) -> None:
        self.starts_D, self.lengths_D = starts_D, lengths_D
        self.longest = int(lengths_D.max()) if len(lengths_D) else 0
        self.offsets = F.pad(lengths_D.cumsum(0), (1, 0)).to(torch.int32)
        self.laid: _Laid | None = None

    def attend(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        q_NHK, k_NGK, v_NGK = in_autocast_type(q_NHK, k_NGK, v_NGK)
        if serves_documents(q_NHK):
            return documents_attention(q_NHK, k_NGK, v_NGK, self.offsets, self.longest)
        if self.laid is None:
            groups = []
            for members in _by_size(self.lengths_D.tolist()):
                first_D, length_D = self.starts_D[members], self.lengths_D[members]
                groups.append(_layout(first_D, length_D, int(length_D.max())))
            self.laid = _Laid(groups)
        parts = []
        for q_DMHK, k_DMGK, v_DMGK in zip(
            *(self.laid.lay_out(x) for x in (q_NHK, k_NGK, v_NGK)), strict=True
        ):
            parts.append(attention(q_DMHK, k_DMGK, v_DMGK, is_causal=True))
        return self.laid.take_back(parts)


class _Laid:
    """Where rows lie once they are laid out in groups of places, each (documents, places)."""

    def __init__(self, groups: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take each group's row of each place and its places in use; every row has one."""
        self.shapes = [row_DM.shape for row_DM, _ in groups]
        self.row_P = torch.cat([row_DM.flatten() for row_DM, _ in groups])
        bases = itertools.accumulate((row_DM.numel() for row_DM, _ in groups), initial=0)
        used = torch.cat([base + used for base, (_, used) in zip(bases, groups, strict=False)])
        self.place_N = torch.empty_like(used).index_copy_(0, self.row_P[used], used)

    def lay_out(self, x_N: Tensor) -> list[Tensor]:
        """Return the rows of each group, (documents, places, ...)."""
        parts = lay_out(x_N, self.row_P, self.place_N).split([s.numel() for s in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def take_back(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the rows from where they were laid."""
        return take_back(torch.cat([part.flatten(0, 1) for part in parts]), self.place_N)


class FirstView:
    """Recursion 1's view, which remembers keys and values for the recursions after it."""

    def __init__(self, view: LocalView) -> None:
        self.view = view
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        documents = view.documents
        if documents is None:
            self.starts_D, self.lengths_D = _runs(view.rows)
        else:
            self.starts_D, self.lengths_D = documents.starts_D, documents.lengths_D

    def layer(self, index: int) -> Attend:
        def attend(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            self.kv[index] = k_NGK, v_NGK
            return self.view.attend(q_NHK, k_NGK, v_NGK)

        return Attend(attend)


class _Tile(NamedTuple):
    """Queries of some documents that are computed together, and the keys the last of them sees."""

    key_DS: Tensor
    """row of each key"""
    visible_DQS: Tensor


class LaterView:
    """Active rows attend to all earlier rows of their document, by keys of recursion 1.

    takes_keys  an active row's own key and value of this recursion stand in for its first ones
                (`hybrid`); otherwise none are made (`shared`)

    Queries go in tiles, each to the keys up to its last query: what a mask drops is less than one
    tile's width.
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
        width = GPU_QUERY_TILE if origin_A.is_cuda else QUERY_TILE
        groups = []
        for members in _by_size(lengths_D.tolist()):
            most = int(counts_D[members].max())
            for begin in range(0, most, width):
                index_D = starts_D.new_tensor(members)
                index_D = index_D[counts_D[index_D] > begin]
                count_D = (counts_D[index_D] - begin).clamp(max=width)
                query_DQ, used = _layout(
                    first_D[index_D] + begin, count_D, min(most - begin, width)
                )
                groups.append((query_DQ, used))
                place_DQ = place_A[query_DQ]
                key_S = torch.arange(int(place_DQ.max()) + 1, device=origin_A.device)
                last_D1 = (starts_D + lengths_D - 1)[index_D, None]
                key_DS = torch.minimum(starts_D[index_D, None] + key_S, last_D1)
                visible_DQS = key_S <= place_DQ[..., None]
                self.tiles.append(_Tile(key_DS, visible_DQS))
        self.laid = _Laid(groups)

    def layer(self, index: int) -> Attend:
        def attend(q_AHK: Tensor, k_AGK: Tensor | None, v_AGK: Tensor | None) -> Tensor:
            k_NGK, v_NGK = self.first.kv[index]
            if k_AGK is not None and v_AGK is not None:
                k_NGK = k_NGK.index_copy(0, self.origin_A, k_AGK)
                v_NGK = v_NGK.index_copy(0, self.origin_A, v_AGK)
            if not self.tiles:
                return self.first.view.attend(q_AHK, k_NGK, v_NGK)
            parts = []
            for q_DQHK, (key_DS, visible_DQS) in zip(
                self.laid.lay_out(q_AHK), self.tiles, strict=True
            ):
                k_DSGK, v_DSGK = (
                    x.index_select(0, key_DS.flatten()).unflatten(0, key_DS.shape)
                    for x in (k_NGK, v_NGK)
                )
                parts.append(attention(q_DQHK, k_DSGK, v_DSGK, visible_BQS=visible_DQS))
            return self.laid.take_back(parts)

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
