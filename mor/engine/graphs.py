"""Replays ticks and passes as CUDA graphs, one for each number of rows, captured at first use.

On a CPU they run op by op: the same functions, so that tests there hold for both.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Runs(Protocol):
    """What is captured: it asks the device for nothing, and its tensors keep size and address."""

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Tensors; where all of them is 0 a run changes nothing that anybody reads."""
        ...

    def run(self, num_rows: int, *, draws: bool) -> None: ...


class Graphs:
    """Runs what it is given; on a GPU a run is one launch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: dict[tuple[Runs, int, bool], torch.cuda.CUDAGraph] = {}
        self._memory = None
        """of all graphs: they run one after the other, and what one leaves is in its own rows"""

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def run(self, what: Runs, num_rows: int, *, draws: bool) -> None:
        if self.device.type != "cuda":
            what.run(num_rows, draws=draws)
            return
        key = what, num_rows, draws
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        self._graphs[key].replay()

    @torch.inference_mode()
    def _capture(self, what: Runs, num_rows: int, draws: bool) -> torch.cuda.CUDAGraph:
        """Compile kernels by runs without a row, which change nothing; capture."""
        kept = [mask.clone() for mask in what.masks]
        for mask in what.masks:
            mask.zero_()
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                what.run(num_rows, draws=draws)
        current.wait_stream(stream)
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            _no_collection(),
            torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"),
        ):
            what.run(num_rows, draws=draws)
        for mask, values in zip(what.masks, kept, strict=True):
            mask.copy_(values)
        return graph


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from collecting tensors and graphs of others, which breaks off a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Readback:
    """A copy of a tensor on its way to the host, begun now; nobody waits until it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        if tensor.device.type != "cuda":
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def numpy(self) -> npt.NDArray[np.int64]:
        """Wait for the copy and return it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


class Inbox:
    """Numbers from the host in one copy: tensors on the device that are parts of one."""

    def __init__(self, device: torch.device, **parts: Tensor) -> None:
        """Make parts of these types and sizes, and with these values where a send says nothing."""
        self._default = {name: part.numpy() for name, part in parts.items()}
        ends = np.cumsum([-(-part.nbytes // 8) * 8 for part in parts.values()])
        self._starts = dict(zip(parts, (0, *ends[:-1].tolist()), strict=True))
        self._bytes = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=device)
        self._named = {name: self._part(self._bytes, name, part) for name, part in parts.items()}

    def _part(self, of: Tensor, name: str, like: Tensor) -> Tensor:
        start = self._starts[name]
        return of[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._named[name]

    def send(self, **values: npt.ArrayLike) -> None:
        """Copy values to the beginnings of their parts, without waiting."""
        host = torch.empty_like(self._bytes, device="cpu", pin_memory=self._bytes.is_cuda)
        for name, default in self._default.items():
            part = self._part(host, name, torch.from_numpy(default)).numpy()
            part[:] = default
            if name in values:
                array = np.asarray(values[name])
                part[: len(array)] = array
        self._bytes.copy_(host, non_blocking=True)


def upload(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
