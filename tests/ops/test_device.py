"""Promises of mor.ops.device: the types that `auto` stands for."""

from __future__ import annotations

import pytest
import torch

from mor.ops import device
from mor.ops.device import pick_dtype, pick_product_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("vendor", "features", "weights", "products"),
    [
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, torch.bfloat16),
        ("AuthenticAMD", set(), torch.float32, torch.float32),
        ("GenuineIntel", {"avx512_bf16", "amx_tile"}, torch.bfloat16, torch.bfloat16),
        ("GenuineIntel", {"avx512_bf16"}, torch.bfloat16, torch.float32),
        (None, {"avx512_bf16"}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_auto_is_the_type_that_pays(
    monkeypatch: pytest.MonkeyPatch,
    vendor: str | None,
    features: set[str],
    weights: torch.dtype,
    products: torch.dtype,
) -> None:
    monkeypatch.setattr(device, "_has", features.__contains__)
    monkeypatch.setattr(device, "_cpu_info", {"vendor_id": vendor}.get)
    assert pick_dtype("auto", CPU) == weights
    assert pick_product_dtype("auto", CPU) == products
    for name in ("float32", "bfloat16"):
        assert pick_product_dtype(name, CPU) == getattr(torch, name)


def test_a_machine_is_described_by_its_own_name() -> None:
    machine = device.describe_machine()
    assert machine["processor"]
    assert machine["auto_dtype"] in ("float32", "bfloat16")
