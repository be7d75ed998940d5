"""Promises of the recipes `paper-*`: they are the models, budgets and settings that were published.

The numbers here are those of arXiv 2507.10524 and its public code, not of our own arithmetic.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import make_paper
import pytest
import torch

from mor.cli import main
from mor.config import ModelConfig
from mor.model.cost import count_params, sequence_flops
from mor.model.mor import MoR, assert_sharing
from mor.train.config import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes"
NAMES = [f"{size}-{variant}" for size in make_paper.SIZES for variant in make_paper.VARIANTS]
LAYERS = {
    # base, and the layers at 2, 3 and 4 recursions
    "135m": (30, 30, 32, 30),
    "360m": (32, 32, 32, 34),
    "730m": (26, 26, 26, 26),
    "1.7b": (24, 24, 26, 26),
}


def path_of(name: str) -> Path:
    return FOLDER / f"paper-{name}.toml"


def load(name: str) -> Recipe:
    return load_recipe(path_of(name))


def header_of(name: str) -> str:
    text = path_of(name).read_text(encoding="utf-8")
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("# "))


def test_the_files_are_what_the_script_writes() -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("paper-*.toml")}
    assert len(on_disk) == 28
    assert on_disk == make_paper.all_recipes()


@pytest.mark.parametrize("size", list(LAYERS))
def test_layers_are_the_fewest_that_divide(size: str) -> None:
    base, *at = LAYERS[size]
    assert load(f"{size}-vanilla").model.num_hidden_layers == base
    assert load(f"{size}-vanilla").model.num_recursions == 1
    for recursions, layers in zip((2, 3, 4), at, strict=True):
        for kind, router in (("rec", "fixed"), ("mor", "expert_choice")):
            model = load(f"{size}-{kind}{recursions}").model
            assert (model.num_recursions, model.num_hidden_layers) == (recursions, layers)
            assert (model.router, model.sharing) == (router, "middle_cycle")
            assert model.twin().num_hidden_layers == layers


@pytest.mark.parametrize(
    ("name", "millions", "rounding"),
    [
        ("135m-vanilla", 106, 0.5),
        ("360m-vanilla", 315, 0.5),
        ("360m-rec2", 167, 0.5),
        ("360m-rec3", 118, 0.5),
        ("360m-rec4", 98, 0.5),
        ("360m-mor2", 167, 0.5),
        ("360m-mor3", 118, 0.5),
        ("360m-mor4", 98, 0.5),
        ("730m-vanilla", 654, 0.5),
        ("1.7b-vanilla", 1610, 5),
        ("1.7b-mor2", 870, 5),
        ("1.7b-mor3", 670, 5),
    ],
)
def test_parameters_are_those_of_the_paper(name: str, millions: float, rounding: float) -> None:
    params = count_params(load(name).model)
    assert params.nonembedding / 1e6 == pytest.approx(millions, abs=rounding)
    embedding = {"135m": 28, "360m": 47, "730m": 75, "1.7b": 101}[name.split("-")[0]]
    assert (params.unique - params.nonembedding) / 1e6 == pytest.approx(embedding, abs=0.51)
    assert "in the paper)" in header_of(name)


def test_a_header_says_which_parameters_the_paper_prints() -> None:
    printed = [name for name in NAMES if "computed, not in the paper" not in header_of(name)]
    assert printed == [name for name in NAMES if name in make_paper.STATED_PARAMS]
    assert len(printed) == 12


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("135m-mor3", 36326),
        ("360m-vanilla", 9438),
        ("360m-rec2", 9438),
        ("360m-rec3", 9438),
        ("360m-rec4", 8883),
        ("360m-mor2", 12619),
        ("360m-mor3", 14161),
        ("360m-mor4", 14216),
    ],
)
def test_steps_are_those_of_the_paper(name: str, steps: int) -> None:
    assert steps_of(name) == pytest.approx(steps, abs=1)


def steps_of(name: str) -> int:
    recipe = load(name)
    return recipe.train.num_steps(recipe.model)


@pytest.mark.parametrize(("name", "steps"), [("360m-vanilla", 57), ("360m-mor3", 86)])
def test_warm_up_is_that_of_the_public_code(name: str, steps: int) -> None:
    train = load(name).train
    assert round(train.warmup_share * steps_of(name)) == steps


@pytest.mark.parametrize(
    ("name", "flops"),
    [("vanilla", 16.8), ("rec4", 16.7), ("mor2", 17.4), ("mor3", 17.7), ("mor4", 17.7)],
)
def test_the_budget_counted_honestly_is_larger(name: str, flops: float) -> None:
    """The paper leaves out head and routers and widens grouped keys: the sum leans to MoR."""
    recipe = load(f"360m-{name}")
    run = recipe.train.budget_tokens * sequence_flops(recipe.model, 2048) / 2048
    assert run / 1e18 == pytest.approx(flops, abs=0.05)
    assert f"{flops}e18 with grouped heads" in header_of(f"360m-{name}")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_the_model_that_it_counts(name: str) -> None:
    recipe = load(name)
    with torch.device("meta"):
        model = MoR(recipe.model)
    params = count_params(recipe.model)
    assert sum(param.numel() for param in model.parameters()) == params.unique
    assert f"{params.unique / 1e6:.1f}M stored" in header_of(name)
    assert len(model.model.routers) == (recipe.model.num_recursions if "mor" in name else 0)
    train = recipe.train
    assert (train.batch_rows, train.micro_batch_rows, train.context) == (1024, 16, 2048)


def test_sharing_is_asserted_without_memory_too() -> None:
    with torch.device("meta"):
        model = MoR(load("360m-mor3").model)
    assert_sharing(model)
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(AssertionError):
        assert_sharing(model)


def test_plan_tells_what_the_papers_run_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path_of("360m-mor3")), "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 14160 and plan["tokens"] == pytest.approx(29.7e9, rel=1e-3)
    assert plan["twin_params_nonembedding"] == count_params(load("360m-vanilla").model).nonembedding
    assert 40e9 < plan["train_peak_bytes"] < plan["twin_train_peak_bytes"]
    assert main(["plan", str(path_of("360m-mor3"))]) == 0
    assert "53.09 EFLOPs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("recursions", "layers"), [(4, 34), (7, 37)])
def test_recursions_that_do_not_fit_are_refused_with_a_number_that_does(
    recursions: int, layers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.num-recursions", str(recursions)]
    assert main(["plan", str(path_of("360m-mor3")), *flags]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == "" and line.startswith("mor: num_hidden_layers 32 does not fit")
    assert line.endswith(f"use {layers}")
    flags += ["--model.num-hidden-layers", str(layers)]
    assert main(["plan", str(path_of("360m-mor3")), *flags]) == 0


@pytest.mark.slow
def test_a_360m_model_takes_a_training_step(tiny_data: Path, tmp_path: Path) -> None:
    """About 5 GB of memory: weights, gradients, moments, and their copy for the checkpoint."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 49152}))
    flags = (
        "--train.budget-tokens 512 --train.batch-tokens 512 --train.micro-batch-tokens 256 "
        "--train.context 256 --train.eval-tokens 512 --train.dtype float32 --train.device cpu"
    )
    try:
        args = ["train", str(path_of("360m-mor3")), "--data", str(data), "--out", str(out)]
        assert main([*args, *flags.split()]) == 0
        summary = json.loads((out / "summary.json").read_text())
        (line,) = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
        assert ModelConfig.load(out / "model").vocab_size == 49152
    finally:
        shutil.rmtree(out, ignore_errors=True)
    assert (summary["steps"], summary["tokens"]) == (1, 512)
    assert line["loss"] == pytest.approx(math.log(49152), abs=0.5)  # of fresh weights
    assert line["active_share"] == pytest.approx([1, 170 / 256, 85 / 256])
    assert summary["val_loss"] < line["loss"]


@pytest.mark.slow
@torch.no_grad()
def test_a_1_7b_model_runs_forward() -> None:
    """About 4 GB of memory."""
    model = MoR(load("1.7b-mor3").model).eval()
    ids = torch.randint(0, 49152, (1, 48))
    out = model(ids, labels=ids.roll(-1, 1), rule="train")
    assert float(out.loss_sum) / 48 == pytest.approx(math.log(49152), abs=1)
    assert [stats.num_active for stats in out.recursions] == [48, 32, 16]
    assert out.depth.sum() == 48 + 32 + 16
    causal = model(ids)
    assert causal.logits.shape == (1, 48, 49152) and causal.logits.isfinite().all()
