"""The tables of `mor bench decode` and `prefill`, and what they say in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from mor.bench.serve_config import EFFICIENCY_TARGET, MAX_EFFICIENCY
from mor.log import human_bytes, human_count

DECODE_COLUMNS = (
    "in flight",
    "tokens/s",
    "efficiency",
    "first ms p50/p99",
    "next ms p50/p95/p99",
    "depth",
    "KV",
    "most",
    "longest",
)
PEER_COLUMNS = ("batch", "tokens/s", "the twin is quicker by")
PREFILL_COLUMNS = (
    "prompt",
    "times twin",
    "quartiles",
    "tokens/s",
    "twin's",
    "efficiency",
    "twin's",
    "first token ms",
    "twin's",
)


def print_decode(result: dict[str, Any], file: TextIO) -> None:
    """Print machine, and each cell with its rows and speed-ups."""
    console = _console(file)
    console.print(_about(result))
    for cell in result["cells"]:
        bound = cell["speedup_bound"]
        speedups = ", ".join(
            f"{cell[f'speedup_{regime}']:.3f} times the twin's tokens/s "
            f"({cell[f'speedup_{regime}_q1']:.3f}-{cell[f'speedup_{regime}_q3']:.3f}) at {words}"
            for regime, words in (("fixed_batch", "equal requests"), ("max_batch", "equal bytes"))
        )
        console.print(
            f"\n{cell['shape']}, {cell['recursions']} recursions, {cell['layers']} layers, "
            f"{cell['in_flight']} in flight, {cell['depths']} depths, "
            f"{human_bytes(cell['kv_budget_bytes'])} of keys and values\n"
            f"{speedups}; layers alone allow {bound:.3f}"
        )
        table = _table(("", *DECODE_COLUMNS))
        for row in cell["rows"]:
            table.add_row(
                f"{row['name']}, {row['regime']}",
                str(row["in_flight"]),
                human_count(row["tokens_per_s"]),
                _share(row["efficiency"]) + ("" if row["is_valid"] else " INVALID"),
                f"{row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f}",
                f"{row['inter_token_p50_ms']:.1f} / {row['inter_token_p95_ms']:.1f} / "
                f"{row['inter_token_p99_ms']:.1f}",
                f"{row['mean_depth']:.2f}",
                human_bytes(row["kv_bytes"]),
                str(row["most_requests"]),
                str(row["longest_context"]),
            )
        console.print(table)
    if result.get("peers"):
        table = _table(("", *PEER_COLUMNS))
        for row in result["peers"]:
            quartiles = f"{row['twin_speedup_q1']:.2f}-{row['twin_speedup_q3']:.2f}"
            table.add_row(
                row["name"],
                str(row["batch"]),
                human_count(row["tokens_per_s"]),
                f"{row['twin_speedup']:.2f} ({quartiles})",
            )
        console.print(table)


def print_prefill(result: dict[str, Any], file: TextIO) -> None:
    """Print machine and cells."""
    console = _console(file)
    console.print(_about(result))
    table = _table(("", *PREFILL_COLUMNS))
    for cell in result["cells"]:
        table.add_row(
            f"{cell['shape']} mor{cell['recursions']}",
            str(cell["prompt_len"]),
            f"{cell['speedup']:.3f}",
            f"{cell['speedup_q1']:.3f}-{cell['speedup_q3']:.3f}",
            human_count(cell["tokens_per_s"]),
            human_count(cell["twin_tokens_per_s"]),
            f"{cell['efficiency']:.3f}",
            f"{cell['twin_efficiency']:.3f}" + ("" if cell["is_valid"] else " INVALID"),
            f"{cell['ttft_ms']:.1f}",
            f"{cell['twin_ttft_ms']:.1f}",
        )
    console.print(table)


def _about(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    processor = machine["processor"]
    if result["device"] != "cpu":
        processor = f"{machine['gpu']}, {processor}"
    return (
        f"{processor}, {machine['threads']} threads, torch {machine['torch']}, {result['dtype']}; "
        f"median of {settings['rounds']} rounds"
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _console(file: TextIO) -> Any:
    from rich.console import Console

    console = Console(file=file, highlight=False, soft_wrap=True)
    console.width = max(150, console.width)
    return console


def _table(columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(columns):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    return table


def verdict(result: dict[str, Any]) -> list[str]:
    """Say what was reached, and which runs count for nothing."""
    lines = []
    for cell in result["cells"]:
        name = f"{cell['shape']} mor{cell['recursions']} at {cell['in_flight']} in flight"
        for row in cell["rows"]:
            if not row["is_valid"]:
                lines.append(
                    f"{name}: INVALID, {row['name']} in {row['regime']} is {row['efficiency']:.3f} "
                    f"times as quick as its kernels alone, {MAX_EFFICIENCY} is the most; measure "
                    "again with nothing else running"
                )
        speedups = (
            f"{name}: {cell['speedup_fixed_batch']:.2f} times its twin, "
            f"{cell['speedup_max_batch']:.2f} in equal bytes"
        )
        if cell["efficiency"] is None:
            lines.append(f"{speedups}; efficiency is told on a CPU alone")
            continue
        least = min(cell["efficiency"], cell["twin_efficiency"])
        is_valid = all(row["is_valid"] for row in cell["rows"])
        outcome = "met" if least >= EFFICIENCY_TARGET else "missed"
        outcome = outcome if is_valid else "not told: a run is invalid"
        lines.append(
            f"{speedups}; efficiency {cell['efficiency']:.3f}, the twin's "
            f"{cell['twin_efficiency']:.3f}, target {EFFICIENCY_TARGET} {outcome}"
        )
    return lines
