"""Kernels run in Triton's interpreter where there is no GPU, and compiled where there is one.

Triton chooses when it is imported, once for a process, so tests/conftest.py asks for the
interpreter where it sees no GPU. `cpu` tests want the interpreter, `cuda` tests a GPU;
TRITON_INTERPRET=1 or 0 chooses by hand.
"""

from __future__ import annotations

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not IS_INTERPRETED:
        pytest.skip("kernels are compiled in this process; TRITON_INTERPRET=1 interprets them")
    if request.param == "cuda" and IS_INTERPRETED:
        pytest.skip("kernels are interpreted in this process; TRITON_INTERPRET=0 compiles them")
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def close(dtype: torch.dtype) -> dict[str, float]:
    """Return what assert_close allows; the interpreter cuts to bfloat16 where a GPU rounds."""
    if dtype == torch.float32:
        return {"atol": 2e-5, "rtol": 1e-5}
    return {"atol": 2e-2, "rtol": 2e-2}
