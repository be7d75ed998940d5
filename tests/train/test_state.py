"""Promises of a run's checkpoints: rotated, whole, and a damaged one costs only its steps."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.config import ModelConfig
from mor.log import logger
from mor.model.mor import MoR
from mor.train import state
from mor.train.config import TrainConfig
from mor.train.optim import build_optimizer
from mor.train.state import Checkpoints


def model_and_optimizer(kind: Any = "adamw") -> tuple[MoR, torch.optim.Optimizer]:
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_recursions=2,
        router="expert_choice",
    )
    model = MoR(config)
    return model, build_optimizer(model, TrainConfig(budget_tokens=1, optimizer=kind))


def take_step(model: MoR, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(0, 32, (2, 8))
    out = model.train()(ids, labels=ids)
    (out.loss_sum + out.router_loss_sum).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Checkpoints, MoR, torch.optim.Optimizer]]:
    """Checkpoints of the steps 1, 2 and 3, of which two are kept."""
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        take_step(model, optimizer)
        checkpoints.save(model, optimizer, {"step": step, "seconds": 0.0})
    checkpoints.wait()
    yield checkpoints, model, optimizer
    checkpoints.close()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="mor")
    return caplog


def test_the_newest_are_kept(run: Any) -> None:
    checkpoints, _, _ = run
    assert checkpoints.steps() == [2, 3]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def test_weights_moments_and_random_state_come_back(run: Any) -> None:
    checkpoints, model, optimizer = run
    torch.set_rng_state(torch.get_rng_state())
    fresh, fresh_optimizer = model_and_optimizer()
    assert checkpoints.load_newest(fresh, fresh_optimizer) == {"step": 3, "seconds": 0.0}
    take_step(fresh, fresh_optimizer)
    checkpoints.load_newest(model, optimizer)
    take_step(model, optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_what_is_saved_is_the_state_of_that_moment(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps taken while the background writes do not reach the file."""
    checkpoints, model, optimizer = run
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoints.save(model, optimizer, {"step": 4, "seconds": 0.0})
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    checkpoints.wait()
    checkpoints.load_newest(model, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def foreign(path: Path) -> None:
    state.save_tensors({"a": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", foreign),
        ("model.safetensors", Path.unlink),
        ("optimizer.safetensors", cut),
        ("optimizer.safetensors", foreign),
        ("state.json", cut),
        ("state.json", lambda path: path.write_text("{}")),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    run: Any, said: pytest.LogCaptureFixture, name: str, damage: Any
) -> None:
    checkpoints, model, optimizer = run
    damage(checkpoints.folder / "step-00000003" / name)
    restored = checkpoints.load_newest(model, optimizer)
    assert restored is not None and restored["step"] == 2
    (line,) = [record.getMessage() for record in said.records]
    assert "step-00000003 is damaged" in line and "trying the one before" in line


def test_nothing_is_restored_from_a_checkpoint_that_is_half_good(run: Any) -> None:
    """Weights are not taken when the optimizer beside them is broken."""
    checkpoints, _, _ = run
    for step in (2, 3):
        cut(checkpoints.folder / f"step-0000000{step}" / "optimizer.safetensors")
    fresh, optimizer = model_and_optimizer()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged; train into"):
        checkpoints.load_newest(fresh, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("kinds", [("adamw", "muon"), ("muon", "adamw")])
def test_moments_of_another_optimizer_are_not_taken(tmp_path: Path, kinds: Any) -> None:
    model, optimizer = model_and_optimizer(kinds[0])
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    take_step(model, optimizer)
    checkpoints.save(model, optimizer, {"step": 1, "seconds": 0.0})
    checkpoints.close()
    with pytest.raises(ValueError, match="is damaged; train into"):
        checkpoints.load_newest(*model_and_optimizer(kinds[1]))
    restored = checkpoints.load_newest(*model_and_optimizer(kinds[0]))
    assert restored is not None and restored["step"] == 1


def test_a_run_without_checkpoints_starts_at_the_beginning(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert checkpoints.load_newest(*model_and_optimizer()) is None
    checkpoints.close()


@pytest.mark.parametrize("left", [".step-00000009.part-77", ".step-00000003.old-77"])
def test_what_a_kill_left_is_removed(run: Any, left: str) -> None:
    checkpoints, model, optimizer = run
    (checkpoints.folder / left).mkdir()
    (checkpoints.folder / left / "model.safetensors").write_bytes(b"half")
    checkpoints.load_newest(model, optimizer)
    assert checkpoints.steps() == [2, 3]
    assert not (checkpoints.folder / left).exists()


def test_a_write_that_fails_is_raised_and_the_ones_before_stay(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, model, optimizer = run

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(state, "save_tensors", full)
    checkpoints.save(model, optimizer, {"step": 4, "seconds": 0.0})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(model, optimizer, {"step": 5, "seconds": 0.0})
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
