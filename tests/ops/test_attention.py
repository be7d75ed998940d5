"""Fused attention gives the numbers and gradients of its plain twin."""

import pytest
import torch

from mor.ops.attention import attention, attention_reference


def _inputs(Q, S, H, G, B=3, K=8):
    torch.manual_seed(0)
    shapes = ((B, Q, H, K), (B, S, G, K), (B, S, G, K))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["causal", "masked", "one_query", "one_query_masked"])
def test_fused_attention_equals_its_plain_twin(kind, H, G):
    Q, S = (7, 7) if kind == "causal" else (1, 9) if kind.startswith("one") else (5, 9)
    options = {"is_causal": kind == "causal"}
    if kind.endswith("masked"):
        visible = torch.rand(3, Q, S) < 0.5
        visible[..., 0] = True
        options["visible_BQS"] = visible
    results = []
    for function in (attention, attention_reference):
        inputs = _inputs(Q, S, H, G)
        out = function(*inputs, **options)
        assert out.shape == inputs[0].shape
        weight = torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape).sin()
        (out * weight).sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
