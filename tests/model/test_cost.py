"""The cost model counts what the model does: parameters, FLOPs, pairs, bytes."""

import dataclasses
import functools

import pytest
from support_model import KINDS, OPTIONS, random_ids, small_config, small_model
from torch.utils.flop_counter import FlopCounterMode

from mor.bench.memory import saved_bytes
from mor.config import ModelConfig
from mor.model import cost
from mor.model.generate import Prefill, generate
from mor.model.mor import MoR


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle", "none"])
@pytest.mark.parametrize(("router", "gating"), KINDS)
def test_parameters_are_counted(router, gating, sharing, tied):
    layers = 6 if sharing == "cycle" else 8
    model = small_model(
        router, gating, sharing=sharing, num_hidden_layers=layers, tie_word_embeddings=tied
    )
    counted = cost.count_params(model.config)
    assert counted.unique == sum(p.numel() for p in model.parameters())
    embedding = model.model.embed_tokens.weight.numel() * (1 if tied else 2)
    assert counted.nonembedding == counted.unique - embedding


@pytest.mark.parametrize(("router", "options"), OPTIONS)
def test_parameters_and_flops_of_routers_are_counted(router, options):
    model = small_model(router, **options)
    assert cost.count_params(model.config).unique == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(random_ids(1, 6), rule="causal", implementation="reference")
    # The reference makes keys and values at every recursion, also where it drops them.
    config = model.config
    if config.kv_strategy == "shared":
        config = dataclasses.replace(config, kv_strategy="per_recursion")
    expected = cost.forward_flops(
        config,
        tokens=6,
        pairs=36,
        active_tokens=[6] * 3,
        active_pairs=[36] * 3,
        head_tokens=6,
    )
    # It passes every row through every exit map.
    expected += 6 * 2 * 2 * cost.exit_map_weights(config)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("rule", ["train", "causal"])
@pytest.mark.parametrize(("router", "options"), [*((r, {"gating": g}) for r, g in KINDS), *OPTIONS])
def test_the_fast_forward_spends_no_product_on_rows_that_left(router, options, rule):
    """The counter sees every product but fused attention: exactly those of the active rows.

    Shared keys and values are not made after recursion 1.
    """
    model = small_model(router, **options)
    ids = random_ids(2, 12)
    with FlopCounterMode(display=False) as counter:
        out = model(ids, rule=rule)
    expected = cost.forward_flops(
        model.config,
        tokens=24,
        pairs=0,
        active_tokens=[stats.num_active for stats in out.recursions],
        active_pairs=[0] * 3,
        head_tokens=24,
    )
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(("router", "gating"), KINDS)
def test_flops_equal_the_counter_on_the_reference_forward(router, gating):
    """The reference runs every token through every recursion, over full squares."""
    B, T = 2, 12
    model = small_model(router, gating)
    with FlopCounterMode(display=False) as counter:
        model(random_ids(B, T), rule="causal", implementation="reference")
    R = model.config.num_recursions
    expected = cost.forward_flops(
        model.config,
        tokens=B * T,
        pairs=B * T * T,
        active_tokens=[B * T] * R,
        active_pairs=[B * T * T] * R,
        head_tokens=B * T,
    )
    assert counter.get_total_flops() == expected


def test_training_is_three_times_the_forward_pass():
    model = small_model("fixed", "none")
    ids = random_ids(2, 12)
    with FlopCounterMode(display=False) as forward:
        model(ids, rule="causal", implementation="reference")
    with FlopCounterMode(display=False) as training:
        out = model(ids, labels=ids, rule="train", implementation="reference")
        out.loss_sum.backward()
    # The first layer's input needs a gradient too, for the embedding: exactly three times.
    assert training.get_total_flops() == 3 * forward.get_total_flops()


@pytest.mark.parametrize("kv_strategy", ["per_recursion", "shared", "hybrid"])
def test_attended_pairs_are_counted_by_brute_force(kv_strategy):
    model = small_model(kv_strategy=kv_strategy)
    ids = random_ids(1, 20)
    depths = model(ids, rule="causal").depth[0].tolist()
    config = model.config
    active_pairs = [
        sum(
            1
            for i, d in enumerate(depths)
            for e in depths[: i + 1]
            if d > r and (e > r or kv_strategy != "per_recursion")
        )
        for r in range(3)
    ]
    by_hand = cost.forward_flops(
        config,
        tokens=20,
        pairs=20 * 21 / 2,
        active_tokens=[sum(1 for d in depths if d > r) for r in range(3)],
        active_pairs=active_pairs,
        head_tokens=20,
    )
    assert cost.generation_flops(config, depths) == by_hand


def test_sequence_flops_of_static_top_k_are_those_of_its_depths():
    """Counts of a whole sequence depend on how many are active, not on which."""
    config = small_config()
    model = small_model()
    depths = model(random_ids(1, 12), rule="train").depth[0].tolist()
    assert cost.sequence_flops(config, 12) == pytest.approx(
        cost.generation_flops(config, depths), rel=1e-12
    )


def test_decode_flops_and_kv_bytes_of_the_twin_are_larger():
    config = small_config()
    assert cost.decode_flops_per_token(config, 100) < cost.decode_flops_per_token(
        config.twin(), 100
    )
    own, twin = cost.kv_bytes_per_token(config), cost.kv_bytes_per_token(config.twin())
    # 2 own layers and a block of 2 at mean depth 2, against 8 layers
    assert own / twin == pytest.approx(6 / 8)


@pytest.mark.parametrize("kv_strategy", ["per_recursion", "shared", "hybrid"])
def test_kv_bytes_are_those_of_the_cache(kv_strategy):
    model = small_model(kv_strategy=kv_strategy).float()
    prompt = random_ids(30).tolist()
    prefill = next(iter(generate(model, [prompt], max_tokens=1)))
    assert isinstance(prefill, Prefill)
    depths = prefill.prompt_depths[0]
    active = [sum(1 for d in depths if d > r) / 30 for r in range(3)]
    counted = 30 * cost.kv_bytes_per_token(model.config, element_bytes=4, active=active)
    assert prefill.kv_bytes == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("recursions", [1, 3])
def test_training_memory_estimate_is_within_a_quarter_of_what_is_saved(recursions):
    config = ModelConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_recursions=recursions,
        router="expert_choice" if recursions > 1 else "fixed",
    )
    model = MoR(config)
    ids = random_ids(8, 64)
    saved = saved_bytes(lambda: model(ids, labels=ids, rule="train"), model)
    measured = saved + 16 * cost.count_params(config).unique
    estimated = cost.training_bytes(config, micro_batch_tokens=ids.numel())
    assert estimated == pytest.approx(measured, rel=0.25)


def test_training_memory_follows_what_keeps_less():
    config = small_config(num_hidden_layers=14)
    bytes_of = functools.partial(cost.training_bytes, config, micro_batch_tokens=512)
    projections = sum(a * b for a, b in cost._projection_sizes(config).values())
    weights = cost.count_params(config).unique
    assert bytes_of() > bytes_of(recompute="recursion") > bytes_of(recompute="layer")
    assert bytes_of() - bytes_of(optimizer="muon") == 4 * config.num_unique_layers * projections
    frozen = bytes_of() - bytes_of(freeze="embedding")
    assert frozen == 12 * config.vocab_size * config.hidden_size
    assert bytes_of(freeze="prelude") < bytes_of(freeze="embedding") < 16 * weights + bytes_of()
