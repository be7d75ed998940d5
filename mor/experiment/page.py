"""The HTML report of one experiment: tables with intervals, curves, test-time depth, tokens."""

from __future__ import annotations

import html
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from mor.experiment import isoflop
from mor.experiment.config import Experiment
from mor.experiment.members import SWEEP
from mor.experiment.results import Result
from mor.experiment.tables import HEAD, Row, Table, cells, failures, tables
from mor.files import write_text
from mor.ops.device import describe_machine
from mor.report import Section, curves_svg, render_page, table_html


def write_report(out: Path, experiment: Experiment, results: Sequence[Result]) -> Path:
    """Write report.html into a folder; returns its path."""
    found = tables(results)
    sections = []
    for table in found:
        sections.append(
            Section(
                table.title,
                table_html(HEAD, cells(table), caption=_caption(table)),
                "Causal validation loss in nats per token; with ± the seed that is farthest from "
                "the mean. A difference is paired over texts and seeds; in brackets 95 % over "
                "both, over texts alone where one seed is kept. Time and memory are of runs that "
                "had the machine to themselves only where the log says so.",
            )
        )
        sections.append(Section(f"{table.budget}: training loss", _curves(table)))
    sections += isoflop.sections(found)
    for table in found[:1]:
        sections += _depth_sections(table)
    rates = _rates(results)
    if rates:
        sections.append(Section("Rates", rates, "Held-out loss after a short training at each."))
    bad = failures(results)
    if bad:
        rows = "".join(f"<li>{html.escape(f'{name}: {why}')}</li>" for name, why in bad)
        sections.append(Section("Members that failed", f"<ul>{rows}</ul>"))
    if not sections:
        sections.append(Section("Nothing yet", "<p>No member has come to a result.</p>"))
    page = render_page(
        f"mor experiment {experiment.name}",
        experiment.note or "no note on the data",
        sections,
        command="mor " + shlex.join(sys.argv[1:]),
        machine=describe_machine(),
    )
    path = out / "report.html"
    write_text(path, page)
    return path


def _caption(table: Table) -> str:
    row = table.rows[0].results[0]
    return f"{table.budget}; vocabulary {row['vocab_size']}, {row['val_tokens']} tokens evaluated"


def _curves(table: Table) -> str:
    series = {}
    for row in table.rows:
        points = row.results[0]["curve"]
        per_token = row.results[0]["train_flops"] / row.results[0]["tokens"]
        flops = [more[0] if more else tokens * per_token for tokens, _, *more in points]
        series[row.label] = (flops, [loss for _, loss, *_ in points])
    return curves_svg(series, x_label="training FLOPs", y_label="loss, nats per token")


def _depth_sections(table: Table) -> list[Section]:
    """What depth is worth at test time, and which tokens go deep."""
    routed = [row for row in table.rows if "loss_up_to_depth" in row.results[0]]
    sections = []
    if routed:
        depth = max(len(row.results[0]["loss_up_to_depth"]) for row in routed)
        rows = []
        for row in routed:
            losses = depth_losses(row)
            rows.append([row.label, *(f"{loss:.4f}" for loss in losses)])
            rows[-1] += [""] * (depth - len(losses))
        heads = ["model", *(f"at most {d}" for d in range(1, depth + 1))]
        sections.append(
            Section(
                "Test-time depth",
                table_html(heads, rows),
                "Causal validation loss when no token may take more recursions.",
            )
        )
    for row in table.rows:
        if "depth_by_class" not in row.results[0]:
            continue
        sections.append(Section(f"Which tokens go deep: {row.label}", _classes(row)))
    return sections


def depth_losses(row: Row) -> list[float]:
    """Return the loss at most 1, 2, .. recursions, averaged over seeds."""
    return [
        fmean(values) for values in zip(*(r["loss_up_to_depth"] for r in row.results), strict=True)
    ]


def _classes(row: Row) -> str:
    first = row.results[0]
    rows = [
        [name, f"{100 * one['share']:.1f} %", f"{one['mean_depth']:.2f}", f"{one['loss']:.2f}"]
        for name, one in first["depth_by_class"].items()
    ]
    table = table_html(["tokens", "share", "mean depth", "loss of the next"], rows)
    lists = "".join(
        f"<p>{title}: {_examples(first[field])}</p>"
        for title, field in (("Deepest", "deepest"), ("Shallowest", "shallowest"))
    )
    return table + lists


def _examples(tokens: list[list[object]]) -> str:
    shown = [f"<code>{html.escape(repr(text))}</code> {mean}" for text, mean, _ in tokens]
    return ", ".join(shown)


def _rates(results: Sequence[Result]) -> str:
    swept: dict[str, dict[float, str]] = {}
    for one in results:
        if one.get("budget") == SWEEP:
            name = f"{one['label']} {one['size']}".strip()
            loss = f"{one['heldout_loss']:.4f}" if one["outcome"] == "done" else "failed"
            swept.setdefault(name, {})[one["lr"]] = loss
    if not swept:
        return ""
    lrs = sorted({lr for losses in swept.values() for lr in losses})
    rows = [[name, *(losses.get(lr, "") for lr in lrs)] for name, losses in swept.items()]
    return table_html(["model", *(f"{lr:g}" for lr in lrs)], rows)
