"""Other engines on the twin's own weights: new tokens a second, prompts included.

Every engine gets the same batch of equal prompts and draws as many tokens, greedily, in rounds
whose order changes. An engine that is not installed is skipped with a line. Before it counts, the
plain model holds what it draws.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from mor.bench.serve import new_engine
from mor.bench.serve_config import BenchDecodeConfig
from mor.bench.train import in_order, spread
from mor.bench.verify import largest_gap
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.log import logger, progress
from mor.model.mor import MoR

PROMPT_LEN = 64
NEW_TOKENS = 64
QUICK_NEW_TOKENS = 32
VERIFIED_PROMPTS = 2
VERIFIED_TOKENS = 8
NEAR_TIE = 0.25
"""largest gap to the best logit, in standard deviations, of an engine that does not quantise"""


class Peer(Protocol):
    """An engine with the twin's weights."""

    name: str
    is_exact: bool
    """keeps the weights as they are"""

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Draw so many tokens after each prompt, all prompts at a time."""
        ...

    def close(self) -> None:
        """Give back memory and files."""
        ...


class OurPeer:
    """Our engine."""

    is_exact = True

    def __init__(self, name: str, model: MoR, batch: int) -> None:
        self.name = name
        self.engine: Engine = new_engine(
            model,
            max_requests=batch,
            max_rows=max(512, 2 * batch),
            max_model_len=PROMPT_LEN + NEW_TOKENS,
        )

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        outputs = self.engine.generate(prompts, params)
        return [output.outputs[0].token_ids for output in outputs]

    def close(self) -> None:
        pass


def _generate(config: BenchDecodeConfig, twin: MoR) -> Peer:
    from mor.bench.peers_transformers import StaticBatch

    return StaticBatch(twin)


def _continuous(config: BenchDecodeConfig, twin: MoR) -> Peer:
    from mor.bench.peers_transformers import ContinuousBatch

    return ContinuousBatch(twin)


def _llama(config: BenchDecodeConfig, twin: MoR) -> Peer:
    from mor.bench.peers_llama_cpp import LlamaCpp

    return LlamaCpp(twin)


def _llama_q4(config: BenchDecodeConfig, twin: MoR) -> Peer:
    from mor.bench.peers_llama_cpp import LlamaCpp

    return LlamaCpp(twin, is_quantised=True)


def _openvino(config: BenchDecodeConfig, twin: MoR) -> Peer:
    from mor.bench import openvino_worker

    return _child("OpenVINO GenAI", openvino_worker, config.openvino_python, config, twin)


def _vllm(config: BenchDecodeConfig, twin: MoR) -> Peer:
    from mor.bench import vllm_worker

    return _child("vLLM CPU", vllm_worker, config.vllm_python, config, twin)


def _child(
    name: str, worker: ModuleType, python: Path | None, config: BenchDecodeConfig, twin: MoR
) -> Peer:
    from mor.bench.peers_child import ChildPeer

    return ChildPeer(
        name,
        Path(str(worker.__file__)),
        twin,
        python=str(python or sys.executable),
        max_model_len=PROMPT_LEN + NEW_TOKENS,
        max_requests=max(config.in_flight),
    )


PEERS: dict[str, tuple[tuple[str, ...], Callable[[BenchDecodeConfig, MoR], Peer]]] = {
    "transformers generate": (("transformers",), _generate),
    "transformers continuous batching": (("transformers",), _continuous),
    "llama.cpp": (("llama_cpp", "gguf"), _llama),
    "llama.cpp Q4_0": (("llama_cpp", "gguf"), _llama_q4),
    "OpenVINO GenAI": (("openvino_genai", "optimum", "transformers"), _openvino),
    "vLLM CPU": (("vllm", "transformers"), _vllm),
}
"""Packages that each needs, and what builds it."""
ELSEWHERE = {"OpenVINO GenAI": "openvino_python", "vLLM CPU": "vllm_python"}
"""Setting that names the Python of an engine's own environment, which then has its packages."""


def bench_peers(config: BenchDecodeConfig, twin: MoR, mor: MoR) -> list[dict[str, Any]]:
    """Time the twin, MoR and every peer that is installed, alone and in a batch.

    Returns a row for each engine and batch, the twin's first; one that fails is left out from there
    on, with a line
    """
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        peers = []
        for name, (packages, build) in PEERS.items():
            elsewhere = ELSEWHERE.get(name)
            if elsewhere is not None and getattr(config, elsewhere) is not None:
                packages = ("transformers",)
            missing = missing_of(packages)
            if missing:
                logger.info("%s: skipped, not installed: %s", name, ", ".join(missing))
                continue
            try:
                peers.append(build(config, twin))
            except Exception as error:  # of another engine: ours and the others still count
                logger.warning("%s: left out, it did not start: %s", name, error)
                continue
            stack.callback(peers[-1].close)
        for batch in sorted({1, *config.in_flight}):
            name = f"mor{mor.config.num_recursions}"
            ours = [OurPeer("twin", twin, batch), OurPeer(name, mor, batch)]
            found, failed = _time_batch(config, twin, [*ours, *peers], batch)
            rows += found
            peers = [peer for peer in peers if peer.name not in failed]
    return rows


def missing_of(packages: Sequence[str]) -> list[str]:
    return [one for one in packages if importlib.util.find_spec(one) is None]


def _time_batch(
    config: BenchDecodeConfig, twin: MoR, peers: Sequence[Peer], batch: int
) -> tuple[list[dict[str, Any]], set[str]]:
    """Return a row for each engine, and the names of those that failed; ours may not."""
    draw = random.Random(config.seed)
    vocab = twin.config.vocab_size
    prompts = [[draw.randrange(vocab) for _ in range(PROMPT_LEN)] for _ in range(batch)]
    new_tokens = QUICK_NEW_TOKENS if config.quick else NEW_TOKENS
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    gaps, plain = {}, copy.deepcopy(twin).float()
    with progress(f"engines, batch of {batch}", config.num_rounds + 1) as bar:
        failed: set[str] = set()

        def attempt(peer: Peer, what: Callable[[Peer], None]) -> None:
            try:
                what(peer)
            except Exception as error:
                if isinstance(peer, OurPeer):
                    raise
                logger.warning("%s: left out of batch %d: %s", peer.name, batch, error)
                failed.add(peer.name)

        def warm(peer: Peer) -> None:
            tokens = peer.run(prompts, VERIFIED_TOKENS)
            gaps[peer.name] = _check(peer, plain, prompts, tokens)
            peer.run(prompts, new_tokens)  # as it is timed, so that nothing is built then

        def timed(peer: Peer) -> None:
            start_s = time.perf_counter()
            tokens = peer.run(prompts, new_tokens)
            times[peer.name].append(time.perf_counter() - start_s)
            if any(len(one) != new_tokens for one in tokens):
                raise RuntimeError(f"it drew other than {new_tokens} tokens for a prompt")

        for peer in peers:
            attempt(peer, warm)
        bar.advance(1, note="verified")
        for round_ in range(config.num_rounds):
            for peer in in_order([one for one in peers if one.name not in failed], round_):
                attempt(peer, timed)
            bar.advance(1)
    rows = []
    for peer in (one for one in peers if one.name not in failed):
        ratio = spread(times[peer.name], times["twin"])
        rows.append(
            {
                "name": peer.name,
                "batch": batch,
                "prompt_len": PROMPT_LEN,
                "new_tokens": new_tokens,
                "tokens_per_s": batch * new_tokens / statistics.median(times[peer.name]),
                "twin_speedup": ratio.median,
                "twin_speedup_q1": ratio.q1,
                "twin_speedup_q3": ratio.q3,
                "largest_gap": gaps[peer.name],
            }
        )
    return rows, failed


def _check(
    peer: Peer, plain: MoR, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> float:
    """Return how far drawn tokens are below the best ones; RuntimeError where that is too far."""
    if isinstance(peer, OurPeer):
        plain = copy.deepcopy(peer.engine.model).float()
    pairs = list(zip(prompts, tokens, strict=True))[:VERIFIED_PROMPTS]
    gap = max(largest_gap(plain, prompt, drawn) for prompt, drawn in pairs)
    if peer.is_exact and not gap <= NEAR_TIE:
        raise RuntimeError(
            f"{peer.name} draws a token that is {gap:.3f} standard deviations below the best one "
            "of the same weights"
        )
    return gap
