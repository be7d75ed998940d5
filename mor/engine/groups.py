"""Which implementation runs the layers: compiled kernels where there are any, else torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mor.engine.blocks import Layout
from mor.engine.config import EngineConfig
from mor.engine.layers import LayerGroups, TorchGroups
from mor.engine.native_groups import NativeGroups
from mor.model.mor import MoR
from mor.ops.native import library


def build_groups(model: MoR, pool: Tensor, layout: Layout, config: EngineConfig) -> LayerGroups:
    """Return what runs the model's layers on this pool of pages.

    Raises ValueError when compiled kernels are asked for and cannot be had
    """
    sizes = (layout.own_page_tokens if layout.own_layers else 0, layout.block_page_tokens)
    fits = pool.device.type == "cpu" and pool.dtype in (torch.bfloat16, torch.float32)
    kernels = library.load() if fits and config.backend != "torch" else None
    if kernels is not None:
        return NativeGroups(model, pool, sizes, kernels)
    if config.backend == "native":
        raise ValueError(
            f"backend native is not to be had on {pool.device.type} with {pool.dtype}; use torch"
        )
    return TorchGroups(model, pool, sizes)
