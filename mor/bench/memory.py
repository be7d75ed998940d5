"""What a training step keeps in memory: `python -m mor.bench.memory JOB` measures one model.

It runs in a process of its own, since a peak never falls: one model, nothing before it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mor.bench.contender import Job, build_contender
from mor.train.metrics import peak_memory_bytes

MEASURED_STEPS = 2
"""The first step makes gradients and moments, the second needs both beside its activations."""
OUT_OF_MEMORY = 3
"""Exit code of a child that had not enough."""


class MemoryUse(NamedTuple):
    saved_bytes: int
    """kept for backward when the forward pass ends, each storage once, without the weights"""
    peak_rss_bytes: int
    """largest resident size of the process, Python and its libraries included"""
    peak_device_bytes: int
    """largest allocation on the GPU; 0 on a CPU"""


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Run forward and count the bytes that autograd then keeps, each storage once.

    Storages of the model's own parameters and buffers count nothing. What the result holds, such as
    a graph, is alive while bytes are counted; nodes that went before count nothing.
    """
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        keeper = _Held(tensor.detach())  # a node that kept its own result would never go
        held.add(keeper)
        return keeper

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda keeper: keeper.tensor):
        result = forward()
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = [keeper.tensor.untyped_storage() for keeper in held]
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in owned}
    del result
    return sum(sizes.values())


class _Held:
    """A saved tensor; it goes with the node that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure(job: Job) -> MemoryUse:
    """Train a few steps and read the peaks, then count what a forward pass saves."""
    contender = build_contender(job)
    for step in range(MEASURED_STEPS):
        contender.step(step)
    is_gpu = contender.device.type == "cuda"
    return MemoryUse(
        peak_rss_bytes=peak_memory_bytes(torch.device("cpu")),
        peak_device_bytes=peak_memory_bytes(contender.device) if is_gpu else 0,
        saved_bytes=saved_bytes(contender.forward, contender.module),
    )


def measure_in_child(job: Job) -> MemoryUse:
    """Measure in a fresh process, which ends with this one's Ctrl-C.

    Raises ValueError when memory does not suffice, RuntimeError when the child failed otherwise.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mor.bench.memory", json.dumps(job._asdict())],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,  # Ctrl-C comes to us alone, and leaving `run` ends the child
    )
    if done.returncode in (OUT_OF_MEMORY, -9):  # 9: the system ended it
        raise ValueError(
            f"there is not enough memory to train {job.name}; add --quick or name a smaller shape"
        )
    if done.returncode != 0:
        raise RuntimeError(f"measuring memory of {job.name} ended with code {done.returncode}")
    return MemoryUse(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Measure the job on the command line and print it as JSON; returns the exit code."""
    try:
        print(json.dumps(measure(Job(**json.loads(sys.argv[1])))._asdict()))
    except (MemoryError, RuntimeError) as error:
        kinds = (MemoryError, torch.OutOfMemoryError)
        if isinstance(error, kinds) or "can't allocate memory" in str(error):
            return OUT_OF_MEMORY
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
