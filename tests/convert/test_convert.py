"""Promises of conversion: the parent's numbers where they are promised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support_convert import IDS, PLAIN, SHAPE, go, logits

from mor.checkpoint import load_model
from mor.config import ModelConfig
from mor.convert.align import Heads, aligned
from mor.convert.check import probe, unrolled
from mor.convert.llama import to_llama
from mor.convert.share import sources
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.tokenizer import Tokenizer


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


def test_layers_left_out_and_shared_keys_are_compared_with_the_whole_parent(
    parent: Path, tmp_path: Path
):
    for name, settings in (
        ("dropped", {"sharing": "none", "drop_layers": (3, 4)}),
        ("shared", {"sharing": "middle_cycle", "kv_strategy": "shared"}),
    ):
        result = go(parent, tmp_path / name, **settings)
        assert not result["is_exact"]
        ids = probe(PLAIN)
        with torch.no_grad():
            ours, theirs = (load_model(f)(ids).logits for f in (tmp_path / name, parent))
        wanted = float((ours - theirs).abs().max())
        assert result["max_logit_difference"] == pytest.approx(wanted, rel=1e-3) and wanted > 0.01


def test_half_precision_parents_convert(parent: Path, tmp_path: Path):
    weights = load_file(parent / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, parent / "model.safetensors")
    assert go(parent, tmp_path / "out", sharing="none")["is_exact"]
    assert next(load_model(tmp_path / "out").parameters()).dtype == torch.float32


@pytest.mark.parametrize("body", ["mlp", "wide_mlp"])
def test_routers_with_a_hidden_layer_can_learn(parent: Path, tmp_path: Path, body: str):
    go(parent, tmp_path / "out", sharing="none", router_body=body)
    model = load_model(tmp_path / "out").train()
    out = model(IDS, labels=IDS, rule="train")
    (out.loss_sum + out.router_loss_sum).backward()
    router = model.model.router(1)
    assert torch.sigmoid(router.logits(torch.randn(4, 32))[0]).tolist() == [0.5] * 4
    assert any(p.grad is not None and p.grad.any() for p in router.parameters())


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


def test_exit_maps_start_at_zero_and_change_nothing_at_full_depth(parent: Path, tmp_path: Path):
    result = go(parent, tmp_path / "out", sharing="none", exit_maps=True, gating="none")
    assert result["is_exact"] and result["max_logit_difference"] < 1e-4
    assert not load_model(tmp_path / "out").state_dict()["model.exit_maps.weight"].any()
    to_llama(tmp_path / "out", tmp_path / "llama")


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
        first, part = served[stored][0], "mlp.up_proj.weight"
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        weights = [aligned(theirs.__getitem__, heads, first, i, part) for i in served[stored]]
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
