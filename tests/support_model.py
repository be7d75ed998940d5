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
    ("token_choice", "weighted"),
    ("token_choice", "residual"),
    ("token_choice", "additive"),
    ("random", "weighted"),
    ("random", "residual"),
    ("random", "none"),
]
MOST_TARGETS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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
    ("token_choice", {"router_score": "sigmoid", "router_bias": True}),
    ("token_choice", {"router_balance": "bias", "router_z_loss_coef": 0.3}),
    ("token_choice", {"router_body": "mlp", "router_score": "sigmoid", "gating": "residual"}),
    ("token_choice", {"sharing": "none", "gating": "none"}),
    ("token_choice", {"kv_strategy": "shared"}),
    ("expert_choice", {"kv_strategy": "shared", "gating": "residual"}),
    ("expert_choice", {"kv_strategy": "hybrid"}),
    ("threshold", {"kv_strategy": "shared"}),
    ("threshold", {"kv_strategy": "hybrid", "relax_norms": True}),
    ("random", {"kv_strategy": "hybrid", "gating": "none"}),
    ("expert_choice", {"relax_norms": True, "recursion_encoding": True, "lora_rank": 2}),
    ("token_choice", {"kv_strategy": "shared", "lora_rank": 3, "lora_targets": MOST_TARGETS}),
    ("fixed", {"kv_strategy": "shared", "relax_norms": True}),
    ("fixed", {"lora_rank": 2, "recursion_encoding": True}),
]
KINDS = [*ROUTED, ("fixed", "none")]
THRESHOLDED = ("expert_choice", "threshold")


def small_config(router="expert_choice", gating="auto", **fields: Any) -> ModelConfig:
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


def small_model(router="expert_choice", gating="auto", seed=0, **fields: Any) -> MoR:
    """A model in float64 with weights large enough that routing and attention matter."""
    torch.manual_seed(seed)
    model = MoR(small_config(router, gating, **fields)).double()
    for name, param in model.named_parameters():  # what starts at 0 or 1 would hide mistakes
        if "norm" in name or "recursion_" in name:
            torch.nn.init.normal_(param, mean=0.0 if "recursion_B" in name else 1.0, std=0.3)
    return model


def random_ids(*shape, seed=0, vocab=61):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
