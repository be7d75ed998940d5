"""`mor bench train`: does training time follow FLOPs, and memory the tokens that are left?

A round is one optimizer step of every model, in an order that changes from round to round; what
counts is a model's time over vanilla's of the same round. Memory is measured first, each model in a
process of its own, while this one is small. Before anything is timed, it verifies what is computed.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from mor.bench.config import PEER, SHAPES, BenchTrainConfig, Shape, row_config
from mor.bench.contender import Contender, Job, OurContender, build_contender
from mor.bench.memory import MemoryUse, measure_in_child
from mor.config import ModelConfig
from mor.log import human_bytes, progress
from mor.model import cost
from mor.ops.device import describe_machine, pick_device
from mor.ops.select import top_k_count

WARMUP_ROUNDS = 2
Timed = TypeVar("Timed")


class Spread(NamedTuple):
    """Median and quartiles of per-round ratios."""

    median: float
    q1: float
    q3: float


def bench_train(config: BenchTrainConfig, *, shape: Shape | None = None) -> dict[str, Any]:
    """Measure memory, verify, then time; returns settings, machine and `rows`, vanilla first.

    shape   models and batch instead of those that config.shape names
    Raises  ValueError when transformers is asked for and missing, or memory does not suffice;
            RuntimeError when a model does not compute what it should
    """
    shape = shape or SHAPES[config.shape]
    device = pick_device(config.device)
    batch_rows = shape.quick_batch_rows if config.quick else shape.batch_rows
    jobs = make_jobs(config, shape, device=str(device), batch_rows=batch_rows)
    memory = measure_memory(jobs)
    contenders = build_all(jobs)
    times = time_rounds(contenders, rounds=config.num_rounds, device=device)
    rows = make_rows(jobs, times, memory)
    return {
        "machine": describe_machine(),
        "device": str(device),
        "dtype": config.dtype,
        "shape": config.shape,
        "model": shape.model.to_dict(),
        "context": shape.context,
        "batch_tokens": batch_rows * shape.context,
        "rounds": config.num_rounds,
        "warmup_rounds": WARMUP_ROUNDS,
        "seed": config.seed,
        "rows": rows,
    }


def make_jobs(config: BenchTrainConfig, shape: Shape, *, device: str, batch_rows: int) -> list[Job]:
    """Return the jobs of the rows, vanilla first, and of the peer at the end."""

    def job(name: str, model: ModelConfig, *, is_peer: bool = False) -> Job:
        sizes = {"context": shape.context, "batch_rows": batch_rows}
        where = {"dtype": config.dtype, "device": device, "seed": config.seed}
        return Job(name=name, model=model.to_dict(), is_peer=is_peer, **sizes, **where)

    jobs = [job(name, row_config(shape, name)) for name in config.row_names]
    if wants_peer(config.peer):
        jobs.append(job(PEER, row_config(shape, "vanilla"), is_peer=True))
    return jobs


def wants_peer(choice: str) -> bool:
    """Decide whether transformers' model runs; ValueError when it is asked for and missing."""
    is_here = importlib.util.find_spec("transformers") is not None
    if choice == PEER and not is_here:
        raise ValueError(
            "transformers is missing; --peer transformers needs: "
            "pip install 'mixture-of-recursions[hf]'"
        )
    return choice == PEER or (choice == "auto" and is_here)


def measure_memory(jobs: Sequence[Job]) -> dict[str, MemoryUse]:
    with progress("memory", len(jobs)) as bar:
        memory = {}
        for job in jobs:
            memory[job.name] = measure_in_child(job)
            bar.advance(1, note=f"{job.name} {human_bytes(memory[job.name].saved_bytes)}")
    return memory


def build_all(jobs: Sequence[Job]) -> list[Contender]:
    """Build every model and verify it; the peer gets vanilla's weights."""
    contenders: list[Contender] = []
    with progress("verify", len(jobs)) as bar:
        for job in jobs:
            contender = build_contender(job)
            if isinstance(contender, OurContender):
                check_work(contender)
            else:
                from mor.bench.peers import LlamaContender, copy_weights

                vanilla = contenders[0]
                assert isinstance(vanilla, OurContender) and isinstance(contender, LlamaContender)
                copy_weights(vanilla.model, contender)
            contenders.append(contender)
            bar.advance(1, note=job.name)
    return contenders


def check_work(contender: OurContender) -> None:
    """Raise RuntimeError unless a step computes what its capacities say, and no more.

    The tokens active at each recursion are counted by the model, the products by PyTorch. Attention
    is left out: the counter knows full squares only, and on a CPU not even those.
    """
    config, train = contender.model.config, contender.recipe.train
    active = [
        train.batch_rows * int(top_k_count(torch.tensor([train.context]), share))
        for share in config.capacity
    ]
    contender.meter.reset()
    with FlopCounterMode(display=False) as counter:
        contender.step(0)
    if contender.meter.active != active:
        raise RuntimeError(
            f"{contender.name}: {contender.meter.active} tokens are active, {active} should be"
        )
    by_operator = counter.get_flop_counts()["Global"]
    counted = sum(by_operator.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    expected = 3 * cost.forward_flops(
        config,
        tokens=train.batch_tokens,
        pairs=0,
        active_tokens=active,
        active_pairs=[0] * len(active),
        head_tokens=train.batch_tokens,
    )
    if counted != expected:
        raise RuntimeError(f"{contender.name}: {counted} FLOPs in a step, not {expected:.0f}")


def time_rounds(
    contenders: Sequence[Contender], *, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every model's step in every round, after the warm-up.

    Raises RuntimeError for a loss that is not finite: the trainer then skips its optimizer.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    total = (WARMUP_ROUNDS + rounds) * len(contenders)
    gc.collect()
    with progress("rounds", total) as bar:
        for round_ in range(WARMUP_ROUNDS + rounds):
            for contender in in_order(contenders, round_):
                start_s = now()
                loss = contender.step(round_)
                seconds = now() - start_s
                if not math.isfinite(loss):
                    raise RuntimeError(f"{contender.name}: loss is {loss} in round {round_}")
                if round_ >= WARMUP_ROUNDS:
                    times[contender.name].append(seconds)
                bar.advance(1, note=f"{contender.name} {seconds:.2f} s")
    return times


def in_order(contenders: Sequence[Timed], round_: int) -> list[Timed]:
    """Return the order of a round: forwards, then backwards, then so from the next one on."""
    first = round_ // 2 % len(contenders)
    order = [*contenders[first:], *contenders[:first]]
    return order[::-1] if round_ % 2 else order


def spread(times: Sequence[float], base: Sequence[float]) -> Spread:
    """Return median and quartiles of times over those of the same rounds in base."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return Spread(median, q1, q3)


def make_rows(
    jobs: Sequence[Job], times: dict[str, list[float]], memory: dict[str, MemoryUse]
) -> list[dict[str, Any]]:
    """Return the table: FLOPs, time and memory of every model, over vanilla's."""
    base = jobs[0].name
    flops = {
        job.name: cost.training_flops_per_token(ModelConfig.from_dict(job.model), job.context)
        for job in jobs
    }
    rows = []
    for job in jobs:
        name, step_s = job.name, statistics.median(times[job.name])
        ratio = spread(times[name], times[base])
        tokens = job.context * job.batch_rows
        rows.append(
            {
                "name": name,
                "flops_ratio": flops[name] / flops[base],
                "time_ratio": ratio.median,
                "time_ratio_q1": ratio.q1,
                "time_ratio_q3": ratio.q3,
                "time_s": step_s,
                "tokens_per_s": tokens / step_s,
                "flops_per_s": tokens * flops[name] / step_s,
                "peak_memory_ratio": memory[name].saved_bytes / memory[base].saved_bytes,
                **memory[name]._asdict(),
            }
        )
    return rows
