"""What runs in the interpreter also compiles for the GPUs that it is written for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.language", reason="triton is not installed")

TESTS = Path(__file__).parents[2]
ATTENTION = ("_attend_split", "_attend_tile")
OTHERS = (
    *("_join_splits", "_store", "_rotate_row", "_add_rms_norm", "_silu_mul"),
    *("_go_on", "_gather", "_scatter", "_hash_uniform"),
    *("_locate", "_join_and_ask", "_advance"),
)


def test_every_kernel_compiles_for_hopper_and_attention_uses_tensor_cores(tmp_path):
    env = os.environ | {
        "PYTHONPATH": str(TESTS.parent),
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_INTERPRET": "0",
    }
    run = subprocess.run(
        [sys.executable, str(TESTS / "support_compile.py")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    has_tensor_cores = json.loads(run.stdout)
    assert has_tensor_cores.keys() == {*ATTENTION, *OTHERS}
    assert all(has_tensor_cores[name] for name in ATTENTION)
