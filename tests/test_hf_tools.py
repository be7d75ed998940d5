"""Promises of the adapter to the tools around transformers: peft, Trainer, lm-eval; the docs."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support_hf import (
    KINDS,
    TEXTS,
    causal,
    ids_of,
    load,
    model_of,
    tokenizer_of,
    write_folder,
)

from mor.checkpoint import load_model

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

import mor.hf  # noqa: F401

pytestmark = [
    pytest.mark.xdist_group("hf"),
    pytest.mark.filterwarnings(
        # peft asks transformers by the older name
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),
]
hf_logging.disable_progress_bar()
DOCS = Path(__file__).parent.parent / "docs" / "huggingface.md"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tools")
    models = {kind: model_of(kind) for kind in KINDS}
    models["wide"] = model_of("vanilla", hidden_size=32)
    return {name: write_folder(model, root / name) for name, model in models.items()}


def with_lora(folder: Path) -> Any:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(load(folder), lora)


def train(model: torch.nn.Module, steps: int = 12) -> list[float]:
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.03)
    ids, losses = ids_of(2, 12), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_trains_saves_loads_and_merges(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    model = with_lora(folders[kind]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    for name, param in model.named_parameters():
        assert (param.grad is not None) == param.requires_grad == ("lora_" in name), name
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed and all("lora_" in name for name in changed)

    model.eval().save_pretrained(tmp_path / "lora")
    ids = ids_of(2, 12, seed=3)
    wanted = model(ids).logits
    assert not torch.allclose(wanted, load(folders[kind])(ids).logits, atol=1e-3)
    loaded = PeftModel.from_pretrained(load(folders[kind]), tmp_path / "lora")
    torch.testing.assert_close(loaded(ids).logits, wanted)
    tokens = loaded.generate(input_ids=ids, max_new_tokens=4)
    assert torch.equal(tokens, model.generate(input_ids=ids, max_new_tokens=4, use_cache=False))
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = causal(load_model(tmp_path / "merged"), ids).logits
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vanilla", r"the weight .*layers\.4.* is foreign; the file is of another model"),
        ("wide", r"has shape \[4, 32\], the model's is \[4, 24\]"),
    ],
)
def test_a_lora_of_another_model_is_refused(
    folders: dict[str, Path], source: str, message: str, tmp_path: Path
) -> None:
    with_lora(folders[source]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        PeftModel.from_pretrained(load(folders["expert_choice"]), tmp_path)
    assert "\n" not in str(error.value)


def test_modules_that_are_not_there_are_named_by_peft(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"'c_attn'.* not found in the base model"):
        get_peft_model(load(folders["threshold"]), LoraConfig(target_modules=["c_attn"]))


def test_an_adapter_on_the_head_is_refused(folders: dict[str, Path]) -> None:
    lora = LoraConfig(target_modules=["embed_tokens"])  # the head is tied to it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights itself
        model = get_peft_model(load(folders["threshold"]), lora)
    with pytest.raises(ValueError, match=r"leave lm_head .* out of the adapter's modules"):
        model(ids_of(1, 4))


def test_inputs_can_be_made_to_require_gradients(folders: dict[str, Path]) -> None:
    model = load(folders["threshold"]).requires_grad_(False).train()
    assert not model(ids_of(1, 4)).logits.requires_grad
    model.enable_input_require_grads()
    assert model(ids_of(1, 4)).logits.requires_grad


def test_trainer_trains_and_evaluates(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(folders["expert_choice"])
    row = tokenizer(TEXTS[0])
    # Older versions count the first label, which nothing predicts, in the mean.
    data: Any = [{**row, "labels": [-100, *row.input_ids[1:]]}] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    model = load(folders["expert_choice"])
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    ids = torch.tensor([data[0]["input_ids"]])
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    ours = causal(load_model(folders["expert_choice"]), ids, labels=labels).loss_sum
    assert before == pytest.approx(float(ours) / (ids.shape[1] - 1), rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    predicted: Any = trainer.predict(data).predictions
    assert predicted.shape == (8, ids.shape[1], 280)
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(causal(load_model(tmp_path / "out"), ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_measures_what_we_measure(folders: dict[str, Path], kind: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = folders[kind]
    core, tokenizer = load_model(folder), tokenizer_of(folder)
    lm = HFLM(pretrained=load(folder), tokenizer=tokenizer, batch_size=3, backend="causal")
    pairs = [(TEXTS[1][:19], TEXTS[1][19:]), ("the cat", " sees"), ("red", " river"), ("", "red")]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
        for index, pair in enumerate(pairs)
    ]
    for (context, ending), (likelihood, is_greedy) in zip(
        pairs, lm.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        whole = torch.tensor([tokenizer(context + ending).input_ids])
        count = whole.shape[1] - len(tokenizer(context).input_ids)
        shares = causal(core, whole[:, :-1]).logits[0, -count:].log_softmax(-1)
        target = whole[0, -count:]
        wanted = float(shares.gather(1, target[:, None]).sum())
        assert likelihood == pytest.approx(wanted, abs=1e-4)
        assert is_greedy == torch.equal(shares.argmax(-1), target)

    options = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    asked = [
        Instance(request_type="generate_until", doc={}, arguments=(text, options), idx=index)
        for index, text in enumerate(TEXTS)
    ]
    for text, made in zip(TEXTS, lm.generate_until(asked, disable_tqdm=True), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = load(folder).generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert made == tokenizer.decode(alone, skip_special_tokens=True)


def test_the_blocks_of_the_docs_run(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(tiny_run / "model", tmp_path / "runs" / "a" / "model")
    text = DOCS.read_text(encoding="utf-8")
    line = re.search(r"`(\{\"question.*?\})`", text)
    assert line is not None and json.loads(line[1])["answer"] == 0
    (tmp_path / "animals.jsonl").write_text(f"{line[1]}\n" * 3, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), scope)
    out = capsys.readouterr().out
    assert float(out.splitlines()[-1]) in (0.0, 1.0)
    before, after = (
        load_model(tmp_path / "runs" / "a" / name).state_dict() for name in ("model", "tuned")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
