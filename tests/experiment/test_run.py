"""Promises of a run: nothing is trained twice, one failure stops nobody, the report says it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support_experiment import EXPERIMENT

from mor.cli import main
from mor.data.loader import PreparedData
from mor.experiment import run as runs
from mor.experiment.child import MemberFailed, run_mor
from mor.experiment.config import ExperimentConfig
from mor.experiment.results import read_results
from mor.experiment.run import curve, list_members, run_experiment
from mor.files import locked, only_one
from mor.train.config import load_recipe
from mor.train.trainer import train

Started = list[list[str]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Run members in this process; returns the commands that were started."""
    commands: Started = []

    def run_here(args: Sequence[str]) -> str:
        commands.append(list(args))
        if args[0] == "bench":
            return 'a line\n{"speedup": 2.0}\n'
        recipe = load_recipe(Path(args[1]))
        train(
            recipe,
            data=PreparedData.open(Path(args[args.index("--data") + 1])),
            out=Path(args[args.index("--out") + 1]),
            resume="--resume" in args,
        )
        return ""

    monkeypatch.setattr(runs, "run_mor", run_here)
    return commands


@pytest.fixture
def go(experiment: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(**more: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"data": tiny_data, "out": tmp_path / "out", **more}
        return run_experiment(experiment, ExperimentConfig(**settings))

    return run


def test_an_experiment_runs_whole_once(
    started: Started, go: Callable[..., dict[str, Any]], tmp_path: Path
):
    first = go()
    assert first["failed"] == {} and first["failure"] is None
    results = read_results(tmp_path / "out" / "results.jsonl")
    names = [one["member"] for one in results]
    # 4 sweeps of 2, 4 models x 2 seeds, 4 and 2 and 2 of the other budgets, the pace, the benchmark
    assert len(names) == len(set(names)) == 8 + 8 + 4 + 2 + 2 + 1 + 1
    by_name = {one["member"]: one for one in results}
    assert by_name["decode"]["report"] == {"speedup": 2.0}
    mor = by_name["same-flops_mor3_s0"]
    assert len(mor["row_loss"]) == 16 and mor["val_tokens"] == 512
    assert sum(mor["row_loss"]) / 16 == pytest.approx(mor["val_loss"], abs=1e-4)
    assert len(mor["loss_up_to_depth"]) == 3
    assert mor["loss_up_to_depth"][2] == pytest.approx(mor["val_loss"])
    assert "top_k_loss" in mor and "top_k_loss" not in by_name["same-flops_twin_s0"]
    assert mor["recipe"]["model"]["router_seed"] == 0
    assert by_name["same-flops_random3_s1"]["recipe"]["model"]["router_seed"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    for said in ("same-flops", "Test-time depth", "Which tokens go deep", "Rates", "MoR-3"):
        assert said in page
    count = len(started)
    again = go()
    assert len(started) == count and again["run"] == 0 and again["kept"] == len(names) - 1


def test_equal_members_of_two_budgets_are_trained_once(
    started: Started, tiny_data: Path, tmp_path: Path
):
    path = tmp_path / "exp.toml"
    text = EXPERIMENT.replace("same_flops = 4e8", "same_tokens = 768")
    path.write_text(text.partition("[[bench]]")[0])
    config = ExperimentConfig(
        data=tiny_data, out=tmp_path / "out", only=("same-flops_twin_s0", "same-tokens_twin_s0")
    )
    run_experiment(path, config)
    assert len(started) == 3  # two rates, one training
    results = {one["member"]: one for one in read_results(tmp_path / "out" / "results.jsonl")}
    assert results["same-tokens_twin_s0"]["same_as"] == "same-flops_twin_s0"
    assert results["same-tokens_twin_s0"]["val_loss"] == results["same-flops_twin_s0"]["val_loss"]


def test_a_failing_member_is_reported_and_the_others_go_on(
    started: Started,
    go: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    some = ("same-flops_twin", "same-flops_rec3")
    run_here = runs.run_mor

    def fail_once(args: Sequence[str]) -> str:
        if "same-flops_rec3_s0" in args[1]:
            raise MemberFailed("exit code 1: the disk is full")
        return run_here(args)

    monkeypatch.setattr(runs, "run_mor", fail_once)
    result = go(only=some)
    assert result["failed"] == {"same-flops_rec3_s0": "exit code 1: the disk is full"}
    assert result["failure"] == (
        "1 members failed, the first is same-flops_rec3_s0: exit code 1: the disk is full"
    )
    assert result["run"] == 4 + 3
    assert "the disk is full" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr(runs, "run_mor", run_here)
    again = go(only=some)
    assert again["failed"] == {} and again["run"] == 1


def test_a_failure_takes_no_finished_results_place(
    started: Started,
    go: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """All rates of a sweep fail where only the final was kept: it stays as it was."""
    go(only=("same-flops_twin_s0",))
    file = tmp_path / "out" / "results.jsonl"
    final = next(one for one in read_results(file) if one["member"] == "same-flops_twin_s0")
    file.write_text(json.dumps(final, sort_keys=True) + "\n")

    def fail(args: Sequence[str]) -> str:
        raise MemberFailed("exit code 1: the disk is full")

    monkeypatch.setattr(runs, "run_mor", fail)
    result = go(only=("same-flops_twin",))
    assert list(result["failed"]) == ["sweep_twin_lr0.002", "same-flops_twin_s1"]
    assert (
        result["failed"]["same-flops_twin_s1"] == "its sweep is not whole; the same command goes on"
    )
    kept = {one["member"]: one for one in read_results(file)}
    assert kept["same-flops_twin_s0"] == final


def test_a_rate_that_diverged_is_out_and_one_that_was_killed_is_tried_again(
    started: Started, go: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    run_here, why = runs.run_mor, "exit code 2: step 1: loss is nan; " + runs.DIVERGED

    def fail(args: Sequence[str]) -> str:
        if "lr0.004" in args[1]:
            raise MemberFailed(why)
        return run_here(args)

    monkeypatch.setattr(runs, "run_mor", fail)
    result = go(only=("same-flops_twin_s0",))
    assert list(result["failed"]) == ["sweep_twin_lr0.004"] and result["run"] == 2
    why = "exit code -9: it said nothing"
    result = go(only=("same-flops_mor3_s0",))
    assert list(result["failed"]) == ["sweep_mor3_lr0.004", "same-flops_mor3_s0"]
    monkeypatch.setattr(runs, "run_mor", run_here)
    assert go(only=("same-flops_mor3_s0",))["run"] == 2


def test_a_sweep_whose_rates_all_diverged_says_so(
    started: Started, go: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    def fail(args: Sequence[str]) -> str:
        raise MemberFailed("exit code 2: step 1: loss is nan; " + runs.DIVERGED)

    monkeypatch.setattr(runs, "run_mor", fail)
    why = go(only=("same-flops_twin_s0",))["failed"]["same-flops_twin_s0"]
    assert "all rates of its sweep diverged" in why


def test_a_training_of_other_text_is_not_measured_on_this(
    started: Started, go: Callable[..., dict[str, Any]], tmp_path: Path
):
    go(only=("same-flops_twin_s0",))
    for file in (tmp_path / "out" / "members").glob("*/run.json"):
        run = json.loads(file.read_text())
        file.write_text(json.dumps(run | {"data_sha256": "another"}))
    (tmp_path / "out" / "results.jsonl").unlink()
    with pytest.raises(ValueError, match="the data is not what the run in"):
        go(only=("same-flops_twin_s0",))


def test_a_model_that_is_added_leaves_the_pace_of_the_others(
    started: Started,
    go: Callable[..., dict[str, Any]],
    experiment: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Tokens of a training of so many seconds go by its pace: measured anew, none would be kept."""
    asked: list[list[str]] = []

    def measured(recipes: dict[str, Any], data: PreparedData) -> dict[str, Any]:
        asked.append(list(recipes))
        return {"tokens_per_s": dict.fromkeys(recipes, 1000.0 * len(asked))}

    monkeypatch.setattr(runs, "measure_paces", measured)
    experiment.write_text(
        experiment.read_text().replace("[sweep]\nlrs = [2e-3, 4e-3]\nshare = 0.5\n", "")
    )
    only = ("same-time_twin_s0",)
    assert go(only=only)["run"] == 1
    more = '[[models]]\nname = "more"\nlabel = "more"\n[[budgets]]'
    experiment.write_text(experiment.read_text().replace("[[budgets]]", more, 1))
    again = go(only=only)
    assert again["failed"] == {} and (again["run"], again["kept"]) == (0, 1)
    assert asked == [["twin", "rec3", "mor3", "random3"], ["more"]]


def test_a_benchmark_with_other_arguments_is_run_again(
    started: Started, go: Callable[..., dict[str, Any]], experiment: Path
):
    go(only=("decode",))
    experiment.write_text(experiment.read_text().replace("['decode']", "['decode', '--quick']"))
    assert go(only=("decode",))["run"] == 1
    assert go(only=("decode",))["kept"] == 1


def test_a_member_goes_on_from_its_checkpoint(
    started: Started, go: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    run_here = runs.run_mor

    def interrupted(args: Sequence[str]) -> str:
        if args[0] == "train" and "same-flops_twin_s0" in args[1]:
            out = Path(args[args.index("--out") + 1])
            out.mkdir(parents=True)
            (out / "run.json").write_text("{}")
            raise KeyboardInterrupt
        return run_here(args)

    monkeypatch.setattr(runs, "run_mor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(only=("same-flops_twin_s0",))
    seen: Started = []

    def look(args: Sequence[str]) -> str:
        seen.append(list(args))
        raise MemberFailed("enough")

    monkeypatch.setattr(runs, "run_mor", look)
    go(only=("same-flops_twin_s0",))
    assert seen[-1][-1] == "--resume"


def test_hours_end_a_run_between_members(
    started: Started, go: Callable[..., dict[str, Any]], tmp_path: Path
):
    result = go(max_hours=1e-9)
    assert result["run"] == 0 and not started
    assert (tmp_path / "out" / "report.html").exists()


def test_results_of_other_settings_are_not_mixed(
    started: Started, go: Callable[..., dict[str, Any]], experiment: Path
):
    go(only=("same-flops_twin_s0",))
    experiment.write_text(EXPERIMENT.replace("hidden_size = 32", "hidden_size = 64"))
    with pytest.raises(ValueError, match="from other settings or data; give another --out"):
        go(only=("same-flops_twin_s0",))


def test_a_training_of_other_settings_is_not_taken_for_the_member(
    started: Started, go: Callable[..., dict[str, Any]], experiment: Path, tmp_path: Path
):
    go(only=("same-flops_twin_s0",))
    (tmp_path / "out" / "results.jsonl").unlink()  # its line dropped, its folder forgotten
    experiment.write_text(EXPERIMENT.replace("hidden_size = 32", "hidden_size = 64"))
    with pytest.raises(ValueError, match="is a training of other settings; remove it"):
        go(only=("same-flops_twin_s0",))


def test_two_runs_in_one_folder_are_refused(
    started: Started, go: Callable[..., dict[str, Any]], tmp_path: Path
):
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import sys, pathlib\nfrom mor.files import only_one\n"
        f"with only_one(pathlib.Path({str(out)!r})):\n    print('held', flush=True)\n    input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"in use by another run \(process {other.pid}"):
        go()
    other.communicate("\n")
    with only_one(out):
        assert (out / ".lock").read_text() == str(os.getpid())


def test_a_training_that_outlives_its_experiment_holds_the_folder(tmp_path: Path):
    code = (
        "import os, pathlib, subprocess, sys\nfrom mor.files import only_one\n"
        f"with only_one(pathlib.Path({str(tmp_path)!r})):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'input()'], close_fds=False)\n"
        "    print(child.pid, flush=True)\n    os._exit(9)\n"
    )
    gone = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert gone.stdin is not None and gone.stdout is not None
    child = int(gone.stdout.readline())
    assert gone.wait() == 9
    with pytest.raises(ValueError, match="in use by another"), only_one(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    gone.stdin.close()
    gone.stdout.read()
    gone.stdout.close()
    with only_one(tmp_path):
        pass


def test_a_lock_ends_with_its_block(tmp_path: Path):
    for _ in range(2):
        with locked(tmp_path / "lock", wait=False):
            pass


def test_a_child_says_what_it_printed_or_why_it_failed(tiny_recipe: Path):
    printed = run_mor(["plan", str(tiny_recipe), "--json"])
    assert json.loads(printed.strip().splitlines()[-1])["steps"] == 12
    with pytest.raises(MemberFailed, match=r"exit code 2: .*none\.toml"):
        run_mor(["plan", "none.toml"])


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals")
def test_a_terminated_run_takes_its_child_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pid = tmp_path / "pid"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $$ > {pid}\necho begun >&2\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        while not (pid.is_file() and pid.read_text().strip()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(KeyboardInterrupt):
        run_mor(["train"])
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_is_missing_is_said(
    started: Started, experiment: Path, tiny_data: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match="--out is missing"):
        run_experiment(experiment, ExperimentConfig(data=tiny_data))
    mistyped = ExperimentConfig(data=tiny_data, out=tmp_path / "none", only=("same-flop_twin_s0",))
    with pytest.raises(ValueError, match=r"--only .* is unknown; did you mean same-flops_twin_s0"):
        run_experiment(experiment, mistyped)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="--data is missing"):
        run_experiment(experiment, ExperimentConfig(out=tmp_path / "out"))
    with pytest.raises(ValueError, match="max_hours is -1"):
        ExperimentConfig(max_hours=-1)


def test_the_list_says_what_each_member_costs(experiment: Path, tiny_data: Path):
    listed = list_members(experiment, ExperimentConfig(data=tiny_data))
    members = {one["member"]: one for one in listed["members"]}
    assert len(members) == 8 + 8 + 4 + 2 + 2 and listed["bench"] == ["decode"]
    assert members["same-tokens_twin_s0"]["tokens"] == 768
    assert members["same-time_twin_s0"]["tokens"] is None
    some = ExperimentConfig(data=tiny_data, only=("same-tokens_twin_s0",))
    listed = list_members(experiment, some)
    names = [one["member"] for one in listed["members"]]
    assert names == ["sweep_twin_lr0.002", "sweep_twin_lr0.004", "same-tokens_twin_s0"]
    assert listed["bench"] == []


def test_the_command_needs_a_recipe(capsys: pytest.CaptureFixture[str]):
    assert main(["experiment"]) == 2
    assert "write mor experiment RECIPE" in capsys.readouterr().err


def test_a_curve_has_few_points_and_the_last_token():
    lines = [
        {"tokens": 10 * (i + 1), "loss": float(i), "train_flops": 5.0 * i * i} for i in range(150)
    ]
    points = curve(lines)
    assert len(points) <= runs.CURVE_POINTS and points[-1] == [1500, 148.0, 5.0 * 149 * 149]
    assert curve([]) == []
