"""Promises of the Hugging Face adapter: same folder, same numbers, padding on any side, strict."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support_hf import KINDS, VOCAB, causal, ids_of, load, model_of, pad, write_folder

from mor import hf_hook
from mor.checkpoint import load_model
from mor.config import ModelConfig
from mor.model.router import WideModule

pytest.importorskip("transformers", minversion="5.0")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as hf_logging

from mor.hf import MorCache, MorForCausalLM
from mor.hf_config import MorConfig

pytestmark = pytest.mark.xdist_group("hf")  # one worker pays for the import
hf_logging.disable_progress_bar()
F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(model_of(request.param), tmp_path_factory.mktemp("hf") / request.param)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "routed"
    return write_folder(model_of("expert_choice"), path)


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_auto_classes_know_mor_when_it_is_imported_first(routed: Path) -> None:
    """Also where modeling_utils, half there itself, is what imports them."""
    imports = (
        "import mor, transformers.modeling_utils; from transformers import AutoModelForCausalLM"
    )
    model = f"model = AutoModelForCausalLM.from_pretrained({str(routed)!r})"
    python(f"{imports}; {model}; assert type(model).__module__ == 'mor.hf'")


def test_auto_classes_know_mor_when_they_are_imported_first(routed: Path) -> None:
    imports = "from transformers.models.auto.configuration_auto import CONFIG_MAPPING; import mor"
    python(f"{imports}; assert CONFIG_MAPPING['mor'].__module__ == 'mor.hf_config'")


def test_mor_needs_no_transformers() -> None:
    hidden = "import sys; sys.modules['transformers'] = None"
    python(f"{hidden}; import mor, mor.checkpoint")


def test_another_major_version_is_told_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.6"))
    with caplog.at_level(logging.WARNING):
        hf_hook._register(ModuleType("auto"))  # has no AutoConfig: touching it would raise
    assert "mor works with transformers 5" in caplog.text


def test_the_config_holds_every_field_of_ours(folder: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, MorConfig)
    assert config.core == ModelConfig.load(folder)
    config.save_pretrained(tmp_path)
    assert ModelConfig.load(tmp_path) == config.core
    assert AutoConfig.from_pretrained(tmp_path).core == config.core
    assert MorConfig(**config.core.to_dict()).core == config.core


def test_a_config_can_be_changed_but_not_into_nonsense(routed: Path) -> None:
    config = AutoConfig.from_pretrained(routed, router_alpha=0.5)
    assert config.core.router_alpha == 0.5
    config.num_recursions = 0
    with pytest.raises(ValueError, match="num_recursions is 0"):
        _ = config.core
    written = json.loads((routed / "config.json").read_text())
    with pytest.raises(ValueError, match="key 'router_alfa' is unknown; did you mean router_alpha"):
        MorConfig.from_dict(written | {"router_alfa": 1})


def test_files_are_the_same_both_ways(folder: Path, tmp_path: Path) -> None:
    core, model = load_model(folder), load(folder)
    assert isinstance(model, MorForCausalLM) and not model.training
    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys() == model.state_dict().keys() == core.state_dict().keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    again = load_model(tmp_path)  # strict
    assert again.config == core.config
    ids = ids_of(2, 12)
    assert torch.equal(causal(again, ids).logits, causal(core, ids).logits)


def test_no_buffer_is_left_out_of_the_file(folder: Path) -> None:
    """transformers builds on the meta device: what the file lacks would stay uninitialised."""
    model = load(folder)
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    core = model_of("expert_choice", tie_word_embeddings=False)
    model = load(write_folder(core, tmp_path / "m"))
    ids, wanted = ids_of(2, 12), causal(core, ids_of(2, 12)).logits
    model.save_pretrained(tmp_path / "n")
    again = load_model(tmp_path / "n")
    # Close: where a file's weights lie in memory may move a product's last bit.
    torch.testing.assert_close(model(ids).logits, wanted)
    torch.testing.assert_close(causal(again, ids).logits, wanted)
    for other in (model, again):
        kept, had = (m.state_dict()["lm_head.weight"] for m in (other, core))
        assert torch.equal(kept, had)


def test_routers_stay_fp32(folder: Path) -> None:
    core, model = load_model(folder), load(folder, dtype=torch.bfloat16)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype="bfloat16")
    of_routers = {
        f"{name}.{key}"
        for name, module in core.named_modules()
        if isinstance(module, WideModule)
        for key in module.state_dict()
    }
    assert bool(of_routers) == core.config.has_router
    moved = load(folder).to(torch.bfloat16)
    for name, tensor in core.state_dict().items():
        for other in (model, fresh, moved):
            got = other.state_dict()[name]
            assert got.dtype == (tensor.dtype if name in of_routers else torch.bfloat16), name
        if name in of_routers:
            assert torch.equal(model.state_dict()[name], tensor), name
    ids = ids_of(2, 12)
    torch.testing.assert_close(
        model(ids).logits, causal(load_model(folder, dtype=torch.bfloat16), ids).logits
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda tensors: tensors.pop("model.routers.1.threshold"), "threshold is missing"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "the weight other is foreign"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(VOCAB, 24)}), None),
    ],
)
def test_loading_is_strict(routed: Path, tmp_path: Path, change: Any, message: str | None) -> None:
    tensors = load_file(routed / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((routed / "config.json").read_text())
    if message is None:  # a tied head that some tool stored a second time
        load(tmp_path)
        return
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_model_of_another_format_is_refused(routed: Path, tmp_path: Path) -> None:
    config = json.loads((routed / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ValueError, match="format version is 99, this mor reads") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_never_enters_the_model(folder: Path, side: str) -> None:
    core, model = load_model(folder, dtype=F64), load(folder, dtype=F64)
    rows = [ids_of(n, seed=n) for n in (11, 5, 8)]
    ids, mask = pad(rows, side)
    out = model(ids, attention_mask=mask)
    other = model(ids.masked_fill(mask == 0, 3), attention_mask=mask.bool())
    assert torch.equal(out.logits, other.logits)
    for row, tokens in enumerate(rows):
        alone = causal(core, tokens[None])
        is_real = mask[row].bool()
        torch.testing.assert_close(out.logits[row, is_real], alone.logits[0], **EXACT)
        assert torch.equal(out.depth[row, is_real], alone.depth[0])
        assert not out.depth[row, ~is_real].any() and not out.logits[row, ~is_real].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_mean_over_labels(folder: Path, side: str) -> None:
    core, model = load_model(folder, dtype=F64), load(folder, dtype=F64)
    rows = [ids_of(n, seed=n) for n in (11, 5)]
    ids, mask = pad(rows, side)
    labels = ids.clone()
    labels[0, 2:4] = -100
    total = count = 0
    for row, tokens in enumerate(rows):
        target = torch.cat([labels[row][mask[row].bool()][1:], torch.tensor([-100])])
        total += causal(core, tokens[None], labels=target[None]).loss_sum
        count += int((target != -100).sum())
    loss = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-6, atol=1e-6)
    half = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * half, loss)


def test_training_uses_the_rule_and_the_losses_of_training(folder: Path) -> None:
    core, model = load_model(folder, dtype=F64), load(folder, dtype=F64).train()
    ids = ids_of(2, 12)
    out = model(ids, labels=ids)
    target = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    ours = core.train()(ids, labels=target, rule="train")
    loss = ours.loss_sum / 22
    if ours.router_loss_sum is not None:
        loss = loss + ours.router_loss_sum / 24
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(out.depth, ours.depth)
    out.loss.backward()
    loss.backward()
    wanted = dict(core.named_parameters())
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, wanted[name].grad, rtol=1e-5, atol=1e-6)


def test_top_k_is_for_training_only(routed: Path) -> None:
    core, model = load_model(routed), load(routed)
    ids = ids_of(2, 24)
    by_rule = {rule: core(ids, rule=rule).depth for rule in ("train", "causal")}
    assert not torch.equal(*by_rule.values())
    assert torch.equal(model(ids).depth, by_rule["causal"])
    assert torch.equal(model.train()(ids).depth, by_rule["train"])
    with torch.no_grad():
        assert torch.equal(model(ids).depth, by_rule["causal"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_to_keep(routed: Path, side: str) -> None:
    model = load(routed, dtype=F64)
    ids, mask = pad([ids_of(n, seed=n) for n in (9, 6)], side)
    logits = model(ids, attention_mask=mask).logits
    kept = model(ids, attention_mask=mask, logits_to_keep=3).logits
    torch.testing.assert_close(kept, logits[:, -3:])
    which = torch.tensor([1, 7])
    kept = model(ids, attention_mask=mask, logits_to_keep=which).logits
    torch.testing.assert_close(kept, logits[:, which])
    kept = model(ids, attention_mask=mask, num_logits_to_keep=1).logits
    last = [8, 8] if side == "left" else [8, 5]
    torch.testing.assert_close(kept[:, 0], logits[torch.arange(2), last])


def test_outputs_come_as_a_tuple_on_request(routed: Path) -> None:
    model, ids = load(routed), ids_of(1, 5)
    out = model(ids, labels=ids)
    loss, logits, depth = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    assert torch.equal(depth, out.depth)


IDS = ids_of(2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"inputs_embeds": torch.ones(2, 5, 24)}, "inputs_embeds are not supported"),
        ({"attention_mask": torch.ones(2, 7)}, r"attention_mask has shape \[2, 7\]"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, "attention_mask has shape"),
        ({"attention_mask": torch.zeros(2, 5)}, "hides every token"),
        ({"position_ids": torch.arange(1, 6)[None]}, "position_ids do not count"),
        ({"past_key_values": DynamicCache()}, "the cache is a DynamicCache; give a MorCache"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported"),
        ({"token_type_ids": torch.ones(2, 5)}, "token_type_ids is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused(routed: Path, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(routed)(**({"input_ids": IDS} | call))


def test_positions_that_count_real_tokens_are_welcome(routed: Path) -> None:
    model = load(routed)
    ids, mask = pad([ids_of(4), ids_of(2)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = MorCache()
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    model(ids_of(2, 1), position_ids=torch.tensor([[4], [2]]), past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids"):
        model(ids_of(2, 1), position_ids=torch.tensor([[4], [4]]), past_key_values=cache)


def test_a_cache_is_not_for_training(routed: Path) -> None:
    with pytest.raises(ValueError, match="a cache serves generation"):
        load(routed).train()(IDS, use_cache=True)


def test_activation_checkpointing_is_refused_in_one_line(routed: Path) -> None:
    model = load(routed)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    with pytest.raises(ValueError, match="MorForCausalLM does not support"):
        enable()


def test_what_would_be_silently_wrong_is_refused(routed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another shape than the model; leave out ignore_mism"):
        load(routed, vocab_size=VOCAB + 8, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="quantization_config is not supported"):
        load(routed, quantization_config={"load_in_4bit": True})
    places = {"model": "cpu", "lm_head": "disk"}
    untied = write_folder(model_of("expert_choice", tie_word_embeddings=False), tmp_path / "m")
    with pytest.raises(ValueError, match="device_map puts mor on cpu, disk"):
        load(untied, device_map=places, offload_folder=tmp_path / "off")
    with pytest.raises(ValueError, match="config is of a llama; make a folder of mor"):
        MorConfig.from_dict({"model_type": "llama", "vocab_size": 99})
    model = load(routed).train()
    model.model.router(0).get_buffer("steps_done").zero_()
    with pytest.raises(ValueError, match="capacity_warmup_steps is 4 and has not ended"):
        model(ids_of(1, 8), labels=ids_of(1, 8))


def test_trainer_knows_that_labels_are_to_be_shifted() -> None:
    """Else its own loss, asked for by label_smoothing_factor, would teach to copy a token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mor"] == MorForCausalLM.__name__


def test_the_vocabulary_can_grow(routed: Path, tmp_path: Path) -> None:
    model = load(routed)
    before = model(IDS).logits
    model.resize_token_embeddings(VOCAB + 5)
    after = model(IDS).logits
    assert after.shape[-1] == VOCAB + 5
    torch.testing.assert_close(after[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(causal(load_model(tmp_path), IDS).logits, after)
    model.resize_token_embeddings(VOCAB + 500, mean_resizing=False)
    fresh = model.model.embed_tokens.weight[VOCAB + 5 :].detach()
    assert float(fresh.std()) == pytest.approx(model.config.initializer_range, rel=0.1)
