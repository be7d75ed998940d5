"""Where the device's part of a tick runs: on this processor, and on a GPU where the mark asks."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        torch.use_deterministic_algorithms(False)  # it refuses cumulated sums there
    return request.param
