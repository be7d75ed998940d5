"""Which implementation runs a tick: compiled kernels where there are any, else torch."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from mor.engine.blocks import BlockManager, Layout
from mor.engine.captured import CapturedTicks
from mor.engine.config import EngineConfig
from mor.engine.device_tick import DeviceTick
from mor.engine.layers import LayerGroups, TorchGroups
from mor.engine.native_groups import NativeGroups
from mor.engine.native_runner import NativeRunner, fits
from mor.engine.torch_runner import TorchRunner
from mor.model.mor import MoR
from mor.ops.native import compiled


def build_runner(
    model: MoR, groups: LayerGroups, blocks: BlockManager, *, num_rows: int
) -> TorchRunner:
    """Return what runs ticks on these layers."""
    if isinstance(groups, NativeGroups) and fits(model.config):
        return NativeRunner(model, groups, blocks, num_rows=num_rows)
    return TorchRunner(model, groups, blocks, num_rows=num_rows)


def build_captured(
    model: MoR, runner: TorchRunner, blocks: BlockManager, config: EngineConfig
) -> CapturedTicks | None:
    """Return what runs ticks on the device alone; None where they take the ordinary path.

    Raises ValueError when capture is asked for and the model or the backend does not allow it
    """
    why = None
    if not isinstance(runner.groups, TorchGroups):
        why = "the native backend; use torch or triton"
    elif not model.config.shares_block or model.config.lora_rank:
        why = "layers or LoRA of each recursion's own; use auto"
    if config.capture == "on" and why is not None:
        raise ValueError(f"capture is on, but it does not serve {why}")
    # Not torch's attention by itself: it reads every place of the widest table, filled or not.
    is_fast = model.device.type == "cuda" and type(runner.groups) is not TorchGroups
    is_wanted = config.capture == "on" or (config.capture == "auto" and is_fast)
    if why is not None or not is_wanted:
        return None
    tick_of = DeviceTick
    if type(runner.groups) is not TorchGroups:
        from mor.engine.fused_tick import FusedTick

        tick_of = FusedTick
    return CapturedTicks(
        model,
        runner,
        blocks,
        max_requests=config.max_num_seqs,
        max_rows=config.max_num_batched_tokens,
        tick_of=tick_of,
    )


def build_groups(
    model: MoR, pool: Tensor, layout: Layout, config: EngineConfig, *, max_model_len: int
) -> LayerGroups:
    """Return what runs the model's layers on this pool of pages.

    Raises ValueError when a backend is asked for that cannot be had
    """
    sizes = (layout.own_page_tokens if layout.own_layers else 0, layout.block_page_tokens)
    backend, is_cpu = config.backend, pool.device.type == "cpu"
    is_float = pool.dtype in (torch.bfloat16, torch.float32)
    if backend in ("auto", "native") and is_cpu and is_float:
        kernels = compiled.load()
        if kernels is not None:
            return NativeGroups(model, pool, sizes, kernels)
    has_triton = importlib.util.find_spec("triton") is not None and is_float
    has_triton = has_triton and (not is_cpu or os.environ.get("TRITON_INTERPRET") == "1")
    if has_triton and (backend == "triton" or (backend == "auto" and not is_cpu)):
        from mor.engine.triton_groups import TritonGroups

        most = {"max_rows": config.max_num_seqs, "max_count": max_model_len}
        return TritonGroups(model, pool, sizes, **most)
    if backend in ("native", "triton"):
        raise ValueError(
            f"backend {backend} is not to be had on {pool.device.type} with {pool.dtype}; use torch"
        )
    return TorchGroups(model, pool, sizes)
