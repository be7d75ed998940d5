"""The causal contract: what a token does depends on its past alone, and one rule holds everywhere.

Change the future, the padding, the neighbours: nothing moves. Cached decoding equals teacher
forcing. In float64 "nothing" means 1e-9; in fp32 it means 1e-5.
"""

import itertools

import pytest
import torch
from support_model import KINDS, OPTIONS, ROUTED, THRESHOLDED, random_ids, small_model

from mor.model.generate import GeneratedToken, Prefill, generate

T = 24
ALL = [*KINDS, *OPTIONS]


def causal(model, ids, **options):
    with torch.no_grad():
        return model(ids, rule="causal", **options)


def spread_thresholds(model, ids):
    """Put every threshold into the widest gap of the middle scores: all depths occur, no ties."""
    if model.config.router not in THRESHOLDED:
        return model
    for r in range(1, model.config.num_recursions):
        scores = causal(model, ids).recursions[r].score_N.sort().values
        gaps = scores.diff()[len(scores) // 3 : 2 * len(scores) // 3]
        place = len(scores) // 3 + int(gaps.argmax())
        model.model.router(r).threshold.fill_(float(scores[place : place + 2].mean()))
    return model


def routed_model(router, gating, dtype=torch.float64, **fields):
    fields = fields | (gating if isinstance(gating, dict) else {"gating": gating})
    model = spread_thresholds(small_model(router, **fields).to(dtype), random_ids(4, T))
    if router != "fixed":
        depths = set(causal(model, random_ids(4, T)).depth.flatten().tolist())
        assert depths == {1, 2, 3}, "the test would prove nothing"
    return model


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@pytest.mark.parametrize(("router", "gating"), ALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_changing_the_future_moves_nothing(router, gating, implementation, dtype, tolerance):
    model = routed_model(router, gating, dtype)
    ids = random_ids(2, T)
    before = causal(model, ids, implementation=implementation)
    for cut in (1, 5, T - 3):
        other = ids.clone()
        other[:, cut:] = random_ids(2, T - cut, seed=9)
        after = causal(model, other, implementation=implementation)
        assert torch.equal(before.depth[:, :cut], after.depth[:, :cut])
        scale = before.logits.abs().max()
        moved = (before.logits - after.logits)[:, :cut].abs().max() / scale
        assert moved < tolerance


def test_top_k_does_peek_at_the_future():
    """The reason for the rule: top-k routing moves past logits when the future changes."""
    model = routed_model("expert_choice", "weighted")
    ids = random_ids(2, T)
    other = ids.clone()
    other[:, T // 2 :] = random_ids(2, T - T // 2, seed=9)
    with torch.no_grad():
        before, after = model(ids, rule="train"), model(other, rule="train")
    assert not torch.equal(before.depth[:, : T // 2], after.depth[:, : T // 2])


@pytest.mark.parametrize("rule", ["causal", "train"])
@pytest.mark.parametrize(("router", "gating"), ALL)
def test_padding_and_neighbours_move_nothing(router, gating, rule):
    model = routed_model(router, gating)
    ids = random_ids(3, T)
    lengths = torch.tensor([T, 9, 17])
    with torch.no_grad():
        together = model(ids, lengths=lengths, rule=rule)
        other_padding = ids.clone()
        for row, length in enumerate(lengths):
            other_padding[row, length:] = 7
        repadded = model(other_padding, lengths=lengths, rule=rule)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length], rule=rule)
            for batch in (together, repadded):
                assert torch.equal(batch.depth[row, :length], alone.depth[0])
                torch.testing.assert_close(
                    batch.logits[row, :length], alone.logits[0], rtol=1e-9, atol=1e-9
                )
    assert not together.depth[1, 9:].any()


@pytest.mark.parametrize(("router", "gating"), ALL)
def test_documents_packed_in_a_row_do_not_see_each_other(router, gating):
    model = routed_model(router, gating)
    ids = random_ids(1, T)
    segments = (torch.arange(T) >= 10).long()[None]
    packed = causal(model, ids, segments=segments)
    other = ids.clone()
    other[0, :10] = random_ids(10, seed=4)
    changed = causal(model, other, segments=segments)
    assert torch.equal(packed.depth[0, 10:], changed.depth[0, 10:])
    torch.testing.assert_close(packed.logits[0, 10:], changed.logits[0, 10:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("router", "gating"), ALL)
def test_cached_decoding_equals_teacher_forcing(router, gating):
    model = routed_model(router, gating)
    ids = random_ids(1, T)
    whole = causal(model, ids)
    for chunks in ([T], [1] * T, [7, 1, 1, 9, 6]):
        cache = model.new_cache(1)
        start, logits, depths = 0, [], []
        for size in chunks:
            out = causal(model, ids[:, start : start + size], cache=cache)
            logits.append(out.logits)
            depths.append(out.depth)
            start += size
        assert torch.equal(torch.cat(depths, 1), whole.depth)
        torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("router", "gating"), ALL)
def test_ragged_batches_with_a_cache_equal_each_sequence_alone(router, gating):
    """Sequences of unequal length, chunks of unequal size, some of them empty."""
    model = routed_model(router, gating)
    ids = random_ids(3, T)
    steps = torch.tensor([[5, 0, 9], [1, 1, 1], [0, 8, 3], [1, 1, 0], [1, 4, 1]])
    cache = model.new_cache(3)
    place = torch.zeros(3, dtype=torch.int64)
    logits = [[], [], []]
    for lengths in steps:
        width = int(lengths.max())
        chunk = torch.zeros(3, width, dtype=torch.int64)
        for row, count in enumerate(lengths):
            chunk[row, :count] = ids[row, place[row] : place[row] + count]
        out = causal(model, chunk, lengths=lengths, cache=cache)
        for row, count in enumerate(lengths):
            logits[row].append(out.logits[row, :count])
        place += lengths
    for row in range(3):
        alone = causal(model, ids[row : row + 1, : place[row]])
        torch.testing.assert_close(torch.cat(logits[row]), alone.logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_strategy", ["per_recursion", "shared", "hybrid"])
@pytest.mark.parametrize(("router", "gating"), ROUTED)
def test_cache_holds_active_tokens_only(router, gating, kv_strategy):
    """And of recursion 1 only where its keys and values serve all."""
    model = routed_model(router, gating, kv_strategy=kv_strategy)
    ids = random_ids(2, T)
    cache = model.new_cache(2)
    out = causal(model, ids, cache=cache)
    config = model.config
    assert len(cache.block) == (1 if kv_strategy == "shared" else 3)
    for r, group in enumerate(cache.block, start=1):
        assert group.count_B.tolist() == (out.depth >= r).sum(1).tolist()
    in_block = int(out.depth.sum()) if kv_strategy != "shared" else 2 * T
    tokens = config.num_own_layers * 2 * T + config.num_block_layers * in_block
    a_token = 2 * config.num_key_value_heads * config.head_dim * 8
    assert cache.kv_bytes == tokens * a_token


@pytest.mark.parametrize(("router", "gating"), ALL)
def test_greedy_generation_equals_argmax_over_the_whole_sequence(router, gating):
    model = routed_model(router, gating)
    prompts = [random_ids(n, seed=n).tolist() for n in (1, 6, 11)]
    events = list(generate(model, prompts, max_tokens=9))
    assert isinstance(events[0], Prefill)
    for index, prompt in enumerate(prompts):
        made = [e for e in events if isinstance(e, GeneratedToken) and e.sequence == index]
        ids = torch.tensor([prompt + [event.token for event in made]])
        out = causal(model, ids)
        assert [e.token for e in made] == out.logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert [e.depth for e in made] == out.depth[0, len(prompt) :].tolist()
        assert events[0].prompt_depths[index] == out.depth[0, : len(prompt)].tolist()


def test_a_sequence_that_ended_costs_nothing(monkeypatch):
    """An ended sequence takes part in later steps with no rows."""
    model = routed_model("fixed", "none")
    prompts = [random_ids(n, seed=n).tolist() for n in (4, 8)]
    events = generate(model, prompts, max_tokens=12)
    free = [event for event in events if isinstance(event, GeneratedToken)]
    of_first = [e.token for e in free if e.sequence == 0]
    of_second = [e.token for e in free if e.sequence == 1]
    eos = next(t for t in of_first if t not in of_second)
    ended = [
        e
        for e in generate(model, prompts, max_tokens=12, eos_token_id=eos)
        if isinstance(e, GeneratedToken)
    ]
    assert [e.token for e in ended if e.sequence == 0] == list(
        itertools.takewhile(lambda t: t != eos, of_first)
    )
    assert [e.token for e in ended if e.sequence == 1] == of_second


def test_weights_are_really_shared():
    """One module applied R times: a change of the block changes every recursion."""
    model = routed_model("fixed", "none")
    assert len(model.model.layers) == 4 == model.config.num_unique_layers
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()})
