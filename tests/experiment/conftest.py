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


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members do not wait for the measurement of the machine's peak speed."""
    from mor.train import trainer

    monkeypatch.setattr(trainer, "measure_peak_flops", lambda *args, **kwargs: 1e12)
