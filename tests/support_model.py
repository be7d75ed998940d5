"""Small models for the tests of this folder and of the contracts."""

import math
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
    ("expert_choice", {"prelude_layers": 2, "coda_layers": 2, "num_hidden_layers": 10}),
    ("random", {"prelude_layers": 0, "coda_layers": 2, "sharing": "none"}),
    ("expert_choice", {"prelude_layers": 0, "coda_layers": 2}),
    ("threshold", {"prelude_layers": 2, "coda_layers": 0}),
    ("expert_choice", {"exit_maps": True, "sharing": "none", "gating": "none"}),
    ("token_choice", {"exit_maps": True, "kv_strategy": "shared"}),
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
        if "exit_maps" in name or name.endswith("_proj.bias"):
            torch.nn.init.normal_(param, std=0.3)
    return model


def random_ids(*shape, seed=0, vocab=61):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def _run(model, implementation, ids, labels, **options):
    model.zero_grad()
    out = model(ids, labels=labels, implementation=implementation, **options)
    loss = out.loss_sum + (0 if out.router_loss_sum is None else out.router_loss_sum)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    logits = model(ids, implementation=implementation, **options).logits
    return out, logits, grads


def assert_same(model, ids, **options):
    labels = random_ids(*ids.shape, seed=5)
    fast, fast_logits, fast_grads = _run(model, "fast", ids, labels, **options)
    plain, plain_logits, plain_grads = _run(model, "reference", ids, labels, **options)
    assert torch.equal(fast.depth, plain.depth)
    torch.testing.assert_close(fast_logits, plain_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast.loss_sum, plain.loss_sum, rtol=1e-10, atol=1e-9)
    assert (fast.router_loss_sum is None) == (plain.router_loss_sum is None)
    for a, b in zip(fast.recursions, plain.recursions, strict=True):
        assert (a.num_candidates, a.num_active) == (b.num_candidates, b.num_active)
        torch.testing.assert_close(a.score_N, b.score_N, rtol=1e-9, atol=1e-12)
    for name in fast_grads.keys() | plain_grads.keys():
        zero = torch.zeros_like(dict(model.named_parameters())[name])
        a, b = fast_grads.get(name, zero), plain_grads.get(name, zero)
        scale = 1 + b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-9, atol=1e-9, msg=name)
    return fast


def naive_attention(q, k, v):
    """Causal attention, one query and head at a time."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for row in range(len(q)):
        for head in range(q.shape[1]):
            key = k[: row + 1, head // group]
            share = (key @ q[row, head] / math.sqrt(q.shape[2])).softmax(0)
            out[row, head] = share @ v[: row + 1, head // group]
    return out
