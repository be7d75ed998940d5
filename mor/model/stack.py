"""The recursive stack: prelude, shared block applied 1..R times per token, coda, norm.

    x -> prelude -> [route -> gather -> block -> join] x R -> scatter -> (exit maps) -> coda -> norm

Only the rows that are active enter the block: their linear products, attention, keys and values are
all that is spent. It knows hidden states and rows, no vocabulary.
Shapes: N packed rows, A active rows, D width, R recursions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mor.config import ModelConfig
from mor.model.cache import KVCache
from mor.model.layers import ExitMaps, Layer, RMSNorm, Rotary, rotary_angles
from mor.model.router import Router, Routing, Rule, join
from mor.model.rows import Rows
from mor.model.token_router import TokenChoice, TokenRouter
from mor.model.views import Keys, LocalKeys, View

Recompute = Literal["none", "recursion", "layer"]


class RecursionStats(NamedTuple):
    """What happened at one recursion, for metrics and for setting thresholds."""

    num_candidates: int
    num_active: int
    num_passing: Tensor
    """candidates that the causal rule would have let through"""
    logit_N: Tensor
    """detached logits of the candidates, as the causal rule asks them; empty without a router"""

    @property
    def score_N(self) -> Tensor:
        """Scores of the candidates; sigmoids far from 0 all round to 1."""
        return torch.sigmoid(self.logit_N)


class StackOutput(NamedTuple):
    x_ND: Tensor
    depth_N: Tensor
    """recursions that each row took, int64"""
    router_loss: Tensor | None
    """weighted losses summed over rows and recursions (each over c_(r-1)), None without any"""
    recursions: list[RecursionStats]
    ends: list[End]
    """states at the end of each recursion, where they were asked for"""


class End(NamedTuple):
    """Where the rows of a recursion stand after it."""

    x_AD: Tensor
    origin_A: Tensor
    """which of all rows they are"""


class Stack(nn.Module):
    """Layers, stored once each in the order prelude, block, coda, and one router a recursion."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        """what is computed again in the backward pass instead of being kept for it"""
        self.depth_limit = config.num_recursions
        """recursions that any token may take; the trainer begins with 1 where it is asked to"""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        own = range(config.num_prelude_layers), range(config.num_coda_layers)
        block = config.num_unique_layers - config.num_own_layers
        self.layers = nn.ModuleList(
            [
                *(Layer(config, is_shared=False) for _ in own[0]),
                *(Layer(config, is_shared=True) for _ in range(block)),
                *(Layer(config, is_shared=False) for _ in own[1]),
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.routers = nn.ModuleList(
            TokenRouter(config) if config.router == "token_choice" else Router(config, r)
            for r in range(config.num_routers)
        )
        self.recursion_encoding = None
        if config.recursion_encoding:
            shape = (config.num_recursions, config.hidden_size)
            self.recursion_encoding = nn.Parameter(torch.ones(shape))
        self.exit_maps = ExitMaps(config) if config.exit_maps else None

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

    def compile_layers(self) -> None:
        """Compile every layer's parts around attention, at the first call of each."""
        for layer in self.layers:
            cast(Layer, layer).compile_parts()

    def router(self, recursion: int) -> Router:
        return cast(Router, self.routers[recursion])

    def forward(
        self,
        x_ND: Tensor,
        rows: Rows,
        *,
        rule: Rule,
        cache: KVCache | None = None,
        keep_ends: bool = False,
        routing_only: bool = False,
    ) -> StackOutput:
        """Run packed rows through prelude, recursions and coda.

        x_ND       embeddings of the rows
        rule       train (top-k of whole sequences, no cache) or causal
        cache      keys and values of earlier tokens; this call adds those of its rows
        keep_ends  return the states at the end of each recursion too
        routing_only  leave out the coda, which decides on nobody's depth
        """
        rotary = rotary_angles(rows.position_N, self.config, dtype=x_ND.dtype)
        keys = LocalKeys(self.config, rows) if cache is None else cache.append(rows)
        x_ND = self._run(self.prelude, x_ND, rotary, keys.own)
        ends: list[End] | None = [] if keep_ends else None
        x_ND, depth_N, router_loss, stats = self._recursions(x_ND, rows, rotary, rule, keys, ends)
        coda, first = () if routing_only else self.coda, self.config.num_prelude_layers
        x_ND = self._run(coda, x_ND, rotary, keys.own, first=first)
        return StackOutput(self.norm(x_ND), depth_N, router_loss, stats, ends or [])

    def _recursions(
        self,
        x_ND: Tensor,
        rows: Rows,
        rotary: Rotary,
        rule: Rule,
        keys: Keys,
        ends: list[End] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[RecursionStats]]:
        """Run every recursion on the rows that are active there."""
        start_ND, choice, gating = x_ND, None, self.config.gating
        if self.config.router == "token_choice":
            choice = cast(TokenRouter, self.routers[0])(x_ND, rows, rule=rule)
            gating = "scaled" if choice.step_gate_NR is not None else "none"
        depth_N = torch.zeros(len(rows), dtype=torch.int64, device=x_ND.device)
        origin_N = torch.arange(len(rows), device=x_ND.device)
        router_loss = None if choice is None else choice.loss
        stats: list[RecursionStats] = []
        left: list[tuple[Tensor, Tensor]] = []  # rows of a recursion, and which of them went on
        for r in range(self.depth_limit):
            num_candidates, gate_A1 = len(rows), None
            logit_N = passing = x_ND.new_empty(0)
            routing = self._route(r, x_ND, rows, rule, choice, origin_N)
            if routing is not None:
                logit_N, gate_A1, passing = routing.logit_N, routing.gate_A1, routing.num_passing
                if routing.loss is not None:
                    router_loss = routing.loss + (0 if router_loss is None else router_loss)
                if routing.index_A is not None:
                    left.append((x_ND, routing.index_A))
                    x_ND = x_ND.index_select(0, routing.index_A)
                    rotary = rotary.take(routing.index_A)
                    rows = rows.take(routing.index_A, equal_count=routing.equal_count)
                    origin_N = origin_N[routing.index_A]
            stats.append(RecursionStats(num_candidates, len(rows), passing, logit_N))
            if len(rows) == 0:
                continue  # the next recursion has no candidates either
            view = keys.recursion(r, rows, origin_N)
            x_ND = join(x_ND, self._block(r, x_ND, rotary, view), gate_A1, gating)
            depth_N[origin_N] = r + 1
            if ends is not None:
                ends.append(End(x_ND, origin_N))
        for before_ND, index_A in reversed(left):
            x_ND = before_ND.index_copy(0, index_A, x_ND)
        if choice is not None:
            at_exit = "additive" if choice.step_gate_NR is not None else self.config.gating
            x_ND = join(start_ND, x_ND, choice.exit_gate_N1, at_exit)
        if self.exit_maps is not None:
            x_ND = self.exit_maps(x_ND, depth_N)
        return x_ND, depth_N, router_loss, stats

    def _route(
        self,
        recursion: int,
        x_ND: Tensor,
        rows: Rows,
        rule: Rule,
        choice: TokenChoice | None,
        origin_N: Tensor,
    ) -> Routing | None:
        """Ask who of the candidate rows goes on; None without a router."""
        if choice is not None:
            return choice.routing(recursion, x_ND, origin_N)
        if not self.config.has_router:
            return None
        return self.router(recursion)(x_ND, rows, rule=rule)

    def _block(self, recursion: int, x_AD: Tensor, rotary: Rotary, view: View) -> Tensor:
        """Apply a recursion's layers, and its encoding if there is one."""

        def run(x_AD: Tensor) -> Tensor:
            return self._run(self.block(recursion), x_AD, rotary, view, recursion=recursion)

        x_AD = _recomputed(run, x_AD) if self.recompute == "recursion" else run(x_AD)
        if self.recursion_encoding is not None:
            x_AD = x_AD * self.recursion_encoding[recursion].to(x_AD.dtype)
        return x_AD

    def _run(
        self,
        layers: Sequence[Layer],
        x_ND: Tensor,
        rotary: Rotary,
        view: View,
        *,
        first: int = 0,
        recursion: int = 0,
    ) -> Tensor:
        """Apply layers in order; `first` is the place of the first among its group's keys."""
        for index, layer in enumerate(layers):
            attend = view.layer(first + index)
            if self.recompute == "layer":
                x_ND = _recomputed(layer, x_ND, rotary, attend, recursion)
            else:
                x_ND = layer(x_ND, rotary, attend, recursion)
        return x_ND

    @torch.no_grad()
    def after_step(
        self, micro_batches: Sequence[Sequence[RecursionStats]], *, is_first: bool = False
    ) -> None:
        """Move what routers move after an optimizer step: thresholds, balance, counters.

        micro_batches  `MoROutput.recursions` of every micro-batch of the step
        is_first       the run's first step
        """
        if self.config.router == "token_choice":
            by_recursion = zip(*micro_batches, strict=True)
            active = [sum(stats.num_active for stats in parts) for parts in by_recursion]
            picks = [a - b for a, b in zip(active, [*active[1:], 0], strict=True)]
            cast(TokenRouter, self.routers[0]).after_step(torch.tensor(picks))
            return
        for r in range(min(self.config.num_routers, len(micro_batches[0]))):
            scores = [stats[r].score_N for stats in micro_batches]
            self.router(r).after_step(torch.cat(scores), is_first=is_first)


def _recomputed(run: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Run without keeping what the backward pass needs; it runs again there."""
    if not torch.is_grad_enabled():
        return run(*inputs)
    return cast(Tensor, checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False))
