"""Saved bytes are those that autograd keeps, each storage once; every model has its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mor.bench import memory
from mor.bench.config import BenchTrainConfig, Shape
from mor.bench.contender import Job
from mor.bench.memory import MemoryUse, measure, measure_in_child, saved_bytes
from mor.bench.train import make_jobs
from mor.config import ModelConfig

Patch = pytest.MonkeyPatch


def test_every_storage_counts_once_and_weights_do_not():
    linear = nn.Linear(8, 4, bias=False)
    x = torch.ones(5, 8, requires_grad=True)

    def forward() -> Tensor:
        y = linear(x).exp()  # keeps x (5 x 8), the weight, and its own result (5 x 4)
        return y[:2].square().sum() + y[2:].sin().sum()  # both keep views of that result

    assert saved_bytes(forward, linear) == 4 * (5 * 8 + 5 * 4)


def test_a_view_keeps_its_whole_storage():
    x = torch.ones(100, 8)
    weight = torch.ones(8, requires_grad=True)
    assert saved_bytes(lambda: x[:1] * weight, nn.Module()) == 4 * 100 * 8


def test_a_graph_that_was_dropped_counts_nothing():
    x = torch.ones(50, requires_grad=True)

    def forward() -> Tensor:
        torch.ones(1000, requires_grad=True).exp().sum()
        return x.exp()

    assert saved_bytes(forward, nn.Module()) == 4 * 50


def test_gradients_flow_through_what_is_counted():
    x = torch.ones(3, requires_grad=True)
    results = []
    saved_bytes(lambda: results.append(x.exp().sum()), nn.Module())
    results[0].backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.ones(3).exp())


def tiny_job(name: str = "mor3") -> Job:
    model = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=14,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    shape = Shape(model, context=26, batch_rows=2, quick_batch_rows=1)
    config = BenchTrainConfig(peer="none")
    jobs = make_jobs(config, shape, device="cpu", batch_rows=2)
    return next(job for job in jobs if job.name == name)


def test_a_child_counts_the_same_bytes_and_a_peak_of_its_own():
    held = torch.ones(50_000_000)  # 200 MB of ours, which are not the child's
    ours, childs = measure(tiny_job()), measure_in_child(tiny_job())
    assert childs.saved_bytes == ours.saved_bytes > 0
    assert childs.peak_device_bytes == 0
    if sys.platform == "linux":
        assert childs.peak_rss_bytes < ours.peak_rss_bytes - held.nbytes // 2


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (memory.OUT_OF_MEMORY, ValueError, "not enough memory to train mor3"),
        (-9, ValueError, "not enough memory to train mor3"),
        (1, RuntimeError, "measuring memory of mor3 ended with code 1"),
    ],
)
def test_a_child_that_fails_is_named(code, error, said, monkeypatch: Patch):
    done = SimpleNamespace(returncode=code, stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(error, match=said):
        measure_in_child(tiny_job())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), memory.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), memory.OUT_OF_MEMORY),
    ],
)
def test_a_child_says_when_memory_was_not_enough(error, code, monkeypatch: Patch):
    def fail(job: Job) -> MemoryUse:
        raise error

    monkeypatch.setattr(memory, "measure", fail)
    monkeypatch.setattr(sys, "argv", ["memory", "{}"])
    monkeypatch.setattr(memory, "Job", lambda **fields: tiny_job())
    assert memory.main() == code


def children_of(pid: int) -> list[int]:
    """Return the processes that pid started (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_ends_the_child_too():
    command = [sys.executable, "-m", "mor", "bench", "train", "--device", "cpu"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        children: list[int] = []
        deadline_s = time.monotonic() + 60
        while not children and time.monotonic() < deadline_s:
            time.sleep(0.1)
            children = children_of(process.pid)
        assert children, "no child was started"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "mor: interrupted"
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{child}").exists() for child in children)
