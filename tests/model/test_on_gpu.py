"""On a GPU packed documents give what the readable twin gives, in value and in gradient."""

from typing import Any

import pytest
import torch
from support_model import random_ids, small_config

from mor.model.mor import MoR
from mor.ops.attention import (
    attention,
    attention_reference,
    documents_attention,
    serves_documents,
)

pytestmark = pytest.mark.gpu

ROUTED = [
    {"kv_strategy": "per_recursion"},
    {"kv_strategy": "shared"},
    {"kv_strategy": "hybrid"},
    {"router": "fixed", "gating": "none", "num_recursions": 1},
]


def documents(lengths: list[int], T: int = 64) -> torch.Tensor:
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return segment.reshape(-1, T)


@pytest.mark.parametrize(("H", "G", "K"), [(4, 4, 64), (9, 3, 64), (6, 2, 32)])
def test_documents_one_after_the_other_are_attended_apart(H: int, G: int, K: int) -> None:
    lengths = [1, 5, 130, 64, 2, 300]
    N = sum(lengths)
    torch.manual_seed(0)
    inputs = [torch.randn(N, heads, K, device="cuda") for heads in (H, G, G)]
    halves = [x.bfloat16().requires_grad_() for x in inputs]
    assert serves_documents(halves[0])
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    q_NHK, k_NGK, v_NGK = halves
    fast = documents_attention(q_NHK, k_NGK, v_NGK, offsets, max(lengths))
    wide = [x.detach().float().requires_grad_() for x in halves]
    parts, start = [], 0
    for length in lengths:
        q, k, v = (x[None, start : start + length] for x in wide)
        parts.append(attention(q, k, v, is_causal=True)[0])
        start += length
    plain = torch.cat(parts)
    weight = torch.randn_like(plain)
    (fast.float() * weight).sum().backward()
    (plain * weight).sum().backward()
    torch.testing.assert_close(fast.float(), plain, atol=2e-2, rtol=2e-2)
    for a, b in zip(halves, wide, strict=True):
        assert a.grad is not None and b.grad is not None
        close = (a.grad.float() - b.grad).norm() / b.grad.norm()
        assert close < 2e-2


@pytest.mark.parametrize(("Q", "S"), [(64, 704), (100, 320), (256, 257), (1, 64)])
def test_masked_attention_has_finite_gradients(Q: int, S: int) -> None:
    """A row that attends to little of little has a low log-sum: cuDNN's gradients were NaN."""
    torch.manual_seed(0)
    shapes = ((3, Q, 9, 64), (3, S, 3, 64), (3, S, 3, 64))
    halves = [torch.randn(*shape, device="cuda").bfloat16() for shape in shapes]
    halves[0] = halves[0] * 30
    visible = torch.rand(3, Q, S, device="cuda") < 0.1
    visible[..., 0] = True
    found = []
    for function, inputs in (
        (attention, halves),
        (attention_reference, [x.float() for x in halves]),
    ):
        leaves = [x.detach().requires_grad_() for x in inputs]
        q, k, v = leaves
        out = function(q, k, v, visible_BQS=visible)
        out.float().sin().sum().backward()
        found.append([out.float(), *(x.grad.float() for x in leaves if x.grad is not None)])
    for fast, plain in zip(*found, strict=True):
        assert fast.isfinite().all()
        assert (fast - plain).norm() / plain.norm() < 3e-2


@pytest.mark.parametrize("fields", ROUTED, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_packed_documents_equal_the_reference(fields: dict[str, Any], dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)  # it refuses cumulated sums there
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # autocast leaves doubles
    model = MoR(small_config(head_dim=8, initializer_range=0.1, **fields)).to("cuda", wide)
    ids, labels = random_ids(3, 64).cuda(), random_ids(3, 64, seed=5).cuda()
    segments = documents([3, 40, 21, 1, 63, 20, 30, 14]).cuda()
    found = []
    for implementation in ("fast", "reference"):
        model.zero_grad()
        is_half = dtype == torch.bfloat16 and implementation == "fast"
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=is_half):
            out = model(
                ids, labels=labels, segments=segments, rule="train", implementation=implementation
            )
        assert out.loss_sum is not None
        out.loss_sum.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((out.loss_sum.detach(), grads))
    (fast, fast_grads), (plain, plain_grads) = found
    error = (fast_grads - plain_grads).norm() / plain_grads.norm()
    if dtype == torch.float64:
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-9)
        assert error < 1e-9
    else:  # rounding may send another token on
        torch.testing.assert_close(fast, plain, rtol=2e-2, atol=0.0)
        assert error < 0.1 or fields.get("router") != "fixed"
