"""Promises of ModelConfig: defaults resolved once, what does not fit refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mor.config import ModelConfig, check_choice

ROUTED: dict[str, Any] = {"num_hidden_layers": 8, "num_recursions": 3, "router": "expert_choice"}


def test_defaults_follow_from_the_rest() -> None:
    config = ModelConfig(**ROUTED)
    assert config.capacity == (1.0, 2 / 3, 1 / 3)
    assert config.gating == "weighted"
    assert config.head_dim == 64
    assert config.capacity_depth == pytest.approx(2)
    assert ModelConfig(num_hidden_layers=8, num_recursions=3).capacity == (1.0,) * 3
    assert ModelConfig().gating == "none"
    assert (config.router_score, config.router_alpha) == ("sigmoid", 0.1)
    token = ModelConfig(**ROUTED | {"router": "token_choice"})
    assert (token.router_score, token.router_alpha, token.num_routers) == ("softmax", 1.0, 1)
    assert ModelConfig(**ROUTED, lora_rank=4).lora_alpha == 8


@pytest.mark.parametrize(
    ("sharing", "layers", "unique", "own"),
    [("middle_cycle", 8, 4, 2), ("cycle", 9, 3, 0), ("middle_cycle", 5, 3, 2)],
)
def test_layers_are_shared_as_the_map_says(
    sharing: Any, layers: int, unique: int, own: int
) -> None:
    fields: dict[str, Any] = {"num_hidden_layers": layers, "sharing": sharing}
    config = ModelConfig(**ROUTED | fields)
    assert (config.num_unique_layers, config.num_own_layers) == (unique, own)
    assert config.num_prelude_layers == config.num_coda_layers == own // 2


def test_the_twin_has_equal_layers_and_one_recursion() -> None:
    options: dict[str, Any] = {"kv_strategy": "hybrid", "lora_rank": 2, "relax_norms": True}
    twin = ModelConfig(**ROUTED, **options, recursion_encoding=True).twin()
    assert (twin.kv_strategy, twin.lora_rank, twin.relax_norms) == ("per_recursion", 0, False)
    assert (twin.num_recursions, twin.router, twin.gating, twin.capacity) == (
        1,
        "fixed",
        "none",
        (1.0,),
    )
    assert twin.num_unique_layers == twin.num_hidden_layers == 8


def test_a_config_file_reads_back(tmp_path: Path) -> None:
    config = ModelConfig(**ROUTED, capacity=(1, 0.5, 0.5), eos_token_id=3)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.load(tmp_path) == config
    assert ModelConfig.load(tmp_path / "config.json") == config


FIRST_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rope_theta rms_norm_eps "
    "tie_word_embeddings initializer_range bos_token_id eos_token_id num_recursions sharing "
    "router capacity gating router_score router_alpha router_body router_bias router_aux "
    "router_z_loss_coef capacity_warmup_steps router_threshold_rate router_aux_loss_coef "
    "router_balance router_balance_loss_coef router_balance_rate router_seed kv_strategy "
    "relax_norms recursion_encoding lora_rank lora_alpha lora_targets "
)
"""what config.json held when folders were first written; it never grows"""


def test_a_folder_of_the_first_days_still_loads() -> None:
    whole = ModelConfig(**ROUTED).to_dict()
    kept = ("model_type", "format_version", *FIRST_FIELDS.split())
    assert ModelConfig.from_dict({name: whole[name] for name in kept}) == ModelConfig(**ROUTED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 9}, "7 shared layers do not divide; use 11"),
        ({"coda_layers": 3}, "4 shared layers do not divide; use 10"),
        ({"prelude_layers": -2}, "prelude_layers is -2; give 0 or more, or -1"),
        ({"num_hidden_layers": 4}, "do not divide; use 5"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 577}, "does not divide by num_attention_heads 9"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 2}, "does not divide by num_key_value_heads 2"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"eos_token_id": 49152}, "eos_token_id is 49152, but the vocabulary has 49152"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"sharing": "middle"}, "did you mean middle_cycle"),
        ({"router": "expert"}, "did you mean expert_choice"),
        ({"gating": "residul"}, "did you mean residual"),
        ({"router": "threshold", "gating": "none"}, "learns through its gate"),
        ({"router": "threshold", "gating": "additive"}, "learns through its gate"),
        ({"sharing": "middle_sequence"}, "sharing middle_sequence serves the router fixed"),
        ({"router": "random", "router_aux": "router"}, "serves the router expert_choice"),
        ({"router_aux": "router", "gating": "none"}, "leaves top-k to what the gate teaches"),
        ({"router": "fixed", "capacity_warmup_steps": 3}, "serves routers with capacities"),
        ({"capacity_warmup_steps": -1}, "capacity_warmup_steps is -1"),
        ({"router_z_loss_coef": -1.0}, "router_z_loss_coef is -1.0"),
        ({"router_threshold_rate": 0.0}, "router_threshold_rate is 0.0"),
        ({"router_body": "mpl"}, "did you mean mlp"),
        ({"router": "token_choice", "capacity": (1, 0.6, 0.3)}, "uses all depths evenly; leave it"),
        ({"router": "token_choice", "capacity_warmup_steps": 3}, "not token_choice; use 0"),
        (
            {"router": "token_choice", "gating": "additive", "router_balance": "bias"},
            "token_choice would learn nothing",
        ),
        ({"router_score": "softmax"}, "router_score softmax serves the router token_choice"),
        ({"router_score": "tanh"}, "router_score 'tanh' is unknown"),
        ({"router_balance": "bias"}, "router_balance bias serves the router token_choice"),
        ({"exit_maps": True, "router": "fixed"}, "exit_maps serve routers that let tokens go"),
        ({"router_balance_rate": 2.0}, "router_balance_rate is 2.0"),
        ({"router_balance_loss_coef": math.nan}, "router_balance_loss_coef is nan"),
        ({"kv_strategy": "share"}, "did you mean shared"),
        ({"kv_strategy": "shared", "sharing": "none"}, "kv_strategy shared needs a block that is"),
        ({"kv_strategy": "hybrid", "router": "fixed"}, "hybrid equals per_recursion"),
        ({"relax_norms": True, "sharing": "none"}, "relax_norms needs a block that is shared"),
        (
            {"recursion_encoding": True, "router": "fixed", "num_recursions": 1},
            "recursion_encoding needs a block that is shared by 2 recursions or more",
        ),
        (
            {"lora_rank": 4, "router": "fixed", "sharing": "middle_sequence"},
            "lora_rank 4 needs a block that is shared",
        ),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_alpha": -2.0}, "lora_alpha is -2.0"),
        ({"lora_targets": ("q_pro",)}, "did you mean q_proj"),
        ({"lora_targets": ()}, "name each projection once, at least one"),
        (
            {"lora_rank": 2, "kv_strategy": "shared"},
            "leave k_proj and v_proj out",
        ),
        ({"capacity": (1, 0.5)}, "capacity has 2 values for 3 recursions"),
        ({"capacity": (1, 0.5, 0.6)}, "rises; a token that left cannot come back"),
        ({"capacity": (1, 0.5, 0)}, r"leaves \(0, 1\]"),
        ({"capacity": (1, math.nan, 0.5)}, r"leaves \(0, 1\]"),
        ({"capacity": (1.5, 1, 0.5)}, r"leaves \(0, 1\]"),
        ({"capacity": (0.9, 0.5, 0.5)}, "the first capacity is 0.9; give 1"),
        ({"router": "fixed", "capacity": (1, 0.5, 0.5)}, "choose the router expert_choice"),
        ({"num_recursions": 1}, "needs num_recursions of 2 or more"),
        ({"router_alpha": -1}, "router_alpha is -1"),
        ({"router_aux_loss_coef": math.inf}, "router_aux_loss_coef is inf"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**ROUTED | fields)


def test_a_choice_names_the_nearest_or_all() -> None:
    check_choice("x", "one", ("one", "two"))
    with pytest.raises(ValueError, match="x 'onee' is unknown; did you mean one"):
        check_choice("x", "onee", ("one", "two"))
    with pytest.raises(ValueError, match="choose from one, two"):
        check_choice("x", "99", ("one", "two"))
