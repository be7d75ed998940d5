"""Two fused passes over rows: residual add with RMSNorm, and the gate of the feed-forward layer.

Shapes: N rows, D width, F feed-forward width, R recursions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.ops.triton.reference import AddNorm


def add_rms_norm(
    stream_ND: Tensor,
    update_ND: Tensor | None,
    gain_RD: Tensor,
    *,
    eps: float,
    recursion_N: Tensor | None = None,
) -> AddNorm:
    """Add an update to the stream and norm the sum, in one pass.

    update_ND    what a sublayer made; None to norm the stream as it is
    gain_RD      (D,), or (R, D) with a gain for each recursion
    recursion_N  integers, the row of gain_RD that each row takes; asked for with (R, D)
    Returns      the sum rounded to the stream's type, and its norm (from the rounded sum, in fp32)
    Cost         reads stream and update, writes sum and norm: 4 N D x itemsize bytes, not 5
    """
    N, D = stream_ND.shape
    assert (recursion_N is None) == (gain_RD.dim() == 1), gain_RD.shape
    assert recursion_N is None or recursion_N.is_contiguous()
    assert gain_RD.is_contiguous() and stream_ND.stride(1) == 1
    assert update_ND is None or (update_ND.shape == (N, D) and update_ND.stride(1) == 1)
    normed_ND = torch.empty((N, D), dtype=stream_ND.dtype, device=stream_ND.device)
    sum_ND = stream_ND if update_ND is None else torch.empty_like(normed_ND)
    has_update, has_recursions = update_ND is not None, recursion_N is not None
    _add_rms_norm[(N,)](
        stream_ND, stream_ND if update_ND is None else update_ND, gain_RD,
        stream_ND if recursion_N is None else recursion_N, sum_ND, normed_ND,
        stream_ND.stride(0), 0 if update_ND is None else update_ND.stride(0), eps,
        HAS_UPDATE=has_update, HAS_RECURSIONS=has_recursions, D=D,
        BLOCK_D=triton.next_power_of_2(D), num_warps=4 if D <= 2048 else 8,
    )  # fmt: skip
    return AddNorm(sum_ND, normed_ND)


def silu_mul(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Return silu(gate) x up, in fp32 until it is rounded; the halves of one tensor serve too."""
    N, F = gate_NF.shape
    assert up_NF.shape == (N, F) and gate_NF.stride(1) == up_NF.stride(1) == 1
    out_NF = torch.empty((N, F), dtype=gate_NF.dtype, device=gate_NF.device)
    block = min(1024, triton.next_power_of_2(F))
    _silu_mul[(N, triton.cdiv(F, block))](
        gate_NF, up_NF, out_NF, gate_NF.stride(0), up_NF.stride(0), F, BLOCK=block, num_warps=4
    )
    return out_NF


@triton.jit
def _add_rms_norm(
    stream_ptr, update_ptr, gain_ptr, recursion_ptr, sum_ptr, normed_ptr,
    stride_stream, stride_update, eps,
    HAS_UPDATE: tl.constexpr, HAS_RECURSIONS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dim_D = tl.arange(0, BLOCK_D)
    mask_D = dim_D < D
    dtype = normed_ptr.dtype.element_ty
    x_D = tl.load(stream_ptr + row * stride_stream + dim_D, mask=mask_D, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        update_D = tl.load(update_ptr + row * stride_update + dim_D, mask=mask_D, other=0.0)
        rounded_D = (x_D + update_D.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * D + dim_D, rounded_D, mask=mask_D)
        x_D = rounded_D.to(tl.float32)
    if HAS_RECURSIONS:
        gain_ptr += tl.load(recursion_ptr + row).to(tl.int64) * D
    # gains are kept in fp32 and used in the stream's type, as in the model
    gain_D = tl.load(gain_ptr + dim_D, mask=mask_D, other=0.0).to(dtype).to(tl.float32)
    normed_D = x_D * tl.rsqrt(tl.sum(x_D * x_D, 0) / D + eps) * gain_D
    tl.store(normed_ptr + row * D + dim_D, normed_D.to(dtype), mask=mask_D)


@triton.jit
def _silu_mul(gate_ptr, up_ptr, out_ptr, stride_gate, stride_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dim_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_F = dim_F < width
    gate_F = tl.load(gate_ptr + row * stride_gate + dim_F, mask=mask_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * stride_up + dim_F, mask=mask_F, other=0.0).to(tl.float32)
    out_F = gate_F * tl.sigmoid(gate_F) * up_F
    tl.store(out_ptr + row * width + dim_F, out_F.to(out_ptr.dtype.element_ty), mask=mask_F)
