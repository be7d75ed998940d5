"""GGUF files of the Llama family: metadata, weights dequantised one at a time, tokenizer.

llama.cpp lays the two halves of a head that turn together side by side; here they come apart
again. Needs the extra `gguf`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor

from mor.config import ModelConfig
from mor.convert.parent import Parent
from mor.tokenizer import Tokenizer

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q5_0", "Q5_1", "Q5_K")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONTROL, USER_DEFINED = 3, 4
"""token types"""


def open_gguf(path: Path, *, name: str = "") -> Parent:
    """Open a GGUF file; ValueError, in one line, for one that is broken or of another family."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"{path} needs the extra gguf: pip install mixture-of-recursions[gguf]"
        ) from error
    try:
        reader = gguf.GGUFReader(str(path))
    except Exception as error:  # the library raises many kinds for a file that is not whole
        raise ValueError(f"{path} is broken or no GGUF file: {error}") from error
    values = _Values(path, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(values, is_tied="output.weight" not in tensors)
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{path}: rope_freqs.weight scales the rotary angles, as Llama 3.1 and later do, which "
            "is not read"
        )
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in READABLE:
            raise ValueError(
                f"{path}: {tensor.name} is quantised as {kind}; mor reads {', '.join(READABLE)}"
            )

    def read(wanted: str) -> Tensor:
        stored = tensors.get(gguf_name(wanted))
        if stored is None:
            raise ValueError(f"{path}: the weight {gguf_name(wanted)} is missing")
        try:
            weight = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        except Exception as error:  # a file that was cut short
            raise ValueError(f"{path}: {stored.name} cannot be read ({error})") from error
        weight = weight.reshape(tuple(reversed(stored.shape.tolist())))
        heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
        }.get(wanted.removesuffix(".weight").rpartition(".")[2])
        return weight if heads is None else halves_apart(weight, heads)

    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    dtype = FLOATS.get(next(iter(kinds)), torch.float32) if len(kinds) == 1 else torch.float32
    template = values.get("tokenizer.chat_template")
    return Parent(
        name=name or str(path),
        config=config,
        tensor=read,
        dtype=torch.float32 if dtype == torch.float16 else dtype,
        tokenizer=lambda: _tokenizer(values),
        files={"chat_template.jinja": template} if template else {},
    )


class _Values:
    """Metadata of a file."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path, self.reader = path, reader

    def get(self, key: str, default: Any = None) -> Any:
        found = self.reader.fields.get(key)
        return default if found is None else found.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path}: {key} is missing")
        return value


def _config(values: _Values, *, is_tied: bool) -> ModelConfig:
    family = values.need("general.architecture")
    if family != "llama":
        raise ValueError(
            f"{values.path}: general.architecture is {family!r}; mor reads llama from GGUF"
        )
    scaling = values.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"{values.path}: llama.rope.scaling.type is {scaling!r}; only none is read"
        )
    if values.get("llama.expert_count", 0):
        raise ValueError(f"{values.path}: llama.expert_count is above 0; experts are not read")
    heads = values.need("llama.attention.head_count")
    hidden = values.need("llama.embedding_length")
    vocab = values.get("llama.vocab_size") or len(values.need("tokenizer.ggml.tokens"))
    try:
        return ModelConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=values.need("llama.feed_forward_length"),
            num_hidden_layers=values.need("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=values.get("llama.attention.head_count_kv", heads),
            head_dim=values.get("llama.attention.key_length", hidden // heads),
            max_position_embeddings=values.need("llama.context_length"),
            rope_theta=float(values.get("llama.rope.freq_base", 10000.0)),
            rms_norm_eps=float(f"{values.need('llama.attention.layer_norm_rms_epsilon'):.3g}"),
            tie_word_embeddings=is_tied,
            bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=values.get("tokenizer.ggml.eos_token_id"),
            sharing="cycle",
        )
    except ValueError as error:
        raise ValueError(f"{values.path}: {error}") from error


def gguf_name(name: str) -> str:
    """Return the name that GGUF has for a weight of transformers' Llama."""
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rows, which has the two that turn together in pairs."""
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(values: _Values) -> Tokenizer:
    """Build the byte-level BPE of a file, its digit step right."""
    kind, before = values.need("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or before not in ("smollm", "gpt-2", "default"):
        raise ValueError(
            f"{values.path}: its tokenizer is {kind} {before}, which is not read from GGUF; give "
            "--tokenizer with the model's tokenizer.json"
        )
    tokens = values.need("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in values.need("tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if before == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps)
    raw.decoder = decoders.ByteLevel()
    types = values.get("tokenizer.ggml.token_type", [])
    special = [t for t, kind in zip(tokens, types, strict=False) if kind == CONTROL]
    plain = [t for t, kind in zip(tokens, types, strict=False) if kind == USER_DEFINED]
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    raw.add_tokens([AddedToken(t, normalized=False) for t in plain])
    return Tokenizer(raw)
