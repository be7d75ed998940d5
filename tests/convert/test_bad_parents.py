"""What conversion refuses: one line that names the value, and nothing half-written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support_convert import go

from mor.convert import parent as parents
from mor.convert.config import ConvertConfig


def edit(**fields: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return make


def misshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors")


def retype(dtype: torch.dtype) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({k: w.to(dtype) for k, w in weights.items()}, folder / "model.safetensors")

    return make


def leave_out(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "settings", "said"),
    [
        (edit(model_type="gpt2"), {}, "model_type is 'gpt2'; mor converts llama"),
        (edit(attention_bias=True), {}, "attention_bias is True; only False"),
        (edit(rope_parameters={"rope_type": "yarn"}), {}, "rotary scaling .*yarn"),
        (edit(tie_word_embeddings=False), {}, "there is no lm_head.weight"),
        (edit(num_hidden_layers=9), {}, "27|do not divide|missing"),
        (
            edit(quantization_config={"quant_method": "fp8"}),
            {},
            "quantization_config asks for fp8; only plain float weights",
        ),
        (retype(torch.float64), {}, "is stored as torch.float64; only float32, float16"),
        (misshape, {}, r"layers\.1\.mlp\.up_proj\.weight has shape \[3, 3\]"),
        (leave_out, {"sharing": "none"}, "self_attn.q_proj.weight is missing"),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            {},
            "tokenizer.json does not.*--tokenizer",
        ),
        (lambda f: (f / "config.json").unlink(), {}, "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), {}, "config.json is not JSON"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            {},
            r"pytorch_model\.bin is a pickle, which is never read",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), {}, "is broken or no safetensors"),
        (
            lambda f: None,
            {"num_recursions": 4},
            r"drop 2 with --drop-layers, .* \[2, 3, 6\]",
        ),
        (
            lambda f: None,
            {"prelude_layers": 6, "coda_layers": 5},
            "prelude_layers 6 and coda_layers 5 leave 0 of 8 layers for 2 recursions",
        ),
        (
            lambda f: None,
            {"drop_layers": (8,)},
            "drop_layers holds 8; .* layers 0 to 7",
        ),
    ],
)
def test_a_parent_that_does_not_fit_is_refused_in_one_line(
    parent: Path,
    tmp_path: Path,
    spoil: Callable[[Path], Any],
    settings: dict[str, Any],
    said: str,
):
    spoil(parent)
    with pytest.raises(ValueError, match=said) as caught:
        go(parent, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gating": "weighted"}, "gating is weighted; its gate is alpha"),
        ({"gating": "additive"}, "gating is additive"),
        ({"router": "token_choice"}, "router is token_choice"),
        ({"init": "svd"}, "init is svd and lora_rank is 0"),
        ({"init": "svd", "sharing": "none"}, "init is svd, but no layer is shared"),
        ({"num_recursions": 1, "lora_rank": 8}, "lora_rank is 8, but num_recursions is 1"),
        ({"exit_maps": True, "router": "fixed"}, "exit_maps serve routers that let tokens go"),
        ({"num_recursions": 0}, "num_recursions is 0"),
        ({"init": "middle"}, "init 'middle' is unknown"),
        ({"drop_layers": (1, 1)}, "give each once"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        ConvertConfig(**settings)


def test_a_parent_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"is no folder, no \.gguf file"):
        go(Path("nothing"), tmp_path / "out")
    monkeypatch.setitem(parents.BUILT_IN, "tiny", ("no_such_package", "x.gguf", "smollm"))
    with pytest.raises(ValueError, match="tiny needs the extra smollm"):
        go(Path("tiny"), tmp_path / "out")


def test_a_hub_name_without_network_is_said(tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ValueError, match="somebody/model cannot be had from the hub") as caught:
        go(Path("somebody/model"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_interrupted_conversion_leaves_nothing(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = sys.modules["mor.convert.convert"]

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "converted", stop)
    with pytest.raises(KeyboardInterrupt):
        go(parent, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


def test_a_full_folder_is_not_overwritten(parent: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="already holds files"):
        go(parent, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
