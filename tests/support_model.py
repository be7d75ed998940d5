"""Small models for the tests of this folder and of the contracts."""

from typing import Any

import torch

from mor.config import ModelConfig
from mor.model.mor import MoR

ROUTED = [
    ("expert_choice", "weighted"),
    ("expert_choice", "residual"),
    ("expert_choice", "additive"),
    ("expert_choice", "none"),
    ("threshold", "weighted"),
    ("threshold", "residual"),
    ("random", "weighted"),
    ("random", "residual"),
    ("random", "none"),
]
# Options of a router that change its numbers, each with a router that has them.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("expert_choice", {"router_body": "mlp"}),
    ("expert_choice", {"router_body": "wide_mlp", "router_bias": True}),
    ("expert_choice", {"router_aux": "router", "router_body": "mlp"}),
    ("expert_choice", {"router_aux": "router", "router_z_loss_coef": 0.3}),
    ("expert_choice", {"capacity_warmup_steps": 4}),
    ("expert_choice", {"sharing": "none"}),
    ("threshold", {"router_bias": True, "router_z_loss_coef": 0.3}),
    ("threshold", {"capacity_warmup_steps": 4, "sharing": "none"}),
    ("random", {"router_body": "mlp", "sharing": "none"}),
]
KINDS = [*ROUTED, ("fixed", "none")]
THRESHOLDED = ("expert_choice", "threshold")


def small_config(router="expert_choice", gating="weighted", **fields: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_recursions": 3,
        "router": router,
        "gating": gating,
        "initializer_range": 0.3,
        "router_aux_loss_coef": 1.0,
    }
    return ModelConfig(**{**values, **fields})


def small_model(router="expert_choice", gating="weighted", seed=0, **fields: Any) -> MoR:
    """A model in float64 with weights large enough that routing and attention matter."""
    torch.manual_seed(seed)
    return MoR(small_config(router, gating, **fields)).double()


def random_ids(*shape, seed=0, vocab=61):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
