"""A safetensors file written weight by weight, so that a model larger than memory can be.

Source: the format's description, huggingface/safetensors: a header of JSON, then the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mor.log import progress

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
ALIGNMENT = 8


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensor_of: Callable[[str], Tensor],
) -> None:
    """Write weights in the order of their names.

    shapes     name -> (shape, stored type)
    tensor_of  called once for each name; ValueError here when its shape is another
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file, progress("weights", len(shapes)) as bar:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, (shape, dtype) in shapes.items():
            tensor = tensor_of(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, the config says {list(shape)}"
                )
            stored = tensor.to(dtype).contiguous().reshape(-1)
            file.write(stored.view(torch.uint8).numpy().data if stored.numel() else b"")
            bar.advance()
