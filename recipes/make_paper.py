"""Write the recipes of the Mixture-of-Recursions paper, 28 files, from one table.

    python recipes/make_paper.py

Source: arXiv 2507.10524 (Tables 3, 6, 7 and 9) and its public code for batch and schedule. Every
model has the paper's budget of 16.5e18 forward FLOPs, counted as the paper counts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.config import ModelConfig
from mor.files import write_text
from mor.model.cost import count_params, sequence_flops

FOLDER = Path(__file__).parent
CONTEXT = 2048
BATCH_TOKENS = 1024 * CONTEXT
BUDGET_FLOPS = 16.5e18
WARMUP_SHARE = 0.00605  # the public code's 57 steps of 9438 and 86 of 14161


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A base model of the paper's Table 6; heads are of size 64, embeddings tied."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


SIZES = {
    "135m": Size(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "360m": Size(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ),
    "730m": Size(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=26,
        num_attention_heads=24,
        num_key_value_heads=8,
    ),
    "1.7b": Size(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
}
VARIANTS = ("vanilla", "rec2", "rec3", "rec4", "mor2", "mor3", "mor4")
KINDS = {"vanilla": "vanilla", "rec": "fixed-depth recursive", "mor": "MoR"}

ROUTING = {
    "router": "expert_choice",
    "gating": "weighted",
    "router_alpha": 0.1,
    "router_body": "linear",
    "router_aux": "loss",
    "router_aux_loss_coef": 0.001,
    "kv_strategy": "per_recursion",
}
"""The paper's choice for expert choice; capacities are (R - r + 1) / R."""

STATED_PARAMS = {
    "135m-vanilla": "106M",
    "360m-vanilla": "315M",
    "360m-rec2": "167M",
    "360m-rec3": "118M",
    "360m-rec4": "98M",
    "360m-mor2": "167M",
    "360m-mor3": "118M",
    "360m-mor4": "98M",
    "730m-vanilla": "654M",
    "1.7b-vanilla": "1.61B",
    "1.7b-mor2": "0.87B",
    "1.7b-mor3": "0.67B",
}
"""Unique parameters without embedding that the paper prints."""

STATED_LOSS = {
    "135m-vanilla": 2.8432,
    "135m-rec3": 2.9552,
    "135m-mor3": 2.9490,
    "360m-vanilla": 2.7824,
    "360m-rec2": 2.8079,
    "360m-rec3": 2.8466,
    "360m-rec4": 2.8781,
    "360m-mor2": 2.7511,
    "360m-mor3": 2.7925,
    "360m-mor4": 2.8204,
    "730m-vanilla": 2.7048,
    "730m-rec3": 2.7886,
    "730m-mor3": 2.7438,
    "1.7b-vanilla": 2.8658,
    "1.7b-rec3": 3.0042,
    "1.7b-mor3": 2.8316,
}
"""Validation loss that the paper prints for this budget, nats per token."""


def fit_layers(base: int, num_recursions: int) -> int:
    """Return the fewest layers, not below base, of which all but two divide by the recursions."""
    return base + -(base - 2) % num_recursions


def paper_flops_per_token(model: ModelConfig) -> float:
    """FLOPs of a forward pass at context 2048, for one token, as the paper counts them.

    It ignores grouped heads (k and v count as wide as q), embedding, head, routers and norms.
    Source: recovered from the budgets and step counts of arXiv 2507.10524, Table 3 and its code;
    `mor.model.cost` counts honestly.
    """
    d, f = model.hidden_size, model.intermediate_size
    linear, attention = 2 * (4 * d * d + 3 * d * f), 2 * CONTEXT * d
    flops: float = model.num_own_layers * (linear + attention)
    for share in model.capacity:
        flops += model.num_block_layers * (share * linear + share**2 * attention)
    return flops


def model_fields(size: str, variant: str) -> dict[str, Any]:
    """Return what [model] of a recipe holds."""
    base = SIZES[size]
    recursions = 1 if variant == "vanilla" else int(variant[3:])
    fields: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "num_hidden_layers": fit_layers(base.num_hidden_layers, recursions),
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": base.num_key_value_heads,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "num_recursions": recursions,
    }
    if recursions > 1:
        fields["sharing"] = "middle_cycle"
    return fields | (ROUTING if variant.startswith("mor") else {"router": "fixed"})


def num_steps(model: ModelConfig) -> int:
    """Steps that the paper's budget allows."""
    return round(BUDGET_FLOPS / paper_flops_per_token(model) / BATCH_TOKENS)


def train_fields(model: ModelConfig) -> dict[str, Any]:
    """Return what [train] of a recipe holds: the settings of the paper's public code."""
    return {
        "budget_tokens": num_steps(model) * BATCH_TOKENS,
        "context": CONTEXT,
        "batch_tokens": BATCH_TOKENS,
        "micro_batch_tokens": 16 * CONTEXT,
        "lr": 3e-3,
        "schedule": "trapezoid",
        "warmup_share": WARMUP_SHARE,
        "decay_share": 0.2,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "eval_tokens": 500 * CONTEXT,
    }


def recipe_text(size: str, variant: str) -> str:
    """Return a recipe as it stands in its file."""
    fields = model_fields(size, variant)
    model = ModelConfig(**fields)
    train = train_fields(model)
    tables = [
        "\n".join([f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in rows.items())])
        for table, rows in (("model", fields), ("train", train))
    ]
    return "\n".join(_header(size, variant, model)) + "\n" + "\n\n".join(tables) + "\n"


def _header(size: str, variant: str, model: ModelConfig) -> list[str]:
    name = f"{size}-{variant}"
    kind = KINDS[variant.rstrip("234")]
    recursions = "" if variant == "vanilla" else f", {model.num_recursions} recursions"
    params, tokens = count_params(model), num_steps(model) * BATCH_TOKENS
    stored, rest = f"{params.unique / 1e6:.1f}M", f"{params.nonembedding / 1e6:.1f}M"
    printed = STATED_PARAMS.get(name)
    source = f"{printed} in the paper" if printed else "computed, not in the paper"
    honest = tokens * sequence_flops(model, CONTEXT) / CONTEXT
    loss = "none printed in the paper"
    if name in STATED_LOSS:
        loss = f"{STATED_LOSS[name]:.4f} nats in the paper"
        loss += ", under top-k routing" if model.has_router else ""
    return [
        f"# {size.upper()} {kind}{recursions}, as in arXiv 2507.10524. Written by make_paper.py.",
        f"# Layers: {model.num_hidden_layers} unrolled, {model.num_unique_layers} stored.",
        f"# Parameters: {stored} stored, {rest} without embedding ({source}).",
        f"# Cost: {num_steps(model)} steps, {tokens / 1e9:.1f}B tokens; "
        f"{BUDGET_FLOPS / 1e18:g}e18 forward FLOPs as the paper counts,",
        f"# {honest / 1e18:.1f}e18 with grouped heads, routers and head. "
        "Training takes three times as many.",
        "# Data: fineweb-edu-dedup of smollm-corpus, prepared with the SmolLM tokenizer (49,152",
        "# entries; the vocabulary follows the data, and with it the parameters stored).",
        f"# Expected loss: {loss}; no run of ours yet.",
    ]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:_}" if isinstance(value, int) and value >= 1_000_000 else f"{value:g}"


def all_recipes() -> dict[str, str]:
    """Return every file's name and text."""
    return {
        f"paper-{size}-{variant}.toml": recipe_text(size, variant)
        for size in SIZES
        for variant in VARIANTS
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, text in all_recipes().items():
        write_text(FOLDER / name, text)


if __name__ == "__main__":
    main()
