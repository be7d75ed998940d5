"""Where and in which type the arithmetic runs."""

from __future__ import annotations

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
    """Turn `auto` into bfloat16 where the processor multiplies it in hardware, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: absent means no
    has_bf16 = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return torch.bfloat16 if has_bf16 else torch.float32


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
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    auto = pick_dtype("auto", pick_device("auto"))
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
