"""The head's loss in chunks is the loss of whole logits, gradients too."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mor.ops.loss import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_distillation,
    linear_distillation_reference,
    linear_top_distillation,
    linear_top_distillation_reference,
)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_chunked_loss_and_gradients_equal_the_plain_twin(chunk_rows):
    torch.manual_seed(0)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        torch.manual_seed(1)
        h = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
        label = torch.tensor([0, 10, -100, 3, 3, -100, 7])
        options = {"chunk_rows": chunk_rows} if function is linear_cross_entropy else {}
        loss = function(h, weight, label, **options)
        (loss * 0.3).backward()
        results.append((loss, h.grad, weight.grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


def test_whole_logits_never_exist(monkeypatch):
    sizes = []
    plain = torch.nn.functional.linear

    def linear(*args, **kwargs):
        out = plain(*args, **kwargs)
        sizes.append(out.shape)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    h = torch.randn(64, 4, requires_grad=True)
    linear_cross_entropy(h, torch.randn(9, 4), torch.zeros(64).long(), chunk_rows=16).backward()
    assert sizes == [(16, 9)] * 4


def test_without_gradients_none_is_computed():
    h, weight = torch.randn(4, 3), torch.randn(5, 3)
    loss = linear_cross_entropy(h, weight, torch.tensor([0, 1, 2, 3]))
    assert not loss.requires_grad
    only_h = h.clone().requires_grad_()
    linear_cross_entropy(only_h, weight, torch.tensor([0, 1, 2, 3])).backward()
    assert only_h.grad is not None


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_costs_one_product_though_the_head_could_learn(off):
    h, weight = torch.randn(4, 3), torch.nn.Parameter(torch.randn(5, 3))
    with FlopCounterMode(display=False) as counter, off():
        linear_cross_entropy(h, weight, torch.tensor([0, 1, 2, 3]))
    assert counter.get_total_flops() == 2 * 4 * 3 * 5


def test_loss_under_autocast_stays_close_to_fp32():
    h = torch.randn(32, 16, requires_grad=True)
    weight = torch.randn(50, 16)
    label = torch.arange(32)
    plain = linear_cross_entropy_reference(h, weight, label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = linear_cross_entropy(h, weight, label)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=2e-2, atol=0.5)


def top_of(teacher: Tensor, head: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return shares of the likeliest tokens and of the rest, and which tokens they are."""
    share, token = (teacher @ head.T).softmax(-1).topk(count)
    return torch.cat([share, (1 - share.sum(-1, keepdim=True)).clamp(min=0)], -1), token


DISTILLATIONS = {
    "whole": (linear_distillation, linear_distillation_reference),
    "top": (linear_top_distillation, linear_top_distillation_reference),
}


@pytest.mark.parametrize("kind", DISTILLATIONS)
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 0.0), (0.0, 2.0)])
def test_distillation_and_gradients_equal_the_plain_twin(kind, chunk_rows, weights):
    fast, plain = DISTILLATIONS[kind]
    results = []
    for function, options in ((fast, {"chunk_rows": chunk_rows}), (plain, {})):
        torch.manual_seed(1)
        h = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(7, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
        if kind == "top":
            teacher = top_of(*teacher, 4)
        label = torch.tensor([0, 10, -100, 3, 3, -100, 7])
        out = function(
            h,
            weight,
            label,
            *teacher,
            label_weight=weights[0],
            teacher_weight=weights[1],
            **options,
        )
        (out.loss * 0.3).backward()
        results.append((*out, h.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_all_tokens_as_top_tokens_are_the_whole_distribution():
    torch.manual_seed(2)
    h, weight, teacher, head = (torch.randn(n, 5) for n in (6, 11, 6, 11))
    weights = {"label_weight": 0.3, "teacher_weight": 0.7}
    label = torch.arange(6)
    whole = linear_distillation(h, weight, label, teacher, head, **weights)
    top = linear_top_distillation(h, weight, label, *top_of(teacher, head, 11), **weights)
    for one, other in zip(whole, top, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", DISTILLATIONS)
def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(kind):
    """A few of the likeliest tokens too: what the others have is no less wanted."""
    h, weight = torch.randn(6, 5, requires_grad=True), torch.randn(11, 5)
    label = torch.arange(6)
    teacher = h.detach(), weight
    if kind == "top":
        teacher = top_of(*teacher, 3)
    out = DISTILLATIONS[kind][0](h, weight, label, *teacher, label_weight=0.0, teacher_weight=1.0)
    out.loss.backward()
    assert float(out.divergence) == pytest.approx(0, abs=1e-5)
    assert h.grad is not None and h.grad.abs().max() < 1e-6
    assert float(out.cross_entropy) == pytest.approx(
        float(linear_cross_entropy_reference(h, weight, label).detach()), rel=1e-5
    )
