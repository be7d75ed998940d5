"""What a model costs: parameters, FLOPs, keys and values, memory, as functions of the depth.

One multiply-add is two FLOPs. Grouped-query attention, router and head are counted; embedding
look-ups, norms and activations are not. `active` is always the share of tokens active at each
recursion, so the mean depth is its sum. Training is three times the forward pass, less where
weights are frozen.
Formulas: FACTS of arXiv 2507.10524 counted honestly (the paper ignores grouped heads and the head).
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mor.config import ModelConfig

Freeze = Literal["none", "embedding", "prelude"]
FREEZE: tuple[Freeze, ...] = ("none", "embedding", "prelude")


class ParamCount(NamedTuple):
    unique: int
    """weights stored"""
    nonembedding: int
    """stored weights without embedding and head"""
    effective: int
    """weights that a token of full depth passes, counted each time"""


def layer_params(config: ModelConfig) -> int:
    """Weights of one layer, norms included."""
    d, k = config.hidden_size, config.head_dim
    attention = 2 * d * k * (config.num_attention_heads + config.num_key_value_heads)
    if config.attention_bias:
        attention += k * (config.num_attention_heads + 2 * config.num_key_value_heads)
    attention += 2 * k if config.qk_norm else 0
    return attention + 3 * d * config.intermediate_size + 2 * d


def count_params(config: ModelConfig) -> ParamCount:
    """Count parameters; the thresholds are buffers and not counted."""
    d, R = config.hidden_size, config.num_recursions
    embedding = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    rest = d + config.num_routers * router_params(config)  # last norm and routers
    rest += R * d if config.recursion_encoding else 0
    maps = (R - 1) * exit_map_weights(config)
    apart = recursion_layer_params(config)
    # A layer's own gains take the place of its first ones.
    gains = 2 * d if config.relax_norms else 0
    own = config.num_unique_layers * layer_params(config) + rest
    own += config.num_block_layers * (R * apart - gains)
    unrolled = config.num_hidden_layers * layer_params(config) + rest
    unrolled += config.num_block_layers * R * (apart - gains)
    return ParamCount(embedding + own + maps, own + maps, embedding + unrolled)


def recursion_layer_params(config: ModelConfig) -> int:
    """Weights of one shared layer that one recursion has for itself: norm gains and LoRA."""
    gains = 2 * config.hidden_size if config.relax_norms else 0
    return gains + _lora_params(config)


def _lora_params(config: ModelConfig) -> int:
    if not config.lora_rank:
        return 0
    sizes = _projection_sizes(config)
    return config.lora_rank * sum(sum(sizes[target]) for target in config.lora_targets)


def _projection_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's projections."""
    d, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (d, q),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (q, d),
        "gate_proj": (d, inner),
        "up_proj": (d, inner),
        "down_proj": (inner, d),
    }


def router_params(config: ModelConfig) -> int:
    """Weights of one router, and of the auxiliary one beside it."""
    if not config.has_router:
        return 0
    return (_router_weights(config) + _router_biases(config)) * (2 if config.has_aux_router else 1)


def _router_weights(config: ModelConfig) -> int:
    hidden, outputs = config.router_hidden_size, config.router_outputs
    if hidden:
        return hidden * (config.hidden_size + outputs)
    return config.hidden_size * outputs


def _router_biases(config: ModelConfig) -> int:
    return config.router_hidden_size + config.router_outputs if config.router_bias else 0


def router_flops(config: ModelConfig) -> int:
    """FLOPs to score one candidate."""
    return 2 * _router_weights(config) * (2 if config.has_aux_router else 1)


def linear_flops(config: ModelConfig) -> int:
    """FLOPs of one layer's matrix products for one token, LoRA left out."""
    return 2 * sum(inputs * outputs for inputs, outputs in _projection_sizes(config).values())


def block_linear_flops(config: ModelConfig, recursion: int) -> int:
    """FLOPs of a shared layer's matrix products for one token active at a recursion (from 0)."""
    flops = linear_flops(config) + 2 * _lora_params(config)
    return flops - (2 * _key_value_params(config) if _reads_first_keys(config, recursion) else 0)


def _reads_first_keys(config: ModelConfig, recursion: int) -> bool:
    """Tell whether a recursion makes no keys and values."""
    return config.kv_strategy == "shared" and recursion > 0


def _key_value_params(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.num_key_value_heads * config.head_dim


def pair_flops(config: ModelConfig) -> int:
    """FLOPs of one layer for one pair of a query and a key it sees."""
    return 4 * config.num_attention_heads * config.head_dim


def forward_flops(
    config: ModelConfig,
    *,
    tokens: float,
    pairs: float,
    active_tokens: Sequence[float],
    active_pairs: Sequence[float],
    head_tokens: float,
) -> float:
    """Sum a forward pass from counts.

    tokens, pairs                what prelude and coda see: rows, and attended (query, key) pairs
    active_tokens, active_pairs  the same at each recursion
    head_tokens                  rows whose logits are computed
    """
    pair = pair_flops(config)
    flops = config.num_own_layers * (tokens * linear_flops(config) + pairs * pair)
    flops += head_tokens * 2 * config.hidden_size * config.vocab_size
    candidates = tokens
    for r, (active, attended) in enumerate(zip(active_tokens, active_pairs, strict=True)):
        if r < config.num_routers:
            flops += candidates * router_flops(config)
        linear = block_linear_flops(config, r)
        flops += config.num_block_layers * (active * linear + attended * pair)
        candidates = active
    return flops + 2 * exit_map_weights(config) * (active_tokens[0] - active_tokens[-1])


def exit_map_weights(config: ModelConfig) -> int:
    """Weights of the map that one token which leaves early passes."""
    return config.hidden_size**2 if config.exit_maps else 0


def sequence_flops(
    config: ModelConfig, length: int, *, active: Sequence[float] | None = None, head: bool = True
) -> float:
    """FLOPs of one forward pass over a sequence, active tokens spread evenly over it.

    active  share of tokens at each recursion; the capacities unless given
    """
    shares = config.capacity if active is None else active
    sees_all = config.kv_strategy != "per_recursion"
    pairs = _causal_pairs(length)
    return forward_flops(
        config,
        tokens=length,
        pairs=pairs,
        active_tokens=[share * length for share in shares],
        active_pairs=[
            share * pairs if sees_all else _causal_pairs(share * length) for share in shares
        ],
        head_tokens=length if head else 0,
    )


def _causal_pairs(count: float) -> float:
    return count * (count + 1) / 2


def training_flops_per_token(
    config: ModelConfig,
    length: int,
    *,
    active: Sequence[float] | None = None,
    freeze: Freeze = "none",
) -> float:
    """FLOPs of forward and backward for one token of a packed row of `length` tokens.

    active  share of tokens at each recursion; the capacities unless given
    freeze  what keeps its weights; no gradient is worked out for it, or for what comes before
    """
    flops = 3 * sequence_flops(config, length, active=active) / length
    if freeze != "none":
        flops -= 2 * config.hidden_size * config.vocab_size
    if freeze == "prelude":
        pairs = _causal_pairs(length) * pair_flops(config) / length
        flops -= 2 * config.num_prelude_layers * (linear_flops(config) + pairs)
    return flops


def warm_share(share: float, step: int, warmup_steps: int) -> float:
    """Share of tokens that a recursion takes after `step` steps, falling from 1 to its capacity.

    c + (1 - c) (1 + cos(pi min(1, s / W))) / 2
    """
    if not warmup_steps:
        return share
    done = min(1.0, step / warmup_steps)
    return share + (1 - share) * (1 + math.cos(math.pi * done)) / 2


@functools.lru_cache(maxsize=64)
def _warmup_flops(config: ModelConfig, length: int, freeze: Freeze) -> tuple[float, ...]:
    """FLOPs per token of the first 0, 1, .. W steps together, while capacities warm up."""
    W, total = config.capacity_warmup_steps, [0.0]
    for step in range(W):
        shares = tuple(warm_share(share, step, W) for share in config.capacity)
        cost = training_flops_per_token(config, length, active=shares, freeze=freeze)
        total.append(total[-1] + cost)
    return tuple(total)


def training_flops(
    config: ModelConfig,
    length: int,
    *,
    steps: int,
    batch_tokens: int,
    shallow_steps: int = 0,
    freeze: Freeze = "none",
) -> float:
    """FLOPs of so many optimizer steps, forward and backward, capacity warm-up counted.

    shallow_steps  the first ones, in which every token takes one recursion alone
    freeze         what keeps its weights
    """
    once = (1.0, *[0.0] * (config.num_recursions - 1))
    warm, shallow = _warmup_flops(config, length, freeze), min(steps, shallow_steps)
    warming = min(steps - shallow, config.capacity_warmup_steps)
    flops = warm[warming]
    for count, active in ((shallow, once), (steps - shallow - warming, config.capacity)):
        flops += count * training_flops_per_token(config, length, active=active, freeze=freeze)
    return flops * batch_tokens


def num_shallow_steps(steps: int, shallow_share: float) -> int:
    """Return how many of the steps of a training are shallow."""
    return int(shallow_share * steps)


@functools.lru_cache(maxsize=64)
def steps_for(
    config: ModelConfig,
    length: int,
    *,
    flops: float,
    batch_tokens: int,
    shallow_share: float = 0.0,
    freeze: Freeze = "none",
) -> float:
    """Optimizer steps that so many FLOPs pay for, the last of them in part.

    shallow_share  share of the steps, the first ones, in which tokens take one recursion alone
    freeze         what keeps its weights
    """
    if not shallow_share and not config.capacity_warmup_steps:
        return flops / batch_tokens / training_flops_per_token(config, length, freeze=freeze)

    def cost(steps: int) -> float:
        shallow = num_shallow_steps(steps, shallow_share)
        size = {"steps": steps, "batch_tokens": batch_tokens, "shallow_steps": shallow}
        return training_flops(config, length, **size, freeze=freeze)

    whole = bisect.bisect_right(range(2**62), flops, key=cost) - 1
    return whole + (flops - cost(whole)) / (cost(whole + 1) - cost(whole))


def decode_flops_per_token(
    config: ModelConfig, context: int, *, active: Sequence[float] | None = None
) -> float:
    """FLOPs to decode one token after `context` tokens, at the given shares."""
    shares = config.capacity if active is None else active
    sees_all = config.kv_strategy != "per_recursion"
    return forward_flops(
        config,
        tokens=1,
        pairs=context + 1,
        active_tokens=shares,
        active_pairs=[share * ((1 if sees_all else share) * context + 1) for share in shares],
        head_tokens=1,
    )


def generation_flops(
    config: ModelConfig, depths: Sequence[int], *, head_tokens: int | None = None
) -> float:
    """FLOPs to run tokens of these depths one after the other, attended keys counted exactly.

    A token of depth r is active at recursions 1..r and sees the earlier ones active there, or all
    earlier ones where keys of recursion 1 serve.
    head_tokens  tokens whose logits are computed; all unless given
    """
    active_tokens = [0.0] * config.num_recursions
    active_pairs = [0.0] * config.num_recursions
    sees_all = config.kv_strategy != "per_recursion"
    for seen, depth in enumerate(depths, 1):
        for r in range(depth):
            active_tokens[r] += 1
            active_pairs[r] += seen if sees_all else active_tokens[r]
    return forward_flops(
        config,
        tokens=len(depths),
        pairs=_causal_pairs(len(depths)),
        active_tokens=active_tokens,
        active_pairs=active_pairs,
        head_tokens=len(depths) if head_tokens is None else head_tokens,
    )


def kv_bytes_per_token(
    config: ModelConfig, *, element_bytes: int = 2, active: Sequence[float] | None = None
) -> float:
    """Bytes of keys and values that a token leaves behind on average."""
    shares = config.capacity if active is None else active
    a_layer = 2 * config.num_key_value_heads * config.head_dim * element_bytes
    kept = shares[0] if config.kv_strategy == "shared" else sum(shares)
    return a_layer * (config.num_own_layers + config.num_block_layers * kept)


def kv_bytes(config: ModelConfig, depths: Sequence[int], *, element_bytes: int = 2) -> int:
    """Bytes of keys and values that tokens of these depths leave behind."""
    a_layer = 2 * config.num_key_value_heads * config.head_dim * element_bytes
    kept = len(depths) if config.kv_strategy == "shared" else sum(depths)
    return a_layer * (config.num_own_layers * len(depths) + config.num_block_layers * kept)


def weight_bytes_per_step(
    config: ModelConfig, *, element_bytes: int = 2, active: Sequence[float] | None = None
) -> float:
    """Bytes of weights read to decode one token alone: the block once per recursion it takes."""
    shares = config.capacity if active is None else active
    layers = config.num_own_layers + config.num_block_layers * sum(shares)
    weights = layers * layer_params(config)
    weights += config.num_block_layers * sum(shares) * _lora_params(config)
    if config.kv_strategy == "shared":
        weights -= config.num_block_layers * sum(shares[1:]) * _key_value_params(config)
    if config.recursion_encoding:
        weights += sum(shares) * config.hidden_size
    weights += exit_map_weights(config) * (shares[0] - shares[-1])
    head = config.vocab_size * config.hidden_size
    routers = router_params(config) * sum((1.0, *shares)[: config.num_routers])
    return element_bytes * (weights + head + config.hidden_size + routers)


def saved_floats_per_token(config: ModelConfig) -> float:
    """Numbers that one layer keeps for its backward pass, for one token.

    Two norm inputs and outputs with their scales, rotated q, k, v (k and v repeated for
    their groups), attention's output, gate, up and their products. Held to the measured bytes by a
    test.
    """
    d, f = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    repeated = 2 * q if q != kv else 2 * kv
    return 4 * d + 2 * q + repeated + 4 * f


def training_bytes(
    config: ModelConfig,
    *,
    micro_batch_tokens: int,
    element_bytes: int = 4,
    recompute: str = "none",
    optimizer: str = "adamw",
    freeze: Freeze = "none",
) -> float:
    """Estimate peak memory of training: fp32 weights, gradients, moments, activations.

    AdamW has two moments of a weight, Muon one of a projection's. What is recomputed keeps its
    inputs, and one layer or recursion at a time all that its backward pass needs.
    """
    # Capacities that warm up are 1 in the first step.
    deep = config.num_recursions if config.capacity_warmup_steps else sum(config.capacity)
    whole, inputs = config.num_own_layers + config.num_block_layers * deep, 0.0
    if recompute == "layer":
        whole, inputs = 1.0, whole
    if recompute == "recursion":
        whole, inputs = config.num_own_layers + config.num_block_layers, deep
    floats = whole * saved_floats_per_token(config) + inputs * config.hidden_size
    stream = config.hidden_size * (4 + 2 * config.num_recursions)
    activations = micro_batch_tokens * (floats + stream) * element_bytes
    trained, layers = count_params(config).unique, config.num_unique_layers
    if freeze != "none":
        heads = 1 if config.tie_word_embeddings else 2
        trained -= heads * config.vocab_size * config.hidden_size
    if freeze == "prelude":
        trained -= config.num_prelude_layers * layer_params(config)
        layers -= config.num_prelude_layers
    moments = 2 * trained - (layers * linear_flops(config) // 2 if optimizer == "muon" else 0)
    return 4 * (count_params(config).unique + trained + moments) + activations
