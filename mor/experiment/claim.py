"""A row of the claims table, and what all kinds of rows say alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mor.experiment.results import Result

Kept = dict[str, list[Result]]
"""experiment -> its results"""


class Claim(NamedTuple):
    """A row of the table."""

    claim: str
    paper: str
    ours: str
    holds: str
    machine: str
    command: str
    detail: str = ""
    """what the long table says too: intervals, seeds"""
    is_brief: bool = True
    """stands in the short table too"""


def not_run(claim: str, paper: str, why: str, command: str) -> Claim:
    """Return a row without figures, which says why."""
    return Claim(claim, paper, "", f"not run: {why}", "", command)


def why_not(scale: str) -> str:
    """Say why nothing was run at a scale."""
    return "a GPU was at hand too briefly" if scale == "gpu" else "no result is kept"


def machine_of(results: Sequence[Result]) -> str:
    """Name the machine of the first of some results."""
    about = results[0]["machine"]
    named = [about.get("gpu") or about.get("processor", ""), f"{about.get('cores', '?')} cores"]
    return ", ".join(part for part in named if part)


def percent(ratio: float) -> str:
    """Say how much more or less than 1 a ratio is."""
    return f"{100 * (ratio - 1):+.0f} %"
