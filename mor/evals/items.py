"""Few-shot tasks from local files: each line becomes requests, pairs of context and continuation.

Prompts and scores are lm-evaluation-harness's (version 0.4): zero-shot, a space between context and
choice, `acc_norm` over the characters of a choice. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mor.config import check_choice


class Request(NamedTuple):
    """What a model is asked: how likely is the continuation after the context?"""

    context: str
    continuation: str


class Item(NamedTuple):
    """One question."""

    name: str
    requests: tuple[Request, ...]
    gold: int | None
    """index of the right request; None where greedy agreement decides"""
    choice_chars: tuple[int, ...]
    """characters of each choice, for acc_norm"""
    subject: str = ""

    @property
    def chance(self) -> float:
        return 0.0 if self.gold is None else 1 / len(self.requests)

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of what is asked and what is right."""
        return hashlib.sha256(json.dumps([self.requests, self.gold]).encode()).hexdigest()


class Task(NamedTuple):
    """Where a task's items are and how a line becomes one."""

    file: str
    parse: Callable[[dict[str, Any]], Item]
    has_norm: bool
    """acc_norm is told beside acc"""


def load_items(task: str, data_dir: Path, *, limit: int = 0, num_fewshot: int = 0) -> list[Item]:
    """Read a task's items, the first `limit` of them (0: all).

    Raises ValueError, in one line, for an unknown task, a missing file or a line that does not fit
    """
    check_choice("task", task, list(TASKS))
    if limit < 0:
        raise ValueError(f"limit is {limit}; give 1 or more, or 0 for all items")
    if num_fewshot and task != "mmlu":
        raise ValueError(f"num_fewshot is {num_fewshot}; only mmlu has examples to show")
    about = TASKS[task]
    file = data_dir / task / about.file
    items = [_parsed(about, line, where) for where, line in _lines(file)]
    if not items:
        raise ValueError(f"{file} holds no items; give one JSON object a line")
    if num_fewshot:
        items = _with_examples(items, data_dir / task / "dev.jsonl", num_fewshot)
    elif task == "mmlu":
        items = [_described(item, "") for item in items]
    return items[:limit] if limit else items


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    if not file.is_file():
        raise ValueError(
            f"{file} is missing; --data-dir holds a folder for each task, one JSON object a line"
        )
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}") from error
    found = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{file}, line {number}"
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg})") from error
        if not isinstance(line, dict):
            raise ValueError(f"{where}: no object; give one JSON object a line")
        found.append((where, line))
    return found


def _parsed(about: Task, line: dict[str, Any], where: str) -> Item:
    try:
        item = about.parse(line)
    except KeyError as error:
        raise ValueError(f"{where}: the field {error.args[0]} is missing") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: a field has the wrong type or value ({error})") from error
    if not item.requests or any(not r.context or not r.continuation.strip() for r in item.requests):
        raise ValueError(f"{where}: a context or a choice is empty")
    if item.gold is not None and not 0 <= item.gold < len(item.requests):
        raise ValueError(f"{where}: gold is {item.gold} of {len(item.requests)} choices")
    return item


def _choices(line: dict[str, Any], context: str) -> Item:
    choices = [str(choice) for choice in line["choices"]]
    return Item(
        str(line["id"]),
        tuple(Request(context, f" {choice}") for choice in choices),
        int(line["gold"]),
        tuple(len(choice) for choice in choices),
    )


def _hellaswag(line: dict[str, Any]) -> Item:
    return _choices(line, line["context"].strip())


def _answered(line: dict[str, Any]) -> Item:
    """ARC and PIQA end the question with "Answer:"; files may have it already."""
    context = line["context"]
    return _choices(line, context if context.endswith("\nAnswer:") else f"{context}\nAnswer:")


def _plain(line: dict[str, Any]) -> Item:
    return _choices(line, line["context"])


def _winogrande(line: dict[str, Any]) -> Item:
    continuation = f" {line['continuation']}"
    contexts = [str(context) for context in line["context_options"]]
    return Item(
        str(line["id"]),
        tuple(Request(context, continuation) for context in contexts),
        int(line["gold"]),
        (len(line["continuation"]),) * len(contexts),
    )


def _last_word(line: dict[str, Any]) -> Item:
    request = Request(line["context"], f" {line['continuation']}")
    return Item(str(line["id"]), (request,), None, (len(line["continuation"]),))


def _mmlu(line: dict[str, Any]) -> Item:
    letters = "ABCD"
    if len(line["choices"]) != len(letters):
        raise ValueError(f"{len(line['choices'])} choices instead of {len(letters)}")
    context = _mmlu_question(line)
    requests = tuple(Request(context, f" {letter}") for letter in letters)
    return Item(str(line["id"]), requests, int(line["gold"]), (1,) * 4, line["subject"])


def _mmlu_question(line: dict[str, Any]) -> str:
    options = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip("ABCD", line["choices"], strict=True)
    )
    return f"{line['question'].strip()}\n{options}Answer:"


def _described(item: Item, examples: str) -> Item:
    """Put the subject, and examples, before a question of MMLU."""
    subject = item.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    requests = tuple(Request(head + examples + r.context, r.continuation) for r in item.requests)
    return item._replace(requests=requests)


def _with_examples(items: list[Item], dev: Path, count: int) -> list[Item]:
    shown: dict[str, list[str]] = {}
    for where, line in _lines(dev):
        item = _parsed(TASKS["mmlu"], line, where)
        assert item.gold is not None
        answer = item.requests[item.gold].continuation
        shown.setdefault(item.subject, []).append(f"{item.requests[0].context}{answer}\n\n")
    for item in items:
        if len(shown.get(item.subject, [])) < count:
            raise ValueError(
                f"{dev} has {len(shown.get(item.subject, []))} examples of {item.subject}; ask for "
                "no more with --num-fewshot"
            )
    return [_described(item, "".join(shown[item.subject][:count])) for item in items]


TASKS: dict[str, Task] = {
    "hellaswag": Task("validation.jsonl", _hellaswag, True),
    "piqa": Task("validation.jsonl", _answered, True),
    "winogrande": Task("validation.jsonl", _winogrande, False),
    "arc_easy": Task("test.jsonl", _answered, True),
    "arc_challenge": Task("test.jsonl", _answered, True),
    "openbookqa": Task("test.jsonl", _plain, True),
    "lambada_openai": Task("test.jsonl", _last_word, False),
    "mmlu": Task("test.jsonl", _mmlu, False),
}
