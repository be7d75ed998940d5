"""Kept results as Markdown: the claims table, and every experiment's own tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor.experiment.claim import Claim, Kept
from mor.experiment.claims import claims
from mor.experiment.results import read_results
from mor.experiment.tables import HEAD, cells, failures, tables
from mor.files import write_text
from mor.log import logger

BEGIN = "<!-- claims: written by mor experiment --render, not by hand -->"
END = "<!-- end of claims -->"
CLAIM_HEAD = ("claim", "paper", "ours", "holds")
INTRO = """# Results

Written by `mor experiment --render docs/results.md README.md` from the files in `results/`, never
by hand: each line there is one training or benchmark with its settings, its machine and a hash of
itself.

Losses are causal, in nats per token on validation text; ± is the seed that is farthest from the
mean. A difference is paired over the same texts and over the seeds that both have, in brackets 95 %
over texts (blocks of neighbouring rows drawn again) and seeds (their noise estimated over all rows
of the experiment). A claim about losses holds when two seeds or more are kept and the whole
interval is on its side, "tie" says that it holds 0, and rows that differ in more than what is
compared get no verdict. The vanilla twin, fixed depth, MoR and the random router share data and
budget. A rate is the recipe's, the same for all, or the best of a sweep with the same rates for
all; "edge" says that it was the sweep's last, so a better one may lie beyond. Parameters, and
tokens per parameter, are counted without embedding, as in the paper. "Our settings" are those of
the recipe's model of that name. A repeat is a token that has followed the one before it earlier in
its document, within the row, so that it can be copied. Seconds and peak memory are of the whole
process on the machine as it was, and compare nothing: `throughput-cpu` does, in alternating rounds.
"""


def render(paths: Sequence[Path], *, kept: Path) -> dict[str, Any]:
    """Write Markdown files from a folder of results; one with marks keeps what is outside of them.

    Raises ValueError for a folder without results, a line that was changed by hand, or a file that
    is there and has no marks and was not written by this
    """
    results = read_kept(kept)
    for path in paths:
        write_text(path, rendered(path, results))
        logger.info("wrote %s", path)
    return {"written": [str(path) for path in paths], "experiments": sorted(results)}


def read_kept(folder: Path) -> Kept:
    """Read a folder of results, an experiment a file."""
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise ValueError(
            f"{folder} holds no results (*.jsonl); give the folder with --kept, or keep some with "
            "mor experiment RECIPE --results"
        )
    return {file.stem: read_results(file) for file in files}


def rendered(path: Path, results: Kept) -> str:
    """Return what a file is to hold."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = claims(results)
    if BEGIN in before:
        head, _, rest = before.partition(BEGIN)
        if END not in rest:
            raise ValueError(f"{path} has the mark that opens the claims and not {END!r}; add it")
        return f"{head}{BEGIN}\n\n{claims_markdown(rows)}\n{END}{rest.partition(END)[2]}"
    if before and not before.startswith(INTRO.partition("\n")[0]):
        raise ValueError(
            f"{path} was not written by --render and has no marks; put {BEGIN} and {END} where the "
            "claims belong, or give another path"
        )
    parts = [INTRO, "## Claims\n", claims_markdown(rows, whole=True), _repeat(rows)]
    for name, some in results.items():
        parts += _experiment(name, some)
    return "\n".join(parts)


def claims_markdown(rows: Sequence[Claim], *, whole: bool = False) -> str:
    """Return the table of claims; where it is to be whole, all, with intervals and seeds."""

    def ours(row: Claim) -> str:
        return f"{row.ours}; {row.detail}" if whole and row.detail else row.ours

    shown = [row for row in rows if whole or row.is_brief]
    return markdown_table(CLAIM_HEAD, [[r.claim, r.paper, ours(r), r.holds] for r in shown])


def _repeat(rows: Sequence[Claim]) -> str:
    """Return each command once, with the claims that rest on it."""
    served: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.command:
            served.setdefault((f"`{row.command}`", row.machine), []).append(row.claim)
    cells = [["; ".join(rest), machine, told] for (told, machine), rest in served.items()]
    return "\n## How to repeat a row\n\n" + markdown_table(("claims", "machine", "command"), cells)


def _experiment(name: str, results: Sequence[dict[str, Any]]) -> list[str]:
    """Return an experiment's tables; none for one of benchmarks alone."""
    parts = []
    for table in tables(results):
        caption = f"Vocabulary {table.rows[0].results[0]['vocab_size']}."
        parts += [f"\n### {table.title}\n", caption + "\n", markdown_table(HEAD, cells(table))]
    bad = failures(results)
    if bad:
        parts += ["\nMembers that failed:\n", *(f"- {member}: {why}" for member, why in bad), ""]
    if not parts:
        return []
    note = next((one["note"] for one in results if one.get("note")), "")
    return [f"\n## {name}\n", f"{note}\n" if note else "", *parts]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(one) for one in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()
