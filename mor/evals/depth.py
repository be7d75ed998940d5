"""Bounds on every token's depth, for measuring a model at depths that its router did not choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mor.model.mor import MoR

EVERYONE, NOBODY = -1.0, 2.0
"""thresholds below and above every score"""


def bound_depth(model: MoR, *, least: int = 1, most: int) -> None:
    """Let every token take `least` to `most` recursions; changes the model's thresholds.

    Raises ValueError for a router that has none, or a depth that the model has not
    """
    config = model.config
    if config.router not in ("expert_choice", "threshold"):
        raise ValueError(
            f"the router {config.router} has no thresholds, so its depth cannot be limited"
        )
    if not 1 <= least <= most <= config.num_recursions:
        raise ValueError(
            f"depth {least} to {most} does not fit a model of {config.num_recursions} recursions; "
            f"give 1 to {config.num_recursions}"
        )
    for r in range(config.num_recursions):
        if r < least or r >= most:
            model.model.router(r).threshold.fill_(EVERYONE if r < least else NOBODY)


@contextmanager
def bounded_depth(model: MoR, *, least: int = 1, most: int) -> Iterator[None]:
    """The same while the block runs."""
    routers = [model.model.router(r) for r in range(model.config.num_recursions)]
    before = [router.threshold.clone() for router in routers]
    try:
        bound_depth(model, least=least, most=most)
        yield
    finally:
        for router, threshold in zip(routers, before, strict=True):
            router.threshold.copy_(threshold)
