"""Claims of speed and memory: what `mor bench` printed, from the experiment `throughput-SCALE`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mor.experiment.claim import Claim, Kept, machine_of, not_run, percent, why_not

PAPER_FIXED = {2: 1.23, 3: 1.33, 4: 1.42}
PAPER_LARGEST = {2: 1.60, 3: 1.95, 4: 2.06}
USUAL_IN_FLIGHT = 32
GOAL_EFFICIENCY = 0.95
"""share of what the kernels allow, on a CPU"""
GOAL_SPEEDUP = 2.06
"""times the twin's tokens at equal bytes, on a GPU"""


def served(kept: Kept, scale: str) -> Iterator[Claim]:
    """Claims of speed and memory, from `mor bench`."""
    results = kept.get(f"throughput-{scale}", [])
    benches = [one for one in results if one["outcome"] == "done"]
    if not benches:
        yield not_run(
            f"Throughput ({scale}): MoR serves up to 2.06 times its twin's tokens",
            "1.23 / 1.33 / 1.42 at 32 in flight, 1.60 / 1.95 / 2.06 at equal bytes (MoR-2, 3, 4; "
            "prompts and cache writes left out)",
            why_not(scale),
            "mor bench decode --recursions 2 3 4 --json",
        )
        return
    for result in benches:
        report, args = result["report"], " ".join(result["args"])
        about = (machine_of([result]), f"mor bench {args} --json")
        kind = result["args"][0]
        if kind == "decode":
            yield from _decoded(scale, result["member"], report, about)
        elif kind == "train":
            yield from _stepped(
                f"{scale}, shape {result['member'].removeprefix('train-')}", report, about
            )
        elif kind == "prefill":
            yield from _prefilled(scale, report, about)


def _decoded(
    scale: str, name: str, report: dict[str, Any], about: tuple[str, str]
) -> Iterator[Claim]:
    """Tokens a second at the same requests in flight, and at the same bytes."""
    cells, shape = report["cells"], name.split("-")[1].upper()
    in_flight, equal = cells[0]["in_flight"], "at equal bytes of keys and values"
    if in_flight != USUAL_IN_FLIGHT:
        equal += f", those of {in_flight} in the twin"
    ours = ", capacities 1, 1/4, 1/16" if cells[0].get("routing") == "ours" else ""
    bounds = ", ".join(f"{cell['speedup_bound']:.2f}" for cell in cells)
    for regime, words, paper in (
        ("fixed_batch", f"at {in_flight} in flight", PAPER_FIXED),
        ("max_batch", equal, PAPER_LARGEST),
    ):
        said = [f"MoR-{cell['recursions']} {cell[f'speedup_{regime}']:.2f}" for cell in cells]
        quartiles = [
            f"{cell[f'speedup_{regime}_q1']:.2f}-{cell[f'speedup_{regime}_q3']:.2f}"
            for cell in cells
        ]
        shares = [
            f"{share:.2f} ({_efficiency(cell, regime, 'twin'):.2f})"
            for cell in cells
            if (share := _efficiency(cell, regime, "mor")) is not None
        ]
        kernels = f"of what the kernels allow {', '.join(shares)}, the twin's in brackets; "
        reached = [cell[f"speedup_{regime}"] >= paper[cell["recursions"]] for cell in cells]
        quicker = all(cell[f"speedup_{regime}_q1"] > 1 for cell in cells)
        yield Claim(
            f"Throughput {words} ({scale}, {shape} shape{ours}, prompts included)",
            ", ".join(f"MoR-{r} {ratio:.2f}" for r, ratio in paper.items()),
            f"{', '.join(said)} times the twin",
            "yes" if all(reached) else "quicker, not by as much" if quicker else "no",
            *about,
            f"quartiles {', '.join(quartiles)}; {kernels if shares else ''}layers alone would give "
            f"{bounds}",
            is_brief=in_flight == USUAL_IN_FLIGHT,
        )


def _efficiency(cell: dict[str, Any], regime: str, side: str) -> float | None:
    """Return the efficiency of a side in a regime; of the only one where both are the same run.

    None on a GPU, where none is told
    """
    rows = [row for row in cell["rows"] if row["side"] == side]
    return next((row for row in rows if row["regime"] == regime), rows[0])["efficiency"]


def _stepped(where: str, report: dict[str, Any], about: tuple[str, str]) -> Iterator[Claim]:
    rows = {row["name"]: row for row in report["rows"]}
    ours = [rows[name] for name in ("mor2", "mor3", "mor4") if name in rows]
    told_rows = [
        f"MoR-{row['name'][3:]}: time {percent(row['time_ratio'])}, memory "
        f"{percent(row['peak_memory_ratio'])}, FLOPs {percent(row['flops_ratio'])}"
        for row in ours
    ]
    good = all(row["time_ratio"] <= 0.81 and row["peak_memory_ratio"] <= 0.75 for row in ours)
    yield Claim(
        f"Same tokens ({where}): training takes less time and memory",
        "time -19 %, memory -25 %, FLOPs -25 % (MoR-2)",
        "; ".join(told_rows),
        "yes" if good else "in part" if all(row["time_ratio"] < 1 for row in ours) else "no",
        *about,
        "memory: bytes kept for the backward pass",
    )


def _prefilled(scale: str, report: dict[str, Any], about: tuple[str, str]) -> Iterator[Claim]:
    cells = report["cells"]
    said = [f"{cell['prompt_len']} tokens {cell['speedup']:.2f}" for cell in cells]
    yield Claim(
        f"Prompts ({scale}, MoR-{cells[0]['recursions']}): skipped work shows in prefill too",
        "left out of its timing",
        f"{', '.join(said)} times the twin",
        "yes" if all(cell["speedup"] > 1 for cell in cells) else "no",
        *about,
    )


def served_well(kept: Kept, scale: str) -> tuple[bool, str]:
    """Tell whether models of the goal's routing are served as it says, and how they are."""
    report = report_of(kept, scale, "decode-135m-ours") or report_of(kept, scale, "decode-135m")
    if report is None:
        return False, "not served"
    cells = report["cells"]
    shape = "the 135M shape, drawn depths"
    if scale == "gpu":
        speedup = min(cell["speedup_max_batch"] for cell in cells)
        return speedup >= GOAL_SPEEDUP, f"{shape}, serves {speedup:.2f} times its twin's tokens"
    regimes = {"fixed_batch": "at equal requests", "max_batch": "at equal bytes"}
    least, recursions, regime = min(
        (row["efficiency"], cell["recursions"], row["regime"])
        for cell in cells
        for row in cell["rows"]
        if row["side"] == "mor"
    )
    return least >= GOAL_EFFICIENCY, (
        f"{shape}, reaches {least:.2f} at least (MoR-{recursions}, {regimes[regime]})"
    )


def report_of(kept: Kept, scale: str, member: str) -> dict[str, Any] | None:
    """Return what `mor bench` printed for a member of the throughput experiment."""
    for result in kept.get(f"throughput-{scale}", []):
        if result["member"] == member and result["outcome"] == "done":
            return result["report"]
    return None
