"""Promises of workloads: lengths come from a seed or a file, and what does not fit is named."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from mor.bench.serve_config import FULL_MIX
from mor.bench.workload import cut_prompts, make_trace, read_trace


def test_requests_are_a_function_of_seed_and_place():
    trace = make_trace(50, FULL_MIX, vocab_size=100, seed=3)
    assert trace == make_trace(50, FULL_MIX, vocab_size=100, seed=3)
    assert trace[:20] == make_trace(20, FULL_MIX, vocab_size=100, seed=3)
    assert trace != make_trace(50, FULL_MIX, vocab_size=100, seed=4)


def test_lengths_are_mixed_and_within_their_limits():
    trace = make_trace(400, FULL_MIX, vocab_size=100, seed=0)
    for lengths, drawn in (
        (FULL_MIX.prompt, [request.prompt_len for request in trace]),
        (FULL_MIX.output, [request.output_len for request in trace]),
    ):
        assert lengths.least == min(drawn) and max(drawn) <= lengths.most
        assert statistics.median(drawn) == pytest.approx(lengths.median, rel=0.15)
        assert statistics.pstdev(drawn) > 0.4 * lengths.median
    assert all(0 <= token < 100 for request in trace for token in request.prompt_ids)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def test_a_trace_file_gives_lengths_arrivals_and_depths(tmp_path: Path):
    path = write(
        tmp_path / "trace.jsonl",
        {"prompt_len": 3, "output_len": 2, "arrival_s": 1.5},
        {"prompt_len": 2, "output_len": 1, "depths": [1, 3]},
    )
    first, second = read_trace(path, vocab_size=10, max_recursions=3, seed=0)
    assert (first.prompt_len, first.output_len, first.depths) == (2, 1, (1, 3))
    assert (second.prompt_len, second.arrival_s, second.num_run) == (3, 1.5, 4)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt_len": 0, "output_len": 2}, "prompt_len is 0; give a whole number of 1 or more"),
        ({"prompt_len": 1}, "output_len is None; give a whole number"),
        ({"prompt_len": 1, "output_len": True}, "output_len is True"),
        ({"prompt_len": 1, "output_len": 1, "arrival_s": -1}, "arrival_s is -1; give seconds"),
        ({"prompt_len": 1, "output_len": 2, "depths": [4, 1]}, r"depths leave 1..3"),
        ({"prompt_len": 1, "output_len": 2, "depths": [1]}, "1 depths for 2 tokens that run"),
        ({"prompt_len": 1, "output_len": 2, "length": 1}, "length is unknown; use prompt_len"),
        ([1], "is no object"),
    ],
)
def test_what_a_trace_file_cannot_say_is_named_with_its_line(tmp_path: Path, line, said):
    path = write(tmp_path / "trace.jsonl", {"prompt_len": 1, "output_len": 1}, line)
    with pytest.raises(ValueError, match=f"line 2: .*{said}"):
        read_trace(path, vocab_size=10, max_recursions=3, seed=0)


def test_an_empty_trace_is_refused(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no request"):
        read_trace(path, vocab_size=10, max_recursions=3, seed=0)


def test_prompts_are_cut_from_a_text_one_behind_the_other():
    trace = make_trace(3, FULL_MIX, vocab_size=100, seed=0)
    cut = cut_prompts(trace, range(70))
    flat = [token for request in cut for token in request.prompt_ids]
    assert flat == [i % 70 for i in range(len(flat))]
    assert [r.output_len for r in cut] == [r.output_len for r in trace]
    with pytest.raises(ValueError, match="text for prompts is empty"):
        cut_prompts(trace, [])
