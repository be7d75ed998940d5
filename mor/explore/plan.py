"""What a recipe will cost, before any training, beside its vanilla twin of equal layers."""

from __future__ import annotations

import sys
from typing import Any

from mor.config import ModelConfig
from mor.log import human_bytes, human_count
from mor.model import cost
from mor.train.config import Recipe, TrainConfig, check_context, check_routing

ELEMENT_BYTES = 2  # served weights, keys and values in bf16


def plan(model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    """Predict the cost of a model and, under `twin_` names, of its vanilla twin.

    flops_per_token is the forward pass at the recipe's context; training is three times that.
    """
    Recipe(model=model, train=train)  # what training would refuse
    check_context(model, train)
    check_routing(model, train)
    own = _costs(model, train)
    twin = {f"twin_{name}": value for name, value in _costs(model.twin(), train).items()}
    steps = train.num_steps(model)
    tokens = steps * train.batch_tokens
    return {
        **own,
        **twin,
        "vocab_size": model.vocab_size,
        "mean_depth": model.capacity_depth,
        "context": train.context,
        "steps": steps,
        "tokens": tokens,
        "tokens_per_parameter": tokens / own["params_nonembedding"],
        "train_flops": cost.training_flops(
            model,
            train.context,
            steps=steps,
            batch_tokens=train.batch_tokens,
            shallow_steps=cost.num_shallow_steps(steps, train.shallow_share),
            freeze=train.freeze,
        ),
        "element_bytes": ELEMENT_BYTES,
    }


def _costs(model: ModelConfig, train: TrainConfig) -> dict[str, float]:
    params = cost.count_params(model)
    forward = cost.sequence_flops(model, train.context) / train.context
    return {
        "params_unique": params.unique,
        "params_nonembedding": params.nonembedding,
        "params_effective": params.effective,
        "flops_per_token": forward,
        "train_flops_per_token": cost.training_flops_per_token(
            model, train.context, freeze=train.freeze
        ),
        "decode_flops_per_token": cost.decode_flops_per_token(model, train.context),
        "kv_bytes_per_token": cost.kv_bytes_per_token(model, element_bytes=ELEMENT_BYTES),
        "weight_bytes_per_token": cost.weight_bytes_per_step(model, element_bytes=ELEMENT_BYTES),
        "train_peak_bytes": cost.training_bytes(
            model,
            micro_batch_tokens=train.micro_batch_tokens or train.batch_tokens,
            recompute=train.recompute,
            optimizer=train.optimizer,
            freeze=train.freeze,
        ),
    }


ROWS = (
    ("parameters stored", "params_unique", human_count),
    ("  without embedding", "params_nonembedding", human_count),
    ("  passed at full depth", "params_effective", human_count),
    ("FLOPs per token, forward", "flops_per_token", human_count),
    ("FLOPs per token, training", "train_flops_per_token", human_count),
    ("FLOPs per decoded token", "decode_flops_per_token", human_count),
    ("keys and values per token", "kv_bytes_per_token", human_bytes),
    ("weights read per token", "weight_bytes_per_token", human_bytes),
    ("training memory, estimate", "train_peak_bytes", human_bytes),
)


def print_plan(result: dict[str, Any]) -> None:
    """Print the plan as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "this recipe", "vanilla twin", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for label, key, show in ROWS:
        mine, twin = result[key], result[f"twin_{key}"]
        table.add_row(label, show(mine), show(twin), f"{mine / twin:.2f}")
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    console.print(
        f"\nvocabulary {result['vocab_size']}, where the recipe gives none that of the data in "
        f"training; mean depth {result['mean_depth']:.2f}; context {result['context']}; "
        f"{result['steps']} steps, {human_count(result['tokens'])} tokens "
        f"({result['tokens_per_parameter']:.1f} per non-embedding parameter), "
        f"{human_count(result['train_flops'])}FLOPs. Weights, keys and values in bf16."
    )
