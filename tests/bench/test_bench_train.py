"""Promises of `mor bench train`: it verifies, alternates, and reports what it says it measures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from mor.bench import memory
from mor.bench import train as bench
from mor.bench.config import PEER, ROWS, SHAPES, BenchTrainConfig, RowName, Shape, row_config
from mor.bench.contender import Contender, Job, OurContender, RandomBatches
from mor.bench.table import print_table, verdict
from mor.bench.train import in_order
from mor.cli import main
from mor.config import ModelConfig
from mor.model import cost
from mor.model.layers import MLP
from mor.model.router import Router

TINY = Shape(
    ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=14,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    ),
    context=26,
    batch_rows=2,
    quick_batch_rows=1,
)
Patch = pytest.MonkeyPatch


def tiny_jobs(rows: tuple[RowName, ...] = tuple(ROWS)) -> list[Job]:
    config = BenchTrainConfig(rows=rows, peer="none", device="cpu")
    return bench.make_jobs(config, TINY, device="cpu", batch_rows=2)


def job_of(name: str) -> Job:
    return next(job for job in tiny_jobs() if job.name == name)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A whole run over all rows, with memory measured in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_in_child", memory.measure)
        config = BenchTrainConfig(rounds=9, peer="none", device="cpu")
        return bench.bench_train(config, shape=TINY)


def test_rows_hold_ratios_over_vanilla(result):
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == list(ROWS)
    vanilla = rows["vanilla"]
    for key in ("flops_ratio", "time_ratio", "time_ratio_q1", "time_ratio_q3"):
        assert vanilla[key] == 1.0
    assert vanilla["peak_memory_ratio"] == 1.0
    for name, row in rows.items():
        assert row["time_ratio_q1"] <= row["time_ratio"] <= row["time_ratio_q3"], name
        assert row["peak_memory_ratio"] == row["saved_bytes"] / vanilla["saved_bytes"]
        assert row["peak_rss_bytes"] > row["saved_bytes"]
        assert row["tokens_per_s"] == pytest.approx(52 / row["time_s"])
    flops = [row["flops_ratio"] for row in rows.values()]
    assert flops[1] == 1.0 and flops == sorted(flops, reverse=True)
    assert rows["mor4"]["saved_bytes"] < rows["mor2"]["saved_bytes"] < vanilla["saved_bytes"]
    assert (result["rounds"], result["context"], result["batch_tokens"]) == (9, 26, 52)
    assert result["machine"]["torch"] == torch.__version__
    json.dumps(result)


def test_flops_are_the_cost_models(result):
    row = next(row for row in result["rows"] if row["name"] == "mor3")
    mor, twin = (
        cost.training_flops_per_token(row_config(TINY, name), TINY.context)
        for name in ("mor3", "vanilla")
    )
    assert row["flops_ratio"] == mor / twin < 0.85
    assert row["flops_per_s"] == pytest.approx(mor * 52 / row["time_s"])


def test_the_table_shows_every_row_and_number_whole(result, capsys):
    print_table(result, sys.stdout)
    out = capsys.readouterr().out
    assert all(f"\n{row['name']} " in out for row in result["rows"])
    assert "…" not in out and "9 rounds" in out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_every_shape_fits_every_row_with_equal_unrolled_layers(shape):
    for name, recursions in ROWS.items():
        config = row_config(shape, name)
        own, block = config.num_own_layers, config.num_block_layers
        assert own + block * recursions == shape.model.num_hidden_layers
        assert config.has_router == name.startswith("mor")
        assert config.head_dim == 64
    assert shape.context <= shape.model.max_position_embeddings
    assert row_config(shape, "mor2").num_block_layers >= 4


def test_batches_are_a_function_of_seed_and_sample():
    batches = RandomBatches(64, 26, 0)
    first = batches.batch(2, 2)
    assert first.input_ids_BT.shape == (2, 26)
    assert torch.equal(first.input_ids_BT[:, 1:], first.labels_BT[:, :-1])
    assert torch.equal(first.input_ids_BT, batches.batch(2, 2).input_ids_BT)
    for other in (batches.batch(4, 2), RandomBatches(64, 26, 1).batch(2, 2)):
        assert not torch.equal(first.input_ids_BT, other.input_ids_BT)


@pytest.mark.parametrize("name", list(ROWS))
def test_a_right_model_passes_verification(name):
    bench.check_work(OurContender(job_of(name)))


def test_more_active_tokens_than_the_capacities_allow_are_found(monkeypatch: Patch):
    contender = OurContender(job_of("mor3"))
    capacity = Router.capacity
    monkeypatch.setattr(Router, "capacity", lambda self, r: min(1.0, capacity(self, r) + 0.2))
    with pytest.raises(RuntimeError, match=r"mor3: \[52, 44, 26\] tokens are active"):
        bench.check_work(contender)


def test_work_that_the_cost_model_does_not_know_is_found(monkeypatch: Patch):
    contender = OurContender(job_of("mor3"))
    forward = MLP.forward

    def twice(self: MLP, x_ND: torch.Tensor, recursion: int = 0) -> torch.Tensor:
        return forward(self, x_ND, recursion) + 0 * forward(self, x_ND, recursion)

    monkeypatch.setattr(MLP, "forward", twice)
    with pytest.raises(RuntimeError, match="FLOPs in a step"):
        bench.check_work(contender)


class Fake(Contender):
    """Counts its steps."""

    def __init__(self, name: str, calls: list[str], loss: float = 1.0) -> None:
        self.name, self.calls, self.loss = name, calls, loss
        self.device = torch.device("cpu")

    @property
    def module(self) -> nn.Module:
        raise AssertionError("not asked for")

    def step(self, step: int) -> float:
        self.calls.append(f"{self.name}{step}")
        return self.loss

    def forward(self) -> object:
        raise AssertionError("not asked for")


def test_a_round_is_one_step_of_each_and_the_order_changes():
    calls: list[str] = []
    fakes = [Fake(name, calls) for name in "abc"]
    times = bench.time_rounds(fakes, rounds=9, device=torch.device("cpu"))
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 9, "b": 9, "c": 9}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 9 + bench.WARMUP_ROUNDS
    for number, round_ in enumerate(rounds):
        assert sorted(round_) == [f"a{number}", f"b{number}", f"c{number}"]
    firsts = Counter(round_[0][0] for round_ in rounds)
    before = Counter(x[0] + y[0] for r in rounds for x, y in itertools.pairwise(r))
    assert set(firsts) == set("abc")
    assert {"ab", "ba", "bc", "cb"} <= set(before)


def test_a_loss_that_is_not_finite_ends_the_benchmark():
    with pytest.raises(RuntimeError, match="b: loss is nan in round 0"):
        bench.time_rounds(
            [Fake("a", []), Fake("b", [], float("nan"))], rounds=9, device=torch.device("cpu")
        )


def test_ratios_are_taken_within_a_round():
    """A slow round slows both: the median of ratios does not see it, a ratio of medians would."""
    base = [1.0, 1.0, 10.0, 10.0, 10.0]
    times = [0.5, 0.6, 7.0, 8.0, 9.0]
    assert bench.spread(times, base) == pytest.approx((0.7, 0.6, 0.8))


def row(name: str, **fields: Any) -> dict[str, Any]:
    spread = {"time_ratio": 1.0, "time_ratio_q1": 0.9, "time_ratio_q3": 1.1}
    return {"name": name, "flops_ratio": 1.0, "peak_memory_ratio": 1.0, **spread, **fields}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"flops_ratio": 0.8, "time_ratio": 0.84}, "1.05 times its share, target 1.05 met"),
        ({"flops_ratio": 0.8, "time_ratio": 0.85}, "1.06 times its share, target 1.05 missed"),
        ({"peak_memory_ratio": 0.75}, "vanilla's bytes for backward, target 0.75 met"),
        ({"peak_memory_ratio": 0.76}, "target 0.75 missed"),
    ],
)
def test_verdict_says_what_is_met_and_what_is_missed(fields, line):
    lines = verdict([row("vanilla"), row("mor3", **fields)])
    assert line in "\n".join(lines)


@pytest.mark.parametrize(("ratio", "word"), [(1.2, "not slower"), (0.9, "slower")])
def test_verdict_compares_vanilla_with_its_peer(ratio, word):
    (line,) = verdict([row("vanilla"), row(PEER, time_ratio=ratio)])
    assert line.startswith(f"vanilla is {word} than transformers' Llama")
    assert f"takes {ratio:.2f} of its time (quartiles 0.90-1.10)" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "8"], "rounds is 8; give 9 or more, or 0"),
        (["--rounds", "-1"], "rounds is -1; give 9 or more, or 0"),
        (["--seed", "-1"], "seed is -1; give a number from 0 to 2**63 - 1"),
        (["--shape", "tiny"], "invalid choice 'tiny' for argument '--shape'"),
        (["--rows", "mor5"], "invalid choice 'mor5' for argument '--rows'"),
        (["--device", "tpu"], "device 'tpu' is unknown; use cpu, cuda or auto"),
    ],
)
def test_bad_settings_are_refused_with_one_line(flags, said, capsys):
    assert main(["bench", "train", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mor: {said}") and err.count("\n") == 1


def test_a_missing_transformers_is_named_with_its_command(monkeypatch: Patch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "train", "--peer", "transformers"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'mixture-of-recursions[hf]'" in err and err.count("\n") == 1
    assert not bench.wants_peer("auto") and not bench.wants_peer("none")


def test_vanilla_runs_whichever_rows_are_chosen():
    assert [job.name for job in tiny_jobs(rows=("mor4", "mor2"))] == ["vanilla", "mor2", "mor4"]


def test_the_command_prints_its_table_or_one_json_object(monkeypatch: Patch, capsys):
    monkeypatch.setattr(bench, "measure_in_child", memory.measure)
    monkeypatch.setitem(SHAPES, "small", TINY)
    flags = ["bench", "train", "--quick", "--rows", "mor3", "--peer", "none", "--device", "cpu"]
    assert main([*flags, "--json"]) == 0
    said = capsys.readouterr()
    assert [row["name"] for row in json.loads(said.out)["rows"]] == ["vanilla", "mor3"]
    assert "mor3 spends 0." in said.err
    assert main(flags) == 0
    assert "time / FLOPs" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_everyone_goes_before_everyone_else_equally_often(count: int):
    names: list[Any] = [str(number) for number in range(count)]
    orders = [in_order(names, round_) for round_ in range(2 * count)]
    for a, b in itertools.combinations(names, 2):
        assert sum(order.index(a) < order.index(b) for order in orders) == count
    assert sorted(order[0] for order in orders) == sorted(names * 2)
