"""Promises of the peers: they have the twin's weights, and one that is missing is skipped."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support_bench import tiny_shapes

from mor.bench import serve_peers
from mor.bench.serve_config import BenchDecodeConfig
from mor.bench.serve_models import build_model, build_twin
from mor.bench.serve_peers import PEERS, Peer, bench_peers
from mor.model.mor import MoR


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_shapes(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_peers, "PROMPT_LEN", 12)
        patch.setattr(serve_peers, "NEW_TOKENS", 8)
        patch.setattr(serve_peers, "QUICK_NEW_TOKENS", 4)
        yield


def config() -> BenchDecodeConfig:
    return BenchDecodeConfig(shape="small", quick=True, rounds=3, in_flight=(2,))


def models() -> tuple[MoR, MoR]:
    mor = build_model(config(), 3, dtype=torch.float32, device=torch.device("cpu"))
    return build_twin(mor, 0), mor


# Matrices as narrow as these cannot be quantised.
@pytest.mark.parametrize("name", [name for name in PEERS if "Q4" not in name])
def test_a_peer_draws_what_the_twins_weights_say(name: str):
    packages, build = PEERS[name]
    for package in packages:
        pytest.importorskip(package)
    twin, _ = models()
    peer = build(config(), twin)
    prompts = [[5, 9, 60, 3, 8, 21, 40], [1, 2, 3, 4, 50, 6, 7]]
    tokens = peer.run(prompts, 6)
    peer.close()
    assert [len(one) for one in tokens] == [6, 6]
    gap = serve_peers._check(peer, twin, prompts, tokens)
    assert gap <= serve_peers.NEAR_TIE


def test_a_peer_that_is_not_installed_is_skipped_with_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    monkeypatch.setattr(serve_peers, "missing_of", list)
    monkeypatch.setattr(logging.getLogger("mor"), "propagate", True)
    with caplog.at_level("INFO", logger="mor"):
        rows = bench_peers(config(), *models())
    assert [(row["name"], row["batch"]) for row in rows] == [
        ("twin", 1),
        ("mor3", 1),
        ("twin", 2),
        ("mor3", 2),
    ]
    assert rows[0]["twin_speedup"] == 1 and rows[1]["tokens_per_s"] > 0
    assert "llama.cpp: skipped, not installed: llama_cpp, gguf" in caplog.text


class Wrong:
    """Draws the token 0."""

    name, is_exact = "wrong", True

    def run(self, prompts: Any, new_tokens: int) -> list[list[int]]:
        return [[0] * new_tokens for _ in prompts]

    def close(self) -> None:
        pass


def test_a_peer_that_fails_or_has_other_weights_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    twin, mor = models()

    def wrong(config: BenchDecodeConfig, twin: MoR) -> Peer:
        return Wrong()

    def broken(config: BenchDecodeConfig, twin: MoR) -> Peer:
        raise RuntimeError("no such thing here")

    monkeypatch.setattr(serve_peers, "PEERS", {"wrong": ((), wrong), "broken": ((), broken)})
    with caplog.at_level(logging.WARNING):
        rows = bench_peers(config(), twin, mor)
    assert [row["name"] for row in rows] == ["twin", "mor3", "twin", "mor3"]  # of batch 1 and 2
    assert "broken: left out, it did not start: no such thing here" in caplog.text
    assert "wrong: left out of batch 1: wrong draws a token that is" in caplog.text


FAKE_VLLM = """
import os
__version__ = "0.0-fake"

class SamplingParams:
    def __init__(self, **given):
        self.max_tokens = given["max_tokens"]
        assert given["temperature"] == 0 and given["ignore_eos"]

class Output:
    def __init__(self, ids):
        self.token_ids, self.outputs = ids, [self]

class LLM:
    def __init__(self, model, **given):
        print("noise on stdout")
        assert os.path.exists(os.path.join(model, "model.safetensors"))
        assert given["enable_prefix_caching"] is False and given["max_num_seqs"] == 2
        if os.environ.get("FAKE_FAILS"):
            raise ValueError("no room")

    def generate(self, prompts, params, use_tqdm):
        if os.environ.get("FAKE_DIES"):
            os._exit(3)
        return [Output([p["prompt_token_ids"][0]] * params.max_tokens) for p in prompts]
"""
FAKE_OPENVINO = {
    "openvino": "Tensor = lambda ids: ids\n",
    "openvino_genai": """
import os
__version__ = "0.0-fake"

class SchedulerConfig: pass
class GenerationConfig: pass

class Output:
    def __init__(self, ids):
        self.m_generation_ids = [ids]

class ContinuousBatchingPipeline:
    def __init__(self, folder, scheduler, device, settings):
        assert os.path.exists(os.path.join(folder, "exported")) and device == "CPU"
        assert scheduler.enable_prefix_caching is False and scheduler.max_num_seqs == 2
        if os.environ.get("FAKE_FAILS"):
            raise ValueError("no room")

    def generate(self, prompts, configs):
        if os.environ.get("FAKE_DIES"):
            os._exit(3)
        assert all(config.ignore_eos and not config.do_sample for config in configs)
        return [Output([int(p[0, 0])] * c.max_new_tokens) for p, c in zip(prompts, configs)]
""",
    "optimum/intel": """
import os

class OVModelForCausalLM:
    @classmethod
    def from_pretrained(cls, folder, export, compile, load_in_8bit):
        print("noise on stdout")
        assert os.path.exists(os.path.join(folder, "model.safetensors")) and not load_in_8bit
        return cls()

    def save_pretrained(self, folder):
        os.makedirs(os.path.join(folder, "exported"))
""",
}
CHILDREN = ("vLLM CPU", "OpenVINO GenAI")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchDecodeConfig:
    """Engines that answer with a prompt's first token, in an environment of their own."""
    pytest.importorskip("transformers")
    for name, code in {"vllm": FAKE_VLLM, **FAKE_OPENVINO}.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    python = Path(sys.executable)
    return dataclasses.replace(config(), vllm_python=python, openvino_python=python)


@pytest.mark.parametrize("name", CHILDREN)
def test_an_engine_runs_in_a_child_process(name: str, fakes: BenchDecodeConfig):
    peer = PEERS[name][1](fakes, models()[0])
    assert peer.run([[7, 1], [9, 2]], 3) == [[7, 7, 7], [9, 9, 9]]
    peer.close()


@pytest.mark.parametrize("name", CHILDREN)
@pytest.mark.parametrize(
    ("fault", "said"), [("FAKE_FAILS", "ValueError: no room"), ("FAKE_DIES", "it ended; ")]
)
def test_a_child_that_fails_says_why(
    name: str,
    fault: str,
    said: str,
    fakes: BenchDecodeConfig,
    monkeypatch: pytest.MonkeyPatch,
):
    def start_and_run() -> None:
        peer = PEERS[name][1](fakes, models()[0])
        try:
            peer.run([[7, 1], [9, 2]], 3)
        finally:
            peer.close()

    monkeypatch.setenv(fault, "1")
    with pytest.raises(RuntimeError, match=said):
        start_and_run()


@pytest.mark.parametrize("name", ["vllm_python", "openvino_python"])
def test_a_python_that_is_not_there_is_said(name: str):
    paths: dict[str, Any] = {name: Path("/none/python")}
    with pytest.raises(ValueError, match=f"{name} is /none/python, which is no file"):
        BenchDecodeConfig(**paths)
