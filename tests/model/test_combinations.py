"""Every combination of sharing, router, gating and keys: exact, or refused in one line."""

import itertools
import typing

import pytest
import torch
from support_model import assert_same, random_ids, small_model

from mor import config as fields


def choices(kind, *but):
    return [choice for choice in typing.get_args(kind) if choice not in but]


COMBINATIONS = list(
    itertools.product(
        choices(fields.Sharing),
        choices(fields.RouterKind),
        choices(fields.Gating, "auto"),
        choices(fields.KVStrategy),
    )
)


def is_allowed(sharing, router, gating, kv_strategy):
    """The rules of docs/model.md, written once more."""
    if router == "fixed":
        keys = kv_strategy == "per_recursion" or (kv_strategy == "shared" and "cycle" in sharing)
        return gating == "none" and keys
    if "sequence" in sharing or (sharing == "none" and kv_strategy != "per_recursion"):
        return False
    return router != "threshold" or gating in ("weighted", "residual")


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_a_combination_is_exact_or_refused_in_one_line(combination):
    sharing, router, gating, kv_strategy = combination
    shape = {
        "sharing": sharing,
        "kv_strategy": kv_strategy,
        "num_hidden_layers": 6 if sharing in ("cycle", "sequence") else 8,
    }
    if not is_allowed(*combination):
        with pytest.raises(ValueError) as refused:
            small_model(router, gating, **shape)
        assert "\n" not in str(refused.value)
        return
    model = small_model(router, gating, **shape)
    ids = random_ids(2, 14)
    lengths = torch.tensor([14, 9])
    segments = (torch.arange(14) >= 5).long().expand(2, 14)
    for rule in ("train", "causal"):
        fast = assert_same(model, ids, rule=rule, lengths=lengths, segments=segments)
    if router == "fixed":
        assert set(fast.depth[0].tolist()) == {3}
    with torch.no_grad():
        whole = model(ids, rule="causal")
        cache = model.new_cache(2)
        parts = [model(ids[:, at : at + 7], rule="causal", cache=cache) for at in (0, 7)]
    logits = torch.cat([part.logits for part in parts], 1)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-9, atol=1e-9)
    assert model(ids).logits.requires_grad
