"""What limits which tokens an answer may hold: a grammar that is walked as the answer grows.

The engine knows no grammar: whoever sets `SamplingParams.constraint` brings the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Mask(Protocol):
    """The state of one answer."""

    def allowed(self, output_ids: Sequence[int]) -> bytes:
        """Return a bit for each token that may come next, lowest id in the lowest bit.

        output_ids  all tokens of the answer so far; they only grow from call to call
        """
        ...


class Constraint(Protocol):
    """A grammar, for any number of answers."""

    def start(self) -> Mask:
        """Return the state of an answer that has no token yet."""
        ...
