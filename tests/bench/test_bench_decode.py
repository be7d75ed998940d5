"""Promises of `mor bench decode`: it verifies, fills pages, alternates and reports both sides."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support_bench import MIX, tiny_shapes

from mor.bench import decode, serve_config
from mor.bench.decode import bench_decode
from mor.bench.kernels import NativeKernels, PlainKernels, build_kernels, pages_of, singles
from mor.bench.serve import largest_in_flight, new_engine, run_trace
from mor.bench.serve_config import BenchDecodeConfig
from mor.bench.serve_models import build_model
from mor.bench.serve_report import HEADLINE, longest_context, speedup_bound
from mor.bench.serve_table import print_decode, verdict
from mor.bench.verify import SHORT_PROMPT, check_mean_depth, verify
from mor.bench.workload import make_trace
from mor.cli import main
from mor.engine.blocks import Layout
from mor.model.mor import MoR


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_shapes():
        yield


def settings(**fields: Any) -> BenchDecodeConfig:
    values: dict[str, Any] = {"shape": "small", "quick": True, "rounds": 3, "in_flight": (4,)}
    values |= {"dtype": "float32", "device": "cpu", "max_num_batched_tokens": 32}
    return BenchDecodeConfig(**values | fields)


def tiny_mor() -> MoR:
    return build_model(settings(), 3, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench_decode(settings())


def test_the_headline_is_that_of_the_cells(result):
    (cell,) = result["cells"]
    assert all(result[name] == cell[name] for name in HEADLINE)
    assert result["efficiency"] == cell["efficiency"] > 0
    assert result["twin_efficiency"] == cell["twin_efficiency"] > 0
    assert result["settings"]["rounds"] == 3 and result["settings"]["in_flight"] == (4,)
    assert {"machine", "device", "dtype", "peak_memory_bytes"} < set(result)
    json.dumps(result)


def test_both_sides_are_told_in_both_regimes(result):
    (cell,) = result["cells"]
    rows = {(row["regime"], row["side"]): row for row in cell["rows"]}
    assert len(rows) == 4
    for row in rows.values():
        assert len(row["tokens_per_s_rounds"]) == 3 and row["window_tokens"] > 0
        assert 0 < row["inter_token_p50_ms"] <= row["inter_token_p95_ms"]
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert 0 < row["kv_bytes"] <= cell["kv_budget_bytes"]
    fixed, most = rows["fixed_batch", "mor"], rows["max_batch", "mor"]
    assert fixed["in_flight"] == rows["fixed_batch", "twin"]["in_flight"] == 4
    assert most["in_flight"] == most["most_requests"] > 4
    assert most["longest_context"] > rows["max_batch", "twin"]["longest_context"]
    assert rows["fixed_batch", "twin"]["mean_depth"] == 1
    assert cell["mean_depth"] == pytest.approx(2, abs=0.2) and cell["depths"] == "drawn"


def test_the_table_shows_every_row_whole(result, capsys):
    print_decode(result, sys.stdout)
    out = capsys.readouterr().out
    assert "mor3, max_batch" in out and "twin, fixed_batch" in out and "…" not in out
    assert any("times its twin" in line for line in verdict(result))


def test_verdict_marks_a_run_that_beats_its_kernels(result):
    (cell,) = result["cells"]
    rows: list[dict[str, Any]] = [row | {"is_valid": True} for row in cell["rows"]]
    rows[0].update({"efficiency": 1.05, "is_valid": False})
    lines = verdict({"cells": [cell | {"rows": rows}]})
    assert any("target 0.95 not told: a run is invalid" in line for line in lines)
    assert [line for line in lines if "INVALID" in line and "1.050 times as quick" in line]


def test_a_trace_says_how_deep_its_tokens_go(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    depths = [[1] * 9, [3] * 9, [2] * 9, [1, 2, 3] * 3]
    lines = [json.dumps({"prompt_len": 4, "output_len": 6, "depths": one}) for one in depths]
    path.write_text("\n".join(lines))
    (cell,) = bench_decode(settings(trace=path, in_flight=(2,)))["cells"]
    (row,) = (r for r in cell["rows"] if (r["side"], r["regime"]) == ("mor", "fixed_batch"))
    trace = decode.build_trace(settings(trace=path), tiny_mor().config, 2)
    engine = new_engine(tiny_mor(), max_requests=2, max_rows=32, max_model_len=10)
    run = run_trace(engine, trace, in_flight=2)
    assert [one.depths for one in run.served] == depths
    assert row["verified"]["num_tokens"] > 0


def test_a_right_engine_is_verified_and_a_wrong_one_found():
    trace = make_trace(2, MIX, vocab_size=64, seed=0)
    mor = tiny_mor()
    engine = new_engine(mor, max_requests=2, max_rows=32, max_model_len=40)
    checked = verify(engine, trace, name="mor3")
    assert checked.num_tokens == 2 * sum(request.output_len for request in trace)
    assert checked.largest_error < 1e-4
    assert checked.num_depth_slips == 0 and 1 < checked.mean_depth < 3
    engine.model = tiny_mor()
    with torch.no_grad():
        engine.model.model.coda[0].self_attn.v_proj.weight.zero_()
    with pytest.raises(RuntimeError, match=r"mor3: the engine is .* off the plain model"):
        verify(engine, trace, name="mor3")


def test_where_every_prompt_holds_another_depth_short_ones_are_compared(monkeypatch: Any):
    """Rounding turns a depth now and then; behind it nothing can be compared."""
    trace = make_trace(2, MIX, vocab_size=64, seed=0)
    engine = new_engine(tiny_mor(), max_requests=2, max_rows=32, max_model_len=40)
    assert all(len(request.prompt_ids) > SHORT_PROMPT for request in trace)
    right, lengths = engine.generate, []

    def slipping(prompts: Any, params: Any) -> Any:
        outputs = right(prompts, params)
        lengths.extend(map(len, prompts))
        for output in outputs:
            if len(output.prompt_token_ids) > SHORT_PROMPT:
                output.prompt_depths[0] += 1
        return outputs

    monkeypatch.setattr(engine, "generate", slipping)
    monkeypatch.setattr("mor.bench.verify._check", lambda *args, **kwargs: None)
    checked = verify(engine, trace, name="mor3")
    assert lengths[-1] == SHORT_PROMPT
    assert checked.num_tokens == 2 * sum(request.output_len for request in trace)
    monkeypatch.setattr("mor.bench.verify.SHORT_PROMPT", 99)
    with pytest.raises(RuntimeError, match="nothing is compared"):
        verify(engine, trace, name="mor3")


def test_depths_that_are_not_the_models_are_found(monkeypatch: Any):
    trace = make_trace(2, MIX, vocab_size=64, seed=0)
    engine = new_engine(tiny_mor(), max_requests=2, max_rows=32, max_model_len=40)
    right = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *args: _deeper(right(*args)))
    with pytest.raises(RuntimeError, match="do not take the plain model's depth"):
        verify(engine, trace, name="mor3")


def _deeper(outputs: list[Any]) -> list[Any]:
    for output in outputs:
        output.prompt_depths = [depth % 3 + 1 for depth in output.prompt_depths]
    return outputs


def test_a_mean_depth_that_misses_the_capacities_is_found():
    config = tiny_mor().config
    assert check_mean_depth([1, 2, 3] * 100, config, name="mor3") == 2
    with pytest.raises(RuntimeError, match=r"mor3: the mean depth is 2.500 .* 2.000 should be"):
        check_mean_depth([2, 3] * 100, config, name="mor3")


def test_the_most_requests_are_found_by_filling_pages():
    mor, trace = tiny_mor(), make_trace(40, MIX, vocab_size=64, seed=0)
    layout = Layout.of(mor.config)
    engine = new_engine(
        mor,
        max_requests=30,
        max_rows=64,
        max_model_len=40,
        kv_cache_bytes=60 * layout.page_elements * 4,
    )
    most = largest_in_flight(engine, trace, known=2, guess=12, most=30, tries=8)
    assert 2 < most < 30
    assert not run_trace(engine, trace, in_flight=most, until_dry=True).is_short
    assert run_trace(engine, trace, in_flight=30, ends_when_short=True).is_short


def test_a_run_keeps_so_many_requests_in_flight_and_ends_idle():
    trace = make_trace(12, MIX, vocab_size=64, seed=0)
    engine = new_engine(tiny_mor(), max_requests=8, max_rows=32, max_model_len=40)
    run = run_trace(engine, trace, in_flight=3)
    assert [len(one.token_s) for one in run.served] == [r.output_len for r in trace]
    assert [len(one.depths) for one in run.served] == [r.num_run for r in trace]
    short = run_trace(engine, trace, in_flight=3, until_dry=True)
    assert short.events[-1].num_queued == 0 and short.window.stop == len(short.events) - 1
    assert not engine.has_work and not engine.requests
    assert [a.depths[: len(b.depths)] for a, b in zip(run.served, short.served, strict=True)] == [
        b.depths for b in short.served
    ]


def test_the_bound_is_that_of_the_layers_and_the_head():
    config = serve_config.served_config("360m", 4)
    assert speedup_bound(config, 2.5) == pytest.approx(1.45, abs=0.005)
    assert speedup_bound(config, 4) == 1


def test_the_longest_context_fills_the_bytes():
    engine = new_engine(tiny_mor(), max_requests=1, max_rows=32, max_model_len=40)
    layout, depths = engine.layout, [1, 2, 3]
    tokens = longest_context(engine, depths, 30 * engine.page_bytes)
    pages = -(-tokens // layout.own_page_tokens)
    pages += sum(-(-int(tokens * share) // layout.block_page_tokens) for share in (1, 2 / 3, 1 / 3))
    assert pages <= 30 and tokens > 30 * layout.block_page_tokens / 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "2"], "rounds is 2; give 3 or more, or 0"),
        (["--recursions", "1"], "recursions is [1]; give numbers of 2 or more"),
        (["--recursions", "5"], "num_hidden_layers 30 does not fit 5 recursions"),
        (["--in-flight", "0"], "in_flight is [0]; give numbers of 1 or more"),
        (["--text", "a.txt"], "text is for trained weights; give --model too"),
        (
            ["--model", "a", "--routing", "ours"],
            "routing is for shapes; a trained model has its own",
        ),
        (["--kv-cache-bytes", "-1"], "kv_cache_bytes is -1; give 0 or more"),
        (["--trace", "missing.jsonl"], "missing.jsonl: No such file"),
    ],
)
def test_bad_settings_are_refused_with_one_line(flags, said, capsys):
    assert main(["bench", "decode", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mor: {said}") and err.count("\n") == 1


def test_kernels_timed_alone_run_all_layers_of_wide_ends() -> None:
    """Pages were cut for the block: the compiled ends wrote beyond them, the plain ones stopped."""
    sizes = {"num_hidden_layers": 12, "prelude_layers": 4, "coda_layers": 4, "num_recursions": 2}
    config = dataclasses.replace(tiny_mor().config, capacity=(), **sizes)
    torch.manual_seed(0)
    model, call = MoR(config).eval(), singles(5, 17)
    pools = []
    for wants_compiled in (False, True):
        torch.manual_seed(1)
        kernels = build_kernels(model, pages=pages_of(call), wants_compiled=wants_compiled)
        assert isinstance(kernels, NativeKernels | PlainKernels)
        pool = kernels.pool
        before = pool.clone()
        kernels.layers("prelude", torch.full((5, config.hidden_size), 0.01), call, 5)
        by_layer = (pool != before).view(len(pool), 4, -1).any(-1)
        assert by_layer.any(0).all(), "a layer left no keys"
        pools.append(pool)
    torch.testing.assert_close(*pools, rtol=1e-5, atol=1e-6)
