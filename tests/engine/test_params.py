"""Sampling parameters are refused in one line that names them, or kept as they were meant."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from mor.engine.params import SamplingParams

WHOLE = ("n", "max_tokens", "min_tokens", "top_k", "logprobs", "prompt_logprobs", "seed")
NUMBERS = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "threshold_shift", "target_depth"),
)
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
BAD: list[tuple[str, Any]] = [
    *(
        (name, bad)
        for name in (*WHOLE, "max_recursions")
        for bad in (1.5, 2.0, "1", True, [], 2**80)
    ),
    *((name, bad) for name in NUMBERS for bad in (math.nan, math.inf, -math.inf, "1", True, [])),
    *((name, 10**400) for name in NUMBERS),
    *((name, bad) for name in FLAGS for bad in (1, 0, "true", None)),
    *((name, None) for name in ("n", "min_tokens", "top_k", "temperature", "top_p", "min_p")),
    *(("n", bad) for bad in (0, -1, 1025)),
    *(("max_tokens", bad) for bad in (0, -1)),
    *((name, -1) for name in ("min_tokens", "logprobs", "prompt_logprobs", "temperature", "min_p")),
    *((name, 21) for name in ("logprobs", "prompt_logprobs")),
    ("top_k", -2),
    *(("top_p", bad) for bad in (0, -0.1, 1.01)),
    ("min_p", 1.01),
    *(("repetition_penalty", bad) for bad in (0, -1, 1e-9, 101)),
    *((name, bad) for name in ("presence_penalty", "frequency_penalty") for bad in (-2.1, 2.1)),
    *(("max_recursions", bad) for bad in (0, -1)),
    *(("target_depth", bad) for bad in (0, 0.5, -1)),
    *(("stop", bad) for bad in ("", [""], ["a", ""], 3, [3], [None], {"a": 1}, True)),
    *(("stop_token_ids", bad) for bad in (3, "3", ["3"], [-1], [True], [1.0], [None])),
    *(("logit_bias", bad) for bad in ([1], "1", {-1: 1}, {"x": 1}, {True: 1}, {1.0: 1}, {"²": 1})),
    *(("logit_bias", {1: bad}) for bad in (101, -101, math.nan, math.inf, "1", None, True)),
    ("logit_bias", {1: 1.0, "1": 2.0}),
]


@pytest.mark.parametrize(("name", "bad"), BAD)
def test_a_bad_value_is_refused_in_one_line_that_names_it(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} .*give ") as caught:
        SamplingParams(**{name: bad})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, above max_tokens 4"),
        ({"n": 2, "temperature": 0}, "n is 2 with temperature 0"),
        ({"target_depth": 2, "threshold_shift": 0.1}, "give one"),
        ({"target_depth": 2.5, "max_recursions": 2}, "target_depth is 2.5, above max_recursions"),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SamplingParams(**values)
    assert "\n" not in str(caught.value)


def test_values_are_kept_in_one_form() -> None:
    params = SamplingParams(
        n=3,
        max_tokens=None,
        temperature=1,
        top_k=-1,
        logit_bias={"7": 2, 3: -100},  # type: ignore[dict-item]
        stop="end",
        stop_token_ids=[4, 5],
        seed=-(2**63),
        logprobs=0,
        max_recursions=2,
        target_depth=2,
    )
    assert params.logit_bias == {7: 2.0, 3: -100.0}
    assert params.stop == params.stop_strings == ("end",)
    assert params.stop_token_ids == params.stop_ids == (4, 5)
    assert isinstance(params.temperature, float) and isinstance(params.target_depth, float)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == SamplingParams().stop_ids == ()
    assert SamplingParams(logit_bias={}).logit_bias is None
    for copy in (pickle.loads(pickle.dumps(params)), replace(params)):
        assert copy == params
        assert all(getattr(copy, f.name) == getattr(params, f.name) for f in fields(params))
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_a_caller_that_changes_its_table_later_changes_nothing() -> None:
    table, stops = {1: 1.0}, ["a"]
    params = SamplingParams(logit_bias=table, stop=stops)
    table[10**9] = 1.0
    stops.append("")
    assert params.logit_bias == {1: 1.0} and params.stop_strings == ("a",)


def test_what_is_plain_greedy_needs_nothing_but_an_argmax() -> None:
    assert SamplingParams(temperature=0, top_k=5, top_p=0.5, logprobs=2).is_plain_greedy
    assert not SamplingParams().is_plain_greedy
    changes: list[dict[str, Any]] = [
        {"min_tokens": 1},
        {"logit_bias": {1: 1}},
        {"presence_penalty": 1},
        {"frequency_penalty": -1},
        {"repetition_penalty": 1.1},
    ]
    for change in changes:
        params = SamplingParams(temperature=0, **change)
        assert not params.is_plain_greedy
        assert params.has_penalties == any("penalty" in name for name in change)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    SamplingParams(logit_bias={9: 1}, stop_token_ids=[9]).check_vocab(10)
    with pytest.raises(ValueError, match="logit_bias has token id 10; the vocabulary's ids go"):
        SamplingParams(logit_bias={10: 1}).check_vocab(10)
    with pytest.raises(ValueError, match="stop_token_ids has token id 10"):
        SamplingParams(stop_token_ids=[9, 10]).check_vocab(10)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, mor.engine.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
