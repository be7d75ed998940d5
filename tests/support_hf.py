"""Small model folders, one a kind of routing, for the tests of the Hugging Face adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support_model import small_model

from mor.checkpoint import save_model
from mor.model.mor import MoR
from mor.tokenizer import train_bpe

VOCAB = 280
TEXTS = ["the cat sees", "a dog finds the old house by the river", "red"]
# A new router or kind of keys and values is one line here.
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {"router": "fixed", "gating": "none", "num_recursions": 1},
    "expert_choice": {"router": "expert_choice", "capacity_warmup_steps": 4},
    "threshold": {"router": "threshold", "gating": "residual", "num_recursions": 2},
    "token_choice": {"router": "token_choice", "kv_strategy": "shared", "relax_norms": True},
    "hybrid": {"kv_strategy": "hybrid", "recursion_encoding": True, "lora_rank": 2},
}


def model_of(kind: str, **fields: Any) -> MoR:
    """A model in float64 whose tokens take different depths, with thresholds far from any score."""
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    model = small_model(**{**ends, **KINDS[kind], **fields}).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("steps_done"):  # transformers trains what mor train has warmed up
            buffer.fill_(model.config.capacity_warmup_steps)
    if model.config.router in ("expert_choice", "threshold"):
        for r in range(1, model.config.num_recursions):
            scores = causal(model, ids_of(4, 24)).recursions[r].score_N.sort().values
            third = len(scores) // 3
            place = third + int(scores.diff()[third:-third].argmax())
            # Halfway between two scores; float32, since that is what a file holds.
            model.model.router(r).threshold.fill_(float(scores[place : place + 2].mean().float()))
    if model.config.has_router:
        assert len(set(causal(model, ids_of(4, 24)).depth.flatten().tolist())) > 1
    return model


def write_folder(model: MoR, folder: Path) -> Path:
    """Save a model as fp32, with a tokenizer of VOCAB entries."""
    texts = iter([" ".join(TEXTS) + " likes blue cats and every other thing. "] * 20)
    save_model(model.float(), folder, tokenizer=train_bpe(texts, vocab_size=VOCAB))
    return folder


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def causal(model: MoR, ids: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, rule="causal", **options)


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay rows out with padding on the left, on the right, or in the middle of a row."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 7)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        free = width - len(tokens)
        columns = {
            "left": range(free, width),
            "right": range(len(tokens)),
            "middle": [*range(1), *range(free + 1, width)],
        }[side]
        ids[row, list(columns)] = tokens
        mask[row, list(columns)] = 1
    return ids, mask
