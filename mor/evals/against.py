"""`mor eval --against PARENT`: a model, its fixed depths and others beside the parent, one report.

Every row is measured alike: bits per byte and few-shot items under the causal rule at the depth
that its tokens took, tokens a second on our engine in alternating rounds.
"""

from __future__ import annotations

import copy
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mor.checkpoint import load_model
from mor.data.loader import PreparedData
from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.evals.depth import bound_depth
from mor.evals.loss import check_lengths, measure_split
from mor.evals.tasks import Subject, answer_tasks, answers_key, retention, summary
from mor.files import write_text
from mor.log import human_bytes, human_count, logger, progress
from mor.model import cost
from mor.model.mor import MoR
from mor.ops.device import describe_machine, pick_device, pick_dtype
from mor.report import Section, render_page, require_report_extra, table_html
from mor.tokenizer import Tokenizer

REQUESTS, PROMPT_LEN, NEW_TOKENS, ROUNDS = 32, 64, 32, 3
CONTEXT = 512
"""tokens before the one whose FLOPs are told"""
HEAD = (
    "model", "parameters", "bytes", "mean depth", "FLOPs per token", "KV per token", "tokens/s",
    "over parent", "bits per byte", "more than parent", "retention",
)  # fmt: skip


class Row(NamedTuple):
    """A model that stands in the report."""

    label: str
    folder: Path
    subject: Subject
    held: tuple[float, ...] | None = None
    """share of tokens active at each recursion where that is no question; None is to be measured"""


def compare(
    folder: Path,
    parent: Path,
    *,
    beside: Mapping[str, Path],
    data_folder: Path | None,
    tasks: Sequence[str],
    data_dir: Path | None,
    out: Path | None,
    limit: int = 0,
    num_fewshot: int = 0,
    split: str = "val",
    limit_tokens: int = 0,
    context: int = 0,
    cache: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measure all rows and write the report; returns them as `rows`, the parent's first.

    beside  label -> folder of models that had the same budget, such as a fixed-depth one
    out     HTML file; None writes none
    Raises  ValueError for a folder, data or task that does not fit
    """
    if data_folder is None and not tasks:
        raise ValueError("nothing to measure; give --data, or --tasks and --data-dir")
    if out is not None:
        require_report_extra()
        if not out.parent.is_dir():
            raise ValueError(f"{out.parent} does not exist; make it, or give another --out")
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    rows = [_row("parent", parent, where, kind), *_depths(folder, where, kind)]
    rows += [_row(label, one, where, kind) for label, one in beside.items()]
    data = None if data_folder is None else PreparedData.open(data_folder)
    if data is not None:
        models = [row.subject.model for row in rows]
        context = check_lengths(models, limit_tokens=limit_tokens, context=context)
        for row in rows:
            data.check_model(row.folder, row.subject.model.config)
    for row in rows:
        most, needed = row.subject.model.config.max_position_embeddings, PROMPT_LEN + NEW_TOKENS
        if most < needed:
            raise ValueError(f"{row.folder} takes {most} tokens; speed is measured with {needed}")
    lines, answered = [], []
    for row in rows:
        logger.info("%s", row.label)
        line: dict[str, Any] = {"model": row.label}
        active = row.held
        if data is not None:
            found = measure_split(
                row.subject.model, data, split, limit_tokens=limit_tokens, context=context
            )
            text, active = data.split(split), found.active
            line["bits_per_byte"] = found.bits_per_byte(text.tokens / text.bytes)
        judged = answer_tasks(
            row.subject, tasks, data_dir, limit=limit, num_fewshot=num_fewshot, cache=cache
        )
        answered.append(judged)
        if judged:
            line["tasks"] = summary(judged)
            kept = retention(judged, answered[0])
            line["retention"] = None if kept is None else kept._asdict()
        lines.append({**line, **_costs(row.subject.model, active)})
    rates = tokens_per_s([row.subject.model for row in rows])
    for line, (rate, depth) in zip(lines, rates, strict=True):
        line |= {"tokens_per_s": rate, "speedup": rate / rates[0][0], "timed_mean_depth": depth}
        if "bits_per_byte" in line:
            line["more_bits"] = line["bits_per_byte"] / lines[0]["bits_per_byte"] - 1
    result: dict[str, Any] = {"parent": str(parent), "rows": lines}
    if out is not None:
        write_text(out, _page(lines, folder, parent))
        result["report"] = str(out)
        logger.info("wrote %s", out)
    return result


def folders_of(beside: Sequence[str]) -> dict[str, Path]:
    """Read LABEL=FOLDER pairs; ValueError for one that is none."""
    found = {}
    for pair in beside:
        label, _, folder = pair.partition("=")
        if not label or not folder:
            raise ValueError(f"beside is {pair!r}; write LABEL=FOLDER")
        found[label] = Path(folder)
    return found


def _row(label: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Row:
    model = load_model(folder, dtype=dtype, device=device)
    tokenizer = Tokenizer.load(folder, eos_token=model.config.eos_token_id)
    everyone = model.config.capacity if set(model.config.capacity) == {1.0} else None
    return Row(
        label, folder, Subject(model, tokenizer, answers_key(folder, dtype, 0), dtype), everyone
    )


def _depths(folder: Path, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Return the model as trained, then held to every depth where its router has thresholds."""
    trained = _row("as trained", folder, device, dtype)
    rows, config = [trained], trained.subject.model.config
    if config.router not in ("expert_choice", "threshold"):
        return rows
    for depth in range(1, config.num_recursions + 1):
        model = copy.deepcopy(trained.subject.model)
        bound_depth(model, least=depth, most=depth)
        key = trained.subject.key.replace("-0", f"-fixed{depth}")
        subject = trained.subject._replace(model=model, key=key)
        held = (1.0,) * depth + (0.0,) * (config.num_recursions - depth)
        rows.append(Row(f"every token at depth {depth}", folder, subject, held))
    return rows


def _costs(model: MoR, active: tuple[float, ...] | None) -> dict[str, Any]:
    """Return what a row costs at the shares of tokens that were active; None where nobody knows."""
    config = model.config
    params = cost.count_params(config)
    size = next(iter(model.parameters())).element_size()
    known = {"params_unique": params.unique, "weight_bytes": params.unique * size}
    if active is None:
        return {**known, "mean_depth": None, "flops_per_token": None, "kv_bytes_per_token": None}
    return {
        **known,
        "mean_depth": sum(active),
        "flops_per_token": cost.decode_flops_per_token(config, CONTEXT, active=active),
        "kv_bytes_per_token": cost.kv_bytes_per_token(config, element_bytes=2, active=active),
    }


def tokens_per_s(models: Sequence[MoR]) -> list[tuple[float, float]]:
    """Time every model on our engine, in rounds whose order changes; prompts included.

    Returns tokens a second, and the mean depth that those tokens took, of each
    """
    draw = random.Random(0)
    vocab = min(model.config.vocab_size for model in models)
    prompts = [[draw.randrange(vocab) for _ in range(PROMPT_LEN)] for _ in range(REQUESTS)]
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    settings = EngineConfig(
        max_num_seqs=REQUESTS,
        max_model_len=PROMPT_LEN + NEW_TOKENS,
        enable_prefix_caching=False,
    )
    engines = [Engine(model.eval(), config=settings) for model in models]
    times: list[list[float]] = [[] for _ in engines]
    depths = [0.0] * len(engines)
    with progress("tokens a second", ROUNDS + 1) as bar:
        for round_ in range(ROUNDS + 1):
            order = range(len(engines)) if round_ % 2 else reversed(range(len(engines)))
            for place in order:
                start_s = time.perf_counter()
                outputs = engines[place].generate(prompts, params)
                times[place].append(time.perf_counter() - start_s)
                depths[place] = statistics.mean(output.mean_depth for output in outputs)
            bar.advance()
    # The first round warms up.
    rates = [REQUESTS * NEW_TOKENS / statistics.median(one[1:]) for one in times]
    return list(zip(rates, depths, strict=True))


def _page(lines: Sequence[dict[str, Any]], folder: Path, parent: Path) -> str:
    cells = [
        [
            line["model"],
            human_count(line["params_unique"]),
            human_bytes(line["weight_bytes"]),
            _known(line["mean_depth"], "{:.2f}".format),
            _known(line["flops_per_token"], human_count),
            _known(line["kv_bytes_per_token"], human_bytes),
            f"{line['tokens_per_s']:.0f} at depth {line['timed_mean_depth']:.2f}",
            f"{line['speedup']:.2f}",
            f"{line['bits_per_byte']:.4f}" if "bits_per_byte" in line else "",
            f"{100 * line['more_bits']:+.1f} %" if "more_bits" in line else "",
            _interval(line["retention"]) if "retention" in line else "",
        ]
        for line in lines
    ]
    note = (
        f"FLOPs of a token after {CONTEXT}, at the depths of the text that was measured; tokens/s "
        "with prompts included, of drawn tokens. Retention: (accuracy - chance) over the "
        "parent's, in brackets 95 % of a paired bootstrap."
    )
    sections = [Section("Beside the parent", table_html(HEAD, cells), note)]
    names = list(lines[0].get("tasks", {}))
    if names:
        scores = [[line["model"], *(_score(line["tasks"][n]) for n in names)] for line in lines]
        heads = ["model", *(f"{n}, chance {lines[0]['tasks'][n]['chance']:.2f}" for n in names)]
        sections.append(
            Section("Tasks", table_html(heads, scores), "Accuracy, standard error, mean depth.")
        )
    command = f"mor {shlex.join(sys.argv[1:])}"
    return render_page(
        f"{folder.name} against its parent",
        str(parent),
        sections,
        command=command,
        machine=describe_machine(),
    )


def _score(line: dict[str, Any]) -> str:
    error = line.get("acc_norm_stderr", line["acc_stderr"])
    return f"{line['main']:.3f} ±{error:.3f}, {line['mean_depth']:.2f}"


def _known(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def _interval(kept: dict[str, float] | None) -> str:
    if kept is None:
        return "parent at chance"
    return f"{kept['value']:.3f} [{kept['low']:.3f}, {kept['high']:.3f}]"
