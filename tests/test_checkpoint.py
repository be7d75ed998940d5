"""Promises of the model folder: strict, whole, each weight once; a plain Llama loads as R = 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mor.checkpoint import load_model, save_model
from mor.config import ModelConfig
from mor.model.mor import MoR, assert_sharing

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def small_model(**fields: Any) -> MoR:
    torch.manual_seed(0)
    routing: dict[str, Any] = {"num_recursions": 3, "router": "expert_choice"}
    return MoR(ModelConfig(**SIZES | routing | fields))


def logits_of(model: MoR) -> torch.Tensor:
    ids = torch.arange(20).view(2, 10) % model.config.vocab_size
    with torch.no_grad():
        logits = model.eval()(ids).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_as_it_was(tmp_path: Path, tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied)
    model.model.router(1).threshold.fill_(0.37)
    save_model(model, tmp_path / "m", calibration={"active": [1.0]})
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert not loaded.training
    assert float(loaded.model.router(1).threshold) == pytest.approx(0.37)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert json.loads((tmp_path / "m/calibration.json").read_text()) == {"active": [1.0]}
    assert "mor generate" in (tmp_path / "m/README.md").read_text()


def test_every_weight_is_stored_once(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    assert "lm_head.weight" not in tensors
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    assert layers == {0, 1, 2}  # prelude, one block for three recursions, coda


def test_sharing_is_asserted_after_build_and_load(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path / "m")
    assert_sharing(load_model(tmp_path / "m"))
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(AssertionError):
        assert_sharing(model)


def test_routers_stay_fp32_in_a_bf16_model(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m")
    model = load_model(tmp_path / "m", dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        wanted = torch.float32 if "router" in name else torch.bfloat16
        assert tensor.dtype == wanted, name


def test_saving_replaces_a_folder_whole(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m")
    (tmp_path / "m/old").write_text("")
    save_model(small_model(), tmp_path / "m")
    assert not (tmp_path / "m/old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "model.extra is foreign"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm.weight has shape \[3\]"),
    ],
)
def test_loading_is_strict(tmp_path: Path, change: Any, message: str) -> None:
    save_model(small_model(), tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"format_version": 99}, "format version is 99"),
        ({"num_recursion": 3}, "did you mean num_recursions"),
        ({"hidden_size": "16"}, "hidden_size is .16.; give a whole number"),
        ({"capacity": None}, "wrong type"),
        ({"capacity": [1.0, 0.5, 0.6]}, r"config.json: capacity .* rises"),
        ({"router": "expert"}, "config.json: router 'expert' is unknown"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_model(small_model(), tmp_path / "m")
    file = tmp_path / "m/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m")


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "torch_dtype": "float32",
    **SIZES,
}
ROPES = [
    {"rope_theta": 50000.0},
    {"rope_theta": 50000.0, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}},
]


def write_llama(folder: Path, vanilla: MoR, config: dict[str, Any]) -> None:
    """Write a folder as transformers does, from the weights of our vanilla model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(vanilla.state_dict())
    names = {name.split(".", 3)[3] for name in tensors if name.startswith("model.layers.0.")}
    assert names == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_llama_folder_is_a_model_of_one_recursion(
    tmp_path: Path, rope: dict[str, Any], tied: bool
) -> None:
    vanilla = small_model(
        num_recursions=1,
        router="fixed",
        sharing="cycle",
        rope_theta=50000.0,
        tie_word_embeddings=tied,
    )
    # transformers writes tie_word_embeddings only where it differs from its default, false
    config = {**LLAMA, **rope, **({"tie_word_embeddings": True} if tied else {})}
    write_llama(tmp_path / "llama", vanilla, config)
    loaded = load_model(tmp_path / "llama")
    assert loaded.config.num_recursions == 1 and not loaded.config.has_router
    assert loaded.config.rope_theta == 50000.0
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (1, 2)
    assert torch.equal(logits_of(loaded), logits_of(vanilla))


def test_a_tied_head_that_was_stored_twice_is_read(tmp_path: Path) -> None:
    vanilla = small_model(num_recursions=1, router="fixed", sharing="cycle")
    write_llama(tmp_path / "llama", vanilla, {**LLAMA, "tie_word_embeddings": True})
    tensors = load_file(tmp_path / "llama/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "llama/model.safetensors")
    assert torch.equal(logits_of(load_model(tmp_path / "llama")), logits_of(vanilla))


def test_what_a_llama_config_leaves_out_has_transformers_defaults() -> None:
    config = {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "num_key_value_heads")}
    read = ModelConfig.from_dict(config)
    assert (read.rms_norm_eps, read.num_key_value_heads, read.rope_theta) == (1e-6, 4, 10000.0)
    assert not read.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rotary scaling"),
        ({"hidden_size": "16"}, "wrong type"),
    ],
)
def test_llama_features_that_we_lack_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    vanilla = small_model(num_recursions=1, router="fixed", sharing="cycle")
    write_llama(tmp_path / "llama", vanilla, {**LLAMA, **change})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "llama")
