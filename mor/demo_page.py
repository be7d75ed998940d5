"""The demo's table, its verdict in plain words, and its HTML report."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch

from mor.data.loader import PreparedData
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.log import human_bytes, human_count
from mor.model.mor import MoR
from mor.ops.device import describe_machine
from mor.report import (
    Section,
    TokenDepth,
    curves_svg,
    depth_text_html,
    histogram_svg,
    render_page,
    table_html,
)
from mor.train.metrics import read_metrics

PAGE_TOKENS = 256
NOISE = 0.02
"""Bits per byte by which a seed alone moves a result of the demo's size."""
TIE = 0.02
"""Share by which times and peaks of one machine may differ and be called equal."""

COLUMNS = (
    ("unique parameters", "params_unique", human_count),
    ("tokens seen", "tokens", human_count),
    ("bits per byte", "bits_per_byte", "{:.3f}".format),
    ("mean depth", "mean_depth", "{:.2f}".format),
    ("training s", "train_seconds", "{:.0f}".format),
    ("peak memory", "peak_bytes", human_bytes),
    ("KV per token", "kv_bytes_per_token", human_bytes),
    ("generated tokens/s", "decode_tokens_per_s", "{:.0f}".format),
)
BEST_IS_LESS = {"params_unique", "bits_per_byte", "train_seconds", "peak_bytes"} | {
    "kv_bytes_per_token"
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Say in plain words where MoR wins and where it loses, with the numbers."""
    by_name = {row["name"]: row for row in rows}
    mor = by_name["mor"]
    lines = []
    for other, label in (
        ("mor-random", "the same with a random router"),
        ("vanilla", "its vanilla twin"),
        ("recursive", "its fixed-depth recursive twin"),
    ):
        gap = mor["bits_per_byte"] - by_name[other]["bits_per_byte"]
        outcome = "MoR wins" if gap < 0 else "MoR loses"
        if abs(gap) < NOISE:
            outcome = f"a tie, one seed moves it by {NOISE}"
        lines.append(f"MoR minus {label}: {gap:+.4f} bits per byte, causal: {outcome}")
    bits = mor.get("bits_per_byte_up_to_depth")  # a quick run leaves it out
    if bits:
        depths = ", ".join(str(depth) for depth in range(1, len(bits) + 1))
        lines.append(
            f"what depth is worth: {', '.join(f'{b:.4f}' for b in bits)} bits per byte when tokens "
            f"may take at most {depths} recursions"
        )
    vanilla = by_name["vanilla"]
    for label, key, less in (
        ("unique parameters", "params_unique", True),
        ("training time", "train_seconds", True),
        ("peak memory", "peak_bytes", True),
        ("keys and values per token", "kv_bytes_per_token", True),
        ("generated tokens per second", "decode_tokens_per_s", False),
    ):
        ratio = mor[key] / vanilla[key] if vanilla[key] else math.nan
        outcome = "MoR wins" if (ratio < 1) == less else "MoR loses"
        if abs(ratio - 1) < TIE:
            outcome = "a tie"
        lines.append(f"{label}: {ratio:.2f} of the vanilla twin's: {outcome}")
    return lines


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title, _, _ in COLUMNS:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row["label"], *(show(row[key]) for _, key, show in COLUMNS))
    Console(stderr=True, highlight=False, width=max(120, Console().width)).print(table)


def report_page(
    out: Path,
    rows: list[dict[str, Any]],
    models: dict[str, MoR],
    data: PreparedData,
    command: str,
    seconds: float,
    failure: str | None,
    quick: bool,
) -> str:
    best = set()
    for column, (_, key, _) in enumerate(COLUMNS, start=1):
        if key in BEST_IS_LESS or key == "decode_tokens_per_s":
            choose = min if key in BEST_IS_LESS else max
            target = choose(row[key] for row in rows)
            best |= {(index, column) for index, row in enumerate(rows) if row[key] == target}
    table = table_html(
        ["model", *(title for title, _, _ in COLUMNS)],
        [[row["label"], *(show(row[key]) for _, key, show in COLUMNS)] for row in rows],
        best=best,
        caption=f"Trained for {rows[0]['train_flops']:.2g} FLOPs each, same data order",
    )
    said = "".join(f"<li>{line}</li>" for line in verdict(rows))
    if failure:
        said = f"<li><strong>{failure}</strong></li>" + said
    series, shares = {}, {}
    for row in rows:
        lines = [
            line for line in read_metrics(out / row["name"] / "metrics.jsonl") if "loss" in line
        ]
        flops = [line["train_flops"] for line in lines]
        series[row["label"]] = (flops, smooth([line["loss"] for line in lines]))
        active = [*row["active_share"], 0.0]
        if row["num_recursions"] > 1:
            shares[row["label"]] = [a - b for a, b in itertools.pairwise(active)]
    manifest = data.manifest
    tokens_per_param = rows[0]["tokens"] / rows[0]["params_nonembedding"]
    sections = [
        Section(
            "Same FLOPs, side by side",
            f"{table}<ul>{said}</ul>",
            "Bits per byte are measured on text that no model saw, with the depth of every token "
            f"decided from its past alone. With {tokens_per_param:.1f} tokens per parameter all "
            "models are starved; the shared ones see more tokens for the same FLOPs, which favours "
            "them here." + (" A quick run: the numbers say little." if quick else ""),
        ),
        Section(
            "Training loss against FLOPs spent",
            curves_svg(series, x_label="training FLOPs", y_label="loss, nats per token"),
            "Running mean. The routed models train with top-k routing; their causal loss is the "
            "one in the table.",
        ),
        Section(
            "How deep tokens go",
            histogram_svg(shares, x_label="depth", y_label="share of tokens"),
            "Held-out text, causal routing.",
        ),
        Section("Held-out text, coloured by depth", _depth_page(models["mor"], data)),
        Section(
            "A sample",
            _sample(models["mor"], data),
            "From nothing, at temperature 0.8; every token coloured by its depth.",
        ),
    ]
    text_bytes = sum(split.bytes for split in manifest.splits.values())
    described = {**describe_machine(), "corpus sha256": manifest.corpus_sha256}
    subtitle = (
        f"{manifest.source}; {human_bytes(text_bytes)} of text, "
        f"vocabulary of {manifest.vocab_size}; {seconds:.0f} seconds in all"
    )
    return render_page("mor demo", subtitle, sections, command=command, machine=described)


def smooth(values: list[float], *, keep: float = 0.8) -> list[float]:
    """Return the running mean of values, unbiased at the start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


@torch.inference_mode()
def _depth_page(model: MoR, data: PreparedData) -> str:
    """Colour the first held-out tokens by the depth that the causal rule gives them."""
    ids = data.split("val").read(0, PAGE_TOKENS)
    depths = model(torch.from_numpy(ids)[None], rule="causal").depth[0].tolist()
    return _coloured(ids.tolist(), depths, model, data)


def _sample(model: MoR, data: PreparedData) -> str:
    params = SamplingParams(max_tokens=200, temperature=0.8, top_p=0.95, seed=0)
    (output,) = Engine(model).generate([[data.manifest.eos_token_id]], params)
    answer = output.outputs[0]
    # The last token of an answer is never run, so nobody knows its depth.
    return _coloured(answer.token_ids[: len(answer.depths)], answer.depths, model, data)


def _coloured(ids: list[int], depths: list[int], model: MoR, data: PreparedData) -> str:
    pieces = data.tokenizer().pieces(ids)
    tokens = [TokenDepth(text, depth) for text, depth in zip(pieces, depths, strict=True)]
    return depth_text_html(tokens, model.config.num_recursions)
