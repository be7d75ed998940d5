"""Loss and bits per byte of a model folder on prepared text, under the causal rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor.checkpoint import load_model
from mor.data.loader import PreparedData, sequential_batches
from mor.log import logger, progress
from mor.model.mor import MoR
from mor.model.router import Rule
from mor.ops.device import pick_device
from mor.train.heldout import HeldoutResult, measure_loss

BATCH_TOKENS = 8192
MOST_CONTEXT = 2048


def evaluate_folder(
    folder: Path,
    data_folder: Path,
    *,
    split: str = "val",
    limit_tokens: int = 0,
    context: int = 0,
    also_top_k: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure a split; returns loss in nats per token, bits per byte, mean depth and shares.

    Every token is predicted once, from the tokens before it in its row and document. Bits per byte
    take the bytes per token of the whole split.
    Raises ValueError when the data has another tokenizer, or the context is longer than trained.
    """
    model = load_model(folder, device=pick_device(device))
    data = PreparedData.open(data_folder)
    context = check_lengths([model], limit_tokens=limit_tokens, context=context)
    data.check_model(folder, model.config)
    tokens = data.split(split)

    def measure(rule: Rule) -> HeldoutResult:
        return measure_split(
            model, data, split, limit_tokens=limit_tokens, context=context, rule=rule
        )

    result = measure("causal")
    tokens_per_byte = tokens.tokens / tokens.bytes
    report: dict[str, Any] = {
        "model": str(folder),
        "split": split,
        "routing": "causal",
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": math.exp(min(result.loss, 700)),
        "bits_per_byte": result.bits_per_byte(tokens_per_byte),
        "mean_depth": result.mean_depth,
        "active_share": list(result.active),
    }
    logger.info(
        "%s: loss %.4f nats per token, %.4f bits per byte, mean depth %.3f (causal routing)",
        split,
        result.loss,
        report["bits_per_byte"],
        result.mean_depth,
    )
    if also_top_k:
        peek = measure("train")
        report["top_k_bits_per_byte"] = peek.bits_per_byte(tokens_per_byte)
        report["top_k_mean_depth"] = peek.mean_depth
        logger.info(
            "%s: %.4f bits per byte at mean depth %.3f with top-k routing, which chose depths by "
            "looking at future tokens: no result, shown to measure that leak",
            split,
            report["top_k_bits_per_byte"],
            peek.mean_depth,
        )
    return report


def check_lengths(models: Sequence[MoR], *, limit_tokens: int, context: int) -> int:
    """Return the tokens of a row, the same for all models; ValueError for what does not fit."""
    most = min(model.config.max_position_embeddings for model in models)
    if context > most:
        raise ValueError(f"context {context} is longer than trained ({most}); give {most} or less")
    if limit_tokens < 0 or context < 0:
        raise ValueError("--limit-tokens and --context take 0 or more")
    return context or min(most, MOST_CONTEXT)


def measure_split(
    model: MoR,
    data: PreparedData,
    split: str,
    *,
    context: int,
    limit_tokens: int = 0,
    rule: Rule = "causal",
) -> HeldoutResult:
    """Measure a model on a split, or on so many tokens spread evenly over it."""
    tokens = data.split(split)
    rows = max(1, tokens.rows(context))
    if limit_tokens:
        rows = min(rows, max(1, limit_tokens // context))
    batches = sequential_batches(
        tokens,
        row_tokens=context,
        batch_rows=max(1, BATCH_TOKENS // context),
        eos_token_id=data.manifest.eos_token_id,
        limit_rows=rows,
    )
    with progress(f"eval {split} ({rule})", rows) as bar:

        def counted() -> Any:
            for batch in batches:
                yield batch
                bar.advance(len(batch.input_ids_BT))

        return measure_loss(model, counted(), rule=rule)
