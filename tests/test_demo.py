"""The demo says plainly where MoR wins and loses, and refuses depths that went wrong."""

import json
import subprocess
import sys

import pytest
from support_model import random_ids, small_model

from mor.demo import MEMBERS, check_depths, verify_decode
from mor.demo_page import smooth, verdict
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams


def row(name, **fields):
    values = {
        "name": name,
        "params_unique": 100,
        "bits_per_byte": 2.0,
        "train_seconds": 50.0,
        "peak_bytes": 1000,
        "kv_bytes_per_token": 10.0,
        "decode_tokens_per_s": 100.0,
        "mean_depth": 2.0,
        "active_share": [1.0, 0.667, 0.333],
        "bits_per_byte_up_to_depth": [2.3, 2.1, 2.0],
    }
    return {**values, **fields}


def test_verdict_names_losses_with_their_sign():
    rows = [row(member.name) for member in MEMBERS]
    rows[0]["bits_per_byte"] = 2.1
    rows[0]["decode_tokens_per_s"] = 150.0
    rows[0]["train_seconds"] = 60.0
    lines = "\n".join(verdict(rows))
    assert "random router: +0.1000 bits per byte, causal: MoR loses" in lines
    rows[0]["bits_per_byte"] = 1.995
    assert "-0.0050 bits per byte, causal: a tie" in "\n".join(verdict(rows))
    assert "what depth is worth: 2.3000, 2.1000, 2.0000 bits per byte" in lines
    assert "training time: 1.20 of the vanilla twin's: MoR loses" in lines
    assert "generated tokens per second: 1.50 of the vanilla twin's: MoR wins" in lines


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({}, None),
        ({"mean_depth": 2.09}, None),
        ({"mean_depth": 1.88}, "mean depth is 1.880"),
        ({"mean_depth": float("nan")}, "mean depth is nan"),
        ({"active_share": [1.0, 0.96, 0.04]}, "recursion 2: it collapsed"),
        ({"active_share": [1.0, 0.9, 0.04]}, "recursion 3: it collapsed"),
    ],
)
def test_wrong_depths_fail_the_demo_and_name_the_cause(fields, cause):
    failure = check_depths(small_model(), [row("mor", **fields)])
    assert failure is None if cause is None else cause in str(failure)


def test_decoding_is_verified_before_it_is_timed(monkeypatch):
    prompt, params = random_ids(8).tolist(), SamplingParams(max_tokens=6, temperature=0)
    engine = Engine(small_model())
    verify_decode("mor", engine, prompt, params)
    monkeypatch.setattr(engine.sampler, "_argmax", lambda logit_NV: logit_NV.argmin(1))
    with pytest.raises(RuntimeError, match="disagree"):
        verify_decode("mor", engine, prompt, params)


def test_running_mean_is_unbiased_at_the_start():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([4.0, 2.0])[0] == 4.0


@pytest.mark.slow
def test_quick_demo_as_a_user_runs_it(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "mor", "demo", "--out", str(out), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode == 0) == (result["failure"] is None), done.stderr
    assert [model["name"] for model in result["models"]] == [member.name for member in MEMBERS]
    wanted = {"name", "params_unique", "bits_per_byte", "train_flops", "train_seconds"}
    wanted |= {"peak_bytes", "kv_bytes_per_token", "mean_depth", "decode_tokens_per_s"}
    for model in result["models"]:
        assert wanted <= model.keys()
        assert (out / model["name"] / "model" / "model.safetensors").is_file()
    flops = [model["train_flops"] for model in result["models"]]
    assert max(flops) / min(flops) < 1.05
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert 'src="http' not in page
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "already holds" in again.stderr
