"""Promises of the peers: they have the twin's weights, and one that is missing is skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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
    peer = build(twin)
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


def test_a_peer_with_other_weights_is_found(monkeypatch: pytest.MonkeyPatch):
    twin, mor = models()

    def build(twin: MoR) -> Peer:
        return Wrong()

    monkeypatch.setattr(serve_peers, "PEERS", {"wrong": ((), build)})
    with pytest.raises(RuntimeError, match="wrong draws a token that is"):
        bench_peers(config(), twin, mor)
