"""Promises of uptraining: stages follow each other, a stopped one goes on, the parent is near."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.checkpoint import load_model, save_model
from mor.cli import main
from mor.config import ModelConfig
from mor.convert.config import ConvertConfig
from mor.convert.convert import convert
from mor.convert.llama import llama_config
from mor.data.config import PrepareConfig
from mor.data.loader import PreparedData
from mor.data.prepare import prepare
from mor.engine.engine import Engine
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer
from mor.train import trainer
from mor.train.metrics import read_metrics
from mor.uptrain import run as runs
from mor.uptrain.config import SelfConfig, UptrainConfig, load_uptrain_recipe
from mor.uptrain.run import uptrain
from mor.uptrain.self_text import write_self_text

ROOT = Path(__file__).parent.parent.parent
RECIPE = """
[convert]
num_recursions = 3
lora_rank = 2
[train]
context = 32
batch_tokens = 128
dtype = "float32"
eval_tokens = 256
lr = 3e-3
[distill]
label_weight = 0.2
teacher_weight = 0.8
state_weight = 0.1
[self]
tokens = 3000
text_tokens = 24
[[stages]]
name = "block"
train = { budget_tokens = 1024 }
[[stages]]
name = "router"
model = { capacity = [1.0, 0.7, 0.4], capacity_warmup_steps = 4 }
train = { budget_tokens = 1024, lr = 1e-3 }
[[stages]]
name = "polish"
model = { capacity = [1.0, 0.7, 0.4] }
train = { budget_tokens = 512, lr = 1e-4 }
distill = { label_weight = 1.0, teacher_weight = 0.0 }
"""
PARENT = ModelConfig(
    vocab_size=280,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=0,
    sharing="cycle",
)


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "measure_peak_flops", lambda *args, **kwargs: 1e12)


@pytest.fixture
def parent(tmp_path: Path, tiny_data: Path) -> Path:
    torch.manual_seed(3)
    folder = tmp_path / "parent"
    save_model(MoR(PARENT), folder, tokenizer=Tokenizer.load(tiny_data))
    (folder / "config.json").write_text(json.dumps(llama_config(PARENT)))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def go(parent: Path, recipe: Path, tmp_path: Path, data: Path | str, **more: Any) -> dict[str, Any]:
    config = UptrainConfig(recipe=recipe, out=tmp_path / "up", data=str(data), device="cpu", **more)
    return uptrain(str(parent), config)


def test_a_parent_becomes_a_mor_in_stages(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path
):
    result = go(parent, recipe, tmp_path, tiny_data)
    assert [stage["stage"] for stage in result["stages"]] == ["block", "router", "polish"]
    assert result["stages"][0]["mean_depth"] == pytest.approx(3)
    model = load_model(tmp_path / "up" / "model")
    assert model.config.capacity == (1.0, 0.7, 0.4) and model.config.gating == "residual"
    assert model.config.capacity_warmup_steps == 0 and model.config.lora_rank == 2
    assert (tmp_path / "up" / "model" / "chat_template.jinja").is_file()
    assert result["lost"] == result["bits_per_byte"] / result["parent_bits_per_byte"] - 1
    assert json.loads((tmp_path / "up" / "uptrain.json").read_text())["stages"]
    before = (tmp_path / "up" / "model" / "model.safetensors").read_bytes()
    assert go(parent, recipe, tmp_path, tiny_data)["bits_per_byte"] == result["bits_per_byte"]
    assert (tmp_path / "up" / "model" / "model.safetensors").read_bytes() == before


def test_stages_run_one_by_one(parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="run the stages before router first"):
        go(parent, recipe, tmp_path, tiny_data, stages=("router",))
    go(parent, recipe, tmp_path, tiny_data, stages=("block",))
    assert not (tmp_path / "up" / "model").exists()
    result = go(parent, recipe, tmp_path, tiny_data, stages=("router",))
    assert [stage["stage"] for stage in result["stages"]] == ["block", "router"]
    assert result["bits_per_byte"] == result["stages"][1]["bits_per_byte"]
    assert "model" not in result
    with pytest.raises(ValueError, match=r"'rooter' is not in .*; it has block, router, polish"):
        go(parent, recipe, tmp_path, tiny_data, stages=("rooter",))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num_recursions = 3", "num_recursions = 3\nseed = 5", "start is .*was begun with"),
        ("[1.0, 0.7, 0.4]", "[1.0, 0.7, 0.5]", r"model.capacity is \[1.0, 0.7, 0.5\], the run in"),
        ("state_weight = 0.1", "state_weight = 0.2", "other weights or another parent"),
    ],
)
def test_a_recipe_that_changed_meets_no_results_of_the_old(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path, old: str, new: str, said: str
):
    go(parent, recipe, tmp_path, tiny_data, stages=("block", "router"))
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=said):
        go(parent, recipe, tmp_path, tiny_data, stages=("block", "router"))


def test_another_parent_or_text_needs_another_folder(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path
):
    go(parent, recipe, tmp_path, tiny_data, stages=("block",))
    with pytest.raises(ValueError, match=r"data is .*self.*, .* was begun with"):
        go(parent, recipe, tmp_path, "self", stages=("block",))
    with pytest.raises(ValueError, match=r"parent is .*elsewhere, .* was begun with"):
        go(tmp_path / "elsewhere", recipe, tmp_path, tiny_data, stages=("block",))
    with pytest.raises(ValueError, match=r"train.budget_tokens is 256, the run in .* began with"):
        go(parent, recipe, tmp_path, tiny_data, stages=("block",), max_tokens=256)


def test_a_mistake_that_made_nothing_is_not_held_against_the_next_try(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match="elsewhere"):
        go(tmp_path / "elsewhere", recipe, tmp_path, tiny_data, stages=("block",))
    recipe.write_text(RECIPE.replace("num_recursions = 3", "num_recursions = 4"))
    with pytest.raises(ValueError, match="4"):
        go(parent, recipe, tmp_path, tiny_data, stages=("block",))
    recipe.write_text(RECIPE)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        go(parent, recipe, tmp_path, tmp_path / "nowhere", stages=("block",))
    assert go(parent, recipe, tmp_path, tiny_data, stages=("block",))["stages"]


def test_a_stage_that_was_stopped_goes_on(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = trainer.train_step

    def stop(*args: Any, **kwargs: Any) -> Any:
        if args[3] == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        go(parent, recipe, tmp_path, tiny_data, stages=("block",))
    monkeypatch.setattr(trainer, "train_step", step)
    seen: list[bool] = []
    whole = runs.train

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["resume"])
        return whole(*args, **kwargs)

    monkeypatch.setattr(runs, "train", watch)
    go(parent, recipe, tmp_path, tiny_data, stages=("block",))
    assert seen == [True]


def test_the_parent_writes_its_own_text(parent: Path, recipe: Path, tmp_path: Path):
    result = go(parent, recipe, tmp_path, "self", stages=("block",), max_tokens=256)
    data = PreparedData.open(tmp_path / "up" / "data")
    tokens = sum(data.split(split).tokens for split in ("train", "val", "heldout"))
    assert 0.5 * 3000 < tokens < 3 * 3000
    assert result["stages"][0]["tokens"] == 256


def test_the_command_prints_one_object(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path, capsys
):
    out = tmp_path / "up"
    command = ["uptrain", str(parent), "--recipe", str(recipe), "--out", str(out)]
    assert main([*command, "--data", str(tiny_data), "--stages", "block", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["stages"][0]["stage"] == "block"


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/uptrain-*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_open_with_their_purpose(path: Path):
    assert load_uptrain_recipe(path).stages
    assert path.read_text(encoding="utf-8").startswith("# ")


FITTED = """
[convert]
num_recursions = 2
sharing = "none"
prelude_layers = 2
coda_layers = 2
gating = "none"
exit_maps = true
[train]
context = 32
batch_tokens = 128
dtype = "float32"
eval_tokens = 256
freeze = "prelude"
eval_every = 2
checkpoint_every = 2
[distill]
label_weight = 0.0
teacher_weight = 1.0
top_k = 8
[[stages]]
name = "route"
model = { capacity = [1.0, 0.5] }
train = { budget_tokens = 768, fit_tokens = 256 }
"""


def test_fitted_exits_heal_and_a_stopped_run_of_frozen_layers_goes_on(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe.write_text(FITTED)
    step = trainer.train_step

    def stop(*args: Any, **kwargs: Any) -> Any:
        if args[3] == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        go(parent, recipe, tmp_path, tiny_data)
    monkeypatch.setattr(trainer, "train_step", step)
    result = go(parent, recipe, tmp_path, tiny_data)
    assert result["stages"][0]["steps"] == 6
    assert result["mean_depth"] == pytest.approx(1.5, abs=0.2)
    held = [
        line
        for line in read_metrics(tmp_path / "up" / "route" / "metrics.jsonl")
        if "heldout_loss" in line
    ]
    assert [line["step"] for line in held] == [2, 4]
    for line in held:  # measured as it will serve, not with everyone at full depth
        assert line["heldout_active"][1] == pytest.approx(0.5, abs=0.05)


def test_layers_that_are_left_out_are_the_parents_still(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path
):
    text = FITTED.replace("exit_maps = true", "exit_maps = true\ndrop_layers = [3, 4]")
    recipe.write_text(text)
    go(parent, recipe, tmp_path, tiny_data)
    assert ModelConfig.load(tmp_path / "up" / "parent").num_hidden_layers == 8
    assert ModelConfig.load(tmp_path / "up" / "model").num_hidden_layers == 6


def test_text_that_was_stopped_goes_on_behind_whole_batches(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(str(parent), tmp_path / "plain", ConvertConfig(num_recursions=1))
    settings = SelfConfig(tokens=1500, text_tokens=16)
    write_self_text(tmp_path / "plain", tmp_path / "whole" / "data", settings, device="cpu")
    out, generate = tmp_path / "cut" / "data", Engine.generate
    calls: list[int] = []

    def stop(self: Engine, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        write_self_text(tmp_path / "plain", out, settings, device="cpu")
    (part,) = (tmp_path / "cut").iterdir()
    with part.open("a") as file:
        file.write('{"text": "half a li')
    write_self_text(tmp_path / "plain", out, settings, device="cpu")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["data"]
    for split in ("train", "val"):
        whole = PreparedData.open(tmp_path / "whole" / "data").split(split)
        assert whole.tokens == PreparedData.open(out).split(split).tokens


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[convert]", "[convrt]", "table 'convrt' is unknown; did you mean convert"),
        ("num_recursions = 3", "num_recursion = 3", "'num_recursion'.*did you mean num_recursions"),
        ("num_recursions = 3", "gating = 'weighted'", "gating is weighted"),
        ("tokens = 3000", "tokens = 0", "tokens is 0; give 1 or more"),
        ('name = "router"', 'name = "block"', "'block' stands twice"),
        ('name = "router"', 'name = "parent"', "parent is the name of another folder"),
        ("capacity_warmup_steps = 4", "num_recursions = 2", "num_recursions is decided by"),
        ("state_weight = 0.1", "state_weight = -1", "state_weight is -1"),
        ("lr = 3e-3", "lr = 'x'", "lr is 'x'"),
        ("lora_rank = 2", "lora_rank = 2.5", "lora_rank is 2.5; give a value of int"),
        ("lora_rank = 2", "tokenizer = 5", "tokenizer is 5; give a value of"),
        ("capacity_warmup_steps = 4", "lora_alpha = 4", "lora_alpha is decided by"),
        ("distill = { label_weight = 1.0, teacher_weight = 0.0 }", "distill = 3", "write a table"),
        ("budget_tokens = 512, ", "", "budget_tokens is 0 and budget_flops is 0"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, said: str):
    assert old in RECIPE
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(ValueError, match=said):
        load_uptrain_recipe(path)


def test_text_of_another_tokenizer_is_refused(
    parent: Path, recipe: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    """Its ids would be trained on as if they were the parent's, and its tokenizer published."""
    other = tmp_path_factory.mktemp("other") / "data"
    prepare(PrepareConfig(corpus="stdlib", limit_bytes=60_000, out=other, vocab_size=270))
    with pytest.raises(ValueError, match="prepared with another tokenizer than"):
        go(parent, recipe, tmp_path, other)
    assert not (tmp_path / "up" / "block").exists()


def test_a_try_of_few_tokens_reaches_its_capacities(
    parent: Path, recipe: Path, tmp_path: Path, tiny_data: Path
):
    go(parent, recipe, tmp_path, tiny_data, max_tokens=256)
    run = json.loads((tmp_path / "up" / "router" / "run.json").read_text())
    assert run["model"]["capacity_warmup_steps"] == 2
    assert not (tmp_path / "up" / "router" / "checkpoints").exists()


def test_routing_that_does_not_fit_names_its_stage(
    parent: Path, recipe: Path, tiny_data: Path, tmp_path: Path
):
    recipe.write_text(RECIPE.replace("[1.0, 0.7, 0.4]", "[1.0, 0.7]"))
    with pytest.raises(ValueError, match="stage router: capacity has 2 values"):
        go(parent, recipe, tmp_path, tiny_data)
    assert not (tmp_path / "up" / "block").exists()  # before any training
    recipe.write_text(RECIPE.replace("warmup_steps = 4", "warmup_steps = 9"))
    with pytest.raises(ValueError, match="warmup_steps is 9, the training has 8 steps for it"):
        go(parent, recipe, tmp_path, tiny_data)
    fixed = RECIPE.replace("lora_rank = 2", 'lora_rank = 2\nrouter = "fixed"', 1)
    routed = 'model = { router = "expert_choice", capacity = [1.0, 0.7, 0.4], '
    recipe.write_text(fixed.replace("model = { capacity = [1.0, 0.7, 0.4], ", routed))
    with pytest.raises(ValueError, match="expert_choice has other weights than fixed"):
        go(parent, recipe, tmp_path / "fixed", tiny_data)
    recipe.write_text(RECIPE.replace("lr = 1e-3", "fit_tokens = 64"))
    with pytest.raises(ValueError, match="stage router: fit_tokens needs exit_maps"):
        go(parent, recipe, tmp_path, tiny_data)
