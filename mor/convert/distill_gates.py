"""`mor convert --to llama --distill-gates`: a plain Llama learns what a routed model says.

The unrolled weights with every gate at 1 are where it begins; the routed model, by its causal rule,
is its teacher. What is lost is printed, not hidden.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from mor.checkpoint import WEIGHTS, load_model, save_model
from mor.config import ModelConfig
from mor.convert.config import DistillGatesConfig
from mor.convert.convert import free_folder
from mor.convert.llama import INEXPRESSIBLE, llama_config, llama_weights, to_llama
from mor.data.loader import PreparedData
from mor.files import only_one, read_json, sha256_file
from mor.log import logger
from mor.model.mor import MoR
from mor.ops.device import pick_device, pick_product_dtype
from mor.tokenizer import Tokenizer
from mor.train.config import Recipe, TrainConfig
from mor.train.distill import DistillConfig
from mor.train.heldout import measure_loss
from mor.train.trainer import Teaching, held_batches, train


def distill_gates(folder: Path, out: Path, config: DistillGatesConfig) -> dict[str, Any]:
    """Train a Llama on what a MoR folder says, and write it; returns losses before and after.

    Raises ValueError for a model that no training helps, or data that does not fit; Interrupted
    after Ctrl-C, and the same command goes on
    """
    assert config.data is not None
    model = load_model(folder)
    reasons = [why for is_so, why in INEXPRESSIBLE if is_so(model.config)]
    if reasons:
        raise ValueError(f"{folder} is no plain Llama, and no training makes it one: {reasons[0]}")
    data = PreparedData.open(config.data)
    free_folder(out)  # before the work, not behind it
    told = hashlib.sha256(f"{sha256_file(folder / WEIGHTS)} {config}".encode())
    work = out.with_name(f"{out.name}.distill-{told.hexdigest()[:12]}")
    work.mkdir(parents=True, exist_ok=True)
    with only_one(work):
        if not (work / "start").is_dir():
            tokenizer = Tokenizer.load(folder, eos_token=model.config.eos_token_id)
            save_model(unrolled_model(model), work / "start", tokenizer=tokenizer)
        start = ModelConfig.load(work / "start")
        context = min(config.distill_context, start.max_position_embeddings)
        settings = TrainConfig(
            budget_tokens=config.distill_tokens,
            lr=config.distill_lr,
            context=context,
            batch_tokens=4 * context,
            warmup_share=0.1,
            decay_share=0.5,
            weight_decay=0.0,
        )
        recipe = Recipe(model=start, train=settings)
        if not (work / "run" / "summary.json").is_file():
            train(
                recipe,
                data=data,
                out=work / "run",
                resume=(work / "run" / "run.json").is_file(),
                start=work / "start",
                teacher=Teaching(folder, DistillConfig(label_weight=0.0, teacher_weight=1.0)),
                go_on="the same command goes on",
            )
        losses = _losses(folder, work, recipe, data)
        for file in sorted(folder.iterdir()):  # chat template and the like come along
            if file.suffix in (".json", ".jinja") and not (work / "run/model" / file.name).exists():
                shutil.copy2(file, work / "run" / "model" / file.name)
        result = losses | to_llama(work / "run" / "model", out)
    shutil.rmtree(work)
    logger.info(
        "nats per token on held-out text: %.4f routed, %.4f with gates of 1, %.4f distilled",
        *(losses[name] for name in ("routed_loss", "start_loss", "loss")),
    )
    return result


def unrolled_model(model: MoR) -> MoR:
    """Return the vanilla model of a routed one's weights, every gate at 1."""
    fields = llama_config(model.config)
    plain = MoR(ModelConfig.from_dict(fields))
    plain.load_state_dict(llama_weights(model))
    return plain.eval()


def _losses(folder: Path, work: Path, recipe: Recipe, data: PreparedData) -> dict[str, float]:
    """Measure teacher, start and result on the validation text."""
    device = pick_device(recipe.train.device)
    dtype = pick_product_dtype(recipe.train.dtype, device)
    held = held_batches(data, "val", recipe)
    found = {}
    for name, path in (
        ("routed_loss", folder),
        ("start_loss", work / "start"),
        ("loss", work / "run" / "model"),
    ):
        with torch.no_grad():
            found[name] = measure_loss(load_model(path, device=device), held, dtype=dtype).loss
    return found | {"tokens": read_json(work / "run" / "summary.json")["tokens"]}
