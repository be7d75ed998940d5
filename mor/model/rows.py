"""Packed rows: the tokens a tensor holds, sequence after sequence, in order of position.

There is no padding inside the model; only attention lays rows out by sequence for a moment.
Shapes: B sequences, N packed rows, A rows kept, M rows of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Which token each packed row is. `take` keeps some; order never changes."""

    sequence_N: Tensor
    position_N: Tensor
    token_N: Tensor
    segment_N: Tensor | None
    """document of each row, unique within its sequence; None when a sequence is one document"""
    length_B: Tensor
    """tokens of each sequence before any left"""
    count_B: Tensor
    """rows of each sequence that are here"""
    equal_length: int | None
    """length_B on the host, when it is the same for all"""
    max_count: int
    is_dense: bool
    """every sequence has max_count rows, so laying out is a view"""

    @classmethod
    def pack(
        cls,
        token_BT: Tensor,
        *,
        length_B: Tensor | None = None,
        start_B: Tensor | None = None,
        segment_BT: Tensor | None = None,
    ) -> tuple[Rows, Tensor | None]:
        """Describe a batch; returns the rows and, for ragged batches, their flat index into B x T.

        length_B  real tokens of each sequence, the rest of its line is padding
        start_B   position of each sequence's first token (what a cache already holds)
        """
        B, T = token_BT.shape
        device = token_BT.device
        position_BT = torch.arange(T, device=device).expand(B, T)
        sequence_BT = torch.arange(B, device=device)[:, None].expand(B, T)
        index_N = None
        if length_B is not None:
            index_N = (position_BT < length_B[:, None]).flatten().nonzero()[:, 0]
        if start_B is not None:
            position_BT = position_BT + start_B[:, None]

        def packed(x_BT: Tensor) -> Tensor:
            return x_BT.flatten() if index_N is None else x_BT.flatten()[index_N]

        if length_B is None:
            count_B = torch.full((B,), T, dtype=torch.int64, device=device)
        else:
            count_B = length_B.to(torch.int64)
        rows = cls(
            sequence_N=packed(sequence_BT),
            position_N=packed(position_BT),
            token_N=packed(token_BT),
            segment_N=None if segment_BT is None else packed(segment_BT),
            length_B=count_B,
            count_B=count_B,
            equal_length=T if length_B is None else None,
            max_count=T if length_B is None else int(count_B.max()),
            is_dense=length_B is None,
        )
        return rows, index_N

    @property
    def num_sequences(self) -> int:
        return self.length_B.shape[0]

    def __len__(self) -> int:
        return self.sequence_N.shape[0]

    def take(self, index_A: Tensor, *, equal_count: int | None = None) -> Rows:
        """Keep some rows, given in ascending order; equal_count says that no count is needed."""
        sequence_A = self.sequence_N[index_A]
        B = self.num_sequences
        if equal_count is None:
            count_B = torch.bincount(sequence_A, minlength=B)
            max_count = int(count_B.max()) if len(sequence_A) else 0
        else:
            count_B = torch.full_like(self.count_B, equal_count)
            max_count = equal_count
        return Rows(
            sequence_N=sequence_A,
            position_N=self.position_N[index_A],
            token_N=self.token_N[index_A],
            segment_N=None if self.segment_N is None else self.segment_N[index_A],
            length_B=self.length_B,
            count_B=count_B,
            equal_length=self.equal_length,
            max_count=max_count,
            is_dense=len(sequence_A) == B * max_count,
        )

    def rank_N(self) -> Tensor:
        """Return each row's place among the rows of its sequence that are here."""
        first_B = self.count_B.cumsum(0) - self.count_B
        return torch.arange(len(self), device=self.sequence_N.device) - first_B[self.sequence_N]

    def slot_N(self) -> Tensor:
        """Return each row's place in the (B x max_count) layout."""
        return self.sequence_N * self.max_count + self.rank_N()

    def pad(self, x_N: Tensor, slot_N: Tensor | None, *, fill: float = 0) -> Tensor:
        """Lay packed rows out as (B, max_count, ...); slot_N is None when dense."""
        shape = (self.num_sequences, self.max_count, *x_N.shape[1:])
        if slot_N is None:
            return x_N.reshape(shape)
        flat = x_N.new_full((shape[0] * shape[1], *shape[2:]), fill)
        return flat.index_copy(0, slot_N, x_N).reshape(shape)

    def unpad(self, x_BM: Tensor, slot_N: Tensor | None) -> Tensor:
        """Inverse of `pad`."""
        flat = x_BM.reshape(-1, *x_BM.shape[2:])
        return flat if slot_N is None else flat[slot_N]
