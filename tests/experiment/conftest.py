"""The small experiment as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_experiment import EXPERIMENT


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "exp.toml"
    path.write_text(EXPERIMENT)
    return path
