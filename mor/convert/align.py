"""The order of heads and neurons in which layers are averaged.

A layer computes the same with its heads, or the neurons of its MLP, in another order, so two layers
may do alike things in different places. Before layers become one, each is put in the order of the
first: docs/LOG.md, "how to begin with a shared layer", has what that is worth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Read = Callable[[str], Tensor]

ROWS_OF = {
    "self_attn.q_proj": "heads",
    "self_attn.k_proj": "kv_heads",
    "self_attn.v_proj": "kv_heads",
    "mlp.gate_proj": "neurons",
    "mlp.up_proj": "neurons",
}
"""projections whose rows, and biases, belong to heads or neurons"""
COLUMNS_OF = {"self_attn.o_proj": "heads", "mlp.down_proj": "neurons"}


class Heads(NamedTuple):
    """Attention of the parent: query heads, those of keys and values, and the size of one."""

    heads: int
    kv_heads: int
    size: int


class Order(NamedTuple):
    """For each row of the first layer, the row of the other that does most alike."""

    heads: Tensor
    kv_heads: Tensor
    neurons: Tensor


def aligned(read: Read, heads: Heads, first: int, layer: int, part: str) -> Tensor:
    """Return `part` of one layer, such as mlp.up_proj.weight, in the order of another layer."""
    weight = read(f"model.layers.{layer}.{part}").float()
    projection = part.rpartition(".")[0]
    if layer == first or projection not in {**ROWS_OF, **COLUMNS_OF}:
        return weight
    order = order_like(read, heads, first, layer)
    if projection in ROWS_OF:
        return weight[getattr(order, ROWS_OF[projection])]
    return weight[:, getattr(order, COLUMNS_OF[projection])]


@functools.lru_cache(maxsize=8)  # all parts of a shared layer are asked for one after the other
def order_like(read: Read, heads: Heads, first: int, layer: int) -> Order:
    """Return the order that makes `layer` most like `first`, by the cosine of their weights."""
    group = heads.heads // heads.kv_heads

    def alike(projection: str, size: int, norm: str | None) -> Tensor:
        """(N, N): cosine of each head's or neuron's weights in `first` with each in `layer`."""
        vectors = []
        for one in (first, layer):
            weight = read(f"model.layers.{one}.{projection}.weight").float()
            if norm is None:
                weight = weight.T
            else:  # what comes in was multiplied by these
                weight = weight * read(f"model.layers.{one}.{norm}.weight").float()
            vectors.append(F.normalize(weight.reshape(weight.shape[0] // size, -1)))
        return vectors[0] @ vectors[1].T

    behind = "post_attention_layernorm"
    neurons = matched(
        alike("mlp.gate_proj", 1, behind)
        + alike("mlp.up_proj", 1, behind)
        + alike("mlp.down_proj", 1, None)
    )
    q_HH = alike("self_attn.q_proj", heads.size, "input_layernorm")
    q_HH = q_HH + alike("self_attn.o_proj", heads.size, None)
    kv_GG = alike("self_attn.k_proj", heads.size, "input_layernorm")
    kv_GG = group * (kv_GG + alike("self_attn.v_proj", heads.size, "input_layernorm"))
    inside = {}
    for i in range(heads.kv_heads):
        for j in range(heads.kv_heads):
            q_gg = q_HH[i * group :, j * group :][:group, :group]
            inside[i, j] = matched(q_gg)
            kv_GG[i, j] += q_gg[torch.arange(group), inside[i, j]].sum()
    groups = matched(kv_GG)
    pairs = enumerate(groups.tolist())
    queries = torch.cat([j * group + inside[i, j] for i, j in pairs])
    return Order(_rows(queries, heads.size), _rows(groups, heads.size), neurons)


def matched(score_NN: Tensor) -> Tensor:
    """Return for each row a column of its own (N), the best pairs first.

    A pair is taken where each is the other's best of those that are left; the best of all always is
    """
    left_NN, found_N = score_NN.clone(), torch.full((len(score_NN),), -1)
    while (found_N < 0).any():
        best_N = left_NN.argmax(1)
        is_mutual = (left_NN.argmax(0)[best_N] == torch.arange(len(best_N))) & (found_N < 0)
        found_N[is_mutual] = best_N[is_mutual]
        left_NN[is_mutual] = -torch.inf
        left_NN[:, best_N[is_mutual]] = -torch.inf
    return found_N


def _rows(heads_H: Tensor, size: int) -> Tensor:
    """Return the rows of heads, each of so many."""
    return (heads_H[:, None] * size + torch.arange(size)).flatten()
