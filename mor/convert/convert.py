"""`mor convert`, to be read top to bottom: open the parent -> map layers -> write -> check.

Weights pass through one at a time, so a checkpoint larger than memory converts; the folder has its
name only when all of it is written and checked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mor.checkpoint import WEIGHTS, model_card
from mor.config import ModelConfig, end_layers
from mor.convert.check import TOLERANCE, logits_at_full_depth, probe
from mor.convert.config import ConvertConfig
from mor.convert.parent import Parent, open_parent, read_tensor
from mor.convert.share import converted, kept_layers, sources
from mor.convert.write import write_tensors
from mor.files import atomic_folder, claim_folder, write_json
from mor.log import logger
from mor.model.cost import count_params
from mor.model.mor import MoR, assert_sharing
from mor.tokenizer import Tokenizer

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def convert(parent: str, out: Path, config: ConvertConfig) -> dict[str, Any]:
    """Make a MoR folder of a parent.

    parent   folder, .gguf file, hub name or built-in name
    Returns  what the command prints: parameters, `max_logit_difference`, whether it is exact
    Raises   ValueError, in one line, for a parent or settings that do not fit; nothing is left then
    """
    opened = checked(open_parent(parent))
    model_config = converted_config(opened, config)
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else _tokenizer(opened)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the parent a vocabulary of "
            f"{model_config.vocab_size}; give the parent's own with --tokenizer"
        )
    free_folder(out)
    torch.manual_seed(config.seed)
    with torch.device("meta"):
        skeleton = MoR(model_config)
    assert_sharing(skeleton)
    kept = kept_layers(opened.config, config)
    found = sources(model_config, kept, config.init)
    dtype = opened.dtype if config.dtype == "auto" else STORED[config.dtype]
    with atomic_folder(out) as part:
        shapes = {
            name: (tuple(tensor.shape), torch.float32 if ".routers." in name else dtype)
            for name, tensor in skeleton.state_dict().items()
        }

        def tensor_of(name: str) -> torch.Tensor:
            shape = shapes[name][0]
            return converted(name, shape, model_config, found, config.init, opened.tensor)

        write_tensors(part / WEIGHTS, shapes, tensor_of)
        logits_BTV = _logits(model_config, part / WEIGHTS)
        difference = _difference(opened, range(opened.config.num_hidden_layers), logits_BTV)
        is_exact = config.is_exact and not config.drop_layers
        unhealed = _difference(opened, kept, logits_BTV) if config.drop_layers else difference
        limit = TOLERANCE if dtype == opened.dtype or dtype == torch.float32 else float("inf")
        if config.is_exact and not unhealed <= limit:
            raise ValueError(
                f"the converted model's logits differ from the parent's by {unhealed:.2g}, more "
                f"than {TOLERANCE:g}; this is a fault of the conversion, please report it"
            )
        write_json(part / "config.json", model_config.to_dict())
        tokenizer.save(part)
        for name, text in opened.files.items():
            (part / name).write_text(text, encoding="utf-8")
        card = model_card(skeleton, _history(opened, config, kept, difference, is_exact=is_exact))
        (part / "README.md").write_text(card, encoding="utf-8")
    params = count_params(model_config)
    logger.info(
        "%s: %.1f M parameters of the parent's %.1f M; logits differ by %.2g at most%s",
        out,
        params.unique / 1e6,
        count_params(opened.config).unique / 1e6,
        difference,
        "" if is_exact else ", which healing (mor uptrain) brings down",
    )
    if config.kv_strategy == "shared":
        logger.info("keys and values are shared: not exact before healing")
    return {
        "model": str(out),
        "parent": opened.name,
        "params_unique": params.unique,
        "parent_params_unique": count_params(opened.config).unique,
        "max_logit_difference": difference,
        "is_exact": is_exact,
    }


def checked(parent: Parent) -> Parent:
    """Return a parent whose weights have the shapes that its config says, or ValueError."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in MoR(parent.config).state_dict().items()}

    def tensor(name: str) -> torch.Tensor:
        weight = parent.tensor(name)
        if weight.shape != shapes[name]:
            raise ValueError(
                f"{parent.name}: {name} has shape {list(weight.shape)}, its config says "
                f"{list(shapes[name])}"
            )
        return weight

    return dataclasses.replace(parent, tensor=tensor)


def converted_config(parent: Parent, config: ConvertConfig) -> ModelConfig:
    """Return the config of the converted model; ValueError for layers that do not divide."""
    kept = kept_layers(parent.config, config)
    plain = _plain(parent.config, len(kept))
    if config.num_recursions == 1:  # ends say what `freeze` may keep
        ends = {"prelude_layers": config.prelude_layers, "coda_layers": config.coda_layers}
        return dataclasses.replace(plain, **ends)
    fields: dict[str, Any] = {
        "num_recursions": config.num_recursions,
        "sharing": config.sharing,
        "prelude_layers": config.prelude_layers,
        "coda_layers": config.coda_layers,
        "router": config.router,
        "kv_strategy": config.kv_strategy,
        "relax_norms": config.relax_norms,
        "lora_rank": config.lora_rank,
        "lora_targets": config.lora_targets,
        "lora_alpha": 0,
        "capacity": (),
        "gating": "auto",
    }
    if config.is_routed:
        everyone = (1.0,) * config.num_recursions
        fields |= {
            "exit_maps": config.exit_maps,
            "gating": config.gating,
            "router_body": config.router_body,
            "capacity": everyone,
        }
    try:
        return dataclasses.replace(plain, **fields)
    except ValueError as error:
        if "do not divide" not in str(error):
            raise
        given = (config.prelude_layers, config.coda_layers)
        own = sum(end_layers(config.sharing, count) for count in given)
        R, shared = config.num_recursions, len(kept) - own
        if shared < R:
            raise ValueError(
                f"prelude_layers {config.prelude_layers} and coda_layers {config.coda_layers} "
                f"leave {max(shared, 0)} of {len(kept)} layers for {R} recursions; give less"
            ) from error
        fits = [n for n in range(2, shared + 1) if shared % n == 0]
        raise ValueError(
            f"{shared} shared layers do not divide by num_recursions {R}; drop {shared % R} with "
            f"--drop-layers, take one of {fits} recursions, or change --prelude-layers and "
            "--coda-layers"
        ) from error


def _tokenizer(parent: Parent) -> Tokenizer:
    try:
        return parent.tokenizer()
    except ValueError as error:
        if "--tokenizer" in str(error):
            raise
        raise ValueError(f"{error}, or name it with --tokenizer") from error


def _logits(model: ModelConfig, weights: Path) -> torch.Tensor:
    """Return what a converted model says of the probe at full depth (B, T, V)."""
    return logits_at_full_depth(model, probe(model), lambda name: read_tensor(weights, name))


def _difference(parent: Parent, kept: Sequence[int], logits_BTV: torch.Tensor) -> float:
    """Return the largest difference of a logit from the parent's with the layers that are kept."""
    shorter = _plain(parent.config, len(kept))

    def read_kept(name: str) -> torch.Tensor:
        head, _, rest = name.partition("model.layers.")
        if head or not rest:
            return parent.tensor(name)
        index, _, part = rest.partition(".")
        return parent.tensor(f"model.layers.{kept[int(index)]}.{part}")

    theirs_BTV = logits_at_full_depth(shorter, probe(shorter), read_kept)
    return float((logits_BTV - theirs_BTV).abs().max())


def _plain(parent: ModelConfig, layers: int) -> ModelConfig:
    """Return a vanilla config of so many layers; a MoR-made parent may name a map and ends."""
    ends: dict[str, Any] = {"sharing": "cycle", "prelude_layers": -1, "coda_layers": -1}
    return dataclasses.replace(parent, num_hidden_layers=layers, **ends)


def _history(
    parent: Parent, config: ConvertConfig, kept: list[int], difference: float, *, is_exact: bool
) -> str:
    """Say in the model card what was done."""
    settings = {
        name: getattr(config, name)
        for name in (
            *("num_recursions", "sharing", "prelude_layers", "coda_layers", "init", "router"),
            *("gating", "kv_strategy"),
        )
    }
    lines = [f"Converted from {parent.name} by `mor convert` with {json.dumps(settings)}."]
    if config.lora_rank:
        lines.append(f"LoRA of each recursion's own: rank {config.lora_rank}.")
    if config.drop_layers:
        lines.append(f"Layers of the parent that are kept: {kept}.")
    lines.append(
        f"At full depth its logits differ from the parent's by {difference:.2g} at most."
        if is_exact
        else f"Before healing its logits differ from the parent's by up to {difference:.2g}."
    )
    lines.append("Every token takes full depth until routing is trained (`mor uptrain`).")
    return "\n".join(lines) + "\n"


def free_folder(out: Path) -> None:
    """Take an empty folder away for a whole one of its name; ValueError for a full one."""
    if out.exists():
        claim_folder(out, what="the converted model")
        out.rmdir()
