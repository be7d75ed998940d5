"""Top-k takes the best, the earlier on a tie; the random draw depends on its own token alone."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.ops.select import hash_draw, hash_uniform, top_k_count, top_k_mask


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 12))
def test_top_k_mask_is_what_sorting_by_hand_gives(scores, k):
    mask = top_k_mask(torch.tensor([scores], dtype=torch.float32), torch.tensor([k]))[0]
    by_hand = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert sorted(by_hand) == mask.nonzero()[:, 0].tolist()


def test_top_k_never_takes_a_token_that_left():
    scores = torch.tensor([[0.1, -math.inf, 0.3], [-math.inf, -math.inf, -math.inf]])
    assert top_k_mask(scores, torch.tensor([3, 3])).tolist() == [
        [True, False, True],
        [False, False, False],
    ]


def test_count_is_the_papers():
    lengths = torch.tensor([0, 1, 2, 3, 9, 300])
    for capacity in (1.0, 2 / 3, 1 / 2, 1 / 3, 0.1):
        expected = [0 if n == 0 else max(1, math.floor(capacity * n + 1e-9)) for n in lengths]
        assert top_k_count(lengths, capacity).tolist() == expected


def test_random_draw_is_uniform_and_independent_of_the_batch():
    position = torch.arange(20000)
    token = torch.randint(0, 1000, (20000,), generator=torch.Generator().manual_seed(0))
    draw = hash_uniform(position, token, seed=1, recursion=1)
    assert draw.min() >= 0 and draw.max() < 1
    shares = torch.histc(draw, bins=10, min=0, max=1) / len(draw)
    assert (shares - 0.1).abs().max() < 0.01
    for other in (
        hash_uniform(position, token, seed=2, recursion=1),
        hash_uniform(position, token, seed=1, recursion=2),
    ):
        assert abs(torch.corrcoef(torch.stack([draw, other]))[0, 1]) < 0.03
    some = torch.tensor([7, 19, 4242])
    assert torch.equal(hash_uniform(position[some], token[some], seed=1, recursion=1), draw[some])


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(INT64, INT64, INT64)
def test_draw_is_splitmix_by_hand_whatever_the_batch(seed, sample, step):
    def mix(state):
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        return state ^ (state >> 31)

    stream = mix((seed * 0x9E3779B97F4A7C15 + sample * 0xC2B2AE3D27D4EB4F) % 2**64)
    by_hand = (mix((stream + step * 0x165667B19E3779F9) % 2**64) >> 11) / 2**53
    columns = [torch.tensor([5, value, 7]) for value in (seed, sample, step)]
    assert float(hash_draw(*columns)[1]) == by_hand
    assert float(hash_draw(*(column[1:2] for column in columns))) == by_hand


def test_draws_of_seeds_samples_and_steps_are_uniform_and_unrelated():
    many, zero = torch.arange(20000), torch.zeros(20000, dtype=torch.int64)
    streams = [
        hash_draw(many, zero, zero),
        hash_draw(zero, many, zero),
        hash_draw(zero, zero, many),
        hash_draw(zero + 1, zero, many),
        hash_draw(zero, zero + 1, many),
    ]
    for draw in streams:
        assert draw.min() >= 0 and draw.max() < 1
        shares = torch.histc(draw, bins=10, min=0, max=1) / len(draw)
        assert (shares - 0.1).abs().max() < 0.01
    related = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert related.abs().max() < 0.03
    successive = torch.corrcoef(torch.stack([streams[2][1:], streams[2][:-1]]))[0, 1]
    assert successive.abs() < 0.03


def test_the_hash_takes_one_recursion_or_each_rows_own():
    position, token = torch.arange(40), torch.arange(40) * 7
    own = torch.arange(40) % 3
    mixed = hash_uniform(position, token, seed=2**62 + 5, recursion=own)
    for recursion in range(3):
        alone = hash_uniform(position, token, seed=2**62 + 5, recursion=recursion)
        assert torch.equal(mixed[own == recursion], alone[own == recursion])
