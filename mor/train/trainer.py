"""Training, to be read top to bottom: loader -> forward -> backward -> clip -> step -> metrics.

The state of a run is (step, weights, optimizer); data order and learning rate are functions of the
step, so a resumed run repeats the bits of one that was never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from mor.checkpoint import WEIGHTS, load_state, load_tensors, model_card, save_model
from mor.config import ModelConfig
from mor.data.loader import Batch, PreparedData, TrainLoader, repeat_rows, sequential_batches
from mor.files import claim_folder, read_json, remove_leftovers, sha256_file, write_json
from mor.log import logger, progress
from mor.model.cost import count_params, num_shallow_steps, training_flops
from mor.model.mor import MoR
from mor.model.stack import RecursionStats
from mor.ops.device import autocast, pick_device, pick_product_dtype
from mor.train.config import (
    Recipe,
    TrainConfig,
    check_context,
    check_routing,
    recipe_to_dict,
    with_defaults,
)
from mor.train.distill import DistillConfig
from mor.train.fit import fit_exits
from mor.train.heldout import HeldoutResult, measure_loss, set_thresholds
from mor.train.metrics import (
    MetricsFile,
    RoutingMeter,
    measure_peak_flops,
    peak_memory_bytes,
    reset_peak_memory,
)
from mor.train.optim import build_optimizer, clip_gradients, learning_rate
from mor.train.state import Checkpoints
from mor.train.teacher import Teacher

EVAL_BATCH_TOKENS = 8192


class Interrupted(Exception):
    """The user stopped a run; a checkpoint of the last whole step is on disk."""


class Batches(Protocol):
    """Where steps get their samples: a pure function of the sample number."""

    def batch(self, first_sample: int, count: int) -> Batch: ...


DIVERGED = "lower train.lr or look at the data there"
"""what a run says at last whose loss is not finite"""
SUMMARY = "summary.json"
"""written last: a run that has it is finished"""


class TrainSummary(NamedTuple):
    """What a finished run reports; `summary.json` holds the same."""

    model: str
    steps: int
    tokens: int
    train_flops: float
    train_seconds: float
    peak_bytes: int
    val_loss: float
    bits_per_byte: float
    mean_depth: float
    active_share: tuple[float, ...]


def train(
    recipe: Recipe,
    *,
    data: PreparedData,
    out: Path,
    resume: bool = False,
    start: Path | None = None,
    teacher: Teaching | None = None,
    go_on: str = "add --resume to go on",
) -> TrainSummary:
    """Train a model from a recipe on prepared data; the model folder ends as `out/model`.

    out      new or empty folder, or a run to go on with
    resume   go on from the newest checkpoint in `out`
    start    model folder whose weights, first and last token the run begins with
    teacher  parent to learn from beside the text
    go_on    what a stopped run says to do next
    Raises   ValueError for settings that do not fit, a folder that holds another run, or a step
             whose loss is not finite (the last good checkpoint stays); Interrupted after Ctrl-C
    """
    fitted = fit_to_data(recipe.model, data, recipe)
    if start is not None:
        taken = ("vocab_size", "bos_token_id", "eos_token_id")
        kept = {name: getattr(recipe.model, name) for name in taken}
        fitted = dataclasses.replace(fitted, **kept)
        data.check_model(start, fitted)
    recipe = dataclasses.replace(recipe, model=fitted)
    config = recipe.train
    check_routing(recipe.model, config)
    device = pick_device(config.device)
    dtype = pick_product_dtype(config.dtype, device)
    loader = TrainLoader(
        data.split("train"),
        row_tokens=config.context,
        seed=config.seed,
        eos_token_id=data.manifest.eos_token_id,
    )
    heldout, val = (held_batches(data, split, recipe) for split in ("heldout", "val"))
    origin = {} if start is None else {"start": sha256_file(start / WEIGHTS)}
    if teacher is not None:
        origin |= {"teacher": sha256_file(teacher.folder / WEIGHTS)}
        origin |= dataclasses.asdict(teacher.config)
    _open_run(out, recipe, data, origin, resume=resume)
    if resume and (out / SUMMARY).is_file() and (out / "model" / WEIGHTS).is_file():
        logger.info("%s is finished", out)
        known: dict[str, Any] = read_json(out / SUMMARY)
        return TrainSummary(**known | {"model": str(out / "model")})

    model = new_model(recipe, device)
    if start is not None:
        take_weights(model, start)
    taught: Teacher | None = None
    parent_loss: float | None = None
    if teacher is not None:
        folder, asked, cache = teacher
        taught = Teacher(folder, recipe.model, asked, dtype=dtype, device=device, cache=cache)
    optimizer = build_optimizer(model, config)
    num_steps = config.num_steps(recipe.model)
    checkpoints = Checkpoints(out / "checkpoints", keep=config.keep_checkpoints)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if resume:
        state = checkpoints.load_newest(model, optimizer) or state
        logger.info("resuming %s at step %d of %d", out, state["step"], num_steps)
    if taught is not None:
        parent_loss = state.get("parent_loss")
        if parent_loss is None:
            parent_loss = measure_loss(taught.parent, heldout, dtype=dtype).loss
    if config.fit_tokens and state["step"] == 0:
        samples = range(0, -(-config.fit_tokens // config.context), config.micro_batch_rows)
        fit_exits(model, [loader.batch(n, config.micro_batch_rows) for n in samples], dtype=dtype)
    metrics = MetricsFile(out / "metrics.jsonl", keep_up_to_step=state["step"])
    peak_flops = measure_peak_flops(device, dtype)
    meter = RoutingMeter(model, config.context)
    eval_every = config.eval_every or max(1, num_steps // 10)
    checkpoint_every = config.checkpoint_every or max(1, num_steps // 10)
    peak_before = state.setdefault("peak_bytes", 0)
    reset_peak_memory(device)
    first_step, start_s = state["step"], time.monotonic() - state["seconds"]
    log_s, log_step = time.monotonic(), first_step

    with progress(f"train {out.name}", num_steps) as bar, _stop_on_interrupt() as stop:
        bar.advance(first_step)
        try:
            for step in range(first_step, num_steps):
                rate = learning_rate(step, num_steps, config)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["lr_scale"]
                losses = train_step(
                    model, optimizer, loader, step, recipe, device, dtype, meter, taught
                )
                if not all(map(math.isfinite, losses.values())):
                    raise ValueError(_bad_step(step, losses, checkpoints))
                done = step + 1
                bar.advance(1, note=f"loss {losses['loss']:.3f}")
                if done % config.log_every == 0 or done == num_steps:
                    now_s = time.monotonic()
                    tokens_per_s = (done - log_step) * config.batch_tokens / (now_s - log_s)
                    flops = flops_of(recipe, done)
                    flops_per_s = (flops - flops_of(recipe, log_step)) / (now_s - log_s)
                    speed = {
                        "tokens_per_s": tokens_per_s,
                        "flops_per_s": flops_per_s,
                        "peak_share": flops_per_s / peak_flops,
                        "peak_memory_bytes": peak_memory_bytes(device),
                        "seconds": now_s - start_s,
                    }
                    tokens = done * config.batch_tokens
                    counts = {"tokens": tokens, "train_flops": flops, "lr": rate}
                    metrics.write(done, {**counts, **losses, **speed, **meter.read()})
                    meter.reset()
                    log_s, log_step = now_s, done
                state = {
                    "step": done,
                    "seconds": time.monotonic() - start_s,
                    "peak_bytes": max(peak_before, peak_memory_bytes(device)),
                    "parent_loss": parent_loss,
                }
                if done % checkpoint_every == 0 or done == num_steps or stop.is_set():
                    checkpoints.save(model, optimizer, state)
                    log_s, log_step = time.monotonic(), done
                if stop.is_set():
                    raise Interrupted(f"stopped after step {done} of {num_steps}; {go_on}")
                if done % eval_every == 0 and done < num_steps:
                    try:
                        result = _amid(model, heldout, dtype=dtype, is_anew=start is None)
                    except KeyboardInterrupt as error:  # the second: it would not wait for the end
                        checkpoints.save(model, optimizer, state)
                        raise Interrupted(f"stopped after step {done}; {go_on}") from error
                    line = {"heldout_loss": result.loss, "heldout_active": list(result.active)}
                    if parent_loss is not None:
                        line["parent_heldout_loss"] = parent_loss
                        logger.info(
                            "held-out loss %.4f, the parent's %.4f", result.loss, parent_loss
                        )
                    metrics.write(done, line)
                    log_s, log_step = time.monotonic(), done
        finally:
            checkpoints.close()
            metrics.close()
    return _finish(model, recipe, data, out, heldout, val, state, num_steps, dtype)


def _amid(model: MoR, heldout: list[Batch], *, dtype: torch.dtype, is_anew: bool) -> HeldoutResult:
    """Measure held-out text amid a training; a conversion's thresholds would let all pass."""
    config = model.config
    is_deep = model.model.depth_limit == config.num_recursions
    if config.router == "expert_choice" and is_deep and not is_anew:
        return set_thresholds(model, heldout, dtype=dtype).result
    return measure_loss(model, heldout, dtype=dtype)


def new_model(recipe: Recipe, device: torch.device) -> MoR:
    """Build a recipe's model as a training begins with it."""
    torch.manual_seed(recipe.train.seed)
    model = MoR(recipe.model).to(device).train()
    model.model.recompute = recipe.train.recompute
    freeze(model, recipe.train)
    if recipe.train.compile:
        model.model.compile_layers()
    return model


def freeze(model: MoR, config: TrainConfig) -> None:
    """Let the parts that a recipe freezes keep their weights."""
    if config.freeze == "none":
        return
    model.head_weight_VD.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.prelude if config.freeze == "prelude" else ():
        layer.requires_grad_(False)


class Teaching(NamedTuple):
    """A parent's folder and what is learnt from it."""

    folder: Path
    config: DistillConfig
    cache: Path | None = None
    """folder for the parent's likeliest tokens, where the config asks for `top_k`"""


def take_weights(model: MoR, folder: Path) -> None:
    """Begin with a folder's weights; what counts steps of a schedule begins anew.

    Raises ValueError for a weight that is missing, foreign or of another shape
    """
    fresh = model.state_dict()
    counters = {name: value for name, value in fresh.items() if name.endswith(".steps_done")}
    tensors = load_tensors(folder / WEIGHTS)
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".steps_done")}
    load_state(model, {**tensors, **counters}, where=str(folder / WEIGHTS), assign=False)


def train_step(
    model: MoR,
    optimizer: torch.optim.Optimizer,
    loader: Batches,
    step: int,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    meter: RoutingMeter,
    teacher: Teacher | None = None,
) -> dict[str, float]:
    """Do one optimizer step; nothing is updated when loss or gradients are not finite.

    Every loss is a sum over tokens divided by the tokens of the whole step, so splitting the batch
    into micro-batches changes nothing.
    """
    config = recipe.train
    tokens = config.batch_tokens
    num_steps = config.num_steps(recipe.model)
    shallow_steps = num_shallow_steps(num_steps, config.shallow_share)
    repeat_steps = int(config.repeat_share * num_steps)
    model.model.depth_limit = 1 if step < shallow_steps else recipe.model.num_recursions
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    router_sum, divergence_sum = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
    state_sum = torch.zeros_like(loss_sum)
    routed: list[list[RecursionStats]] = []
    for start in range(0, config.batch_rows, config.micro_batch_rows):
        first = step * config.batch_rows + start
        batch = loader.batch(first, config.micro_batch_rows)
        if step < repeat_steps:
            batch = repeat_rows(batch, seed=config.seed, first_sample=first)
        batch = batch.to(device)
        with autocast(device, dtype):
            out = model(
                batch.input_ids_BT,
                labels=batch.labels_BT,
                segments=batch.segment_BT,
                rule="train",
                keep_states=teacher is not None,
            )
            if teacher is None:
                assert out.loss_sum is not None
                loss, entropy = out.loss_sum / tokens, out.loss_sum.detach()
            else:
                taught = teacher.losses(model, batch, out)
                loss, entropy = taught.loss / tokens, taught.cross_entropy
                divergence_sum += taught.divergence
                state_sum += taught.state_gap
        if out.router_loss_sum is not None:
            loss = loss + out.router_loss_sum / tokens
            router_sum += out.router_loss_sum.detach()
        loss.backward()
        loss_sum += entropy
        meter.add(out)
        routed.append(out.recursions)
    grad_norm = clip_gradients(model, config.grad_clip)
    losses = {
        "loss": float(loss_sum) / tokens,
        "router_loss": float(router_sum) / tokens,
        "grad_norm": float(grad_norm),
    }
    if teacher is not None:
        losses["divergence"] = float(divergence_sum) / tokens
        losses["state_gap"] = float(state_sum) / tokens
    if all(map(math.isfinite, losses.values())):
        optimizer.step()
        model.model.after_step(routed, is_first=step == shallow_steps)
    optimizer.zero_grad(set_to_none=True)
    return losses


def _finish(
    model: MoR,
    recipe: Recipe,
    data: PreparedData,
    out: Path,
    heldout: list[Batch],
    val: list[Batch],
    state: dict[str, Any],
    num_steps: int,
    dtype: torch.dtype,
) -> TrainSummary:
    """Set the thresholds, measure the validation text, write the model folder and the summary."""
    config = recipe.train
    calibration: dict[str, Any] = {}
    if model.config.has_router:
        calibration = set_thresholds(model, heldout, dtype=dtype).kept
    result = measure_loss(model, val, dtype=dtype)
    text = data.split("val")
    bits_per_byte = result.bits_per_byte(text.tokens / text.bytes)
    tokens = num_steps * config.batch_tokens
    summary = TrainSummary(
        model=str(out / "model"),
        steps=num_steps,
        tokens=tokens,
        train_flops=flops_of(recipe, num_steps),
        train_seconds=state["seconds"],
        peak_bytes=state["peak_bytes"],
        val_loss=result.loss,
        bits_per_byte=bits_per_byte,
        mean_depth=result.mean_depth,
        active_share=result.active,
    )
    card = model_card(
        model,
        f"Trained on {tokens:,} tokens ({tokens / count_params(recipe.model).nonembedding:.1f} per "
        f"non-embedding parameter). Causal validation loss {result.loss:.4f} nats per token, "
        f"{bits_per_byte:.4f} bits per byte, at mean depth {result.mean_depth:.3f}.\n",
    )
    save_model(
        model, out / "model", tokenizer=data.tokenizer(), calibration=calibration or None, card=card
    )
    write_json(out / SUMMARY, summary._asdict())
    return summary


def flops_of(recipe: Recipe, steps: int) -> float:
    """FLOPs of so many steps of a recipe."""
    train = recipe.train
    return training_flops(
        recipe.model,
        train.context,
        steps=steps,
        batch_tokens=train.batch_tokens,
        shallow_steps=num_shallow_steps(train.num_steps(recipe.model), train.shallow_share),
        freeze=train.freeze,
    )


def held_batches(data: PreparedData, split: str, recipe: Recipe) -> list[Batch]:
    """Return `eval_tokens` of a split that no step trains on, spread evenly over it."""
    config = recipe.train
    return list(
        sequential_batches(
            data.split(split),
            row_tokens=config.context,
            batch_rows=max(1, EVAL_BATCH_TOKENS // config.context),
            eos_token_id=data.manifest.eos_token_id,
            limit_rows=max(1, config.eval_tokens // config.context),
        )
    )


def fit_to_data(model: ModelConfig, data: PreparedData, recipe: Recipe) -> ModelConfig:
    """Take vocabulary and document token from the data; refuse what does not fit it."""
    vocab = data.manifest.vocab_size
    default = next(f.default for f in dataclasses.fields(ModelConfig) if f.name == "vocab_size")
    size = vocab if model.vocab_size == default else model.vocab_size
    if size < vocab:
        raise ValueError(
            f"vocab_size is {size}, but the data has token ids up to {vocab - 1}; leave it out"
        )
    check_context(model, recipe.train)
    eos = data.manifest.eos_token_id
    return dataclasses.replace(model, vocab_size=size, bos_token_id=eos, eos_token_id=eos)


def _open_run(
    out: Path, recipe: Recipe, data: PreparedData, origin: dict[str, Any], *, resume: bool
) -> None:
    """Claim a new run folder, or hold a resumed one to the recipe and data it began with.

    origin  hashes of the weights that the run begins with and learns from, empty without
    """
    run = {**recipe_to_dict(recipe), "data_sha256": data.manifest.corpus_sha256}
    run |= {"origin": origin} if origin else {}
    run = json.loads(json.dumps(run))
    file = out / "run.json"
    if not resume:
        if file.is_file():
            raise ValueError(f"{out} already holds a run; add --resume to go on, or change --out")
        claim_folder(out, what="the run")
        write_json(file, run)
        return
    if not file.is_file():
        raise ValueError(f"{out} holds no run to resume; leave out --resume")
    remove_leftovers(out)
    before = read_json(file)
    if before.get("data_sha256") != run["data_sha256"]:
        raise ValueError(f"the data is not what the run in {out} began with; give the same --data")
    if before.get("origin") != run.get("origin"):
        raise ValueError(
            f"the run in {out} began with other weights or another parent; give the same"
        )
    before = with_defaults(before)
    for table in ("model", "train"):
        for key, value in run[table].items():
            was = before[table].get(key)
            if was != value:
                raise ValueError(
                    f"{table}.{key} is {value}, the run in {out} began with {was}; "
                    "use the same recipe and flags"
                )


def _bad_step(step: int, losses: dict[str, float], checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    steps = checkpoints.steps()
    kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was due yet"
    return (
        f"step {step + 1}: loss is {losses['loss']}, router loss {losses['router_loss']}, "
        f"gradient norm {losses['grad_norm']}; {kept}; {DIVERGED}"
    )


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C or SIGTERM into a flag read between steps; the same once more stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
