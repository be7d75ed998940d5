"""Stores reach their own places and no other, with and without the rotation on the way."""

import math

import pytest
import torch
from support_paged import store_reference

pytest.importorskip("triton.language", reason="triton is not installed")
from mor.ops.triton.reference import rotate_reference
from mor.ops.triton.store import rotate, rotate_and_store, store

SLOTS = [5, -1, 0, 20, -1, 13]


def make_kv(G: int, K: int, P: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full((21 // P + 1, 3, 2, G, P, K), math.nan, dtype=dtype, device=device)[:, 1]


@pytest.mark.parametrize(("G", "K", "P"), [(1, 64, 16), (3, 24, 5), (2, 32, 1)])
def test_store_writes_its_slots_and_nothing_else(G, K, P, dtype, device):
    kv, expected = (make_kv(G, K, P, dtype, device) for _ in range(2))
    # keys and values as parts of one wide product
    wide_NX = torch.randn(len(SLOTS), 3 * G * K).to(device, dtype)
    k_NGK, v_NGK = (wide_NX[:, i * G * K : (i + 1) * G * K].view(-1, G, K) for i in (0, 2))
    slot_N = torch.tensor(SLOTS, device=device)
    store(k_NGK, v_NGK, kv, slot_N)
    store_reference(k_NGK, v_NGK, expected, slot_N)
    torch.testing.assert_close(kv, expected, atol=0, rtol=0, equal_nan=True)
    assert kv.isnan().sum() == kv.numel() - 4 * 2 * G * K


@pytest.mark.parametrize(
    ("group", "G", "K", "P"), [(1, 2, 64, 16), (3, 1, 32, 5), (5, 3, 24, 1), (3, 3, 64, 24)]
)
def test_rotation_on_the_way_is_rotation_before(group, G, K, P, dtype, close, device):
    H, N = group * G, len(SLOTS)
    kv, expected = (make_kv(G, K, P, dtype, device) for _ in range(2))
    wide_NX = torch.randn(N, (H + 2 * G) * K).to(device, dtype)
    q_NHK, k_NGK, v_NGK = (
        part_NX.unflatten(-1, (-1, K)) for part_NX in wide_NX.split([H * K, G * K, G * K], dim=1)
    )
    angle_CK = (torch.arange(50)[:, None] * torch.logspace(0, -3, K // 2)).repeat(1, 2).to(device)
    turn = {
        "cos_CK": angle_CK.cos(),
        "sin_CK": angle_CK.sin(),
        "position_N": torch.tensor([0, 7, 49, 3, 3, 20], device=device),
    }
    slot_N = torch.tensor(SLOTS, device=device)
    q_out_NHK = rotate_and_store(q_NHK, k_NGK, v_NGK, kv, slot_N, **turn)
    store_reference(rotate_reference(k_NGK, **turn), v_NGK, expected, slot_N)
    torch.testing.assert_close(q_out_NHK, rotate_reference(q_NHK, **turn), **close)
    torch.testing.assert_close(kv, expected, **close, equal_nan=True)
    assert torch.equal(rotate(q_NHK, **turn), q_out_NHK)


def test_reference_turns_as_the_model_does():
    from support_model import small_config

    from mor.model import layers

    position_N = torch.tensor([0, 3, 11])
    config = small_config()
    x_NHK = torch.randn(3, 2, config.head_dim)
    angles = layers.rotary_angles(position_N, config, dtype=torch.float32)
    table = layers.rotary_angles(torch.arange(12), config, dtype=torch.float32)
    turned_NHK = rotate_reference(
        x_NHK,
        cos_CK=table.cos_N1K[:, 0],
        sin_CK=table.sin_N1K[:, 0],
        position_N=position_N,
    )
    torch.testing.assert_close(turned_NHK, layers.rotate(x_NHK, angles))
