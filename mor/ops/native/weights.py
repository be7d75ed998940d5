"""Weights in the order in which the CPU kernels read them: alone, and as groups of layers.

R recursions, I inputs, r rank; the other letters are those of compiled.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mor.ops.native.structs import GroupStruct, LayerStruct, ProjectionStruct, WeightStruct

PANEL = 16  # outputs of a panel of weights, as kPanel in vector.h


class PackedWeight:
    """A weight (outputs, inputs) in the order in which the kernels read it."""

    def __init__(self, weight: Tensor) -> None:
        assert weight.dtype in (torch.bfloat16, torch.float32) and weight.dim() == 2
        self.outputs, self.inputs = weight.shape
        self.dtype = weight.dtype
        per_step = 2 if weight.dtype == torch.bfloat16 else 1
        panels, steps = -(-self.outputs // PANEL), -(-self.inputs // per_step)
        padded = weight.new_zeros(panels * PANEL, steps * per_step)
        padded[: self.outputs, : self.inputs] = weight.detach()
        self.data = padded.view(panels, PANEL, steps, per_step).transpose(1, 2).contiguous()
        self.struct = WeightStruct(self.data.data_ptr(), steps, panels, self.outputs)


class LayerGroup:
    """Packed weights of layers that run one after another in a call."""

    def __init__(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        *,
        heads: int,
        key_heads: int,
        head_size: int,
        eps: float,
        cos_CK: Tensor,
        sin_CK: Tensor,
        low_rank_scale: float = 0.0,
    ) -> None:
        """Pack layers, given as `mor.model.layers.Layer.state_dict()`.

        cos_CK, sin_CK: rotary factors in fp32, (context, K / 2).
        """
        assert head_size % 2 == 0 and heads % key_heads == 0
        for table in (cos_CK, sin_CK):
            assert table.dtype == torch.float32 and table.is_contiguous()
            assert table.shape[1] == head_size // 2
        self.width = layers[0]["input_layernorm.weight"].shape[-1]
        self.dtype = layers[0]["mlp.down_proj.weight"].dtype
        self.layer_stride_per_token = 2 * key_heads * head_size
        self.recursions = 1
        self.low_rank = 0
        self._kept: list[Any] = [cos_CK, sin_CK]
        structs = (LayerStruct * len(layers))(*(self._layer(one, low_rank_scale) for one in layers))
        self._kept.append(structs)
        self.struct = GroupStruct(
            ctypes.addressof(structs),
            cos_CK.data_ptr(),
            sin_CK.data_ptr(),
            len(layers),
            self.width,
            self.recursions,
            self.low_rank,
            heads,
            key_heads,
            head_size,
            self.dtype == torch.bfloat16,
            eps,
        )

    def _layer(self, tensors: Mapping[str, Tensor], scale: float) -> LayerStruct:
        gains = [
            self._keep(tensors[f"{name}.weight"].detach().float().contiguous())
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        attention = [f"self_attn.{name}_proj" for name in "qkv"]
        if gains[0].dim() == 2:
            self.recursions = len(gains[0])
        return LayerStruct(
            self._projection(tensors, attention, scale),
            self._projection(tensors, ["self_attn.o_proj"], scale),
            self._projection(tensors, ["mlp.gate_proj", "mlp.up_proj"], scale, in_turns=True),
            self._projection(tensors, ["mlp.down_proj"], scale),
            gains[0].data_ptr(),
            gains[1].data_ptr(),
            self.width if gains[0].dim() == 2 else 0,
            self._address(_bias(tensors, attention)),
            *(self._address(tensors.get(f"self_attn.{name}_norm.weight")) for name in "qk"),
        )

    def _address(self, vector: Tensor | None) -> int | None:
        """Keep a vector in fp32 and say where it lies; None without one."""
        if vector is None:
            return None
        return self._keep(vector.detach().float().contiguous()).data_ptr()

    def _projection(
        self,
        tensors: Mapping[str, Tensor],
        names: list[str],
        scale: float,
        *,
        in_turns: bool = False,
    ) -> ProjectionStruct:
        weights = [tensors[f"{name}.weight"].detach() for name in names]
        packed = self._pack(_joined(weights, in_turns=in_turns))
        low = [tensors.get(f"{name}.recursion_A") for name in names]
        with_low = [i for i, a in enumerate(low) if a is not None]
        if not with_low:
            return ProjectionStruct(packed.struct, None, None)
        a_RrI = torch.cat([tensors[f"{names[i]}.recursion_A"].detach() for i in with_low], dim=1)
        self.recursions, rank, _ = a_RrI.shape
        self.low_rank = max(self.low_rank, -(-rank // PANEL) * PANEL)
        pairs = []
        for r in range(self.recursions):
            # One product adds to all parts: each reads its own places of what A made.
            parts, first = [], 0
            for i, weight in enumerate(weights):
                part = weight.new_zeros(len(weight), rank)
                if i in with_low:
                    b = tensors[f"{names[i]}.recursion_B"][r].detach()
                    part[:, first : first + b.shape[1]] = scale * b
                    first += b.shape[1]
                parts.append(part)
            pairs.append((self._pack(a_RrI[r]), self._pack(_joined(parts, in_turns=in_turns))))
        a = (WeightStruct * self.recursions)(*(pair[0].struct for pair in pairs))
        b = (WeightStruct * self.recursions)(*(pair[1].struct for pair in pairs))
        self._kept += [a, b]
        return ProjectionStruct(packed.struct, ctypes.addressof(a), ctypes.addressof(b))

    def _pack(self, weight: Tensor) -> PackedWeight:
        return self._keep(PackedWeight(weight))

    def _keep(self, thing: Any) -> Any:
        self._kept.append(thing)
        return thing


def _bias(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor | None:
    """Return the biases of projections in the places of their joined outputs; None without."""
    found = [tensors.get(f"{name}.bias") for name in names]
    columns = [bias.detach()[:, None] for bias in found if bias is not None]
    return _joined(columns, in_turns=False)[:, 0] if columns else None


def _joined(parts: list[Tensor], *, in_turns: bool) -> Tensor:
    """Join weights along their outputs, or panel by panel in turns.

    The first is padded to whole panels, so that queries can be made without keys and values.
    """
    first, *others = parts
    padded = []
    for part in (first, torch.cat(others)) if others else (first,):
        panels = part.new_zeros(-(-len(part) // PANEL), PANEL, part.shape[1])
        panels.view(-1, part.shape[1])[: len(part)] = part
        padded.append(panels)
    joined = torch.stack(padded, dim=1) if in_turns else torch.cat(padded)
    return joined.reshape(-1, parts[0].shape[1])
