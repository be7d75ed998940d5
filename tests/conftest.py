"""Every test starts from one seed, in deterministic mode, with fresh memory full of NaN.

torch is prepared only where a test file has imported it, so tests without torch stay quick.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# These are read when a library loads, here and in every command that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("local", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    # torch.empty then holds NaN: code that reads what nobody wrote fails at once
    torch.utils.deterministic.fill_uninitialized_memory = True
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(was_deterministic)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu on a machine without one."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
