"""The recursive stack: prelude, shared block applied 1..R times per token, coda, norm.

    x -> prelude -> [route -> gather -> block -> join] x R -> scatter -> coda -> norm

Only the rows that are active enter the block: their linear products, attention, keys and values are
all that is spent. It knows hidden states and rows, no vocabulary.
Shapes: N packed rows, A active rows, D width, R recursions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from mor.config import ModelConfig
from mor.model.cache import KVCache, LocalView
from mor.model.layers import Attend, Layer, RMSNorm, Rotary, rotary_angles
from mor.model.router import Router, Rule, join
from mor.model.rows import Rows


class View(Protocol):
    """Gives every layer of a group its attention."""

    def layer(self, index: int) -> Attend: ...


class RecursionStats(NamedTuple):
    """What happened at one recursion, for metrics and for setting thresholds."""

    num_candidates: int
    num_active: int
    num_passing: Tensor
    """candidates that the causal rule would have let through"""
    score_N: Tensor
    """detached sigmoid scores of the candidates; empty without a router"""


class StackOutput(NamedTuple):
    x_ND: Tensor
    depth_N: Tensor
    """recursions that each row took, int64"""
    router_loss: Tensor | None
    """weighted losses summed over rows and recursions (each over c_(r-1)), None without any"""
    recursions: list[RecursionStats]


class Stack(nn.Module):
    """Layers, stored once each in the order prelude, block, coda, and one router a recursion."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_unique_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.routers = nn.ModuleList(
            Router(config, r) for r in range(config.num_recursions if config.has_router else 0)
        )

    @property
    def prelude(self) -> list[Layer]:
        return self._layers(0, self.config.num_prelude_layers)

    def block(self, recursion: int) -> list[Layer]:
        """Return the layers of a recursion, counted from 0; where they are shared, the same."""
        places = range(self.config.num_block_layers)
        return [
            cast(Layer, self.layers[self.config.block_layer(recursion, place)]) for place in places
        ]

    @property
    def coda(self) -> list[Layer]:
        first = self.config.num_unique_layers - self.config.num_coda_layers
        return self._layers(first, self.config.num_coda_layers)

    def _layers(self, first: int, count: int) -> list[Layer]:
        return [cast(Layer, self.layers[index]) for index in range(first, first + count)]

    def router(self, recursion: int) -> Router:
        return cast(Router, self.routers[recursion])

    def forward(
        self, x_ND: Tensor, rows: Rows, *, rule: Rule, cache: KVCache | None = None
    ) -> StackOutput:
        """Run packed rows through prelude, recursions and coda.

        x_ND   embeddings of the rows
        rule   train (top-k of whole sequences, no cache) or causal
        cache  keys and values of earlier tokens; this call adds those of its rows
        """
        config = self.config
        rotary = rotary_angles(rows.position_N, config, dtype=x_ND.dtype)
        own = LocalView(rows) if cache is None else cache.own.append(rows)
        x_ND = run_layers(self.prelude, x_ND, rotary, own)
        x_ND, depth_N, router_loss, stats = self._recursions(
            x_ND, rows, rotary, rule, cache, full_view=own if cache is None else None
        )
        x_ND = run_layers(self.coda, x_ND, rotary, own, first=config.num_prelude_layers)
        if cache is not None:
            cache.length_B = cache.length_B + rows.count_B
        return StackOutput(self.norm(x_ND), depth_N, router_loss, stats)

    def _recursions(
        self,
        x_ND: Tensor,
        rows: Rows,
        rotary: Rotary,
        rule: Rule,
        cache: KVCache | None,
        *,
        full_view: View | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[RecursionStats]]:
        depth_N = torch.zeros(len(rows), dtype=torch.int64, device=x_ND.device)
        origin_N = torch.arange(len(rows), device=x_ND.device)
        router_loss: Tensor | None = None
        stats: list[RecursionStats] = []
        left: list[tuple[Tensor, Tensor]] = []  # rows of a recursion, and which of them went on
        view = full_view
        for r in range(self.config.num_recursions):
            gate_A1, num_candidates = None, len(rows)
            score_N = passing = x_ND.new_empty(0)
            if self.config.has_router:
                routing = self.router(r)(x_ND, rows, rule=rule)
                score_N, gate_A1 = routing.score_N, routing.gate_A1
                passing = self.router(r).passes(score_N, rows).sum()
                if routing.loss is not None:
                    router_loss = routing.loss + (0 if router_loss is None else router_loss)
                if routing.index_A is not None:
                    left.append((x_ND, routing.index_A))
                    x_ND, rotary = x_ND[routing.index_A], rotary.take(routing.index_A)
                    rows = rows.take(routing.index_A, equal_count=routing.equal_count)
                    origin_N, view = origin_N[routing.index_A], None
            stats.append(RecursionStats(num_candidates, len(rows), passing, score_N))
            if len(rows) == 0:
                continue  # the next recursion has no candidates either
            if cache is not None:
                view = cache.block[r].append(rows)
            elif view is None:
                view = LocalView(rows)
            block_AD = run_layers(self.block(r), x_ND, rotary, view)
            x_ND = join(x_ND, block_AD, gate_A1, self.config.gating)
            depth_N[origin_N] = r + 1
        for before_ND, index_A in reversed(left):
            x_ND = before_ND.index_copy(0, index_A, x_ND)
        return x_ND, depth_N, router_loss, stats


def run_layers(
    layers: Sequence[Layer], x_ND: Tensor, rotary: Rotary, view: View, *, first: int = 0
) -> Tensor:
    """Apply layers in order; `first` is the place of the first among its group's keys."""
    for index, layer in enumerate(layers):
        x_ND = layer(x_ND, rotary, view.layer(first + index))
    return x_ND
