"""The language model: embedding, recursive stack, head and loss.

Shapes: B sequences, T tokens, N packed rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mor.config import ModelConfig
from mor.model.cache import KVCache
from mor.model.layers import Projection
from mor.model.reference import reference_stack
from mor.model.router import Rule
from mor.model.rows import Rows
from mor.model.stack import End, RecursionStats, Stack
from mor.ops.loss import IGNORE, linear_cross_entropy

Implementation = Literal["fast", "reference"]


class MoROutput(NamedTuple):
    """Result of `MoR.forward`. Sums, not means: micro-batches add up to their batch."""

    logits: Tensor | None
    """(B, T, V), zero at padding; (B, 1, V) of the last token when `last_only`; None with labels"""
    loss_sum: Tensor | None
    """cross-entropy summed over labelled tokens"""
    router_loss_sum: Tensor | None
    """weighted losses of the routers, summed over tokens and recursions; None without any"""
    num_tokens: int
    """real tokens of the batch"""
    depth: Tensor
    """(B, T) int64, recursions that each token took; 0 at padding"""
    recursions: list[RecursionStats]
    states: States | None = None
    """where `keep_states` asked for them"""


class States(NamedTuple):
    """What a teacher compares."""

    x_ND: Tensor
    """after the last norm: the head's input"""
    ends: list[End]
    """at the end of each recursion"""


class MoR(nn.Module):
    """Mixture-of-Recursions language model; with one recursion it is a plain Llama.

    Weights are stored once and applied `num_recursions` times, under transformers' Llama names.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.config = config
        self.model = Stack(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, module in self.named_modules():
            self._init_weights(name, module, seed)
        assert_sharing(self)

    def _init_weights(self, name: str, module: nn.Module, seed: int) -> None:
        """Draw a module's weights from the seed and its name alone.

        So models that begin from one seed begin with the same weights wherever they have the same
        ones, whatever else they have: a chance at the start that is common to compared models.
        """
        if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight.is_meta:
            return
        draw = torch.Generator(module.weight.device).manual_seed(seed ^ crc32(name.encode()))
        nn.init.normal_(module.weight, std=self.config.initializer_range, generator=draw)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Projection) and module.recursion_A is not None:
            bound = module.in_features**-0.5
            nn.init.uniform_(module.recursion_A, -bound, bound, generator=draw)
            nn.init.zeros_(cast(nn.Parameter, module.recursion_B))

    @property
    def head_weight_VD(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
        segments: Tensor | None = None,
        rule: Rule | None = None,
        cache: KVCache | None = None,
        implementation: Implementation = "fast",
        last_only: bool = False,
        keep_states: bool = False,
        routing_only: bool = False,
    ) -> MoROutput:
        """Run a batch; with labels it returns loss sums and never holds the whole logits.

        input_ids  (B, T) int64
        labels     (B, T) int64, the token to predict at each place, -100 for none
        lengths    (B,) real tokens of each line, the rest is padding on the right; default all
        segments   (B, T) document of each token; attention stays inside a document
        rule       train or causal; default train in training mode, causal in evaluation mode
        cache      keys and values of earlier tokens (causal rule only)
        keep_states  return `states`, and neither logits nor a loss; fast implementation only
        routing_only  decide on depths alone: no coda, no logits, no loss; fast implementation only
        Raises     ValueError for a cache under the train rule
        """
        rule = rule or ("train" if self.training else "causal")
        if cache is not None and (rule == "train" or segments is not None):
            raise ValueError("a cache needs the causal rule and one document a sequence")
        start_B = None if cache is None else cache.length_B
        rows, index_N = Rows.pack(input_ids, length_B=lengths, start_B=start_B, segment_BT=segments)
        x_ND = self.model.embed_tokens(rows.token_N)
        if implementation == "reference":
            out = reference_stack(self.model, x_ND, rows, rule=rule)
        else:
            out = self.model(
                x_ND,
                rows,
                rule=rule,
                cache=cache,
                keep_ends=keep_states,
                routing_only=routing_only,
            )

        def lay_out(value_N: Tensor) -> Tensor:
            flat = value_N
            if index_N is not None:
                size = (input_ids.numel(), *value_N.shape[1:])
                flat = value_N.new_zeros(size).index_copy(0, index_N, value_N)
            return flat.unflatten(0, input_ids.shape)

        logits = loss_sum = states = None
        if keep_states:
            states = States(out.x_ND, out.ends)
        elif labels is not None and not routing_only:
            label_N = labels.flatten() if index_N is None else labels.flatten()[index_N]
            loss_sum = linear_cross_entropy(out.x_ND, self.head_weight_VD, label_N)
        elif last_only:
            last_B = rows.count_B.cumsum(0) - 1
            logits = F.linear(out.x_ND[last_B], self.head_weight_VD)[:, None]
        elif not routing_only:
            logits = lay_out(F.linear(out.x_ND, self.head_weight_VD))
        return MoROutput(
            logits,
            loss_sum,
            out.router_loss,
            len(rows),
            lay_out(out.depth_N),
            out.recursions,
            states,
        )

    def new_cache(self, batch_size: int) -> KVCache:
        """Return an empty cache in the model's type, on its device."""
        weight = self.model.embed_tokens.weight
        return KVCache(self.config, batch_size, dtype=weight.dtype, device=weight.device)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device


def assert_sharing(model: MoR) -> None:
    """Hold that every weight exists once: one block for all recursions, counted by `cost`.

    Compares identity of storage, since an untied R = 3 and a tied R = 2 can have equal counts.
    """
    from mor.model.cost import count_params

    config = model.config
    assert len(model.model.layers) == config.num_unique_layers
    tensors = [p for p in model.parameters() if p.device.type != "meta"]
    assert len({p.data_ptr() for p in tensors}) == len(tensors), "two weights share their memory"
    assert sum(p.numel() for p in model.parameters()) == count_params(config).unique


__all__ = ["IGNORE", "MoR", "MoROutput", "assert_sharing"]
