"""Cross-entropy of a linear head that never holds the whole logits.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100


def linear_cross_entropy_reference(h_ND: Tensor, weight_VD: Tensor, label_N: Tensor) -> Tensor:
    """Sum over rows of -log softmax(h W^T)[label]; rows labelled -100 count nothing."""
    logit_NV = F.linear(h_ND, weight_VD).float() if h_ND.dtype.itemsize < 4 else h_ND @ weight_VD.T
    return F.cross_entropy(logit_NV, label_N, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, label_N: Tensor, *, chunk_rows: int = 1024
) -> Tensor:
    """Same sum as the reference, chunk by chunk; both gradients are ready after the forward pass.

    h_ND        hidden states after the last norm
    weight_VD   head; under autocast the products run in the autocast type
    label_N     int64 targets, -100 to leave a row out
    chunk_rows  rows whose logits exist at one time
    Returns     a scalar, fp32 or wider
    Cost        three products of N x D x V in training (as forward and backward of a plain head),
                one otherwise; holds chunk_rows x V logits, and gradients of h and W
    """
    device = h_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        h_ND, weight_VD = h_ND.to(dtype), weight_VD.to(dtype)
    return _LinearCrossEntropy.apply(h_ND, weight_VD, label_N, chunk_rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, label_N: Tensor, chunk_rows: int
    ) -> Tensor:
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        grad_h_ND = torch.empty_like(h_ND) if needs_h else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            for start in range(0, h_ND.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                h_CD, label_C = h_ND[rows], label_N[rows]
                logit_CV = F.linear(h_CD, weight_VD).to(wide)
                kept_C = label_C != IGNORE
                target_C = label_C.where(kept_C, torch.zeros_like(label_C))
                norm_C = logit_CV.logsumexp(-1)
                picked_C = logit_CV.gather(1, target_C[:, None])[:, 0]
                total += torch.where(kept_C, norm_C - picked_C, 0).sum()
                if grad_h_ND is None and grad_weight_VD is None:
                    continue
                grad_CV = logit_CV.sub_(norm_C[:, None]).exp_()
                grad_CV.scatter_add_(1, target_C[:, None], -torch.ones_like(norm_C)[:, None])
                grad_CV = grad_CV.mul_(kept_C[:, None]).to(h_ND.dtype)
                if grad_h_ND is not None:
                    torch.mm(grad_CV, weight_VD, out=grad_h_ND[rows])
                if grad_weight_VD is not None:
                    grad_weight_VD += grad_CV.T @ h_CD
        ctx.save_for_backward(grad_h_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_h_ND, grad_weight_VD = ctx.saved_tensors
        if grad_h_ND is not None:
            grad_h_ND = grad_h_ND * grad.to(grad_h_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad).to(ctx.weight_dtype)
        return grad_h_ND, grad_weight_VD, None, None
