"""`mor convert --to llama`: a MoR whose gates are all 1, unrolled into a plain Llama.

Every unrolled layer has its own copy of the shared weights there, so the file is larger: this is
for tools that know no recursions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.checkpoint import WEIGHTS, load_model
from mor.config import ModelConfig
from mor.convert.check import TOLERANCE, logits_at_full_depth, probe, unrolled
from mor.convert.convert import free_folder
from mor.convert.parent import read_tensor
from mor.convert.write import write_tensors
from mor.files import atomic_folder, write_json
from mor.model.mor import MoR

NOT_TAKEN = ("config.json", "calibration.json", "depths.json")
SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
)
"""fields that transformers' Llama has under the same names"""


def to_llama(folder: Path, out: Path) -> dict[str, Any]:
    """Write a MoR folder as a transformers Llama folder of the same logits at full depth.

    Raises ValueError, in one line, where no Llama is the same model
    """
    model = load_model(folder)
    check_is_llama(model, folder)
    config = model.config
    free_folder(out)
    weights = llama_weights(model)
    shapes = {name: (tuple(t.shape), torch.float32) for name, t in weights.items()}
    ids_BT = probe(config)
    with torch.no_grad():
        before = model(ids_BT, rule="causal").logits
    with atomic_folder(out) as part:
        write_tensors(part / WEIGHTS, shapes, weights.__getitem__)
        written = read_from(part / WEIGHTS)
        after = logits_at_full_depth(ModelConfig.from_dict(llama_config(config)), ids_BT, written)
        difference = float((before - after).abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the Llama's logits differ by {difference:.2g}, more than {TOLERANCE:g}; this is "
                "a fault of the conversion, please report it"
            )
        write_json(part / "config.json", llama_config(config))
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".jinja") and file.name not in NOT_TAKEN:
                (part / file.name).write_bytes(file.read_bytes())
    return {"model": str(out), "max_logit_difference": difference}


def read_from(file: Path) -> Any:
    """Return a function that reads weights of a file by name."""
    return lambda name: read_tensor(file, name)


INEXPRESSIBLE: tuple[tuple[Callable[[ModelConfig], bool], str], ...] = (
    (lambda c: c.recursion_encoding, "it has recursion encodings"),
    (lambda c: c.attention_bias or c.qk_norm, "it has biases or head norms, which Llama has not"),
)
"""what no Llama has, whatever it learns"""


def check_is_llama(model: MoR, folder: Path) -> None:
    """Raise ValueError, naming the reason, where a Llama of the same logits does not exist."""
    config = model.config
    reasons = [why for is_so, why in INEXPRESSIBLE if is_so(config)]
    if config.kv_strategy != "per_recursion":
        reasons.append(f"kv_strategy is {config.kv_strategy}")
    if config.has_router:
        if config.gating not in ("none", "residual") or config.router == "token_choice":
            reasons.append(f"router is {config.router}, gating {config.gating}")
        elif config.gating == "residual" and any(p.abs().max() > 0 for p in routers(model)):
            reasons.append("its gates are not 1 (router weights are not 0)")
        if config.router == "random" and set(config.capacity) != {1.0}:
            reasons.append("the random router lets tokens go")
        elif config.router in ("expert_choice", "threshold"):
            thresholds = [model.model.router(r).threshold for r in range(config.num_recursions)]
            if any(float(threshold) >= 0 for threshold in thresholds[1:]):
                reasons.append("its thresholds let tokens go before full depth")
    if reasons:
        raise ValueError(
            f"{folder} is no plain Llama: {'; '.join(reasons)}. --distill-gates --data FOLDER "
            "trains gates and exits away and says what is lost"
        )


def routers(model: MoR) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if ".routers." in name]


def llama_weights(model: MoR) -> dict[str, Tensor]:
    """Return the weights of all unrolled layers, low-rank additions folded in."""
    config, state = model.config, model.state_dict()
    weights = {
        name: state[name]
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        if name in state
    }
    for place, (stored, recursion, _) in enumerate(unrolled(config)):
        prefix = f"model.layers.{stored}."
        for name, tensor in state.items():
            part = name.removeprefix(prefix)
            if part == name or "recursion_" in part:
                continue
            if part.endswith("norm.weight") and tensor.dim() == 2:
                tensor = tensor[recursion]
            first = state.get(name.replace(".weight", ".recursion_A"))
            if first is not None:
                second = state[name.replace(".weight", ".recursion_B")]
                scale = config.lora_alpha / config.lora_rank
                tensor = tensor + scale * second[recursion] @ first[recursion]
            weights[f"model.layers.{place}.{part}"] = tensor
    return weights


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json that transformers reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **{name: getattr(config, name) for name in SAME},
    }
