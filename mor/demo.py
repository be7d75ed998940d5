"""`mor demo`: a small MoR, its vanilla twin and two controls on real text, for the same FLOPs.

Every model is trained by the `mor train` command in a process of its own (so that peak memory is
its own), from a recipe left beside it; then all decode side by side here, in alternating rounds.
"""

from __future__ import annotations

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
from mor.data.loader import PreparedData, sequential_batches
from mor.data.prepare import prepare
from mor.demo_page import print_table, report_page, verdict
from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.files import claim_folder, read_json, write_text
from mor.log import logger, progress
from mor.model.cost import count_params, kv_bytes_per_token
from mor.model.mor import MoR
from mor.report import require_report_extra
from mor.train.heldout import measure_loss
from mor.train.trainer import EVAL_BATCH_TOKENS


@dataclass(frozen=True, slots=True)
class Size:
    """How much the demo does."""

    vocab_size: int
    limit_bytes: int
    context: int
    flops: float
    eval_tokens: int
    decode_tokens: int
    decode_rounds: int


FULL = Size(
    vocab_size=2048,
    limit_bytes=20_000_000,
    context=256,
    flops=2.5e12,
    eval_tokens=65536,
    decode_tokens=96,
    decode_rounds=9,
)
QUICK = Size(
    vocab_size=1024,
    limit_bytes=3_000_000,
    context=128,
    flops=1.0e11,
    eval_tokens=24576,
    decode_tokens=16,
    decode_rounds=2,
)

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
        4e-3,
    ),
    Member("vanilla", "Vanilla twin", "", 4e-3),
    Member("recursive", "Fixed-depth recursive", f"num_recursions = {RECURSIONS}", 4e-3),
    Member(
        "mor-random",
        "MoR, random router",
        f'num_recursions = {RECURSIONS}\nrouter = "random"',
        4e-3,
    ),
)

DEPTH_TOLERANCE = 0.05
NOBODY = 2.0
"""A threshold above every score."""
ACTIVE_BOUNDS = (0.05, 0.95)


def demo(
    out: Path, *, quick: bool, inputs: Sequence[str | Path], seed: int, argv: Sequence[str]
) -> dict[str, Any]:
    """Run the demo into an empty folder; returns `models`, `report` and `failure` (None: fine)."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; give a number from 0 to 2**63 - 1")
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
    if not quick:
        rows[0]["bits_per_byte_up_to_depth"] = bits_up_to_depth(models["mor"], data, size)
    failure = check_depths(models["mor"], rows)
    seconds = time.monotonic() - start_s
    command = "mor " + shlex.join(argv)
    report = out / "report.html"
    write_text(report, report_page(out, rows, models, data, command, seconds, failure, quick))
    print_table(rows)
    for line in verdict(rows):
        logger.info("%s", line)
    logger.info("report: %s (%.0f seconds in all)", report, seconds)
    return {"models": rows, "report": str(report), "seconds": seconds, "failure": failure}


def _prepare(folder: Path, size: Size, inputs: Sequence[str | Path]) -> PreparedData:
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
        context=size.context,
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
    if code == 2:  # it has said why
        raise ValueError(f"training {member.name} came to no result; see the line above")
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


def bits_up_to_depth(model: MoR, data: PreparedData, size: Size) -> list[float]:
    """Causal bits per byte when tokens may take at most 1, 2, .. R recursions.

    What depth is worth to the model: with a weak gate it may be next to nothing.
    """
    val = data.split("val")
    routers = [model.model.router(r) for r in range(1, model.config.num_recursions)]
    trained = [float(router.threshold) for router in routers]
    bits = []
    for most in range(1, model.config.num_recursions + 1):
        for recursion, (router, threshold) in enumerate(zip(routers, trained, strict=True), 2):
            router.threshold.fill_(threshold if recursion <= most else NOBODY)
        batches = sequential_batches(
            val,
            row_tokens=size.context,
            batch_rows=EVAL_BATCH_TOKENS // size.context,
            eos_token_id=data.manifest.eos_token_id,
            limit_rows=size.eval_tokens // size.context,
        )
        bits.append(measure_loss(model, batches).bits_per_byte(val.tokens / val.bytes))
    return bits


def _decode_speeds(models: dict[str, MoR], data: PreparedData, size: Size) -> dict[str, float]:
    """Time greedy decoding of one sequence on the engine, models in turn; median tokens a second.

    First it verifies: what the engine decodes must be what the whole sequence predicts.
    """
    prompt = data.split("val").read(0, 64).tolist()
    params = SamplingParams(max_tokens=size.decode_tokens, temperature=0, ignore_eos=True)
    config = EngineConfig(max_num_seqs=1, enable_prefix_caching=False)
    engines = {name: Engine(model, config) for name, model in models.items()}
    for name, engine in engines.items():
        verify_decode(name, engine, prompt, params)
    times: dict[str, list[float]] = {name: [] for name in models}
    with progress("decode", size.decode_rounds * len(models)) as bar:
        for _ in range(size.decode_rounds):
            for name, engine in engines.items():
                first_s = 0.0
                for piece in engine.stream(prompt, params):
                    if piece.token_ids and not first_s:
                        first_s = time.perf_counter()
                seconds = time.perf_counter() - first_s
                times[name].append((size.decode_tokens - 1) / seconds)
                bar.advance()
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def verify_decode(name: str, engine: Engine, prompt: list[int], params: SamplingParams) -> None:
    """Hold greedy decoding to one forward pass over the whole sequence.

    Up to the first near tie of the two best logits, closer than 1e-4.
    """
    (output,) = engine.generate([prompt], params)
    tokens = output.outputs[0].token_ids
    out = engine.model(torch.tensor([prompt + tokens]), rule="causal")
    assert out.logits is not None
    best = out.logits[0].topk(2).values
    for place, token in enumerate(tokens, start=len(prompt)):
        if best[place - 1, 0] - best[place - 1, 1] < 1e-4:
            return
        if int(out.logits[0, place - 1].argmax()) != token:
            raise RuntimeError(f"{name}: decoding and the whole sequence disagree at {place}")


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
