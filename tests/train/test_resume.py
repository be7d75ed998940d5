"""Promises of a run that stops: it goes on bit for bit, after Ctrl-C and after kill -9 too."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mor.data.loader import PreparedData
from mor.files import sha256_file
from mor.train import trainer
from mor.train.config import Recipe, load_recipe
from mor.train.metrics import read_metrics
from mor.train.trainer import Interrupted, train

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals")
REPEATABLE = ("loss", "router_loss", "grad_norm", "lr", "heldout_loss", "active_share")


def bits_of(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The weights' hash, and the figures of metrics.jsonl that do not depend on the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    kept = [{k: v for k, v in line.items() if k in (*REPEATABLE, "step")} for line in lines]
    return sha256_file(run / "model" / "model.safetensors"), kept


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C while the given step (counted from 1) runs."""
    rate = trainer.learning_rate

    def pressing(at: int, *args: Any) -> float:
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(at, *args)

    monkeypatch.setattr(trainer, "learning_rate", pressing)


def with_model(recipe: Recipe, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **fields))


@needs_signals
def test_a_stop_in_the_last_step_is_heard(
    tiny_data: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the last evaluation, and whatever a command does behind a training, would begin."""
    recipe, data = load_recipe(tiny_recipe), PreparedData.open(tiny_data)
    steps = recipe.train.num_steps(recipe.model)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Interrupted, match=f"stopped after step {steps} of {steps}"):
            train(recipe, data=data, out=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    summary = train(recipe, data=data, out=tmp_path / "run", resume=True)
    assert summary.steps == steps and summary.peak_bytes > 0


@needs_signals
def test_a_second_stop_amid_an_evaluation_loses_no_step(
    tiny_data: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, data = load_recipe(tiny_recipe), PreparedData.open(tiny_data)
    settings = dataclasses.replace(recipe.train, eval_every=3, checkpoint_every=100)
    recipe = dataclasses.replace(recipe, train=settings)

    def pressed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "measure_loss", pressed)
        with pytest.raises(Interrupted, match="stopped after step 3"):
            train(recipe, data=data, out=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {}),
        ({"router_aux": "router", "capacity_warmup_steps": 9}, {}),
        ({"router": "threshold", "capacity_warmup_steps": 9}, {}),
        ({"router": "threshold", "capacity_warmup_steps": 3}, {"shallow_share": 0.75}),
        ({"router": "random"}, {}),
        ({"router": "fixed"}, {"shallow_share": 0.75}),
        (
            {"router_aux": "router"},
            {"optimizer": "muon", "shallow_share": 0.5, "repeat_share": 0.75},
        ),
    ],
    ids=["expert_choice", "aux_router", "threshold", "shallow", "random", "fixed", "muon"],
)
def test_a_resumed_run_repeats_the_bits_of_one_that_never_stopped(
    tiny_data: Path,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    recipe = load_recipe(tiny_recipe)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **settings))
    if fields:
        recipe = with_model(recipe, **{"gating": "auto", "capacity": (), **fields})
    data = PreparedData.open(tiny_data)
    train(recipe, data=data, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted, match="after step 7 of 12; add --resume"):
            train(recipe, data=data, out=tmp_path / "cut")
    assert (tmp_path / "cut/checkpoints/step-00000007").is_dir()
    train(recipe, data=data, out=tmp_path / "cut", resume=True)
    assert bits_of(tmp_path / "cut") == bits_of(tmp_path / "whole")


def test_metrics_of_lost_steps_are_cut_when_a_run_resumes(
    tiny_data: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault at step 7 leaves lines up to 6, the last checkpoint is of step 4."""
    recipe, data = load_recipe(tiny_recipe), PreparedData.open(tiny_data)
    rate = trainer.learning_rate

    def failing(at: int, *args: Any) -> float:
        if at + 1 == 7:
            raise RuntimeError("the power went off")
        return rate(at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", failing)
        with pytest.raises(RuntimeError, match="power"):
            train(recipe, data=data, out=tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a line that a kill cut
    train(recipe, data=data, out=tmp_path / "run", resume=True)
    steps = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == sorted(steps)
    assert sorted(set(steps)) == list(range(1, 13))
    assert len(steps) == 12 + 2  # one line a step, and two of held-out text


def test_resuming_a_finished_run_leaves_its_model_as_it_is(
    tiny_data: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe, data = load_recipe(tiny_recipe), PreparedData.open(tiny_data)
    first = train(recipe, data=data, out=tmp_path / "run")
    before = bits_of(tmp_path / "run")
    again = train(recipe, data=data, out=tmp_path / "run", resume=True)
    assert bits_of(tmp_path / "run") == before
    assert again.val_loss == first.val_loss


DRIVER = """
import sys
import mor.train.state, mor.train.trainer
from mor.cli import main

def hold():
    print("here", flush=True)
    sys.stdin.readline()

if sys.argv[1] == "write":  # hold in the middle of the second checkpoint
    save = mor.train.state.save_tensors
    def slow(tensors, path):
        save(tensors, path)
        if "step-00000008" in str(path):
            path.write_bytes(path.read_bytes()[:100])
            hold()
    mor.train.state.save_tensors = slow
if sys.argv[1] == "step":
    rate = mor.train.trainer.learning_rate
    def waiting(step, *args):
        if step == 5:
            hold()
        return rate(step, *args)
    mor.train.trainer.learning_rate = waiting
codes = [main(["train", *command.split("|")]) for command in sys.argv[2:]]
sys.exit(max(codes))
"""


def start(hold: str, *commands: tuple[object, ...]) -> subprocess.Popen[str]:
    """Start `mor train` in a process of its own; it says "here" and waits at the named place."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, hold, *("|".join(map(str, c)) for c in commands)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class Stopped(NamedTuple):
    """A run that was stopped, and has gone on since."""

    code: int
    errors: str
    files: list[str]
    """what it had left when it stopped"""
    run: Path


@pytest.fixture(scope="module")
def runs(
    tiny_data: Path, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Stopped]:
    """Stop real runs by kill -9, Ctrl-C and SIGTERM; resume them; train a whole one."""
    folder = tmp_path_factory.mktemp("process")

    def command(name: str) -> tuple[object, ...]:
        return (tiny_recipe, "--data", tiny_data, "--out", folder / name)

    stopped = {}
    for name, place, stop in (
        ("killed", "write", signal.SIGKILL),
        ("interrupted", "step", signal.SIGINT),
        ("terminated", "step", signal.SIGTERM),
    ):
        process = start(place, command(name))
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(stop)
        _, errors = process.communicate("\n", timeout=60)
        run = folder / name
        files = [path.relative_to(run).as_posix() for path in run.rglob("*")]
        stopped[name] = Stopped(process.returncode, errors, files, run)
    process = start(
        "nowhere", command("whole"), *((*command(name), "--resume") for name in stopped)
    )
    _, errors = process.communicate(timeout=120)
    whole = Stopped(process.returncode, errors, [], folder / "whole")
    return {"whole": whole, **stopped}


of_stopped_runs = pytest.mark.xdist_group("stopped runs")  # made once, not by each process


@of_stopped_runs
@needs_signals
def test_kill_in_the_middle_of_a_checkpoint_costs_nothing_but_steps(
    runs: dict[str, Stopped],
) -> None:
    killed = runs["killed"]
    assert killed.code == -signal.SIGKILL
    left = [name for name in killed.files if name.count("/") == 1]
    assert "checkpoints/step-00000004" in left
    assert [name for name in left if ".step-00000008.part-" in name]
    assert "checkpoints/step-00000008" not in left
    assert runs["whole"].code == 0, runs["whole"].errors
    assert bits_of(killed.run) == bits_of(runs["whole"].run)
    assert not list(killed.run.rglob(".*")), "half-written files are still there"


@of_stopped_runs
@needs_signals
@pytest.mark.parametrize("how", ["interrupted", "terminated"])
def test_a_stop_writes_a_checkpoint_and_says_how_to_go_on(
    runs: dict[str, Stopped], how: str
) -> None:
    interrupted = runs[how]
    assert interrupted.code == 130
    said = [line for line in interrupted.errors.splitlines() if line.startswith("mor:")]
    assert said == ["mor: stopped after step 6 of 12; add --resume to go on"]
    assert "Traceback" not in interrupted.errors
    assert "checkpoints/step-00000006" in interrupted.files
    assert "model" not in interrupted.files
    assert runs["whole"].code == 0, runs["whole"].errors
    assert bits_of(interrupted.run) == bits_of(runs["whole"].run)
