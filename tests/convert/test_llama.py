"""Promises of the way back to Llama: the same logits, or what training gates away costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support_convert import go, logits

from mor.checkpoint import load_model, save_model
from mor.cli import main
from mor.convert.llama import to_llama
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer


def test_there_and_back_is_the_same_llama(parent: Path, tmp_path: Path, capsys):
    go(parent, tmp_path / "mor", relax_norms=True, init="svd", lora_rank=3)
    command = ["convert", str(tmp_path / "mor"), str(tmp_path / "llama"), "--to", "llama"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["max_logit_difference"] < 1e-4
    torch.testing.assert_close(
        logits(tmp_path / "llama"), logits(tmp_path / "mor"), atol=1e-4, rtol=1e-4
    )
    assert load_model(tmp_path / "llama").config.num_recursions == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.model.router(1).body.weight.fill_(0.1), "its gates are not 1"),
        (lambda model: model.model.router(1).threshold.fill_(0.5), "let tokens go"),
    ],
)
def test_a_model_that_routes_is_no_llama(
    parent: Path, tmp_path: Path, change: Callable[[MoR], None], said: str
):
    go(parent, tmp_path / "mor")
    model = load_model(tmp_path / "mor")
    with torch.no_grad():
        change(model)
    save_model(model, tmp_path / "trained")
    with pytest.raises(ValueError, match=f"{said}.*--distill-gates"):
        to_llama(tmp_path / "trained", tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


def test_gates_and_exits_are_trained_away(
    parent: Path, tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
):
    go(parent, tmp_path / "mor", sharing="none")
    model = load_model(tmp_path / "mor")
    with torch.no_grad():
        torch.nn.init.normal_(dict(model.model.router(1).named_parameters())["body.weight"])
        model.model.router(1).threshold.fill_(0.5)
    tokenizer = Tokenizer.load(tmp_path / "mor", eos_token=model.config.eos_token_id)
    save_model(model, tmp_path / "trained", tokenizer=tokenizer)
    command = ["convert", str(tmp_path / "trained"), str(tmp_path / "llama"), "--distill-gates"]
    assert main([*command, "--to", "llama"]) == 2
    assert "--distill-gates needs --data FOLDER" in capsys.readouterr().err
    command += ["--data", str(tiny_data), "--distill-context", "16"]
    assert main(command) == 2
    assert "give --to llama" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    elsewhere = [*command[:2], str(tmp_path / "full"), *command[3:], "--to", "llama"]
    assert main(elsewhere) == 2  # before the training, not behind it
    assert not list(tmp_path.glob("full.distill*"))
    capsys.readouterr()
    (tmp_path / "trained" / "depths.json").write_text('{"low": 1.2}')
    command += ["--distill-tokens", "6000", "--distill-lr", "3e-3", "--to", "llama", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["loss"] < told["start_loss"]
    assert told["max_logit_difference"] < 1e-4 and told["tokens"] >= 6000
    assert load_model(tmp_path / "llama").config.num_recursions == 1
    assert (tmp_path / "llama" / "tokenizer.json").is_file()
    assert not (tmp_path / "llama" / "depths.json").exists()
    assert not list(tmp_path.glob("llama.distill*"))
