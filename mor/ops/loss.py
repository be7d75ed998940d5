"""Losses of a linear head that never hold the whole logits: of labels, and of a teacher's choice.

Shapes: N rows, D width, E the teacher's width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mor.ops.device import in_autocast_type

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
    h_ND, weight_VD = in_autocast_type(h_ND, weight_VD)
    if not torch.is_grad_enabled():  # else the function works out what a parameter might want
        h_ND, weight_VD = h_ND.detach(), weight_VD.detach()
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
                # In place, one exp for loss and gradient: logits, then e^logit, then gradients.
                logit_CV -= logit_CV.amax(-1, keepdim=True)
                picked_C = logit_CV.gather(1, target_C[:, None])[:, 0]
                mass_C = logit_CV.exp_().sum(-1)
                total += torch.where(kept_C, mass_C.log() - picked_C, 0).sum()
                if grad_h_ND is None and grad_weight_VD is None:
                    continue
                grad_CV = logit_CV.mul_((kept_C / mass_C)[:, None])
                grad_CV.scatter_add_(1, target_C[:, None], -kept_C[:, None].to(wide))
                grad_CV = grad_CV.to(h_ND.dtype)
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


class Distilled(NamedTuple):
    """Sums over the rows that have a label, nats."""

    loss: Tensor
    """what is minimised: label_weight x cross_entropy + teacher_weight x divergence"""
    cross_entropy: Tensor
    """of the labels; detached"""
    divergence: Tensor
    """forward KL, sum over v of p_teacher (log p_teacher - log p_student); detached"""


def linear_distillation_reference(
    h_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    teacher_NE: Tensor,
    teacher_VE: Tensor,
    *,
    label_weight: float,
    teacher_weight: float,
) -> Distilled:
    """Same sums as `linear_distillation`, with whole logits."""
    kept_N = label_N != IGNORE
    student_NV = (h_ND @ weight_VD.T)[kept_N].log_softmax(-1)
    teacher_NV = (teacher_NE @ teacher_VE.T)[kept_N].log_softmax(-1).detach()
    entropy = F.nll_loss(student_NV, label_N[kept_N], reduction="sum")
    divergence = (teacher_NV.exp() * (teacher_NV - student_NV)).sum()
    loss = label_weight * entropy + teacher_weight * divergence
    return Distilled(loss, entropy.detach(), divergence.detach())


LEAST_REST = 1e-6
"""share that a student's other tokens have at least, where it is divided by"""


def linear_top_distillation_reference(
    h_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    share_NJ: Tensor,
    token_NK: Tensor,
    *,
    label_weight: float,
    teacher_weight: float,
) -> Distilled:
    """Same sums as `linear_top_distillation`, with whole logits."""
    kept_N = label_N != IGNORE
    student_NV = (h_ND @ weight_VD.T)[kept_N].log_softmax(-1)
    entropy = F.nll_loss(student_NV, label_N[kept_N], reduction="sum")
    share_NJ, token_NK = share_NJ[kept_N].to(student_NV.dtype), token_NK[kept_N].long()
    picked_NK = student_NV.gather(1, token_NK)
    rest_N1 = (1 - picked_NK.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST)
    picked_NJ = torch.cat([picked_NK, rest_N1.log()], -1)
    divergence = (torch.xlogy(share_NJ, share_NJ) - share_NJ * picked_NJ).sum()
    loss = label_weight * entropy + teacher_weight * divergence
    return Distilled(loss, entropy.detach(), divergence.detach())


def linear_top_distillation(
    h_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    share_NJ: Tensor,
    token_NK: Tensor,
    *,
    label_weight: float,
    teacher_weight: float,
    chunk_rows: int = 512,
) -> Distilled:
    """Sum the losses of labels and of a teacher's K most likely tokens, chunk by chunk.

    share_NJ  their shares, and what all other tokens have together; J = K + 1, sum 1
    token_NK  which tokens they are
    The rest as in `linear_distillation`
    """
    h_ND, weight_VD = in_autocast_type(h_ND, weight_VD)
    weights = (label_weight, teacher_weight)
    args = (h_ND, weight_VD, label_N, share_NJ, token_NK.long())
    return Distilled(*_LinearDistillation.apply(*args, weights, chunk_rows, True))


def linear_distillation(
    h_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    teacher_NE: Tensor,
    teacher_VE: Tensor,
    *,
    label_weight: float,
    teacher_weight: float,
    chunk_rows: int = 512,
) -> Distilled:
    """Sum the losses of labels and of a teacher's distribution, chunk by chunk.

    Both gradients are ready after the forward pass, as in `linear_cross_entropy`: one target, the
    weighted mean of label and teacher, serves both losses.
    h_ND, weight_VD         states after the last norm, and head; gradients go here
    teacher_NE, teacher_VE  the teacher's, without gradient
    label_N                 int64 targets, -100 to leave a row out of both losses
    """
    h_ND, weight_VD, teacher_NE, teacher_VE = in_autocast_type(
        h_ND, weight_VD, teacher_NE, teacher_VE
    )
    weights = (label_weight, teacher_weight)
    args = (h_ND, weight_VD, label_N, teacher_NE.detach(), teacher_VE.detach())
    return Distilled(*_LinearDistillation.apply(*args, weights, chunk_rows, False))


def _learn_whole(
    log_CV: Tensor, teacher_CV: Tensor, weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return divergences (C,) and the gradient of both losses but for the label's own entry.

    log_CV  the student's log shares; gone afterwards, as are the teacher's logits
    """
    teacher_CV -= teacher_CV.logsumexp(-1, keepdim=True)
    share_CV = teacher_CV.exp()
    gap_C = (share_CV * teacher_CV.sub_(log_CV)).sum(-1)
    return gap_C, log_CV.exp_().mul_(sum(weights)).sub_(share_CV, alpha=weights[1])


def _learn_top(
    log_CV: Tensor, share_CJ: Tensor, token_CK: Tensor, weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Do the same where the teacher tells K tokens' shares and what the others have together.

    The others are to share that as they do now with the student.
    """
    picked_CK = log_CV.gather(1, token_CK)
    rest_C1 = (1 - picked_CK.exp().sum(-1, keepdim=True)).clamp_(min=LEAST_REST)
    log_CJ = torch.cat([picked_CK, rest_C1.log()], -1)
    gap_C = (torch.xlogy(share_CJ, share_CJ) - share_CJ * log_CJ).sum(-1)
    fill_C1 = weights[1] * share_CJ[:, -1:] / rest_C1
    grad_CV = log_CV.exp_().mul_(sum(weights) - fill_C1)
    own_CK = fill_C1 * picked_CK.exp_() - weights[1] * share_CJ[:, :-1]
    return gap_C, grad_CV.scatter_add_(1, token_CK, own_CK)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        label_N: Tensor,
        teacher_NE: Tensor,
        teacher_VE: Tensor,
        weights: tuple[float, float],
        chunk_rows: int,
        is_top: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """is_top: the two of the teacher are shares of K tokens and the rest, and the tokens."""
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        grad_h_ND = torch.empty_like(h_ND) if needs_h else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        entropy = torch.zeros((), dtype=wide, device=h_ND.device)
        divergence = torch.zeros_like(entropy)
        label_weight, teacher_weight = weights
        with torch.autocast(h_ND.device.type, enabled=False):
            for start in range(0, h_ND.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                h_CD, label_C = h_ND[rows], label_N[rows]
                kept_C = label_C != IGNORE
                target_C1 = label_C.where(kept_C, torch.zeros_like(label_C))[:, None]
                log_CV = F.linear(h_CD, weight_VD).to(wide)
                log_CV -= log_CV.logsumexp(-1, keepdim=True)
                entropy -= (log_CV.gather(1, target_C1)[:, 0] * kept_C).sum()
                if is_top:
                    share_CJ, token_CK = teacher_NE[rows].to(wide), teacher_VE[rows]
                    gap_C, grad_CV = _learn_top(log_CV, share_CJ, token_CK, weights)
                else:
                    teacher_CV = F.linear(teacher_NE[rows], teacher_VE).to(wide)
                    gap_C, grad_CV = _learn_whole(log_CV, teacher_CV, weights)
                divergence += (gap_C * kept_C).sum()
                if grad_h_ND is None and grad_weight_VD is None:
                    continue
                ones_C1 = torch.full_like(target_C1, -label_weight, dtype=wide)
                grad_CV.scatter_add_(1, target_C1, ones_C1)
                grad_CV = grad_CV.mul_(kept_C[:, None]).to(h_ND.dtype)
                if grad_h_ND is not None:
                    torch.mm(grad_CV, weight_VD, out=grad_h_ND[rows])
                if grad_weight_VD is not None:
                    grad_weight_VD += grad_CV.T @ h_CD
        ctx.save_for_backward(grad_h_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(entropy, divergence)
        return label_weight * entropy + teacher_weight * divergence, entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        grad_h_ND, grad_weight_VD = ctx.saved_tensors
        if grad_h_ND is not None:
            grad_h_ND = grad_h_ND * grad.to(grad_h_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad).to(ctx.weight_dtype)
        return grad_h_ND, grad_weight_VD, None, None, None, None, None, None
