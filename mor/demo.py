"""`mor demo`: a small MoR, its vanilla twin and two controls on real text, for the same FLOPs.

Every model is trained by the `mor train` command in a process of its own (so that peak memory is
its own), from a recipe left beside it; then all decode side by side here, in alternating rounds.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mor.checkpoint import load_model
from mor.data.config import PrepareConfig
from mor.data.loader import PreparedData
from mor.data.prepare import prepare
from mor.files import claim_folder, read_json, write_text
from mor.log import human_bytes, human_count, logger, progress
from mor.model.cost import count_params, kv_bytes_per_token
from mor.model.generate import GeneratedToken, SamplingParams, generate
from mor.model.mor import MoR
from mor.report import (
    Section,
    TokenDepth,
    curves_svg,
    depth_text_html,
    histogram_svg,
    render_page,
    require_report_extra,
    table_html,
)
from mor.train.metrics import read_metrics


@dataclass(frozen=True, slots=True)
class Size:
    """How much the demo does."""

    vocab_size: int
    limit_bytes: int
    flops: float
    eval_tokens: int
    decode_tokens: int
    decode_rounds: int


FULL = Size(
    vocab_size=2048,
    limit_bytes=20_000_000,
    flops=3.0e12,
    eval_tokens=65536,
    decode_tokens=96,
    decode_rounds=9,
)
QUICK = Size(
    vocab_size=1024,
    limit_bytes=6_000_000,
    flops=2.0e11,
    eval_tokens=32768,
    decode_tokens=32,
    decode_rounds=3,
)

CONTEXT = 256
RECURSIONS = 3
RECIPE = """# {label}, trained by `mor demo`. Cost: {flops:.2g} FLOPs, forward and backward.
[model]
hidden_size = 128
intermediate_size = 384
num_hidden_layers = 8
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 512
initializer_range = 0.06
router_seed = {seed}
{model}
[train]
budget_flops = {flops}
context = {context}
batch_tokens = 1024
lr = {lr}
warmup_share = 0.1
decay_share = 0.4
eval_every = 1000000
checkpoint_every = 1000000
eval_tokens = {eval_tokens}
seed = {seed}
dtype = "float32"
device = "cpu"
log_every = 5
"""


@dataclass(frozen=True, slots=True)
class Member:
    """One model of the demo. Learning rates come from the same sweep for each (docs/LOG.md)."""

    name: str
    label: str
    model: str
    lr: float


MEMBERS = (
    Member(
        "mor",
        "Mixture-of-Recursions",
        f'num_recursions = {RECURSIONS}\nrouter = "expert_choice"',
        6e-3,
    ),
    Member("vanilla", "Vanilla twin", "", 6e-3),
    Member("recursive", "Fixed-depth recursive", f"num_recursions = {RECURSIONS}", 6e-3),
    Member(
        "mor-random",
        "MoR, random router",
        f'num_recursions = {RECURSIONS}\nrouter = "random"',
        6e-3,
    ),
)

DEPTH_TOLERANCE = 0.05
ACTIVE_BOUNDS = (0.05, 0.95)


def demo(
    out: Path, *, quick: bool, inputs: Sequence[Path], seed: int, argv: Sequence[str]
) -> dict[str, Any]:
    """Run the demo into an empty folder; returns `models`, `report` and `failure` (None: fine)."""
    require_report_extra()
    claim_folder(out, what="the demo")
    start_s = time.monotonic()
    size = QUICK if quick else FULL
    data = _prepare(out / "data", size, inputs)
    rows: list[dict[str, Any]] = []
    for member in MEMBERS:
        rows.append(_train(member, out, data, size, seed))
    models = {row["name"]: load_model(Path(row["model"])) for row in rows}
    speeds = _decode_speeds(models, data, size)
    for row in rows:
        row["decode_tokens_per_s"] = speeds[row["name"]]
    failure = check_depths(models["mor"], rows)
    seconds = time.monotonic() - start_s
    command = "mor " + shlex.join(argv)
    report = out / "report.html"
    write_text(report, _report(out, rows, models, data, command, seconds, failure, quick))
    _print_table(rows)
    for line in verdict(rows):
        logger.info("%s", line)
    logger.info("report: %s (%.0f seconds in all)", report, seconds)
    return {"models": rows, "report": str(report), "seconds": seconds, "failure": failure}


def _prepare(folder: Path, size: Size, inputs: Sequence[Path]) -> PreparedData:
    prepare(
        PrepareConfig(
            out=folder,
            input=tuple(inputs),
            corpus="none" if inputs else "stdlib",
            vocab_size=size.vocab_size,
            limit_bytes=size.limit_bytes,
            max_document_bytes=4096,  # many documents, so that held-out texts are alike
            val_fraction=0.05,
            heldout_fraction=0.05,
        )
    )
    return PreparedData.open(folder)


def _train(member: Member, out: Path, data: PreparedData, size: Size, seed: int) -> dict[str, Any]:
    """Train one member in its own process and return its row of the table."""
    recipe = out / f"{member.name}.toml"
    text = RECIPE.format(
        label=member.label,
        model=member.model,
        flops=size.flops,
        eval_tokens=size.eval_tokens,
        context=CONTEXT,
        lr=member.lr,
        seed=seed,
    )
    write_text(recipe, text)
    folder = out / member.name
    command = [sys.executable, "-m", "mor", "train", str(recipe)]
    command += ["--data", str(data.folder), "--out", str(folder)]
    code = subprocess.run(command, check=False).returncode
    if code == 130 or code < 0:
        raise KeyboardInterrupt
    if code != 0:
        raise RuntimeError(f"training {member.name} ended with exit code {code}")
    summary = read_json(folder / "summary.json")
    model = load_model(Path(summary["model"]))
    params = count_params(model.config)
    return {
        "name": member.name,
        "label": member.label,
        "model": summary["model"],
        "params_unique": params.unique,
        "params_nonembedding": params.nonembedding,
        "tokens": summary["tokens"],
        "bits_per_byte": summary["bits_per_byte"],
        "train_flops": summary["train_flops"],
        "train_seconds": summary["train_seconds"],
        "peak_bytes": summary["peak_bytes"],
        "kv_bytes_per_token": kv_bytes_per_token(
            model.config, element_bytes=4, active=summary["active_share"]
        ),
        "mean_depth": summary["mean_depth"],
        "active_share": summary["active_share"],
        "num_recursions": model.config.num_recursions,
    }


def _decode_speeds(models: dict[str, MoR], data: PreparedData, size: Size) -> dict[str, float]:
    """Time greedy decoding of one sequence, models in turn; median tokens per second.

    First it verifies: what the cache decodes must be what the whole sequence predicts.
    """
    prompt = data.split("val").read(0, 64).tolist()
    params = SamplingParams(max_tokens=size.decode_tokens)
    for name, model in models.items():
        verify_decode(name, model, prompt, params)
    times: dict[str, list[float]] = {name: [] for name in models}
    with progress("decode", size.decode_rounds * len(models)) as bar:
        for _ in range(size.decode_rounds):
            for name, model in models.items():
                first_s = last_s = 0.0
                for event in generate(model, [prompt], params):
                    last_s = time.perf_counter()
                    if not isinstance(event, GeneratedToken):
                        first_s = last_s
                times[name].append(size.decode_tokens / (last_s - first_s))
                bar.advance()
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def verify_decode(name: str, model: MoR, prompt: list[int], params: SamplingParams) -> None:
    """Hold greedy cached decoding to one forward pass over the whole sequence.

    Up to the first near tie: two logits, or a score and its threshold, closer than 1e-4.
    """
    events = [e for e in generate(model, [prompt], params) if isinstance(e, GeneratedToken)]
    ids = prompt + [event.token for event in events]
    out = model(torch.tensor([ids]), rule="causal")
    assert out.logits is not None
    best = out.logits[0].topk(2).values
    for place, event in enumerate(events, start=len(prompt)):
        if best[place - 1, 0] - best[place - 1, 1] < 1e-4:
            return
        if int(out.logits[0, place - 1].argmax()) != event.token:
            raise RuntimeError(
                f"{name}: cached decoding and the whole sequence disagree at {place}"
            )


def check_depths(model: MoR, rows: list[dict[str, Any]]) -> str | None:
    """Return why the depths are not what was trained for, or None."""
    row = next(row for row in rows if row["name"] == "mor")
    wanted = model.config.capacity_depth
    off = abs(row["mean_depth"] / wanted - 1)
    if not off <= DEPTH_TOLERANCE:
        return (
            f"held-out mean depth is {row['mean_depth']:.3f}, the capacities ask for {wanted:.3f}: "
            "the thresholds, set on other held-out text, do not carry over"
        )
    for recursion, share in enumerate(row["active_share"][1:], start=2):
        if not ACTIVE_BOUNDS[0] <= share <= ACTIVE_BOUNDS[1]:
            return f"{100 * share:.1f}% of tokens are active at recursion {recursion}: it collapsed"
    return None


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
        lines.append(
            f"MoR minus {label}: {gap:+.4f} bits per byte, causal: "
            f"MoR {'wins' if gap < 0 else 'loses'}"
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
        wins = ratio < 1 if less else ratio > 1
        lines.append(
            f"{label}: {ratio:.2f} of the vanilla twin's: MoR {'wins' if wins else 'loses'}"
        )
    return lines


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title, _, _ in COLUMNS:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row["label"], *(show(row[key]) for _, key, show in COLUMNS))
    Console(stderr=True, highlight=False, width=max(120, Console().width)).print(table)


def _report(
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
        Section("A sample", _sample(models["mor"], data), "Underneath every token: its own depth."),
    ]
    text_bytes = sum(split.bytes for split in manifest.splits.values())
    subtitle = (
        f"{manifest.source}; {human_bytes(text_bytes)} of text, "
        f"vocabulary of {manifest.vocab_size}, sha256 {manifest.corpus_sha256[:16]}…; "
        f"{seconds:.0f} seconds in all"
    )
    return render_page("mor demo", subtitle, sections, command=command, machine=machine())


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
    ids = data.split("val").read(0, CONTEXT)
    depths = model(torch.from_numpy(ids)[None], rule="causal").depth[0].tolist()
    return _coloured(ids.tolist(), depths, model, data)


def _sample(model: MoR, data: PreparedData) -> str:
    prompt = [data.manifest.eos_token_id]
    params = SamplingParams(max_tokens=200, temperature=0.8, top_p=0.95)
    events = generate(model, [prompt], params, eos_token_id=data.manifest.eos_token_id)
    made = [event for event in events if isinstance(event, GeneratedToken)]
    return _coloured([e.token for e in made], [e.depth for e in made], model, data)


def _coloured(ids: list[int], depths: list[int], model: MoR, data: PreparedData) -> str:
    pieces = data.tokenizer().pieces(ids)
    tokens = [TokenDepth(text, depth) for text, depth in zip(pieces, depths, strict=True)]
    return depth_text_html(tokens, model.config.num_recursions)


def machine() -> dict[str, str]:
    """Describe this machine as a benchmark must."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {
        "processor": name,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
