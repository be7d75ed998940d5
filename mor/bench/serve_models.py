"""The models that are served: a MoR, trained or fresh, and its vanilla twin; a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mor.bench.serve_config import ServeSettings, served_config
from mor.checkpoint import load_model
from mor.model.mor import MoR
from mor.ops.device import describe_machine
from mor.train.metrics import peak_memory_bytes


def build_model(
    config: ServeSettings, recursions: int, *, dtype: torch.dtype, device: torch.device
) -> MoR:
    """Load the trained model, or make one of the shape with fresh weights."""
    if config.model is not None:
        model = load_model(config.model, dtype=dtype, device=device)
        if model.config.num_recursions == 1:
            raise ValueError(
                f"{config.model} has one recursion; give a MoR, its twin runs beside it"
            )
        return model
    torch.manual_seed(config.seed)
    model = served_config(config.shape, recursions, config.routing)
    return MoR(model).to(dtype=dtype, device=device).eval()


def build_twin(mor: MoR, seed: int) -> MoR:
    """Make the vanilla model of equal unrolled layers; its time does not depend on its weights."""
    torch.manual_seed(seed)
    weight = mor.model.embed_tokens.weight
    return MoR(mor.config.twin()).to(dtype=weight.dtype, device=weight.device).eval()


def about(config: ServeSettings, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a result must be read with: machine, types, memory and settings."""
    names = [name for one in type(config).__mro__ for name in getattr(one, "__slots__", ())]
    settings = {name: getattr(config, name) for name in names}
    return {
        "machine": describe_machine(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "peak_memory_bytes": peak_memory_bytes(device),
        "settings": {
            **{key: str(v) if isinstance(v, Path) else v for key, v in settings.items()},
            "rounds": config.num_rounds,
        },
    }
