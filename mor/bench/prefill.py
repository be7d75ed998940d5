"""`mor bench prefill`: how fast MoR reads prompts, beside its vanilla twin on the same engine.

A run is some prompts of one length at a time, one token drawn after each, and then one prompt
alone, whose token says how long a user waits. Rounds, tables and verification are those of
`mor bench decode`.
"""

from __future__ import annotations

import gc
import random
import statistics
from dataclasses import replace
from typing import Any

from mor.bench.contest import Contest, build_side
from mor.bench.predict import efficiency, is_valid
from mor.bench.serve_config import BenchPrefillConfig
from mor.bench.serve_models import about, build_model, build_twin
from mor.bench.tables import TableMaker
from mor.bench.train import in_order, spread
from mor.bench.verify import check_mean_depth
from mor.bench.workload import RequestSpec, cut_prompts
from mor.log import progress
from mor.model.mor import MoR
from mor.ops.device import pick_device, pick_dtype
from mor.tokenizer import Tokenizer


def bench_prefill(config: BenchPrefillConfig) -> dict[str, Any]:
    """Run all models and lengths; returns the least of each headline, `cells`, settings, machine.

    Raises  as `bench_decode`
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    cells = []
    for recursions in (0,) if config.model else config.recursions:
        mor = build_model(config, recursions, dtype=dtype, device=device)
        twin = build_twin(mor, config.seed)
        for prompt_len in config.lens:
            cells.append(bench_cell(config, mor, twin, prompt_len))
            gc.collect()
    names = ("speedup", "efficiency", "twin_efficiency", "tokens_per_s", "twin_tokens_per_s")
    least = {name: min(cell[name] for cell in cells) for name in names}
    is_all_valid = all(cell["is_valid"] for cell in cells)
    result = {**least, "is_valid": is_all_valid, "cells": cells}
    return {**result, **about(config, device, dtype)}


def bench_cell(config: BenchPrefillConfig, mor: MoR, twin: MoR, prompt_len: int) -> dict[str, Any]:
    """Verify and time prompts of one length."""
    context = mor.config.max_position_embeddings
    if prompt_len >= context:
        raise ValueError(f"prompts of {prompt_len} tokens exceed the context of {context}")
    trace = build_trace(config, mor, prompt_len)
    count, max_rows = len(trace), max(config.max_num_batched_tokens, len(trace) + 1)
    sizes = {"in_flight": count, "max_requests": count, "max_rows": max_rows}
    name = f"mor{mor.config.num_recursions}"
    with progress(f"{name}, prompts of {prompt_len}", config.num_rounds + 1) as bar:
        sides = {
            "mor": build_side(name, mor, trace, **sizes),
            "twin": build_side("twin", twin, trace, **sizes),
        }
        mean_depth = check_mean_depth(sides["mor"].warm.depths, mor.config, name=name)
        batches = {which: Contest(side, count) for which, side in sides.items()}
        alone = {which: Contest(replace(side, trace=trace[:1]), 1) for which, side in sides.items()}
        maker = TableMaker(mor, max_rows=max_rows, max_requests=count, max_keys=prompt_len + 1)
        bar.advance(1, note="verified")
        for round_ in range(config.num_rounds):
            maker.sweep()
            for contest in in_order([*batches.values(), *alone.values()], round_):
                contest.run(until_dry=False)
            bar.advance(1, note=f"{_seconds(batches['twin'])[-1]:.2f} s the twin")
    tables = maker.tables()
    predicted = {
        which: batch.predict(tables, max_rows=max_rows) for which, batch in batches.items()
    }
    shares = {
        which: statistics.median(
            efficiency(run.window, predicted[which].window) for run in one.runs
        )
        for which, one in batches.items()
    }
    ratio = spread(_seconds(batches["twin"]), _seconds(batches["mor"]))
    rates = {which: _rate(one, prompt_len) for which, one in batches.items()}
    waits_ms = {which: 1e3 * statistics.median(_seconds(one)) for which, one in alone.items()}
    return {
        "shape": str(config.model or config.shape),
        "recursions": mor.config.num_recursions,
        "layers": mor.config.num_hidden_layers,
        "prompt_len": prompt_len,
        "prompts": count,
        "depths": "drawn" if config.model is None else "trained",
        "speedup": ratio.median,
        "speedup_q1": ratio.q1,
        "speedup_q3": ratio.q3,
        "efficiency": shares["mor"],
        "twin_efficiency": shares["twin"],
        "is_valid": all(map(is_valid, shares.values())),
        "tokens_per_s": rates["mor"],
        "twin_tokens_per_s": rates["twin"],
        "ttft_ms": waits_ms["mor"],
        "twin_ttft_ms": waits_ms["twin"],
        "mean_depth": mean_depth,
        "verified": sides["mor"].verified._asdict(),
    }


def build_trace(config: BenchPrefillConfig, mor: MoR, prompt_len: int) -> list[RequestSpec]:
    """Draw prompts, or cut them from a text."""
    draw, vocab = random.Random(config.seed), mor.config.vocab_size
    trace = [
        RequestSpec(tuple(draw.randrange(vocab) for _ in range(prompt_len)), 1)
        for _ in range(max(config.batch_tokens // prompt_len, 1))
    ]
    if config.text is not None:
        assert config.model is not None
        text = config.text.read_text(encoding="utf-8")
        trace = cut_prompts(
            trace, Tokenizer.load(config.model, eos_token=mor.config.eos_token_id).encode(text)
        )
    return trace


def _seconds(contest: Contest) -> list[float]:
    return [run.window.seconds for run in contest.runs]


def _rate(contest: Contest, prompt_len: int) -> float:
    """Prompt tokens a second."""
    return len(contest.side.trace) * prompt_len / statistics.median(_seconds(contest))
