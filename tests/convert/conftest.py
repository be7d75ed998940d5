"""The parent that is converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support_convert import PLAIN

from mor.checkpoint import save_model
from mor.convert.llama import llama_config
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer


@pytest.fixture
def parent(tmp_path: Path, tiny_data: Path) -> Path:
    """A Llama folder as transformers writes it."""
    torch.manual_seed(3)
    model = MoR(PLAIN)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    folder = tmp_path / "parent"
    save_model(model, folder, tokenizer=Tokenizer.load(tiny_data))
    (folder / "config.json").write_text(json.dumps(llama_config(PLAIN)))
    (folder / "generation_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
