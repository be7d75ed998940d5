"""Does the converted model say what its parent says? Logits on the same tokens, in fp32.

The parent runs layer by layer, each read, used and forgotten; so does a converted model that is
larger than memory allows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mor.config import ModelConfig
from mor.model.layers import Layer, RMSNorm, rotary_angles
from mor.model.rows import Rows
from mor.model.views import LocalKeys

TOKENS = 48
TOLERANCE = 1e-4
"""largest difference of a logit that counts as equal, where the weights are the parent's"""

Read = Callable[[str], Tensor]


def probe(config: ModelConfig) -> Tensor:
    """Return (1, T) token ids to compare on."""
    draw = torch.Generator().manual_seed(0)
    length = min(TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=draw)


@torch.no_grad()
def logits_at_full_depth(config: ModelConfig, ids_BT: Tensor, read: Read) -> Tensor:
    """Run every token through all layers as they stand unrolled, one layer in memory at a time.

    config  of a vanilla model, or of a MoR whose gates are 1 or absent
    read    weight by name
    Returns (B, T, V) in fp32
    """
    rows, _ = Rows.pack(ids_BT)
    embedding_VD = read("model.embed_tokens.weight").float()
    x_ND = F.embedding(rows.token_N, embedding_VD)
    rotary = rotary_angles(rows.position_N, config, dtype=x_ND.dtype)
    keys, everyone_N = LocalKeys(config, rows), torch.arange(len(rows))
    view, place = keys.own, 0
    for index, recursion, is_shared in unrolled(config):
        if is_shared and place % config.num_block_layers == 0:
            view = keys.recursion(recursion, rows, everyone_N)
        attend = (view if is_shared else keys.own).layer(place % config.num_block_layers)
        place += is_shared
        x_ND = _layer(config, index, is_shared, read)(x_ND, rotary, attend, recursion)
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.copy_(read("model.norm.weight").float())
    head_VD = embedding_VD if config.tie_word_embeddings else read("lm_head.weight").float()
    return F.linear(norm(x_ND), head_VD).unflatten(0, ids_BT.shape)


def unrolled(config: ModelConfig) -> list[tuple[int, int, bool]]:
    """Return (stored layer, recursion, whether it is of the block), in order of depth."""
    first_coda = config.num_unique_layers - config.num_coda_layers
    order = [(i, 0, False) for i in range(config.num_prelude_layers)]
    order += [
        (config.block_layer(r, place), r, True)
        for r in range(config.num_recursions)
        for place in range(config.num_block_layers)
    ]
    return order + [(i, 0, False) for i in range(first_coda, config.num_unique_layers)]


def _layer(config: ModelConfig, index: int, is_shared: bool, read: Read) -> Layer:
    with torch.device("meta"):
        layer = Layer(config, is_shared=is_shared)
    state = {name: read(f"model.layers.{index}.{name}").float() for name in layer.state_dict()}
    layer.load_state_dict(state, assign=True)
    return layer
