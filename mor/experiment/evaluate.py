"""What is measured of a trained member: causal loss by row, the leak of top-k, depth by token.

Shapes: B rows, T tokens of a row, R recursions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mor.data.loader import Batch, PreparedData, sequential_batches
from mor.evals.depth import bounded_depth
from mor.model.cost import kv_bytes_per_token
from mor.model.mor import MoR
from mor.model.router import Rule
from mor.tokenizer import Tokenizer

BATCH_LOGITS = 2**25
"""logits of a pass at most"""
EXAMPLES = 12
SEEN_AT_LEAST = 20
"""times that a token must stand in the text to be an example"""

_WORDS = (
    "a about after all also an and any are as at be been but by can could did do does for from had "
    "has have he her his how i if in into is it its may more most no not of on one or other our "
    "she should so some such than that the their them then there these they this those to up was "
    "we were what when where which while who will with would you your"
)
FUNCTION_WORDS = frozenset(_WORDS.split())
CLASSES = ("function word", "other word", "rest of a word", "number", "punctuation", "space")


class Pass(NamedTuple):
    """One pass over a text."""

    loss_BT: Tensor
    """nats of the token after each"""
    depth_BT: Tensor
    token_BT: Tensor
    num_recursions: int

    @property
    def loss(self) -> float:
        return float(self.loss_BT.double().mean())

    @property
    def mean_depth(self) -> float:
        return float(self.depth_BT.double().mean())

    @property
    def active(self) -> list[float]:
        """Share of tokens active at each recursion."""
        return [float((self.depth_BT > r).double().mean()) for r in range(self.num_recursions)]


def evaluate(model: MoR, data: PreparedData, *, context: int, eval_tokens: int) -> dict[str, Any]:
    """Measure a model on so many validation tokens, spread evenly; it is left in evaluation mode.

    Returns what a result line holds: losses in nats per token, by row too, depths, examples
    """
    model.eval()
    text = _Text(data, model, context=context, eval_tokens=eval_tokens)
    causal = text.run(model, "val")
    val = data.split("val")
    report: dict[str, Any] = {
        "val_loss": causal.loss,
        "val_tokens": causal.loss_BT.numel(),
        "bits_per_byte": causal.loss / math.log(2) * val.tokens / val.bytes,
        "heldout_loss": text.run(model, "heldout").loss,
        "mean_depth": causal.mean_depth,
        "active_share": causal.active,
        "repeats": _repeats(causal, text.batches("val")),
        "row_loss": [round(loss, 5) for loss in causal.loss_BT.double().mean(1).tolist()],
        "kv_bytes_per_token": kv_bytes_per_token(
            model.config, element_bytes=2, active=causal.active
        ),
    }
    if model.config.router in ("expert_choice", "threshold"):
        if model.config.router == "expert_choice":
            peeking = text.run(model, "val", "train")
            report["top_k_loss"] = peeking.loss
            report["top_k_mean_depth"] = peeking.mean_depth
        report["loss_up_to_depth"] = [
            _loss_up_to(model, text, most) for most in range(1, model.config.num_recursions + 1)
        ]
    if model.config.router not in ("fixed", "random"):
        report.update(depth_by_token(causal, data.tokenizer()))
    return report


class _Text:
    """Rows of the held texts."""

    def __init__(self, data: PreparedData, model: MoR, *, context: int, eval_tokens: int) -> None:
        self.data, self.context, self.eval_tokens = data, context, eval_tokens
        self.batch_rows = max(1, BATCH_LOGITS // (context * model.config.vocab_size))

    def batches(self, split: str) -> Iterator[Batch]:
        return sequential_batches(
            self.data.split(split),
            row_tokens=self.context,
            batch_rows=self.batch_rows,
            eos_token_id=self.data.manifest.eos_token_id,
            limit_rows=max(1, self.eval_tokens // self.context),
        )

    def run(self, model: MoR, split: str, rule: Rule = "causal") -> Pass:
        return run_pass(model, self.batches(split), rule)


@torch.inference_mode()
def run_pass(model: MoR, batches: Iterator[Batch], rule: Rule = "causal") -> Pass:
    """Run batches in the model's own type. The rule `train` peeks at the future: name it so."""
    losses, depths, tokens = [], [], []
    for batch in batches:
        batch = batch.to(model.device)
        out = model(batch.input_ids_BT, segments=batch.segment_BT, rule=rule)
        assert out.logits is not None
        loss_N = F.cross_entropy(
            out.logits.flatten(0, 1).float(), batch.labels_BT.flatten(), reduction="none"
        )
        losses.append(loss_N.view_as(batch.labels_BT).cpu())
        depths.append(out.depth.cpu())
        tokens.append(batch.input_ids_BT.cpu())
    return Pass(
        torch.cat(losses), torch.cat(depths), torch.cat(tokens), model.config.num_recursions
    )


def repeats_of(batch: Batch) -> Tensor:
    """Say of each label whether it has followed its token before in the row's document.

    Such a label can be copied, which small models learn late, and some hardly.
    Returns (B, T) bool
    """
    token_BT, label_BT = batch.input_ids_BT, batch.labels_BT
    segment_BT = torch.zeros_like(token_BT) if batch.segment_BT is None else batch.segment_BT
    repeat_BT = torch.zeros(token_BT.shape, dtype=torch.bool)
    for row, pairs in enumerate(torch.stack((segment_BT, token_BT, label_BT), -1).tolist()):
        seen: set[tuple[int, ...]] = set()
        for t, pair in enumerate(map(tuple, pairs)):
            repeat_BT[row, t] = pair in seen
            seen.add(pair)
    return repeat_BT


def _repeats(run: Pass, batches: Iterator[Batch]) -> dict[str, float] | None:
    """Share of the labels that repeat, and the losses of these and of the others."""
    repeat_BT = torch.cat([repeats_of(batch) for batch in batches])
    repeats, others = run.loss_BT[repeat_BT], run.loss_BT[~repeat_BT]
    if not len(repeats) or not len(others):
        return None
    losses = {"loss": float(repeats.double().mean()), "others": float(others.double().mean())}
    return {"share": len(repeats) / run.loss_BT.numel(), **losses}


def _loss_up_to(model: MoR, text: _Text, most: int) -> float:
    with bounded_depth(model, most=most):
        return text.run(model, "val").loss


def depth_by_token(run: Pass, tokenizer: Tokenizer) -> dict[str, Any]:
    """Say which tokens go deep: by class, and the tokens that are deepest and shallowest.

    Returns `depth_by_class`: class -> {share, mean_depth, loss}; `deepest` and `shallowest`:
    [text, mean depth, times]
    """
    depth, loss = run.depth_BT.flatten().tolist(), run.loss_BT.flatten().tolist()
    tokens = run.token_BT.flatten().tolist()
    names = {token: tokenizer.decode([token]) for token in set(tokens)}
    kinds = {token: class_of(text) for token, text in names.items()}
    by_class: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    by_token: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for token, d, nats in zip(tokens, depth, loss, strict=True):
        sums = by_class[kinds[token]]
        sums[0], sums[1], sums[2] = sums[0] + 1, sums[1] + d, sums[2] + nats
        by_token[token][0] += 1
        by_token[token][1] += d
    ranked = sorted(
        (
            (total / count, count, token)
            for token, (count, total) in by_token.items()
            if count >= SEEN_AT_LEAST
        ),
        key=lambda one: (one[0], -one[1], one[2]),
    )

    def told(some: list[tuple[float, int, int]]) -> list[list[Any]]:
        return [[names[token], round(mean, 3), count] for mean, count, token in some]

    return {
        "depth_by_class": {
            name: {
                "share": by_class[name][0] / len(tokens),
                "mean_depth": by_class[name][1] / by_class[name][0],
                "loss": by_class[name][2] / by_class[name][0],
            }
            for name in CLASSES
            if name in by_class
        },
        "deepest": told(ranked[-EXAMPLES:][::-1]),
        "shallowest": told(ranked[:EXAMPLES]),
    }


def class_of(text: str) -> str:
    """Return the class of a token by its text; a word begins with a space or a capital."""
    bare = text.strip()
    if not bare:
        return "space"
    if not any(c.isalnum() for c in bare):
        return "punctuation"
    if any(c.isdigit() for c in bare):
        return "number"
    if bare.lower() in FUNCTION_WORDS and (text[0].isspace() or text[0].isupper()):
        return "function word"
    return "other word" if text[0].isspace() or text[0].isupper() else "rest of a word"
