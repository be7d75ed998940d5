"""Fused passes over rows give what their plain twins give."""

import math

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed")
from mor.ops.triton.norm import add_rms_norm, silu_mul
from mor.ops.triton.reference import add_rms_norm_reference, silu_mul_reference


@pytest.mark.parametrize("D", [1, 64, 576, 1000])
@pytest.mark.parametrize("has_update", [True, False])
def test_norm_of_a_sum_takes_each_rows_gain(D, has_update, dtype, close, device):
    wide_NX = torch.randn(5, D + 3).to(device, dtype)
    stream_ND = wide_NX[:, :D]
    update_ND = torch.randn(5, D).to(device, dtype) if has_update else None
    gain_RD = 1 + 0.3 * torch.randn(3, D, device=device)
    recursion_N = torch.tensor([2, 0, 1, 2, 0], dtype=torch.int32, device=device)
    for gain, choice in ((gain_RD, recursion_N), (gain_RD[1], None)):
        made = add_rms_norm(stream_ND, update_ND, gain, eps=1e-5, recursion_N=choice)
        expected = add_rms_norm_reference(stream_ND, update_ND, gain, eps=1e-5, recursion_N=choice)
        torch.testing.assert_close(made.sum_ND, expected.sum_ND, **close)
        torch.testing.assert_close(made.normed_ND, expected.normed_ND, **close)


def test_reference_norms_as_the_model_does(dtype, close):
    from mor.model.layers import RMSNorm

    norm = RMSNorm(48, 1e-5, recursions=2)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(2, 48))
    x_ND = torch.randn(3, 48).to(dtype)
    recursion_N = torch.tensor([1, 1, 1])
    made = add_rms_norm_reference(x_ND, None, norm.weight, eps=1e-5, recursion_N=recursion_N)
    torch.testing.assert_close(made.normed_ND, norm(x_ND, 1), **close)


def test_a_bad_row_stays_alone(device):
    stream_ND = torch.randn(3, 40, device=device)
    stream_ND[1] = math.nan
    made = add_rms_norm(stream_ND, stream_ND, torch.ones(40, device=device), eps=1e-5)
    assert made.normed_ND[[0, 2]].isfinite().all() and made.normed_ND[1].isnan().all()


@pytest.mark.parametrize("F", [1, 48, 1500])
def test_gated_product_of_two_halves(F, dtype, close, device):
    both_NX = (3 * torch.randn(4, 2 * F)).to(device, dtype)
    gate_NF, up_NF = both_NX.split(F, dim=1)
    made_NF = silu_mul(gate_NF, up_NF)
    torch.testing.assert_close(made_NF, silu_mul_reference(gate_NF, up_NF), **close)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, of exp
def test_gated_product_of_large_numbers_is_finite(device):
    gate_NF = torch.tensor([[-1e4, -200.0, 200.0, 1e4]], device=device)
    made_NF = silu_mul(gate_NF, torch.ones_like(gate_NF))
    torch.testing.assert_close(made_NF, torch.tensor([[0.0, 0.0, 200.0, 1e4]], device=device))
