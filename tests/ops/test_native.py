"""CPU kernels give what torch gives, whatever the shapes, the neighbours and the threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support_native import NAN, attend, library, make_case, places
from torch.nn import functional as F

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
MIXED = [(9, 1, 0), (0, 7, 0), (64, 1, 1), (3, 2, 1), (130, 1, 2)]


@pytest.fixture
def lib():
    return library()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def assert_near(actual, expected, dtype, *, times=1.0):
    scale = expected.abs().max()
    error = ((actual.double() - expected.double()).abs().max() / scale).item()
    assert error <= times * DTYPES[dtype], f"{error:.1e}"


@both_dtypes
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 17, 33, 130, 500])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 7), (96, 64), (100, 33), (577, 130)])
def test_linear_matches_torch_for_any_sizes(lib, dtype, rows, outputs, inputs):
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).to(dtype)
    expected = F.linear(x.to(dtype).double(), weight.double())
    packed = lib.pack_weight(weight)
    out = torch.empty(rows, outputs)
    assert lib.linear(x, packed, out=out) is out
    assert_near(out, expected, torch.float32)
    assert_near(lib.linear(x.to(dtype), packed, dtype=dtype), expected, dtype)


@both_dtypes
def test_a_row_of_a_product_has_the_same_bits_alone_and_in_any_batch(lib, dtype):
    x, packed = torch.randn(300, 70), lib.pack_weight(torch.randn(210, 70).to(dtype))
    whole = lib.linear(x, packed)
    for rows in (1, 2, 5, 8, 20, 130):
        assert torch.equal(lib.linear(x[:rows].contiguous(), packed), whole[:rows])
    with threads(1):
        assert torch.equal(lib.linear(x, packed), whole)


def test_nan_and_infinity_come_through_a_product(lib):
    x, packed = torch.ones(3, 8), lib.pack_weight(torch.ones(20, 8))
    x[1, 3], x[2, 2] = NAN, float("inf")
    out = lib.linear(x, packed)
    assert out[0].eq(8).all() and out[1].isnan().all() and out[2].isinf().all()


def paged(dtype, counts, *, heads, key_heads, size, page_tokens, table_N=None):
    """Random queries, and a pool where only the places of real keys are not NaN."""
    table_N = torch.arange(len(counts)) if table_N is None else torch.tensor(table_N)
    per_table = -(-max(counts) // page_tokens)
    tables = int(table_N.max()) + 1
    tables_TM = torch.randperm(per_table * tables).view(tables, per_table).int()
    pool = torch.full((per_table * tables, 2, key_heads, page_tokens, size), NAN, dtype=dtype)
    for table, count in zip(table_N, counts, strict=True):
        page, offset = places(tables_TM[table], count, page_tokens)
        pool[page, :, :, offset] = torch.randn(count, 2, key_heads, size).to(dtype)
    q_NHK = torch.randn(len(counts), heads, size).to(dtype).float()
    names = {
        "tables_TM": tables_TM,
        "table_N": table_N.int(),
        "count_N": torch.tensor(counts).int(),
    }
    return q_NHK, pool, names


def attended(q_NHK, pool, *, tables_TM, table_N, count_N):
    out = torch.zeros_like(q_NHK)
    for n, count in enumerate(count_N.tolist()):
        page, offset = places(tables_TM[table_N[n]], count, pool.shape[3])
        k, v = pool[page, 0, :, offset].float(), pool[page, 1, :, offset].float()
        out[n] = attend(q_NHK[n], k, v) if count else 0.0
    return out


SHAPES = [(4, 2, 16, 5), (3, 3, 24, 1), (9, 3, 64, 16), (6, 6, 40, 16), (30, 1, 8, 7)]


@both_dtypes
@pytest.mark.parametrize(("heads", "key_heads", "size", "page_tokens"), SHAPES)
def test_attention_matches_torch_for_ragged_counts(lib, dtype, heads, key_heads, size, page_tokens):
    shape = {"heads": heads, "key_heads": key_heads, "size": size, "page_tokens": page_tokens}
    q, pool, names = paged(dtype, [1, 0, 17, 64, 65, 200, 1100, 3], **shape)
    out = lib.paged_attention(q, pool, **names)
    assert_near(out, attended(q, pool, **names), dtype)


@both_dtypes
def test_rows_of_one_table_match_torch_in_any_order(lib, dtype):
    counts = [*range(500, 540), 7, 0, 900, 3]
    shape = {"heads": 6, "key_heads": 2, "size": 32, "page_tokens": 16}
    q, pool, names = paged(dtype, counts, **shape, table_N=[0] * len(counts))
    out = lib.paged_attention(q, pool, **names)
    assert_near(out, attended(q, pool, **names), dtype)


@both_dtypes
def test_attention_of_a_row_has_the_same_bits_alone_and_beside_others(lib, dtype):
    counts = [*range(700, 730), 40, 0, 900]
    shape = {"heads": 6, "key_heads": 2, "size": 32, "page_tokens": 5}
    q, pool, names = paged(dtype, counts, **shape, table_N=[0] * len(counts))
    whole = lib.paged_attention(q, pool, **names)
    for n in range(len(counts)):
        one = {name: names[name][n : n + 1].contiguous() for name in ("table_N", "count_N")}
        alone = lib.paged_attention(q[n : n + 1], pool, tables_TM=names["tables_TM"], **one)
        assert torch.equal(alone[0], whole[n])
    with threads(1):
        assert torch.equal(lib.paged_attention(q, pool, **names), whole)


@both_dtypes
def test_store_writes_slots_and_nothing_else(lib, dtype):
    k, v = torch.randn(2, 3, 2, 8).to(dtype)
    pool = torch.full((4, 2, 2, 5, 8), NAN, dtype=dtype)
    lib.store(k, v, pool, torch.tensor([12, -1, 3]))
    expected = torch.full_like(pool, NAN)
    expected[2, 0, :, 2], expected[2, 1, :, 2] = k[0], v[0]
    expected[0, 0, :, 3], expected[0, 1, :, 3] = k[2], v[2]
    assert torch.equal(pool.isnan(), expected.isnan())
    assert torch.equal(pool.nan_to_num(), expected.nan_to_num())


def check_layers(lib, case, dtype, **changes):
    x, pool = case.run(lib, **changes)
    expected, expected_pool = case.expected(**changes)
    num_full_rows = changes.get("num_full_rows", len(x))
    assert_near(x[:num_full_rows], expected[:num_full_rows], dtype, times=2)
    # nothing is written where nothing belongs
    assert torch.equal(pool.isnan(), expected_pool.isnan())
    assert_near(pool.nan_to_num(), expected_pool.nan_to_num(), dtype, times=2)


LAYER_CASES: dict[str, dict[str, Any]] = {
    "mixed": {},
    "odd width": {"hidden_size": 37, "intermediate_size": 51},
    "head of 24": {"head_dim": 24, "num_attention_heads": 3, "num_key_value_heads": 1},
    "no groups": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48},
    "pages of one token": {"page_tokens": 1},
    "as the 135M model": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "page_tokens": 16,
    },
    "third layer of its pages": {"first_kv_layer": 2},
    "gains of each recursion": {"relax_norms": True},
    "low-rank additions": {"lora_rank": 3, "lora_targets": ("q_proj", "v_proj", "o_proj")},
    "biases": {"attention_bias": True},
    "normed heads": {"qk_norm": True},
    "biases and normed heads of 24": {
        "attention_bias": True,
        "qk_norm": True,
        "head_dim": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "low-rank everywhere": {
        "relax_norms": True,
        "lora_rank": 5,
        "lora_targets": ("k_proj", "gate_proj", "up_proj", "down_proj"),
    },
}


@both_dtypes
@pytest.mark.parametrize("name", LAYER_CASES)
def test_layers_match_the_plain_ones(lib, dtype, name):
    check_layers(lib, make_case(MIXED, dtype=dtype, **LAYER_CASES[name]), dtype)


@both_dtypes
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 33, 130])
def test_layers_match_the_plain_ones_for_a_prompt(lib, dtype, rows):
    check_layers(lib, make_case([(5, rows, 0)], dtype=dtype), dtype)


@both_dtypes
def test_rows_without_keys_of_their_own_see_the_stored_ones(lib, dtype):
    case = make_case(MIXED, dtype=dtype)
    slot_N = case.fields["slot_N"].clone()
    slot_N[8:] = -1
    # those rows do not store, so they see what was there before
    count_N = case.fields["count_N"].clone()
    count_N[8:] = torch.tensor([64, 3, 3, 130])
    check_layers(lib, case, dtype, num_kv_rows=8, slot_N=slot_N, count_N=count_N)


@both_dtypes
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("num_full_rows", [0, 1, 9])
def test_the_last_layer_makes_only_keys_for_rows_without_logits(lib, dtype, layers, num_full_rows):
    case = make_case(MIXED, dtype=dtype, layers=layers)
    if num_full_rows:
        check_layers(lib, case, dtype, num_full_rows=num_full_rows)
    else:
        _, pool = case.run(lib, num_full_rows=0)
        _, expected = case.expected(num_full_rows=0)
        assert_near(pool.nan_to_num(), expected.nan_to_num(), dtype, times=2)


@both_dtypes
def test_padded_rows_change_nothing(lib, dtype):
    case = make_case(MIXED, dtype=dtype)
    x, pool = case.run(lib)
    for name, value in (("position_N", 0), ("table_N", 0), ("count_N", 0), ("slot_N", -1)):
        padding = torch.full((3,), value, dtype=case.fields[name].dtype)
        case.fields[name] = torch.cat((case.fields[name], padding))
    case.fields["recursion_N"] = F.pad(case.fields["recursion_N"], (0, 3))
    case.x_ND = F.pad(case.x_ND, (0, 0, 0, 3))
    padded_x, padded_pool = case.run(lib)
    assert torch.equal(padded_x[: len(x)], x) and not padded_x.isnan().any()
    assert torch.equal(padded_pool.nan_to_num(), pool.nan_to_num())


@both_dtypes
def test_layers_give_the_same_bits_with_any_number_of_threads(lib, dtype):
    case = make_case([*MIXED, (1100, 9, 2)], dtype=dtype)
    x, pool = case.run(lib)
    for count in (1, 3):
        with threads(count):
            other_x, other_pool = case.run(lib)
        assert torch.equal(other_x, x)
        assert torch.equal(other_pool.nan_to_num(), pool.nan_to_num())


def test_norm_matches_torch(lib):
    x, gain = torch.randn(7, 37), torch.randn(37)
    expected = F.rms_norm(x, (37,), gain, 1e-5)
    assert_near(lib.rms_norm(x, gain, 1e-5), expected, torch.float32)
    assert_near(lib.rms_norm(x, gain, 1e-5, dtype=torch.bfloat16), expected, torch.bfloat16)


def test_argmax_is_the_first_largest_and_minus_one_where_that_is_not_finite(lib):
    logits = torch.randn(6, 1003).round(decimals=1)
    logits[1] = -float("inf")
    logits[2, 7] = logits[3, 1002] = NAN
    expected = logits.max(dim=1).indices
    first = [int((row == row.max()).nonzero()[0]) for row in logits[[0, 4, 5]]]
    out = lib.argmax_rows(logits)
    assert out[[0, 4, 5]].tolist() == first and out[[1, 2, 3]].tolist() == [-1] * 3
    assert out.dtype == expected.dtype
