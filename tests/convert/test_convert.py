"""Promises of conversion: the parent's numbers where they are promised, one line where it fails."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mor.checkpoint import load_model, save_model
from mor.cli import main
from mor.config import ModelConfig
from mor.convert import parent as parents
from mor.convert.check import unrolled
from mor.convert.config import ConvertConfig
from mor.convert.convert import convert
from mor.convert.llama import llama_config, to_llama
from mor.convert.share import sources
from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PLAIN = ModelConfig(**SHAPE, sharing="cycle")
IDS = torch.tensor([[5, 9, 60, 3, 8, 21, 40, 200, 7, 7]])


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


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(IDS).logits


def go(parent: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return convert(str(parent), out, ConvertConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_recursions": 1},
        {"sharing": "none", "num_recursions": 2},
        {"sharing": "none", "num_recursions": 3, "router": "threshold", "router_body": "mlp"},
        {"sharing": "none", "num_recursions": 2, "router": "expert_choice", "gating": "none"},
        {"sharing": "none", "num_recursions": 2, "router": "fixed"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_own_layers_at_full_depth_are_the_parent(
    parent: Path, tmp_path: Path, settings: dict[str, Any]
):
    result = go(parent, tmp_path / "out", **settings)
    assert result["is_exact"] and result["max_logit_difference"] <= 1e-5
    torch.testing.assert_close(logits(tmp_path / "out"), logits(parent), atol=1e-4, rtol=1e-4)
    model = load_model(tmp_path / "out")
    assert model(IDS).depth.unique().tolist() == [settings["num_recursions"]]
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).is_file()
    assert "Converted from" in (tmp_path / "out" / "README.md").read_text()


def test_the_parent_is_what_transformers_reads(parent: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    llama = transformers.AutoModelForCausalLM.from_pretrained(parent)
    go(parent, tmp_path / "out", sharing="none")
    with torch.no_grad():
        theirs = llama(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_converts_exactly_and_the_engine_knows_it(
    family: str, tmp_path: Path, tiny_data: Path
):
    transformers = pytest.importorskip("transformers")
    name = family.capitalize()
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(
        **{k: v for k, v in SHAPE.items() if k != "rope_theta"},
        **({"head_dim": 16} if family == "qwen3" else {}),
        tie_word_embeddings=True,
    )
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)  # norms and biases that show
    folder = tmp_path / family
    theirs.save_pretrained(folder)
    Tokenizer.load(tiny_data).save(folder)
    result = go(folder, tmp_path / "out", sharing="none", num_recursions=2)
    assert result["is_exact"]
    with torch.no_grad():
        wanted = theirs(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, atol=1e-4, rtol=1e-4)
    model = load_model(tmp_path / "out")
    assert (model.config.attention_bias, model.config.qk_norm) == (
        family == "qwen2",
        family == "qwen3",
    )
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    drawn = Engine(model).generate([IDS[0].tolist()], params)[0].outputs[0].token_ids
    ids = IDS[0].tolist()
    for token in drawn:
        with torch.no_grad():
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    with pytest.raises(ValueError, match="which Llama has not"):
        to_llama(tmp_path / "out", tmp_path / "llama")
    shared = go(folder, tmp_path / "shared", init="svd", lora_rank=4, relax_norms=True)
    assert not shared["is_exact"]
    with pytest.raises(ValueError, match="backend native does not know attention_bias"):
        Engine(model, EngineConfig(backend="native"))


def test_the_engine_draws_what_the_parent_draws(parent: Path, tmp_path: Path):
    go(parent, tmp_path / "out", sharing="none", num_recursions=3)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    drawn = [
        Engine.load(folder).generate([IDS[0].tolist()], params)[0].outputs[0].token_ids
        for folder in (parent, tmp_path / "out")
    ]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle", "sequence", "middle_sequence"])
@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper", "random", "svd"])
def test_shared_layers_are_what_the_initialisation_says(
    parent: Path, tmp_path: Path, sharing: str, init: str
):
    is_routed = "sequence" not in sharing
    if init == "svd" and not is_routed:
        pytest.skip("low-rank additions are for cycles")
    lora: dict[str, Any] = {"lora_rank": 4} if init == "svd" else {}
    router = "expert_choice" if is_routed else "fixed"
    settings = {"sharing": sharing, "init": init, "router": router, **lora}
    gating = {} if is_routed else {"gating": "none"}
    result = go(parent, tmp_path / "out", **settings, **gating)
    assert not result["is_exact"]
    model, theirs = load_model(tmp_path / "out"), load_model(parent).state_dict()
    config, ours = model.config, model.state_dict()
    served: dict[int, list[int]] = {}
    for place, (stored, _, _) in enumerate(unrolled(config)):
        served.setdefault(stored, []).append(place)
    shared = sorted(stored for stored, layers in served.items() if len(layers) > 1)
    block = sorted(layer for stored in shared for layer in served[stored])
    for order, stored in enumerate(shared):
        weights = [theirs[f"model.layers.{i}.mlp.up_proj.weight"] for i in served[stored]]
        got = ours[f"model.layers.{stored}.mlp.up_proj.weight"]
        if init in ("average", "svd"):
            torch.testing.assert_close(got, sum(weights) / len(weights))
        elif init == "random":
            assert all((got - weight).abs().max() > 0.01 for weight in weights)
        else:
            last = len(block) - 1
            pick = {
                "lower": block[order],
                "upper": block[len(block) - len(shared) + order],
                "stepwise": block[round(order * last / max(1, len(shared) - 1))],
            }[init]
            assert torch.equal(got, theirs[f"model.layers.{pick}.mlp.up_proj.weight"])
    for stored, layers in served.items():
        if len(layers) == 1:
            name = "self_attn.q_proj.weight"
            assert torch.equal(
                ours[f"model.layers.{stored}.{name}"], theirs[f"model.layers.{layers[0]}.{name}"]
            )


def test_svd_of_full_rank_is_the_parent(parent: Path, tmp_path: Path):
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    result = go(
        parent,
        tmp_path / "out",
        init="svd",
        lora_rank=40,  # above every matrix
        lora_targets=targets,
        relax_norms=True,
    )
    assert result["max_logit_difference"] < 1e-3
    torch.testing.assert_close(logits(tmp_path / "out"), logits(parent), atol=1e-3, rtol=1e-3)


def test_more_rank_is_nearer(parent: Path, tmp_path: Path):
    gaps = []
    for rank in (2, 8, 24):
        out = tmp_path / str(rank)
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        go(parent, out, init="svd", lora_rank=rank, lora_targets=targets, relax_norms=True)
        gaps.append(float((logits(out) - logits(parent)).abs().mean()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_layers_can_be_left_out(parent: Path, tmp_path: Path):
    result = go(parent, tmp_path / "out", sharing="none", num_recursions=5, drop_layers=(3,))
    model = load_model(tmp_path / "out")
    assert model.config.num_hidden_layers == 7 and not result["is_exact"]
    theirs = load_model(parent).state_dict()
    name = "self_attn.q_proj.weight"
    got = model.state_dict()[f"model.layers.3.{name}"]
    assert torch.equal(got, theirs[f"model.layers.4.{name}"])


def test_shards_are_read_one_weight_at_a_time(parent: Path, tmp_path: Path):
    folder = tmp_path / "sharded"
    shutil.copytree(parent, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    go(folder, tmp_path / "out", sharing="none")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(parent), atol=1e-4, rtol=1e-4)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the shard b\.safetensors is missing"):
        go(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


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
    command += ["--distill-tokens", "6000", "--distill-lr", "3e-3", "--to", "llama", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["loss"] < told["start_loss"]
    assert told["max_logit_difference"] < 1e-4 and told["tokens"] >= 6000
    assert load_model(tmp_path / "llama").config.num_recursions == 1
    assert (tmp_path / "llama" / "tokenizer.json").is_file()
    assert not (tmp_path / "llama.distill").exists()


@pytest.mark.parametrize("ends", [(2, 2), (0, 2), (3, 1), (2, 0)])
def test_prelude_and_coda_have_the_sizes_asked_for(
    parent: Path, tmp_path: Path, ends: tuple[int, int]
):
    prelude, coda = ends
    asked: dict[str, Any] = {"prelude_layers": prelude, "coda_layers": coda}
    result = go(parent, tmp_path / "own", sharing="none", **asked)
    assert result["max_logit_difference"] < 1e-4
    config = load_model(tmp_path / "own").config
    assert (config.num_prelude_layers, config.num_coda_layers) == ends
    assert config.num_block_layers == (8 - prelude - coda) // 2
    go(parent, tmp_path / "shared", sharing="middle_cycle", **asked)
    theirs = load_model(parent).state_dict()
    ours = load_model(tmp_path / "shared").state_dict()
    name = "mlp.up_proj.weight"
    last = len(load_model(tmp_path / "shared").model.layers)
    for i in range(prelude):
        assert torch.equal(ours[f"model.layers.{i}.{name}"], theirs[f"model.layers.{i}.{name}"])
    for i in range(1, coda + 1):
        got = ours[f"model.layers.{last - i}.{name}"]
        assert torch.equal(got, theirs[f"model.layers.{8 - i}.{name}"])


def edit(**fields: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return make


def misshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors")


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


def test_every_stored_layer_has_a_source():
    for sharing in ("cycle", "middle_cycle", "none"):
        own = 0 if sharing == "cycle" else 2
        settings: dict[str, Any] = {"num_recursions": 3, "sharing": sharing}
        fields: dict[str, Any] = {**SHAPE, "num_hidden_layers": 6 + own, **settings}
        model = ModelConfig(**fields)
        found = sources(model, list(range(model.num_hidden_layers)), "average")
        assert len(found) == model.num_unique_layers
        covered = sorted(layer for source in found for layer in source.layers)
        assert covered == list(range(model.num_hidden_layers))
