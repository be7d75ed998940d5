"""The paper's statements beside what our kept results say: one row a claim, nothing typed.

Claims of training come from the experiments `claims-SCALE` and `goal-SCALE`; those of speed stand
in `served`.
A verdict needs two seeds and the whole interval on one side, else it is a tie, and rows that were
not trained alike get none.
Source: arXiv 2507.10524, tables 2 and 3, figures 3 and 4, appendix E.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from statistics import fmean

from mor.experiment import isoflop
from mor.experiment.claim import Claim, Kept, machine_of, not_run, percent, why_not
from mor.experiment.page import depth_losses
from mor.experiment.results import Result
from mor.experiment.served import GOAL_EFFICIENCY, GOAL_SPEEDUP, served, served_well
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

SCALES = ("cpu", "gpu")
KV_TOLERANCE = 0.02
GOAL_PARAMS = 0.55
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


def claims(kept: Kept) -> list[Claim]:
    """Return the rows; one that was not run says why."""
    rows = []
    for scale in SCALES:
        rows += _trained(kept, scale)
        rows += served(kept, scale)
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


def _command(*rows: Row) -> str:
    """Return the command that runs the trainings of these rows, by their whole names."""
    results = [one for row in rows for one in row.results]
    members = " ".join(one["member"] for one in results)
    name = results[0]["experiment"]
    return f"mor experiment recipes/experiments/{name}.toml --data DATA --out OUT --only {members}"


def _trained(kept: Kept, scale: str) -> Iterator[Claim]:
    """Claims of the trainings of a scale."""
    names = (f"claims-{scale}", f"goal-{scale}")
    same: list[Table] = []
    rest: list[Table] = []
    for name in names:
        found = tables(kept.get(name, []))
        first = [table for table in found if table.kind == "same_flops"][:1]
        same += first
        rest += [table for table in found if table not in first]
    if not same:
        yield not_run(
            f"Same FLOPs ({scale}): a MoR of half the parameters has the lower loss",
            "MoR-2 2.7511 and MoR-3 2.7925 against 2.7824",
            why_not(scale),
            f"mor experiment recipes/experiments/{names[0]}.toml --data DATA --out OUT",
        )
        return
    pair = _best(same)
    best = pair and pair[0]
    for table in same:
        for ours in table.of_kind("mor"):
            yield from _quality(scale, table, ours, is_best=ours is best)
    for table in rest:
        yield from _other_budget(scale, table)
    for table in same:
        yield from _inside(scale, table, best)
    yield _goal(kept, scale, pair)


def _best(found: list[Table]) -> tuple[Row, Table] | None:
    """Return the MoR with the lowest loss, and its table."""
    pairs = [(row, table) for table in found for row in table.of_kind("mor")]
    return min(pairs, key=lambda pair: pair[0].mean("val_loss"), default=None)


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
            machine_of(ours.results),
            _command(ours, other),
            f"{told(gap)}, {_seeds(gap)}",
            is_brief=is_best or other is vanilla,
        )


def _losses(ours: Row, other: Row) -> str:
    """Tell the mean losses of two rows over the seeds that both have."""
    seeds = ours.by_seed.keys() & other.by_seed.keys()
    losses = [
        fmean(one["val_loss"] for one in row.results if one["seed"] in seeds)
        for row in (ours, other)
    ]
    return f"{losses[0]:.4f} against {losses[1]:.4f} ({losses[0] - losses[1]:+.4f})"


def _seeds(gap: Difference) -> str:
    return "by seed " + ", ".join(f"{one:+.4f}" for one in gap.by_seed)


def _tokens(ours: Row, other: Row) -> str:
    each = [row.mean("tokens_per_param") for row in (ours, other)]
    starved = " (starved)" if min(each) < FEWEST_TOKENS else ""
    told = " and ".join(f"{tokens:.0f}" if tokens >= 1 else f"{tokens:.2g}" for tokens in each)
    return f"{told} tokens per parameter{starved}"


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
    for ours in table.of_kind("mor"):
        about = f"{title} ({scale}, {ours.label})"
        yield from _beside(about, paper, table, ours, table.twin_of(ours), "its vanilla twin")


def _enough(kept: Kept) -> Iterator[Claim]:
    """MoR beside the twin, and beside others of its size, where tokens are no limit."""
    title = "As many tokens as each can use"
    found = tables(kept.get("tokens-cpu", []))
    if not found:
        yield not_run(
            f"{title} (cpu): MoR has a lower loss than its vanilla twin",
            "not stated",
            why_not("cpu"),
            "mor experiment recipes/experiments/tokens-cpu.toml --data DATA --out OUT",
        )
        return
    table = found[0]
    for ours in table.of_kind("mor"):
        about = f"{title} (cpu, {ours.label})"
        fixed = table.of_kind("recursive")
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
        f"{_losses(ours, other)}; training FLOPs {percent(flops)}, "
        f"{_tokens(ours, other)}{_arithmetic(ours, other)}",
        _judged(gap, ours, other),
        machine_of(ours.results),
        _command(ours, other),
        f"{told(gap)}, {_seeds(gap)}",
    )


def _inside(scale: str, table: Table, best: Row | None) -> Iterator[Claim]:
    """What is measured of one MoR: keys and values, depth at test time, the leak of top-k."""
    for row in table.of_kind("mor"):
        command, machine, is_brief = _command(row), machine_of(row.results), row is best
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


def _goal(kept: Kept, scale: str, pair: tuple[Row, Table] | None) -> Claim:
    """The best MoR of the scale, and how near to its bound the engine brings such models."""
    speed = f"such models are served at {GOAL_EFFICIENCY} of their bound"
    if scale == "gpu":
        speed = f"such models serve {GOAL_SPEEDUP} times its tokens at equal bytes"
    claim = (
        f"Our goal ({scale}): at the same FLOPs a MoR of at most {100 * GOAL_PARAMS:.0f} % of "
        f"the parameters without embedding is at or under its twin's loss, and {speed}"
    )
    vanilla = pair and pair[1].twin_of(pair[0])
    if pair is None or vanilla is None:
        return not_run(claim, "", "no such rows are kept", "")
    best, table = pair
    gap = table.compare(best, vanilla)
    share = best.mean("params_nonembedding") / vanilla.mean("params_nonembedding")
    verdict = "" if gap is None else _judged(gap, best, vanilla)
    is_good = gap is not None and gap.mean <= 0 and share <= GOAL_PARAMS
    is_served, words = served_well(kept, scale)
    ours = f"{best.label}: {told(gap)} at {100 * share:.0f} % of the parameters; {words}"
    holds = "yes" if is_good and is_served else "in part" if is_good else "no"
    if is_good and verdict not in ("yes", "tie"):
        holds = verdict  # one seed, or not like for like
    return Claim(claim, "", ours, holds, machine_of(best.results), _command(best, vanilla))


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
        yield not_run(claim, paper, why_not(scale), command)
        return
    gaps, num_starved = [], 0
    by_size: dict[str, list[tuple[float, float]]] = {}
    for table in found:
        ours = table.first("mor")
        twin = None if ours is None else table.twin_of(ours)
        gap = None if ours is None else table.compare(ours, twin)
        if gap is None or twin is None:
            continue
        gaps.append((f"{table.size}, {table.budget}", gap))
        by_size.setdefault(table.size, []).append((twin.mean("train_flops"), gap.mean))
        num_starved += twin.mean("tokens_per_param") < FEWEST_TOKENS
    fitted = [
        f"best loss {fit.best_loss:.4f} ({fit.label}, {fit.budget})" for fit in isoflop.fits(found)
    ]
    signs = [gap.side for _, gap in gaps]  # every size and budget is a seed of its own
    holds = "yes" if max(signs, default=1) < 0 else "tie" if max(signs, default=1) == 0 else "no"
    if holds == "yes" and any(max(some)[1] > min(some)[1] for some in by_size.values()):
        holds = "ahead, by less as budgets grow"
    starved = f"the twin is starved in {num_starved} of {len(gaps)}"
    yield Claim(
        claim,
        paper,
        "; ".join([*(f"{where}: {told(gap)}" for where, gap in gaps), *fitted, starved]),
        holds,
        machine_of(results),
        command,
    )


def _few_shot() -> Iterator[Claim]:
    yield not_run(
        "Few-shot: MoR is as accurate as its twin with half the parameters",
        "43.1 (MoR-2), 42.6, 41.6 against 42.3",
        "models of this size read at chance; it waits for uptrained models",
        "",
    )
