"""Which implementation runs the layers: compiled kernels where they can be had, else plain torch."""

from __future__ import annotations

from torch import Tensor

from mor.engine.blocks import Layout
from mor.engine.config import EngineConfig
from mor.engine.layers import LayerGroups, TorchGroups
from mor.model.mor import MoR


def build_groups(model: MoR, pool: Tensor, layout: Layout, config: EngineConfig) -> LayerGroups:
    """Return what runs the model's layers on this pool of pages."""
    sizes = (layout.own_page_tokens if layout.own_layers else 0, layout.block_page_tokens)
    return TorchGroups(model, pool, sizes)
