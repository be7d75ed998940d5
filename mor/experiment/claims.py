"""The paper's statements beside what our kept results say: one row a claim, nothing typed.

Claims of training come from the experiment `claims-SCALE`, those of speed from `throughput-SCALE`.
A verdict needs two seeds and the whole interval on one side, else it is a tie, and rows that were
not trained alike get none.
Source: arXiv 2507.10524, tables 2 and 3, figures 3 and 4, appendix E.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from mor.experiment import isoflop
from mor.experiment.page import depth_losses
from mor.experiment.results import Result
from mor.experiment.stats import Difference
from mor.experiment.tables import (
    Row,
    Table,
    other_settings,
    other_training,
    tables,
    told,
)
from mor.log import human_bytes

Kept = dict[str, list[Result]]
"""experiment -> its results"""

SCALES = ("cpu", "gpu")
PAPER_FIXED = {2: 1.23, 3: 1.33, 4: 1.42}
PAPER_LARGEST = {2: 1.60, 3: 1.95, 4: 2.06}
KV_TOLERANCE = 0.02
GOAL_PARAMS = 0.55
GOAL_EFFICIENCY = 0.95
SMALLEST = 1e-3
"""nats under which a step or a leak that has no interval is not called one"""
MAY_DIFFER = {
    "vanilla": {"shallow_share"},
    "recursive": {
        "router", "gating", "capacity", "capacity_warmup_steps", "router_aux", "router_score",
        "router_alpha", "router_body", "router_bias", "router_z_loss_coef", "router_aux_loss_coef",
        "router_threshold_rate", "router_balance", "router_balance_loss_coef",
        "router_balance_rate",
    },
    "random": {"router", "capacity_warmup_steps"},
}  # fmt: skip
"""kind -> settings that a row of it need not share with the MoR beside it"""
FEWEST_TOKENS = 10.0
"""tokens per parameter under which a model is starved"""


class Claim(NamedTuple):
    """A row of the table."""

    claim: str
    paper: str
    ours: str
    holds: str
    machine: str
    command: str
    detail: str = ""
    """what the long table says too: intervals, seeds"""
    is_brief: bool = True
    """stands in the short table too"""


def claims(kept: Kept) -> list[Claim]:
    """Return the rows; one that was not run says why."""
    rows = []
    for scale in SCALES:
        rows += _trained(kept, scale)
        rows += _served(kept, scale)
        rows += _sizes(kept, scale)
    rows += _enough(kept)
    rows += _few_shot()
    return rows


def _judged(gap: Difference, ours: Row, other: Row) -> str:
    """Give a verdict, unless the two differ in more than what is compared, or one seed is kept."""
    may: set[str] = MAY_DIFFER.get(other.kind, set())
    found = other_training(ours, other) if other.kind == "vanilla" else other_settings(ours, other)
    unlike = [name for name in found if name not in may]
    if _arithmetic(ours, other):
        unlike.append("arithmetic")
    if unlike:
        return f"not like for like: {', '.join(unlike)}"
    if len(gap.by_seed) == 1:
        return f"one seed, {'lower' if gap.mean < 0 else 'higher'}"
    return {-1: "yes", 0: "tie", 1: "no"}[gap.sign]


def _not_run(claim: str, paper: str, why: str, command: str) -> Claim:
    return Claim(claim, paper, "", f"not run: {why}", "", command)


def _why(scale: str) -> str:
    return "no GPU was at hand" if scale == "gpu" else "no result is kept"


def _machine(results: Sequence[Result]) -> str:
    about = results[0]["machine"]
    named = [about.get("gpu") or about.get("processor", ""), f"{about.get('cores', '?')} cores"]
    return ", ".join(part for part in named if part)


def _command(*rows: Row) -> str:
    """Return the command that runs the trainings of these rows, by their whole names."""
    results = [one for row in rows for one in row.results]
    members = " ".join(one["member"] for one in results)
    name = results[0]["experiment"]
    return f"mor experiment recipes/experiments/{name}.toml --data DATA --out OUT --only {members}"


def _trained(kept: Kept, scale: str) -> Iterator[Claim]:
    """Claims of the trainings of a scale."""
    results = kept.get(f"claims-{scale}", [])
    found = tables(results)
    command = f"mor experiment recipes/experiments/claims-{scale}.toml --data DATA --out OUT"
    same = next((table for table in found if table.kind == "same_flops"), None)
    if same is None:
        yield _not_run(
            f"Same FLOPs ({scale}): a MoR of half the parameters has the lower loss",
            "MoR-2 2.7511 and MoR-3 2.7925 against 2.7824",
            _why(scale),
            command,
        )
        return
    best = _best(same)
    for ours in (row for row in same.rows if row.kind == "mor"):
        yield from _quality(scale, same, ours, is_best=ours is best)
    for table in found:
        if table is not same:
            yield from _other_budget(scale, table)
    yield from _inside(scale, same)
    yield _goal(kept, scale, same)


def _best(table: Table) -> Row | None:
    """Return the MoR with the lowest loss."""
    rows = [row for row in table.rows if row.kind == "mor"]
    return min(rows, key=lambda row: row.mean("val_loss"), default=None)


def _quality(scale: str, table: Table, ours: Row, *, is_best: bool) -> Iterator[Claim]:
    """A MoR beside the vanilla twin, one of its own size, fixed depth and the random router."""
    vanilla = table.twin_of(ours)
    share = ours.mean("params_nonembedding") / vanilla.mean("params_nonembedding") if vanilla else 0
    beside = (
        (
            vanilla,
            f"a MoR of {100 * share:.0f} % of the parameters without embedding has a lower loss "
            "than its twin",
            "MoR-2 2.7511, MoR-3 2.7925 against 2.7824",
        ),
        (
            table.plain_of_size(ours),
            "MoR has a lower loss than a vanilla model of its own size, which sees more tokens",
            "not compared",
        ),
        (
            table.control(ours, "recursive"),
            "MoR has a lower loss than fixed depth",
            "2.7925 against 2.8466 (R = 3)",
        ),
        (
            table.control(ours, "random"),
            "a learnt router is worth more than a random one",
            "0.067 nats",
        ),
    )
    for other, claim, paper in beside:
        gap = table.compare(ours, other)
        if gap is None or other is None:
            continue
        yield Claim(
            f"Same FLOPs ({scale}, {ours.label}): {claim}",
            paper,
            f"{_losses(ours, other)}; {_tokens(ours, other)}{_arithmetic(ours, other)}",
            _judged(gap, ours, other),
            _machine(ours.results),
            _command(ours, other),
            f"{told(gap)}, {_seeds(gap)}",
            is_brief=is_best or other is vanilla,
        )


def _losses(ours: Row, other: Row) -> str:
    losses = [row.mean("val_loss") for row in (ours, other)]
    return f"{losses[0]:.4f} against {losses[1]:.4f} ({losses[0] - losses[1]:+.4f})"


def _seeds(gap: Difference) -> str:
    return "by seed " + ", ".join(f"{one:+.4f}" for one in gap.by_seed)


def _tokens(ours: Row, other: Row) -> str:
    each = [row.mean("tokens_per_param") for row in (ours, other)]
    starved = " (starved)" if min(each) < FEWEST_TOKENS else ""
    return f"{each[0]:.0f} and {each[1]:.0f} tokens per parameter{starved}"


def _arithmetic(ours: Row, other: Row) -> str:
    """Say in which types two rows were trained, where they differ in a seed that both have."""
    types = [{one["seed"]: _dtype(one) for one in row.results} for row in (ours, other)]
    unlike = [seed for seed in types[0] if types[1].get(seed, types[0][seed]) != types[0][seed]]
    each = [" or ".join(sorted({one[seed] for seed in unlike})) for one in types]
    return f"; trained in {each[0]} and in {each[1]}" if unlike else ""


def _dtype(result: Result) -> str:
    asked = result["recipe"].get("train", {}).get("dtype", "auto")
    return result["machine"].get("auto_dtype", "a type not kept") if asked == "auto" else asked


def _other_budget(scale: str, table: Table) -> Iterator[Claim]:
    """MoR beside its twin under another budget."""
    words = {
        "same_tokens": ("Same tokens", "higher loss (2.8667 against 2.8471 at 10 B), FLOPs -25 %"),
        "same_time_s": ("Same time", "not stated"),
        "tokens_per_param": ("Same tokens per parameter", "not stated"),
    }
    title, paper = words.get(table.kind, (table.budget, "not stated"))
    for ours in (row for row in table.rows if row.kind == "mor"):
        about = f"{title} ({scale}, {ours.label})"
        yield from _beside(about, paper, table, ours, table.twin_of(ours), "its vanilla twin")


def _enough(kept: Kept) -> Iterator[Claim]:
    """MoR beside the twin, and beside others of its size, where tokens are no limit."""
    title = "As many tokens as each can use"
    found = tables(kept.get("tokens-cpu", []))
    if not found:
        yield _not_run(
            f"{title} (cpu): MoR has a lower loss than its vanilla twin",
            "not stated",
            _why("cpu"),
            "mor experiment recipes/experiments/tokens-cpu.toml --data DATA --out OUT",
        )
        return
    table = found[0]
    for ours in (row for row in table.rows if row.kind == "mor"):
        about = f"{title} (cpu, {ours.label})"
        fixed = [row for row in table.rows if row.kind == "recursive"]
        for other, words in (
            (table.twin_of(ours), "its vanilla twin"),
            (table.plain_of_size(ours), "a vanilla model of its own size"),
            *((row, row.label) for row in fixed),
        ):
            yield from _beside(about, "not stated", table, ours, other, words)


def _beside(
    title: str, paper: str, table: Table, ours: Row, other: Row | None, words: str
) -> Iterator[Claim]:
    """A MoR beside another row of a budget: loss, FLOPs, tokens."""
    gap = table.compare(ours, other)
    if gap is None or other is None:
        return
    flops = ours.mean("train_flops") / other.mean("train_flops")
    yield Claim(
        f"{title}: MoR has a lower loss than {words}",
        paper,
        f"{_losses(ours, other)}; training FLOPs {_percent(flops)}, "
        f"{_tokens(ours, other)}{_arithmetic(ours, other)}",
        _judged(gap, ours, other),
        _machine(ours.results),
        _command(ours, other),
        f"{told(gap)}, {_seeds(gap)}",
    )


def _inside(scale: str, table: Table) -> Iterator[Claim]:
    """What is measured of one MoR: keys and values, depth at test time, the leak of top-k."""
    best = _best(table)
    for row in (row for row in table.rows if row.kind == "mor"):
        command, machine, is_brief = _command(row), _machine(row.results), row is best
        if "loss_up_to_depth" in row.results[0]:
            losses = depth_losses(row)
            falls = all(a - b > SMALLEST for a, b in itertools.pairwise(losses))
            in_all = losses[0] - losses[-1] > SMALLEST
            yield Claim(
                f"Test-time depth ({scale}, {row.label}): more recursions, lower loss",
                "-3.05 at most 1 to -2.85 at most 3 (log-likelihood)",
                ", ".join(f"{loss:.4f} at most {d}" for d, loss in enumerate(losses, 1)),
                "yes" if falls else "in part" if in_all else "no",
                machine,
                command,
                is_brief=is_brief,
            )
        leak = [one["top_k_loss"] - one["val_loss"] for one in row.results if "top_k_loss" in one]
        if leak:
            yield Claim(
                f"Leak ({scale}, {row.label}): the causal loss is, within {SMALLEST} nats, that of "
                "top-k over the whole row, which peeks",
                "published figures are top-k alone",
                f"top-k minus causal: {fmean(leak):+.4f} nats (farthest seed "
                f"{max(leak, key=abs):+.4f})",
                "yes" if max(map(abs, leak)) <= SMALLEST else "no",
                machine,
                command,
                is_brief=is_brief,
            )
        yield _keys(scale, table, row, machine, command)._replace(is_brief=is_brief)


def _keys(scale: str, table: Table, row: Row, machine: str, command: str) -> Claim:
    """Keys and values of a token in the block, as the depths on the validation text say."""
    model = row.results[0]["recipe"]["model"]
    depth = model["num_recursions"]
    active = [
        fmean(shares) for shares in zip(*(r["active_share"] for r in row.results), strict=True)
    ]
    is_shared = model.get("kv_strategy") == "shared"  # kept for recursion 1 alone
    share = (1.0 if is_shared else sum(active)) / depth
    expected = (1.0 if is_shared else sum(model["capacity"])) / depth
    vanilla = table.twin_of(row)
    whole = ""
    if vanilla is not None:
        ours, theirs = row.mean("kv_bytes_per_token"), vanilla.mean("kv_bytes_per_token")
        whole = f"; with first and last layer {human_bytes(ours)} against {human_bytes(theirs)}"
    return Claim(
        f"Keys and values ({scale}, {row.label}): the block keeps the share that its settings say",
        f"{(depth + 1) / (2 * depth):.3f}, (R + 1) / (2 R)",
        f"{share:.3f} (settings say {expected:.3f}){whole}",
        "yes" if abs(share / expected - 1) <= KV_TOLERANCE else "no",
        machine,
        command,
    )


def _goal(kept: Kept, scale: str, table: Table) -> Claim:
    """The best MoR of the scale, and how near to its bound the engine brings such models."""
    claim = (
        f"Our goal ({scale}): at the same FLOPs a MoR of at most {100 * GOAL_PARAMS:.0f} % of "
        "the parameters without embedding is at or under its twin's loss, and such models are "
        f"served at {GOAL_EFFICIENCY} of their bound"
    )
    best = _best(table)
    vanilla = None if best is None else table.twin_of(best)
    if best is None or vanilla is None:
        return _not_run(claim, "", "no such rows are kept", "")
    gap = table.compare(best, vanilla)
    share = best.mean("params_nonembedding") / vanilla.mean("params_nonembedding")
    verdict = "" if gap is None else _judged(gap, best, vanilla)
    is_good = gap is not None and gap.mean <= 0 and share <= GOAL_PARAMS
    report = _report(kept, scale, "decode-135m")
    served, words = _slowest(report) if report else (math.nan, "not served")
    ours = f"{best.label}: {told(gap)} at {100 * share:.0f} % of the parameters; {words}"
    holds = "yes" if is_good and served >= GOAL_EFFICIENCY else "in part" if is_good else "no"
    if is_good and verdict not in ("yes", "tie"):
        holds = verdict  # one seed, or not like for like
    return Claim(claim, "", ours, holds, _machine(best.results), _command(best, vanilla))


def _slowest(report: dict[str, Any]) -> tuple[float, str]:
    """Return the least of its bound that a MoR of a report reached, and which that was."""
    regimes = {"fixed_batch": "at equal requests", "max_batch": "at equal bytes"}
    served, recursions, regime = min(
        (row["efficiency"], cell["recursions"], row["regime"])
        for cell in report["cells"]
        for row in cell["rows"]
        if row["side"] == "mor"
    )
    return served, (
        f"the 135M shape, drawn depths, reaches {served:.2f} at least (MoR-{recursions}, "
        f"{regimes[regime]})"
    )


def _report(kept: Kept, scale: str, member: str) -> dict[str, Any] | None:
    """Return what `mor bench` printed for a member of the throughput experiment."""
    for result in kept.get(f"throughput-{scale}", []):
        if result["member"] == member and result["outcome"] == "done":
            return result["report"]
    return None


def _served(kept: Kept, scale: str) -> Iterator[Claim]:
    """Claims of speed and memory, from `mor bench`."""
    results = kept.get(f"throughput-{scale}", [])
    benches = [one for one in results if one["outcome"] == "done"]
    if not benches:
        yield _not_run(
            f"Throughput ({scale}): MoR serves up to 2.06 times its twin's tokens",
            "1.23 / 1.33 / 1.42 at 32 in flight, 1.60 / 1.95 / 2.06 at equal bytes (MoR-2, 3, 4; "
            "prompts and cache writes left out)",
            _why(scale),
            "mor bench decode --recursions 2 3 4 --json",
        )
        return
    for result in benches:
        report, args = result["report"], " ".join(result["args"])
        about = (_machine([result]), f"mor bench {args} --json")
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
    cells = report["cells"]
    bounds = ", ".join(f"{cell['speedup_bound']:.2f}" for cell in cells)
    for regime, words, paper in (
        ("fixed_batch", f"at {cells[0]['in_flight']} in flight", PAPER_FIXED),
        ("max_batch", "at equal bytes of keys and values", PAPER_LARGEST),
    ):
        said = [f"MoR-{cell['recursions']} {cell[f'speedup_{regime}']:.2f}" for cell in cells]
        quartiles = [
            f"{cell[f'speedup_{regime}_q1']:.2f}-{cell[f'speedup_{regime}_q3']:.2f}"
            for cell in cells
        ]
        shares = [
            f"{_efficiency(cell, regime, 'mor'):.2f} ({_efficiency(cell, regime, 'twin'):.2f})"
            for cell in cells
        ]
        reached = [cell[f"speedup_{regime}"] >= paper[cell["recursions"]] for cell in cells]
        quicker = all(cell[f"speedup_{regime}_q1"] > 1 for cell in cells)
        yield Claim(
            f"Throughput {words} ({scale}, {name.removeprefix('decode-').upper()} shape, prompts "
            "included)",
            ", ".join(f"MoR-{r} {ratio:.2f}" for r, ratio in paper.items()),
            f"{', '.join(said)} times the twin",
            "yes" if all(reached) else "quicker, not by as much" if quicker else "no",
            *about,
            f"quartiles {', '.join(quartiles)}; of what the kernels allow {', '.join(shares)}, the "
            f"twin's in brackets; layers alone would give {bounds}",
        )


def _efficiency(cell: dict[str, Any], regime: str, side: str) -> float:
    """Return the efficiency of a side in a regime; of the only one where both are the same run."""
    rows = [row for row in cell["rows"] if row["side"] == side]
    return next((row for row in rows if row["regime"] == regime), rows[0])["efficiency"]


def _stepped(where: str, report: dict[str, Any], about: tuple[str, str]) -> Iterator[Claim]:
    rows = {row["name"]: row for row in report["rows"]}
    ours = [rows[name] for name in ("mor2", "mor3", "mor4") if name in rows]
    told_rows = [
        f"MoR-{row['name'][3:]}: time {_percent(row['time_ratio'])}, memory "
        f"{_percent(row['peak_memory_ratio'])}, FLOPs {_percent(row['flops_ratio'])}"
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


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f} %"


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


def _sizes(kept: Kept, scale: str) -> Iterator[Claim]:
    """Does MoR stay ahead as models and budgets grow?"""
    claim = f"Scaling ({scale}): MoR's lead holds as sizes and budgets grow"
    paper = "behind at 135M, level or ahead from 360M on"
    name = "isoflop" if scale == "cpu" else "isoflop-gpu"
    command = ""  # there is no recipe of a GPU's size yet
    if scale == "cpu":
        command = f"mor experiment recipes/experiments/{name}.toml --data DATA --out OUT"
    results = kept.get(name, [])
    found = [table for table in tables(results) if table.kind == "same_flops" and table.size]
    if not found:
        yield _not_run(claim, paper, _why(scale), command)
        return
    gaps = []
    for table in found:
        ours = table.first("mor")
        gap = None if ours is None else table.compare(ours, table.twin_of(ours))
        if gap is not None:
            gaps.append((f"{table.size}, {table.budget}", gap))
    fitted = [
        f"best loss {fit.best_loss:.4f} ({fit.label}, {fit.budget})" for fit in isoflop.fits(found)
    ]
    signs = [gap.side for _, gap in gaps]  # every size and budget is a seed of its own
    yield Claim(
        claim,
        paper,
        "; ".join([*(f"{where}: {told(gap)}" for where, gap in gaps), *fitted]),
        "yes" if max(signs, default=1) < 0 else "tie" if max(signs, default=1) == 0 else "no",
        _machine(results),
        command,
    )


def _few_shot() -> Iterator[Claim]:
    yield _not_run(
        "Few-shot: MoR is as accurate as its twin with half the parameters",
        "43.1 (MoR-2), 42.6, 41.6 against 42.3",
        "models of this size read at chance; it waits for uptrained models",
        "",
    )
