"""The table of `mor bench train`, and what it says in plain words. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from mor.bench.config import PEER
from mor.log import human_bytes, human_count

TIME_TARGET = 1.05
"""A model's time ratio over its FLOPs ratio, at most."""
MEMORY_TARGET = 0.75
"""MoR-3's saved bytes over vanilla's, at most."""

COLUMNS = ("", "FLOPs", "time", "quartiles", "time / FLOPs", "saved", "saved bytes")
MORE_COLUMNS = ("peak resident", "s per step", "tokens/s")


def print_table(result: dict[str, Any], file: TextIO) -> None:
    """Print machine, settings and rows; ratios are over vanilla's."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, title in enumerate((*COLUMNS, *MORE_COLUMNS)):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['flops_ratio']:.3f}",
            f"{row['time_ratio']:.3f}",
            f"{row['time_ratio_q1']:.3f}-{row['time_ratio_q3']:.3f}",
            f"{row['time_ratio'] / row['flops_ratio']:.3f}",
            f"{row['peak_memory_ratio']:.3f}",
            human_bytes(row["saved_bytes"]),
            human_bytes(row["peak_rss_bytes"]),
            f"{row['time_s']:.3f}",
            human_count(row["tokens_per_s"]),
        )
    console = Console(file=file, highlight=False)
    console.width = max(120, console.width)
    machine = result["machine"]
    processor = machine["processor"]
    if result["device"] != "cpu":
        processor = f"{machine['gpu']}, {processor}"
    console.print(
        f"{processor}, {machine['threads']} threads, torch {machine['torch']}, {result['dtype']}; "
        f"shape {result['shape']}, context {result['context']}, batch of "
        f"{result['batch_tokens']} tokens, median of {result['rounds']} rounds"
    )
    console.print(table)


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say whether time follows FLOPs, and how our vanilla stands to its peer."""
    lines = []
    for row in rows:
        name, time = row["name"], row["time_ratio"]
        quartiles = f"(quartiles {row['time_ratio_q1']:.2f}-{row['time_ratio_q3']:.2f})"
        if name == PEER:
            outcome = "not slower" if time >= 1 else "slower"
            lines.append(
                f"vanilla is {outcome} than transformers' Llama of the same shape, which takes "
                f"{time:.2f} of its time {quartiles}"
            )
        elif name != "vanilla":
            over = time / row["flops_ratio"]
            lines.append(
                f"{name} spends {row['flops_ratio']:.2f} of vanilla's FLOPs and {time:.2f} of its "
                f"time {quartiles}: {over:.2f} times its share, target {TIME_TARGET} "
                f"{'met' if over <= TIME_TARGET else 'missed'}"
            )
        if name == "mor3":
            saved = row["peak_memory_ratio"]
            lines.append(
                f"{name} saves {saved:.2f} of vanilla's bytes for backward, target {MEMORY_TARGET} "
                f"{'met' if saved <= MEMORY_TARGET else 'missed'}"
            )
    return lines
