"""`mor eval --tasks`: few-shot tasks on local files, answers kept item by item.

An answer is kept under a hash of the model's weights, its limit of depth and the item, so a killed
run goes on and no answer of another model is taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mor.checkpoint import WEIGHTS, load_model
from mor.evals.depth import bound_depth
from mor.evals.items import TASKS, Item, load_items
from mor.evals.score import Answer, score_items
from mor.files import sha256_file
from mor.log import logger, progress
from mor.model.mor import MoR
from mor.ops.device import pick_device, pick_dtype
from mor.tokenizer import Tokenizer

DRAWS = 2000


class Judged(NamedTuple):
    """An item's answer and what it is worth."""

    item: Item
    answer: Answer
    acc: float
    acc_norm: float

    @property
    def mean_depth(self) -> float:
        return self.answer.depth_sum / self.answer.num_tokens


def judge(item: Item, answer: Answer) -> Judged:
    """Score an answer as lm-evaluation-harness does; ties go to the first."""
    if item.gold is None:
        right = float(answer.is_greedy[0])
        return Judged(item, answer, right, right)
    values = np.array(answer.log_likelihoods)
    acc = float(int(values.argmax()) == item.gold)
    norm = float(int((values / np.array(item.choice_chars)).argmax()) == item.gold)
    return Judged(item, answer, acc, norm)


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    data_dir: Path,
    *,
    limit: int = 0,
    num_fewshot: int = 0,
    cache: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_recursions: int = 0,
) -> dict[str, list[Judged]]:
    """Answer the items of tasks with a model folder; returns them by task, in their order.

    cache           folder of answers; OUT of an earlier run goes on
    max_recursions  recursions that a token may take at most; 0 for all
    Raises          ValueError for a task, file or model that does not fit
    """
    items = _items(tasks, data_dir, limit=limit, num_fewshot=num_fewshot)
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    model = load_model(folder, device=where)
    tokenizer = Tokenizer.load(folder, eos_token=model.config.eos_token_id)
    if kind == torch.bfloat16:
        model = model.to(kind)
    if max_recursions:
        bound_depth(model, most=max_recursions)
    key = answers_key(folder, kind, max_recursions)
    subject = Subject(model, tokenizer, key, kind)
    return {task: _answer(subject, task, some, cache) for task, some in items.items()}


def answers_key(folder: Path, dtype: torch.dtype, max_recursions: int) -> str:
    """Tell a model's answers from those of others: by all that decides them."""
    files = [folder / name for name in (WEIGHTS, "config.json", "tokenizer.json")]
    told = "".join(sha256_file(file) for file in files)
    return f"{hashlib.sha256(told.encode()).hexdigest()}-{dtype}-{max_recursions}"


class Subject(NamedTuple):
    """A model that answers."""

    model: MoR
    tokenizer: Tokenizer
    key: str
    """tells its answers from those of others"""
    dtype: torch.dtype


def answer_tasks(
    subject: Subject,
    tasks: Sequence[str],
    data_dir: Path | None,
    *,
    limit: int = 0,
    num_fewshot: int = 0,
    cache: Path | None = None,
) -> dict[str, list[Judged]]:
    """Answer tasks with a model that is loaded; see `run_tasks`."""
    if tasks and data_dir is None:
        raise ValueError("--data-dir is missing; give the folder of the tasks' files")
    if data_dir is None:
        return {}
    items = _items(tasks, data_dir, limit=limit, num_fewshot=num_fewshot)
    return {task: _answer(subject, task, some, cache) for task, some in items.items()}


def _items(
    tasks: Sequence[str], data_dir: Path, *, limit: int, num_fewshot: int = 0
) -> dict[str, list[Item]]:
    if num_fewshot and "mmlu" not in tasks:
        raise ValueError(f"num_fewshot is {num_fewshot}; only mmlu has examples to show")
    return {
        task: load_items(
            task, data_dir, limit=limit, num_fewshot=num_fewshot if task == "mmlu" else 0
        )
        for task in tasks
    }


def evaluate_tasks(
    folder: Path, tasks: str, data_dir: Path | None, **settings: Any
) -> dict[str, Any]:
    """Answer tasks, named with commas between, and log a line for each; see `run_tasks`."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if data_dir is None:
        raise ValueError("--data-dir is missing; give the folder of the tasks' files")
    result = summary(run_tasks(folder, names, data_dir, **settings))
    for task, line in result.items():
        logger.info(
            "%-15s %.4f (+-%.4f) of %d, chance %.2f, mean depth %.2f",
            task,
            line["main"],
            line.get("acc_norm_stderr", line["acc_stderr"]),
            line["n"],
            line["chance"],
            line["mean_depth"],
        )
    return result


def _answer(subject: Subject, task: str, items: list[Item], cache: Path | None) -> list[Judged]:
    kept = _Kept(cache / f"{task}.jsonl" if cache else None, subject.key)
    answers = {place: kept.get(item) for place, item in enumerate(items)}
    missing = [place for place, answer in answers.items() if answer is None]
    with progress(task, len(items)) as bar, kept:
        bar.advance(len(items) - len(missing))
        todo = [items[place] for place in missing]
        scored = score_items(subject.model, subject.tokenizer, todo, dtype=subject.dtype)
        for index, answer in scored:
            answers[missing[index]] = answer
            kept.add(todo[index], answer)
            bar.advance()
    cut = sum(answer.num_cut for answer in answers.values() if answer is not None)
    if cut:
        logger.info(
            "%s: %d requests were longer than the context and lost their beginning", task, cut
        )
    judged = []
    for place, item in enumerate(items):
        answer = answers[place]
        assert answer is not None
        judged.append(judge(item, answer))
    return judged


class _Kept:
    """Answers on disk, one JSON line each; a line that a kill cut short is left out."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.known: dict[str, Answer] = {}
        self.file: Any = None
        if path is None or not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                name, values = json.loads(line)
                self.known[name] = Answer(tuple(values[0]), tuple(values[1]), *values[2:])
            except (json.JSONDecodeError, ValueError, TypeError, IndexError):
                continue

    def _name(self, item: Item) -> str:
        return hashlib.sha256(f"{self.key} {item.fingerprint()}".encode()).hexdigest()

    def get(self, item: Item) -> Answer | None:
        return self.known.get(self._name(item))

    def __enter__(self) -> _Kept:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"", b"\n")
            self.file = self.path.open("a", encoding="utf-8")
            if not whole:
                self.file.write("\n")
        return self

    def __exit__(self, *args: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, item: Item, answer: Answer) -> None:
        if self.file is not None:
            self.file.write(json.dumps([self._name(item), list(answer)]) + "\n")
            self.file.flush()


def summary(judged: dict[str, list[Judged]]) -> dict[str, Any]:
    """Return what each task came to: acc, acc_norm, standard errors, chance, mean depth.

    `main` is what lm-evaluation-harness's tables show: acc_norm where a task has it, else acc.
    """
    out: dict[str, Any] = {}
    for task, some in judged.items():
        acc = [one.acc for one in some]
        line: dict[str, Any] = {
            "n": len(some),
            "acc": float(np.mean(acc)),
            "acc_stderr": stderr(acc),
            "chance": float(np.mean([one.item.chance for one in some])),
            "mean_depth": sum(one.answer.depth_sum for one in some)
            / sum(one.answer.num_tokens for one in some),
        }
        if TASKS[task].has_norm:
            norm = [one.acc_norm for one in some]
            line |= {"acc_norm": float(np.mean(norm)), "acc_norm_stderr": stderr(norm)}
        if task == "lambada_openai":
            nats = [one.answer.log_likelihoods[0] for one in some]
            line["perplexity"] = math.exp(min(-float(np.mean(nats)), 700))
        line["main"] = line.get("acc_norm", line["acc"])
        out[task] = line
    return out


def stderr(values: Sequence[float]) -> float:
    """Return the standard error of a mean, as lm-evaluation-harness has it."""
    if len(values) < 2:
        return float("nan")
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


class Retention(NamedTuple):
    """(accuracy - chance) / (parent's - chance), over all items, with 95 % from a bootstrap."""

    value: float
    low: float
    high: float


def retention(ours: dict[str, list[Judged]], parents: dict[str, list[Judged]]) -> Retention | None:
    """Compare answers to the same items; each task counts alike.

    None where the parent itself is not above chance: its 95 % reach 0, and so would a divisor.
    Raises ValueError when the items are not the same
    """
    gains, wholes = [], []
    for task, some in ours.items():
        theirs = parents[task]
        if [one.item.fingerprint() for one in some] != [o.item.fingerprint() for o in theirs]:
            raise ValueError(f"{task}: the items are not the same, so nothing can be paired")
        chance = np.array([one.item.chance for one in some])
        pick = "acc_norm" if TASKS[task].has_norm else "acc"
        gains.append(np.array([getattr(one, pick) for one in some]) - chance)
        wholes.append(np.array([getattr(one, pick) for one in theirs]) - chance)

    def total(of: list[np.ndarray], places: Sequence[np.ndarray]) -> float:
        return sum(float(one[p].mean()) for one, p in zip(of, places, strict=True))

    rng = np.random.default_rng(0)
    draws = [[rng.integers(len(gain), size=len(gain)) for gain in gains] for _ in range(DRAWS)]
    whole = np.array([total(wholes, places) for places in draws])
    if np.quantile(whole, 0.025) <= 0:
        return None
    low, high = np.quantile([total(gains, p) for p in draws] / whole, [0.025, 0.975])
    everyone = [np.arange(len(gain)) for gain in gains]
    value = total(gains, everyone) / total(wholes, everyone)
    return Retention(value, float(low), float(high))
