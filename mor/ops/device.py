"""Where and in which type the arithmetic runs."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch


def pick_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use cpu, cuda or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; use cpu, cuda or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but this PyTorch sees no GPU; use cpu")
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"device is {name}; kernels run on the first GPU that is seen: use cuda, and "
            f"CUDA_VISIBLE_DEVICES={device.index} to say which that is"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto` into bfloat16 where the processor multiplies it in hardware, else float32.

    For weights that are kept in this type: half the bytes are read.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _has("avx512_bf16") or _has("amx_tile") else torch.float32


def pick_product_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto` into the type in which products of float32 weights are quickest, for training.

    As `pick_dtype`, but float32 on Intel's processors without AMX: on the one that was measured
    bfloat16 products take 1.5 to 1.9 times as long (docs/LOG.md).
    """
    is_slow = not _has("amx_tile") and _cpu_info("vendor_id") == "GenuineIntel"
    if name == "auto" and device.type == "cpu" and is_slow:
        return torch.float32
    return pick_dtype(name, device)


def _has(feature: str) -> bool:
    """Ask PyTorch for a feature of the processor; what it does not know is not there."""
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


@functools.cache
def _cpu_info(field: str) -> str | None:
    """Return what Linux says of the first processor; None elsewhere."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith(field))
    return next(found, None)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the context in which matrix products run in dtype; nothing for None and fp32."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype if half else torch.bfloat16, enabled=half)


def in_autocast_type(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors in the autocast type, or as they are outside autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def describe_machine() -> dict[str, str]:
    """Describe this machine as a benchmark must."""
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    auto = pick_product_dtype("auto", pick_device("auto"))
    machine = {
        "processor": name,
        "auto_dtype": str(auto).removeprefix("torch."),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine
