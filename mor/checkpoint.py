"""The model folder: config.json, model.safetensors, tokenizer.json, calibration.json, README.md.

Loading is strict: every weight is there, in its shape, and nothing else. A plain Llama folder loads
as a model of one recursion. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mor.config import ModelConfig
from mor.files import atomic_folder, write_json
from mor.model.cost import count_params
from mor.model.mor import MoR, assert_sharing
from mor.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"


def save_model(
    model: MoR,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    calibration: dict[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write a model folder, whole or not at all; replaces the folder that has this name."""
    with atomic_folder(folder) as part:
        write_json(part / "config.json", model.config.to_dict())
        save_tensors(model.state_dict(), part / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save(part)
        if calibration is not None:
            write_json(part / "calibration.json", calibration)
        (part / "README.md").write_text(card or model_card(model), encoding="utf-8")


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> MoR:
    """Load a model folder in evaluation mode; routers stay in fp32.

    Raises ValueError in one line for a folder that is missing, broken or of another kind.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a model folder; give one that `mor train` wrote, or make one of an "
            "open model with `mor convert`"
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} is a peft adapter, not a model; merge it into its model first, as "
                "docs/huggingface.md shows"
            )
        raise ValueError(f"{folder} has no config.json; give a model folder")
    config = ModelConfig.load(folder)
    with torch.device("meta"):
        model = MoR(config)
    tensors = load_tensors(folder / WEIGHTS)
    load_state(model, tensors, where=str(folder / WEIGHTS))
    model = model.to(dtype=dtype, device=device).eval()
    assert_sharing(model)
    return model


def load_calibration(folder: Path) -> dict[str, Any] | None:
    """Read what a model folder keeps of its routers' scores; None where it has none."""
    path = folder / "calibration.json"
    if not path.is_file():
        return None
    try:
        calibration = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(calibration, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return calibration


def load_state(model: MoR, tensors: dict[str, Tensor], *, where: str, assign: bool = True) -> None:
    """Give a model its weights; ValueError names the first that is missing, foreign or misshapen.

    assign  take the tensors themselves (a fresh model) instead of copying into the model's
    """
    expected = model.state_dict()
    if model.lm_head is None:
        tensors.pop("lm_head.weight", None)  # some tools store the tied head a second time
    for name in expected:
        if name not in tensors:
            raise ValueError(f"{where}: the weight {name} is missing; the file is of another model")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"{where}: the weight {name} is foreign; the file is of another model")
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {list(tensor.shape)}, the config says "
                f"{list(expected[name].shape)}"
            )
    model.load_state_dict(tensors, strict=True, assign=assign)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:  # a full disk comes as this
        raise OSError(f"cannot write {path}: {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors; ValueError in one line when the file is missing or broken."""
    if path.with_name(f"{path.name}.index.json").is_file():
        raise ValueError(f"{path.parent} is sharded; join its weights into one {path.name}")
    if not path.is_file():
        raise ValueError(f"{path} is missing; only safetensors are read")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is broken or no safetensors file: {error}") from error


def model_card(model: MoR, extra: str = "") -> str:
    """Return a README that says what the folder is and how to use it."""
    config = model.config
    params = count_params(config)
    kind = (
        f"Mixture-of-Recursions with {config.num_recursions} recursions, router `{config.router}`"
        if config.has_router
        else f"{config.num_recursions} recursion(s) of fixed depth"
    )
    return f"""---
library_name: mixture-of-recursions
---
# {kind}

{params.unique:,} parameters ({params.nonembedding:,} without embedding), {config.num_hidden_layers}
layers after unrolling, context {config.max_position_embeddings}.

    mor generate THIS_FOLDER --prompt "..." --show-depth
    mor eval THIS_FOLDER --data PREPARED

{extra}"""
