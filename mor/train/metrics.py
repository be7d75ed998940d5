"""What a run measures: peak speed, peak memory, active shares, drift, dead tokens; `metrics.jsonl`.

Shapes: B sequences, T tokens, R recursions.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mor.files import write_text
from mor.model.mor import MoR, MoROutput


def measure_peak_flops(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """Return the FLOPs per second of a large matrix product, the best of a short run."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, end_s = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end_s or best == float("inf"):
        start_s = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start_s)
    return 2 * size**3 / best


def reset_peak_memory(device: torch.device) -> None:
    """Forget what was used before, where the system can (CUDA and Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: the GPU's allocations, or the process's resident size.

    0 where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage also counts the process that started this one
        for line in status.read_text(encoding="utf-8").split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RoutingMeter:
    """Sums what the routers did between two metrics lines."""

    def __init__(self, model: MoR, context: int) -> None:
        self.capacity = model.config.capacity
        self.num_recursions = model.config.num_recursions
        self.reached_T = torch.zeros(context, dtype=torch.bool, device=model.device)
        self.reset()

    def reset(self) -> None:
        self.tokens = 0
        self.active = [0] * self.num_recursions
        self.candidates = [0] * self.num_recursions
        self.passing: list[Any] = [0] * self.num_recursions
        self.reached_T.zero_()

    def add(self, out: MoROutput) -> None:
        self.tokens += out.num_tokens
        for r, stats in enumerate(out.recursions):
            self.active[r] += stats.num_active
            self.candidates[r] += stats.num_candidates
            if stats.num_passing.dim() == 0:
                self.passing[r] = self.passing[r] + stats.num_passing
        self.reached_T |= (out.depth == self.num_recursions).any(0)

    def read(self) -> dict[str, Any]:
        """Return shares since the last reset.

        active_share  share of tokens active at each recursion
        drift         share of candidates that the causal rule would take, less the share taken
        dead_share    share of positions in the row that never reached the last recursion
        """
        drift = [
            (float(passing) - active) / max(candidates, 1)
            for passing, active, candidates in zip(
                self.passing[1:], self.active[1:], self.candidates[1:], strict=True
            )
        ]
        return {
            "active_share": [active / max(self.tokens, 1) for active in self.active],
            "drift": [0.0, *drift],
            "dead_share": 1 - float(self.reached_T.float().mean()),
        }


class MetricsFile:
    """One JSON object a line; always written."""

    def __init__(self, path: Path, *, keep_up_to_step: int = 0) -> None:
        """Open for appending; lines of steps after keep_up_to_step (of a lost run) are cut."""
        self.path = path
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= keep_up_to_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read whole lines; a kill may have cut the last one."""
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
