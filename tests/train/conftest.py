"""Training tests do not wait for the measurement of the machine's peak speed."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from mor.train import trainer

    monkeypatch.setattr(trainer, "measure_peak_flops", lambda *args, **kwargs: 1e12)
