"""Which stored layer an unrolled one uses: the paper's maps, written from its table."""

import pytest
import torch
from support_model import random_ids, small_config, small_model

from mor.model.mor import MoR


def from_the_table(sharing, layers, recursions):
    """Source: arXiv 2507.10524 Table 1, l counted from 0."""
    shared = layers if sharing in ("cycle", "sequence") else layers - 2
    block = shared // recursions
    maps = {
        "cycle": lambda u: u % block,
        "sequence": lambda u: u // recursions,
        "middle_cycle": lambda u: (u - 1) % block + 1,
        "middle_sequence": lambda u: (u - 1) // recursions + 1,
        "none": lambda u: u,
    }
    last = max(maps[sharing](u) for u in range(layers - 1)) + 1
    is_middle = sharing not in ("cycle", "sequence")
    first = [0] if is_middle else []
    middle = [maps[sharing](u) for u in range(len(first), layers - len(first))]
    return first + middle + ([last] if is_middle else [])


@pytest.mark.parametrize("recursions", [1, 2, 3])
@pytest.mark.parametrize(
    "sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence", "none"]
)
def test_unrolled_layers_follow_the_papers_maps(sharing, recursions):
    layers = 6 if sharing in ("cycle", "sequence") else 8
    config = small_config(
        "fixed", "none", sharing=sharing, num_hidden_layers=layers, num_recursions=recursions
    )
    prelude, coda = config.num_prelude_layers, config.num_coda_layers
    order = [
        *range(prelude),
        *(
            config.block_layer(r, place)
            for r in range(recursions)
            for place in range(config.num_block_layers)
        ),
        *range(config.num_unique_layers - coda, config.num_unique_layers),
    ]
    assert order == from_the_table(sharing, layers, recursions)
    assert sorted(set(order)) == list(range(config.num_unique_layers))


@torch.no_grad()
def test_shared_layers_equal_a_plain_model_with_copied_weights():
    """A recursive model is the unrolled one whose layers hold the same numbers."""
    for sharing in ("cycle", "sequence", "middle_cycle", "middle_sequence"):
        layers = 6 if sharing in ("cycle", "sequence") else 8
        model = small_model("fixed", "none", sharing=sharing, num_hidden_layers=layers)
        plain = small_model("fixed", "none", num_recursions=1, num_hidden_layers=layers)
        weights = model.state_dict()
        unrolled = {k: v for k, v in weights.items() if ".layers." not in k}
        for u, stored in enumerate(from_the_table(sharing, layers, 3)):
            for name in plain.state_dict():
                if name.startswith(f"model.layers.{u}."):
                    unrolled[name] = weights[name.replace(f".{u}.", f".{stored}.", 1)]
        plain.load_state_dict(unrolled)
        ids = random_ids(2, 9)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)


def small_weights(router, gating, **fields):
    torch.manual_seed(0)
    return MoR(small_config(router, gating, **fields)).state_dict()


def test_models_of_one_seed_begin_with_the_same_weights_where_they_have_the_same():
    """Routers, low-rank parts and further layers change no other weight's draw."""
    plain = small_weights("fixed", "none", num_recursions=1, num_hidden_layers=4)
    routed = small_weights("expert_choice", "residual", num_hidden_layers=8, lora_rank=2)
    assert {name for name in plain if "layers.3" in name} <= routed.keys()
    for name, weight in plain.items():
        assert torch.equal(weight, routed[name]), name
    layers = [plain[f"model.layers.{u}.self_attn.q_proj.weight"] for u in range(4)]
    assert not any(torch.equal(layers[0], other) for other in layers[1:])
