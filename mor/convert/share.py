"""Weights of the converted model out of the parent's, one at a time.

The parent's layers that are kept stand for the unrolled ones: prelude, R times the block, coda. A
shared layer stands for several of them. Source of the initialisations: Relaxed Recursive
Transformers, arXiv 2410.20672.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mor.config import ModelConfig
from mor.convert.align import Heads, Read, aligned
from mor.convert.config import ConvertConfig, Init

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EVERYONE = -1.0
"""a threshold below every score"""


class Source(NamedTuple):
    """Which of the parent's layers a stored layer stands for."""

    layers: tuple[int, ...]
    """for a shared one, those of recursion 1, 2, .. R"""
    pick: int | None
    """the parent's layer to copy; None for an average or random weights"""


def kept_layers(parent: ModelConfig, config: ConvertConfig) -> list[int]:
    """Return the parent's layers without those that are dropped; ValueError for one it has not."""
    for layer in config.drop_layers:
        if not 0 <= layer < parent.num_hidden_layers:
            raise ValueError(
                f"drop_layers holds {layer}; the parent has layers 0 to "
                f"{parent.num_hidden_layers - 1}"
            )
    return [i for i in range(parent.num_hidden_layers) if i not in config.drop_layers]


def sources(model: ModelConfig, kept: list[int], init: Init) -> list[Source]:
    """Say for every stored layer where it comes from."""
    prelude, coda, K = model.num_prelude_layers, model.num_coda_layers, model.num_block_layers
    found = [Source((kept[i],), kept[i]) for i in range(prelude)]
    block = kept[prelude : len(kept) - coda]
    served: dict[int, list[int]] = {}
    for r in range(model.num_recursions):
        for place in range(K):
            served.setdefault(model.block_layer(r, place), []).append(block[r * K + place])
    count = len(served)
    for place, stored in enumerate(sorted(served)):
        layers = tuple(served[stored])
        pick: int | None = None
        if len(layers) == 1:
            pick = layers[0]
        elif init == "stepwise":
            pick = block[round(place * (len(block) - 1) / max(1, count - 1))]
        elif init == "lower":
            pick = block[place]
        elif init == "upper":
            pick = block[len(block) - count + place]
        found.append(Source(layers, pick))
    found += [Source((layer,), layer) for layer in kept[len(kept) - coda :]]
    return found


def converted(
    name: str,
    shape: tuple[int, ...],
    model: ModelConfig,
    found: list[Source],
    init: Init,
    read: Read,
) -> Tensor:
    """Return a weight of the converted model, in fp32 or wider.

    name, shape  in the converted model
    read         the parent's weight by name
    """
    if name.startswith("model.exit_maps."):
        return torch.zeros(shape)
    if ".routers." in name:
        if name.endswith("body.0.weight"):  # behind it zeros, which learn only from what is drawn
            return torch.randn(shape) * model.initializer_range
        value = EVERYONE if name.endswith("threshold") else 0.0
        return torch.full(shape, value)
    match = LAYER.fullmatch(name)
    if match is None:
        return read(name).float() if name != "model.recursion_encoding" else torch.ones(shape)
    source, part = found[int(match[1])], match[2]
    if part.endswith(("recursion_A", "recursion_B")):
        return _addition(part, shape, model, source, init, read)
    if len(shape) == 2 and "norm" in part:  # gains of each recursion's own
        return torch.stack([read(f"model.layers.{i}.{part}").float() for i in source.layers])
    if source.pick is not None:
        return read(f"model.layers.{source.pick}.{part}").float()
    if init == "random":
        is_gain = "norm" in part
        return torch.ones(shape) if is_gain else torch.randn(shape) * model.initializer_range
    return _average(source.layers, part, _heads(model), read)


def _heads(model: ModelConfig) -> Heads:
    return Heads(model.num_attention_heads, model.num_key_value_heads, model.head_dim)


def _average(layers: Sequence[int], part: str, heads: Heads, read: Read) -> Tensor:
    """Return the mean of the parent's layers, heads and neurons in the order of the first's."""
    total = aligned(read, heads, layers[0], layers[0], part)
    for layer in layers[1:]:
        total = total + aligned(read, heads, layers[0], layer, part)
    return total / len(layers)


def _addition(
    part: str,
    shape: tuple[int, ...],
    model: ModelConfig,
    source: Source,
    init: Init,
    read: Read,
) -> Tensor:
    """Return the low-rank additions of a shared layer, R of them.

    svd: what each of the parent's layers differs by from the average, its best of that rank; else
    additions that add nothing yet, as LoRA begins.
    """
    is_first = part.endswith("recursion_A")
    if init != "svd":
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound) if is_first else torch.zeros(shape)
    weight = part.rpartition(".")[0] + ".weight"
    scale = model.lora_alpha / model.lora_rank
    pairs = _residuals(source.layers, weight, _heads(model), model.lora_rank, scale, read)
    return torch.stack([pair[0 if is_first else 1] for pair in pairs])


@functools.lru_cache(maxsize=1)  # A and B of a projection are asked for one after the other
def _residuals(
    layers: tuple[int, ...], part: str, heads: Heads, rank: int, scale: float, read: Read
) -> list[tuple[Tensor, Tensor]]:
    """Return (A, B) of what each layer differs by from their average, the best of that rank."""
    mean = _average(layers, part, heads, read)
    pairs = []
    for layer in layers:
        residual = aligned(read, heads, layers[0], layer, part) - mean
        left, size, right = torch.linalg.svd(residual, full_matrices=False)
        root = (size[:rank] / scale).sqrt()
        pad = rank - len(root)  # a rank above that of the matrix
        a_rI = F.pad(root[:, None] * right[:rank], (0, 0, 0, pad))
        pairs.append((a_rI, F.pad(left[:, :rank] * root, (0, pad))))
    return pairs
