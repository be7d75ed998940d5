"""Checkpoints of a run: weights, optimizer, counters. Atomic, rotated, written in the background.

A checkpoint folder has its name only when all of it is on disk, so a kill at any moment leaves the
last one whole.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.checkpoint import WEIGHTS, load_state, load_tensors, save_tensors
from mor.files import atomic_folder, read_json, remove_leftovers, write_json
from mor.log import logger
from mor.model.mor import MoR

NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """Return the steps of the whole checkpoints on disk."""
        if not self.folder.is_dir():
            return []
        found = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def save(self, model: MoR, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Copy the state now and write it in the background; a failed write is raised by the next
        `save` or by `close`."""
        self.wait()
        weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
        moments = _optimizer_tensors(model, optimizer)
        self._pending = self._pool.submit(self._write, weights, moments, dict(state))

    def _write(
        self, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        path = self.folder / f"step-{state['step']:08d}"
        with atomic_folder(path) as part:
            save_tensors(weights, part / WEIGHTS)
            save_tensors(moments, part / "optimizer.safetensors")
            write_json(part / "state.json", state)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{step:08d}", ignore_errors=True)

    def load_newest(self, model: MoR, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint and return its state; None when there is none.

        A checkpoint damaged later on is named, and the one before is taken.
        Raises ValueError when all are damaged
        """
        remove_leftovers(self.folder)
        for step in reversed(self.steps()):
            path = self.folder / f"step-{step:08d}"
            try:
                state = read_json(path / "state.json")
                if state.get("step") != step or "seconds" not in state:
                    raise ValueError(f"{path / 'state.json'} is not of step {step}")
                weights = load_tensors(path / WEIGHTS)
                moments = load_tensors(path / "optimizer.safetensors")
                _check_moments(model, optimizer, moments, where=str(path))
                load_state(model, weights, where=str(path), assign=False)
                _restore_optimizer(model, optimizer, moments)
                return state
            except (ValueError, OSError) as error:
                logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
        if self.steps():
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged; train into a new --out"
            )
        return None

    def wait(self) -> None:
        """Wait for the write in progress and raise what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait until the last checkpoint is on disk; raises what writing it raised."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _optimizer_tensors(model: MoR, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name every tensor of the optimizer after its parameter; add the generator's state."""
    names: dict[Any, str] = {param: name for name, param in model.named_parameters()}
    tensors = {"rng.cpu": torch.get_rng_state()}
    for param, slots in optimizer.state.items():
        for key, value in slots.items():
            tensors[f"{names[param]}.{key}"] = torch.as_tensor(value).detach().cpu().clone()
    return tensors


ADAMW_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def _check_moments(
    model: MoR, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], *, where: str
) -> None:
    """Raise ValueError unless an optimizer's file is whole and of this model and optimizer.

    A parameter that is frozen or never had a gradient, such as a router that nobody reached, has
    no moments.
    """
    moments: dict[Any, tuple[str, ...]] = {}
    for group in optimizer.param_groups:
        kind = MUON_MOMENTS if "momentum" in group else ADAMW_MOMENTS
        moments |= dict.fromkeys(group["params"], kind)
    shapes = {"rng.cpu": torch.get_rng_state().shape}
    for name, param in model.named_parameters():
        keys = [f"{name}.{key}" for key in moments.get(param, ())]
        if any(key in tensors for key in keys):
            shapes |= dict.fromkeys(keys, param.shape)
            if f"{name}.step" in keys:
                shapes[f"{name}.step"] = torch.Size()
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in tensors or name not in shapes or tensors[name].shape != shapes[name]:
            raise ValueError(f"{where}: {name} is missing, foreign or misshapen in the optimizer")


def _restore_optimizer(
    model: MoR, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    params = dict(model.named_parameters())
    torch.set_rng_state(tensors.pop("rng.cpu"))
    state: dict[Any, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(".", 1)
        state.setdefault(params[name], {})[key] = tensor.to(params[name].device)
    optimizer.state.clear()
    optimizer.state.update(state)
