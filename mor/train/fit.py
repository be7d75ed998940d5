"""Exit maps and routers by least squares, before any training, from the model at full depth.

    all take every recursion -> states after each -> the map of each exit
    all leave after r        -> one backward pass -> what leaving costs each token -> router r

Both are linear, so a few thousand tokens say the best of them at once. Costs one forward pass at
full depth, and for each exit one more with a backward pass of what comes behind the block.
Shapes: N tokens, D width, R recursions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mor.data.loader import Batch
from mor.log import progress
from mor.model.layers import ExitMaps
from mor.model.mor import MoR, States
from mor.ops.device import autocast
from mor.ops.loss import linear_distillation
from mor.train.config import check_fit

MAP_RIDGE, ROUTER_RIDGE = 1e-2, 3e-2
"""added to the normal equations, as a share of their mean diagonal"""


class Seen(NamedTuple):
    """What a batch looks like at full depth."""

    batch: Batch
    end_RND: list[Tensor]
    """states after each recursion"""
    head_ND: Tensor
    """after the last norm: the head's input"""


def fit_exits(model: MoR, batches: Sequence[Batch], *, dtype: torch.dtype | None = None) -> None:
    """Set the map of every exit, and the weights of the routers where they are learnt.

    A map takes a token from where it leaves to where full depth would have brought it. A router
    scores a token by what its leaving costs, in rank among all. Thresholds are not set here.
    dtype  autocast type; None keeps the model's own
    """
    check_fit(model.config)
    config, maps = model.config, cast(ExitMaps, model.model.exit_maps)
    learns = config.router == "expert_choice"
    with (
        _everyone_goes_on(model),
        progress("fit exits", len(batches) * (config.num_recursions if learns else 1)) as bar,
    ):
        seen = []
        for batch in batches:
            seen.append(_see(model, batch.to(model.device), dtype))
            bar.advance(1)
        for r in range(1, config.num_recursions):
            state_ND = torch.cat([one.end_RND[r - 1] for one in seen])
            full_ND = torch.cat([one.end_RND[-1] for one in seen])
            with torch.no_grad():
                maps.weight[r - 1] = fit_map(state_ND, full_ND)
            if not learns:
                continue
            costs = []
            for one in seen:
                costs.append(_cost_of_leaving(model, one, r, dtype))
                bar.advance(1)
            weight_D = fit_router(state_ND, torch.cat(costs))
            router = model.model.router(r)
            for body in (router.body, router.aux_body):
                if body is not None:
                    cast(nn.Linear, body).weight.data.copy_(weight_D[None])


def fit_map(state_ND: Tensor, full_ND: Tensor) -> Tensor:
    """Return W (D, D) such that x + W x is near to full depth, each row by its own size."""
    state_ND, gap_ND = state_ND.double(), (full_ND - state_ND).double()
    weight_N1 = 1 / _size(state_ND)
    normal_DD = state_ND.T @ (weight_N1 * state_ND)
    normal_DD.diagonal().add_(MAP_RIDGE * normal_DD.diagonal().mean())
    return torch.linalg.solve(normal_DD, state_ND.T @ (weight_N1 * gap_ND)).T.to(full_ND.dtype)


def fit_router(state_ND: Tensor, cost_N: Tensor) -> Tensor:
    """Return w (D,) whose scores w x are near to the normal quantile of each cost's rank."""
    rank_N = cost_N.argsort(stable=True).argsort(stable=True).double()
    target_N = torch.special.ndtri((rank_N + 0.5) / len(rank_N))
    state_ND = state_ND.double()
    size_N1 = _size(state_ND)
    weight_N1 = (size_N1.median() / size_N1).clamp(max=1)  # the few huge states say little
    normal_DD = state_ND.T @ (weight_N1 * state_ND)
    normal_DD.diagonal().add_(ROUTER_RIDGE * normal_DD.diagonal().mean())
    right_D = state_ND.T @ (weight_N1[:, 0] * target_N)
    return torch.linalg.solve(normal_DD, right_D).float()


def _size(x_ND: Tensor) -> Tensor:
    return x_ND.square().mean(-1, keepdim=True).clamp(min=1e-12)


def _states(model: MoR, batch: Batch) -> States:
    out = model(batch.input_ids_BT, segments=batch.segment_BT, rule="causal", keep_states=True)
    assert out.states is not None
    return out.states


@torch.no_grad()
def _see(model: MoR, batch: Batch, dtype: torch.dtype | None) -> Seen:
    with autocast(model.device, dtype):
        states = _states(model, batch)
    return Seen(batch, [end.x_AD.float() for end in states.ends], states.x_ND.float())


def _cost_of_leaving(model: MoR, seen: Seen, r: int, dtype: torch.dtype | None) -> Tensor:
    """Return what each token adds to the divergence from full depth when all leave after r (N,).

    To first order: the gradient where it stands, times how far that is from full depth. So what it
    does to later tokens counts too.
    """
    stack, found = model.model, []

    def hold(_: nn.Module, inputs: object, left_ND: Tensor) -> Tensor:
        found.append(left_ND.detach().requires_grad_())
        return found[0]

    handle = cast(ExitMaps, stack.exit_maps).register_forward_hook(hold)
    stack.depth_limit = r
    try:
        with torch.enable_grad(), autocast(model.device, dtype):
            head_ND, head_VD = _states(model, seen.batch).x_ND, model.head_weight_VD
            loss = linear_distillation(
                head_ND,
                head_VD,
                seen.batch.labels_BT.flatten(),
                seen.head_ND.to(head_ND.dtype),
                head_VD,
                label_weight=0.0,
                teacher_weight=1.0,
            ).loss
            (gradient_ND,) = torch.autograd.grad(loss, found)
    finally:
        stack.depth_limit = model.config.num_recursions
        handle.remove()
    return (gradient_ND * (found[0].detach() - seen.end_RND[-1])).sum(-1).float()


@contextmanager
def _everyone_goes_on(model: MoR) -> Iterator[None]:
    """Let every token take every recursion, and keep weights from gathering gradients."""
    routers = [model.model.router(r) for r in range(model.config.num_routers)]
    thresholds = [router.threshold.clone() for router in routers]
    trained = [param for param in model.parameters() if param.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)
    for router in routers:
        router.threshold.fill_(-1.0)  # below every score
        router.config = replace(model.config, capacity=(1.0,) * model.config.num_recursions)
    try:
        yield
    finally:
        for router, threshold in zip(routers, thresholds, strict=True):
            router.threshold.copy_(threshold)
            router.config = model.config
        for param in trained:
            param.requires_grad_()
        model.train(was_training)
