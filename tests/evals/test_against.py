"""Promises of the comparison: the parent first, every fixed depth, the same items, one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.checkpoint import load_model, save_model
from mor.cli import main
from mor.config import ModelConfig
from mor.evals import against
from mor.evals.against import compare, folders_of
from mor.evals.depth import bound_depth
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("REQUESTS", 2), ("PROMPT_LEN", 8), ("NEW_TOKENS", 4), ("ROUNDS", 1)):
        monkeypatch.setattr(against, name, value)


@pytest.fixture
def parent(tmp_path: Path, tiny_run: Path, tiny_data: Path) -> Path:
    torch.manual_seed(3)
    config = load_model(tiny_run / "model").config.twin()
    save_model(MoR(config), tmp_path / "parent", tokenizer=Tokenizer.load(tiny_data))
    return tmp_path / "parent"


def test_rows_are_measured_alike(
    tiny_run: Path,
    tiny_data: Path,
    parent: Path,
    data_dir: Path,
    tmp_path: Path,
):
    out = tmp_path / "report.html"
    result = compare(
        tiny_run / "model",
        parent,
        beside={"another": tiny_run / "model"},
        data_folder=tiny_data,
        tasks=["piqa", "arc_easy"],
        data_dir=data_dir,
        out=out,
        limit=6,
        device="cpu",
        dtype="float32",
    )
    rows: list[dict[str, Any]] = result["rows"]
    names = [row["model"] for row in rows]
    depths = [f"every token at depth {d}" for d in (1, 2, 3)]
    assert names == ["parent", "as trained", *depths, "another"]
    assert rows[0]["retention"]["value"] == 1 and rows[0]["speedup"] == 1
    assert [row["timed_mean_depth"] for row in rows[2:5]] == pytest.approx([1, 2, 3])
    assert rows[0]["more_bits"] == 0
    assert [rows[i]["mean_depth"] for i in (2, 3, 4)] == pytest.approx([1, 2, 3])
    assert rows[1]["mean_depth"] == rows[5]["mean_depth"]
    assert rows[1]["bits_per_byte"] == rows[5]["bits_per_byte"]
    assert rows[1]["tasks"] == rows[5]["tasks"]
    flops = [row["flops_per_token"] for row in rows[2:5]]
    assert flops == sorted(flops) and rows[2]["kv_bytes_per_token"] < rows[4]["kv_bytes_per_token"]
    page = out.read_text()
    for said in ("Beside the parent", "every token at depth 2", "piqa, chance 0.50", "another"):
        assert said in page


def test_every_token_takes_the_depth_it_is_held_to(tiny_run: Path):
    model = load_model(tiny_run / "model")
    ids = torch.randint(280, (2, 20))
    for depth in (1, 2, 3):
        bound_depth(model, least=depth, most=depth)
        assert model(ids, rule="causal").depth.unique().tolist() == [depth]


def test_a_model_without_thresholds_has_no_fixed_depths(
    tiny_data: Path, parent: Path, tmp_path: Path
):
    config = ModelConfig.load(parent)
    torch.manual_seed(5)
    save_model(MoR(config), tmp_path / "plain", tokenizer=Tokenizer.load(tiny_data))
    result = compare(
        tmp_path / "plain",
        parent,
        beside={},
        data_folder=tiny_data,
        tasks=[],
        data_dir=None,
        out=None,
        limit_tokens=256,
        device="cpu",
        dtype="float32",
    )
    assert [row["model"] for row in result["rows"]] == ["parent", "as trained"]


def test_the_command_writes_a_report_and_names_mistakes(
    tiny_run: Path, tiny_data: Path, parent: Path, tmp_path: Path, capsys: Any
):
    command = ["eval", str(tiny_run / "model"), "--against", str(parent)]
    out = ["--out", str(tmp_path / "r.html")]
    data = ["--data", str(tiny_data), "--limit-tokens", "256"]
    assert main([*command, *data, *out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["report"].endswith("r.html")
    assert main(command) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert main([*command, *data, "--beside", "fixed"]) == 2
    assert "write LABEL=FOLDER" in capsys.readouterr().err
    assert main([*command, *data, "--context", "4096"]) == 2
    assert "context 4096 is longer than trained" in capsys.readouterr().err
    assert main([*command, *data, "--out", str(tmp_path / "none" / "r.html")]) == 2
    assert "none does not exist; make it" in capsys.readouterr().err
    assert main([*command, *data, "--also-top-k"]) == 2
    assert "--also-top-k does not go with --against" in capsys.readouterr().err
    assert main(["eval", str(tiny_run / "model"), *data, *out]) == 2
    assert "--out needs --against PARENT" in capsys.readouterr().err


def test_labels_may_hold_an_equals_sign_only_once():
    assert folders_of(["fixed depth=a/b=c"]) == {"fixed depth": Path("a/b=c")}
