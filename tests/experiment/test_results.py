"""Promises of kept results: a change by hand is found, nobody's line is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mor.experiment.results import Results, read_results, sealed


def settings(lr: float) -> dict[str, Any]:
    return {"recipe": {"model": {}, "train": {"lr": lr}}, "data_sha256": "d", "eval_tokens": 9}


def line(**more: object) -> dict[str, Any]:
    return {"member": "a", "outcome": "done", "val_loss": 2.5, **settings(1.0), **more}


def test_what_is_added_is_read_back(tmp_path: Path):
    results = Results(tmp_path / "kept" / "r.jsonl")
    results.add(line())
    results.add(line(member="b", **settings(2.0)))
    again = Results(results.path)
    assert list(again.by_name) == ["a", "b"]
    assert again.done("a", settings(1.0)) == again.by_name["a"]
    assert again.done("c", settings(2.0)) == again.by_name["b"]
    assert again.done("c", settings(3.0)) is None
    with pytest.raises(ValueError, match="holds a from other settings or data"):
        again.done("a", settings(2.0))


def test_a_field_that_came_later_has_its_default(tmp_path: Path):
    results = Results(tmp_path / "r.jsonl")
    results.add(line())
    now = settings(1.0)
    now["recipe"]["train"]["lora_lr_scale"] = 1.0
    assert results.done("a", now) is not None
    now["recipe"]["train"]["lora_lr_scale"] = 2.0
    assert results.done("b", now) is None


def test_two_runs_add_to_one_file(tmp_path: Path):
    one, other = Results(tmp_path / "r.jsonl"), Results(tmp_path / "r.jsonl")
    one.add(line())
    other.add(line(member="b"))
    one.add(line(val_loss=2.0))
    assert [(r["member"], r["val_loss"]) for r in read_results(one.path)] == [
        ("a", 2.0),
        ("b", 2.5),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("2.5", "2.4"), "line 1: a was changed after it was written"),
        (lambda text: text.replace('"val_loss": 2.5', '"val_loss": 2.5, "x": 1'), "was changed"),
        (lambda text: "{}\n", "line 1: no result of mor experiment"),
        (lambda text: text[:-9], "line 1: not JSON"),
        (
            lambda text: json.dumps(sealed({**json.loads(text), "format_version": 9})),
            "format version is 9, this mor reads 1",
        ),
    ],
)
def test_a_line_that_is_not_as_it_was_written_is_refused(tmp_path: Path, change, said: str):
    results = Results(tmp_path / "r.jsonl")
    results.add(line())
    results.path.write_text(change(results.path.read_text()))
    with pytest.raises(ValueError, match=said):
        read_results(results.path)
