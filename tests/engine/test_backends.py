"""Every backend gives what the plain model gives, in fp32 up to the first near tie.

A near tie: the two best logits, or a score and its threshold, are closer than 1e-4.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from support_engine import (
    SERVED,
    SOME_SERVED,
    assert_same_up_to_ties,
    greedy,
    new_engine,
    prompt_of,
    served_model,
)
from support_model import small_model

from mor.model.mor import MoR
from mor.ops.device import pick_device
from mor.ops.native import compiled


def check(model: MoR, backend: str, count: int) -> float:
    engine = new_engine(model, backend=backend, max_num_batched_tokens=12)
    prompts = [prompt_of(1 + 7 * i % 38, seed=i) for i in range(count)]
    outputs = engine.generate(prompts, greedy(10))
    engine.check_integrity()
    held = sum(assert_same_up_to_ties(model, output) for output in outputs)
    return held / (10 * count)


@pytest.mark.parametrize("index", range(len(SERVED)))
def test_compiled_kernels_give_the_plain_models_answers(index: int) -> None:
    if compiled.load() is None:
        pytest.skip("no compiler here")
    assert check(served_model(index, torch.float32), "native", 8) > 0.6


@pytest.mark.parametrize("index", range(0, len(SERVED), 4))
def test_torch_in_fp32_gives_the_plain_models_answers(index: int) -> None:
    assert check(served_model(index, torch.float32), "torch", 8) > 0.6


@pytest.mark.parametrize("index", SOME_SERVED)
def test_triton_kernels_give_the_plain_models_answers(index: int) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a GPU the other tests run")
    assert check(served_model(index, torch.float32), "triton", 2) > 0.6


@pytest.mark.parametrize(
    ("router", "fields"),
    [
        ("random", {"capacity_warmup_steps": 1000}),  # as a training leaves it that was cut short
        ("fixed", {"prelude_layers": 0, "coda_layers": 2}),
    ],
)
def test_compiled_ticks_count_and_decide_as_torchs_do(router: str, fields: dict[str, Any]) -> None:
    if compiled.load() is None:
        pytest.skip("no compiler here")
    model = small_model(router, **fields).float()
    seen = []
    for backend in ("torch", "native"):
        engine = new_engine(model, backend=backend)
        engine.add(prompt_of(9, seed=1), greedy(6), request_id="a")
        pieces = [piece for _ in range(4) for piece in engine.step()]
        seen.append(([piece.depths for piece in pieces], engine.kv_bytes_by_table))
    assert seen[0] == seen[1] and seen[0][1][0] > 0


def test_triton_without_gpu_and_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend triton is not to be had on cpu"):
        new_engine(served_model(0, torch.float32), backend="triton")


def test_another_gpu_than_the_current_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched on the current one, and each thread has its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert pick_device("cuda:0").index == 0 and pick_device("cpu:0").type == "cpu"
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1"):
        pick_device("cuda:1")


def test_answers_in_bf16_keep_their_depths_mostly() -> None:
    """Agreement in bf16 is reported, not promised; here it must be far from chance."""
    if compiled.load() is None:
        pytest.skip("no compiler here")
    wide = served_model(0, torch.float32)
    narrow = served_model(0, torch.float32).__class__(wide.config)
    narrow.load_state_dict(wide.state_dict())
    narrow = narrow.to(torch.bfloat16)
    engine = new_engine(narrow, backend="native")
    prompts = [prompt_of(20, seed=i) for i in range(6)]
    outputs = engine.generate(prompts, greedy(4))
    same = total = 0
    with torch.no_grad():
        for prompt, output in zip(prompts, outputs, strict=True):
            depth = wide(torch.tensor([prompt]), rule="causal").depth[0].tolist()
            same += sum(a == b for a, b in zip(depth, output.prompt_depths, strict=True))
            total += len(prompt)
    assert same / total > 0.9
