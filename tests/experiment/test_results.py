"""Promises of kept results: a change by hand is found, nobody's line is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mor.experiment.results import Results, read_results, sealed


def line(**more: object) -> dict[str, object]:
    return {"member": "a", "outcome": "done", "key": "k", "val_loss": 2.5, **more}


def test_what_is_added_is_read_back(tmp_path: Path):
    results = Results(tmp_path / "kept" / "r.jsonl")
    results.add(line())
    results.add(line(member="b", key="l"))
    again = Results(results.path)
    assert list(again.by_name) == ["a", "b"]
    assert again.done("a", "k") == again.by_name["a"]
    assert again.done("c", "l") == again.by_name["b"]
    assert again.done("c", "m") is None
    with pytest.raises(ValueError, match="holds a from other settings or data"):
        again.done("a", "other")


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
