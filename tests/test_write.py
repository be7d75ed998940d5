"""Promises of `mor generate`: what it reports is what the model did."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mor import write
from mor.checkpoint import load_model, save_model
from mor.cli import main
from mor.config import ModelConfig
from mor.data.config import PrepareConfig
from mor.data.prepare import prepare
from mor.engine.engine import Engine
from mor.engine.outputs import StepOutput
from mor.engine.params import SamplingParams
from mor.model.cost import forward_flops
from mor.tokenizer import Tokenizer

Capsys = pytest.CaptureFixture[str]


def generate_json(model: Path, capsys: Capsys, *flags: str) -> dict[str, Any]:
    args = ["generate", str(model), "--json", "--max-tokens", "8", "--device", "cpu", *flags]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "something else than the JSON object is on stdout"
    return json.loads(out)


def test_the_json_object_adds_up(tiny_run: Path, capsys: Capsys) -> None:
    result = generate_json(tiny_run / "model", capsys, "--prompt", "the cat sees", "--ignore-eos")
    assert {"text", "tokens", "depths", "mean_depth", "flops_saved"} <= result.keys()
    tokenizer = Tokenizer.load(tiny_run / "model")
    assert len(result["tokens"]) == 8
    assert len(result["depths"]) == 7, "the last token is never run"
    assert result["text"] == tokenizer.decode(result["tokens"])
    assert len(result["prompt_depths"]) == 1 + len(tokenizer.encode("the cat sees"))
    depths = result["prompt_depths"] + result["depths"]
    assert set(depths) <= {1, 2, 3}
    assert result["mean_depth"] == pytest.approx(sum(depths) / len(depths))


def test_saved_flops_are_those_counted_by_hand(tiny_run: Path, capsys: Capsys) -> None:
    result = generate_json(tiny_run / "model", capsys, "--prompt", "the old", "--ignore-eos")
    config = ModelConfig.load(tiny_run / "model")
    depths = result["prompt_depths"] + result["depths"]

    def flops(depths: list[int]) -> float:
        active = [[d > r for d in depths] for r in range(3)]
        pairs = [sum(sum(a[: i + 1]) for i in range(len(a)) if a[i]) for a in active]
        count = len(depths)
        return forward_flops(
            config,
            tokens=count,
            pairs=sum(range(1, count + 1)),
            active_tokens=[sum(a) for a in active],
            active_pairs=pairs,
            head_tokens=len(result["tokens"]),
        )

    assert result["flops_saved"] == pytest.approx(1 - flops(depths) / flops([3] * len(depths)))


def test_a_token_at_full_depth_saves_nothing(tmp_path: Path, tiny_run: Path) -> None:
    torch.manual_seed(0)
    model = load_model(tiny_run / "model")
    for r in (1, 2):
        model.model.router(r).threshold.fill_(-1.0)
    save_model(model, tmp_path / "deep", tokenizer=Tokenizer.load(tiny_run / "model"))
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    engine = Engine.load(tmp_path / "deep")
    result = write.write_text(engine, "", params, show_depth=False, quiet=True)
    assert result["mean_depth"] == 3.0
    assert result["flops_saved"] == 0.0
    assert result["prompt_depths"] == [3]  # an empty prompt begins a document


def test_greedy_is_the_argmax_under_teacher_forcing(tiny_run: Path, capsys: Capsys) -> None:
    flags = ("--prompt", "the dog likes", "--temperature", "0", "--ignore-eos")
    result = generate_json(tiny_run / "model", capsys, *flags)
    model = load_model(tiny_run / "model")
    ids = [0, *Tokenizer.load(tiny_run / "model").encode("the dog likes"), *result["tokens"]]
    out = model(torch.tensor([ids]), rule="causal", implementation="reference")
    assert out.logits is not None
    assert out.logits[0, -9:-1].argmax(-1).tolist() == result["tokens"]
    assert out.depth[0].tolist()[:-1] == result["prompt_depths"] + result["depths"]


def test_a_seed_repeats_and_another_does_not(tiny_run: Path, capsys: Capsys) -> None:
    def tokens(seed: str) -> list[int]:
        flags = ("--seed", seed, "--temperature", "1.5", "--top-p", "1", "--ignore-eos")
        return generate_json(tiny_run / "model", capsys, *flags)["tokens"]

    assert tokens("1") == tokens("1") != tokens("2")


def test_it_stops_at_the_end_of_the_document_unless_told_otherwise(
    tiny_run: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """All weights equal: every logit is the same, and the first id, the end token, wins."""
    model = load_model(tiny_run / "model")
    for param in model.parameters():
        param.data.fill_(0.01)
    save_model(model, tmp_path / "m", tokenizer=Tokenizer.load(tiny_run / "model"))
    stopped = generate_json(tmp_path / "m", capsys, "--temperature", "0", "--prompt", "a")
    assert stopped["tokens"] == [] and stopped["text"] == ""
    assert stopped["tokens_per_s"] == 0
    went_on = generate_json(tmp_path / "m", capsys, "--temperature", "0", "--ignore-eos")
    assert went_on["tokens"] == [0] * 8


def test_a_prompt_comes_from_flag_file_or_standard_input(
    tiny_run: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("the red house", encoding="utf-8")
    stdin = SimpleNamespace(buffer=io.BytesIO(b"the red house"))
    monkeypatch.setattr(sys, "stdin", stdin)
    sources = (
        ("--prompt", "the red house"),
        ("--prompt-file", str(tmp_path / "p.txt")),
        ("--prompt-file", "-"),
    )
    results = [generate_json(tiny_run / "model", capsys, *flags) for flags in sources]
    for result in results:
        assert result["prompt"] == "the red house"
        assert result["tokens"] == results[0]["tokens"]


def test_text_streams_to_stdout_and_figures_to_stderr(tiny_run: Path, capsys: Capsys) -> None:
    flags = ["--prompt", "the cat", "--max-tokens", "4", "--ignore-eos", "--seed", "3"]
    assert main(["generate", str(tiny_run / "model"), *flags]) == 0
    plain = capsys.readouterr()
    assert plain.out.startswith("the cat")
    assert "4 tokens" in plain.err
    assert main(["generate", str(tiny_run / "model"), *flags, "--show-depth"]) == 0
    shown = capsys.readouterr()
    assert shown.out == plain.out, "colours reach a file"
    assert "depth: 1 grey62, 2 cyan, 3 yellow" in shown.err


def test_a_model_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens may be any bytes: those of a title, a cleared screen, the clipboard."""
    for is_terminal in (True, False):
        out = io.StringIO()
        out.isatty = lambda answer=is_terminal: answer  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdout", out)
        printer = write.Printer(False, False, 3)
        printer.take(StepOutput("a", 0, [5], "a\x1b]0;owned\x07\tb\n\x9b2J"))
        printer.end()
        shown = (
            "a\ufffd]0;owned\ufffd\tb\n\ufffd2J" if is_terminal else "a\x1b]0;owned\x07\tb\n\x9b2J"
        )
        assert out.getvalue() == shown + "\n"


def test_depth_is_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    printer = write.Printer(True, False, 3)
    printer.take(StepOutput("a", 0, [5], "one"))
    assert "one" not in out.getvalue(), "its depth is not known yet"
    printer.take(StepOutput("a", 0, [6], " two", [1]))
    printer.take(StepOutput("a", 0, [7], " end", [2]))
    printer.end()
    text = out.getvalue()
    assert "\x1b[" in text
    first, second = text.index("one"), text.index(" two")
    assert text[:first] != text[first + 3 : second]  # another colour


def test_characters_of_several_tokens_are_written_whole(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(tiny_run / "model")
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode("né€")
    assert len(ids) > 3
    left = list(ids)
    monkeypatch.setattr(engine.sampler, "_argmax", lambda logits: torch.tensor([left.pop(0)]))
    params = SamplingParams(max_tokens=len(ids), temperature=0.0)
    result = write.write_text(engine, "", params, show_depth=False, quiet=True)
    assert result["text"] == "né€"


def test_an_end_token_of_any_name_is_known_from_the_model_folder(
    tiny_data: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """Text prepared with --eos-token gives a model that can write and be measured."""
    raw = json.loads((tiny_data / "tokenizer.json").read_text())
    text = json.dumps(raw).replace("<|endoftext|>", "<|my_end|>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": f"the cat {n} sees " * 20}) + "\n" for n in range(30))
    )
    prepare(
        PrepareConfig(
            input=(tmp_path / "c.jsonl",),
            tokenizer=tmp_path / "tokenizer.json",
            eos_token="<|my_end|>",
            out=tmp_path / "data",
            val_fraction=0.2,
        )
    )
    config = ModelConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sharing="cycle",
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    from mor.data.loader import PreparedData
    from mor.model.mor import MoR

    tokenizer = PreparedData.open(tmp_path / "data").tokenizer()
    save_model(MoR(config), tmp_path / "m", tokenizer=tokenizer)
    assert len(generate_json(tmp_path / "m", capsys, "--ignore-eos")["tokens"]) == 8
    assert main(["eval", str(tmp_path / "m"), "--data", str(tmp_path / "data")]) == 0
