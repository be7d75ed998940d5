"""Cases for the CPU kernels: rows, pages and layers, and what plain torch makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mor.config import ModelConfig
from mor.model.layers import Layer, RMSNorm, rotary_angles
from mor.ops.native.compiled import CompiledKernels, NativeRows, load

NAN = float("nan")


def library() -> CompiledKernels:
    lib = load()
    if lib is None:
        pytest.skip("no C++ compiler that makes the CPU kernels")
    return lib


def places(table_M: Tensor, count: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Pages and offsets of the first tokens of a table."""
    token = torch.arange(count)
    return table_M[token // page_tokens].long(), token % page_tokens


def attend(q_HK: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> Tensor:
    """One row's attention, written out."""
    group = len(q_HK) // k_SGK.shape[1]
    k_SHK, v_SHK = k_SGK.repeat_interleave(group, 1), v_SGK.repeat_interleave(group, 1)
    score_HS = torch.einsum("hk,shk->hs", q_HK, k_SHK) / q_HK.shape[-1] ** 0.5
    return torch.einsum("hs,shk->hk", score_HS.softmax(-1), v_SHK)


@dataclass
class Case:
    """Rows of several requests that go through layers together."""

    layers: list[Layer]
    config: ModelConfig
    x_ND: Tensor
    pool: Tensor  # (pages, elements)
    page_layers: int
    fields: dict[str, Any]  # of NativeRows

    @property
    def pages(self) -> Tensor:
        c, tokens = self.config, self.fields["page_tokens"]
        heads, size = c.num_key_value_heads, c.head_dim
        return self.pool.view(len(self.pool), self.page_layers, 2, heads, tokens, size)

    def run(self, lib: CompiledKernels, **changes: Any) -> tuple[Tensor, Tensor]:
        """Return the stream and the pages after the kernels."""
        fields = {**self.fields, **changes}
        x_ND, pool = self.x_ND.clone(), self.pool.clone()
        rows = NativeRows(**fields, pool=pool)
        lib.layers(x_ND, self.group(lib), rows)
        return x_ND, pool

    def group(self, lib: CompiledKernels):
        c = self.config
        positions = torch.arange(c.max_position_embeddings)
        rotary = rotary_angles(positions, c, dtype=torch.float32)
        half = c.head_dim // 2
        return lib.layer_group(
            [layer.state_dict() for layer in self.layers],
            heads=c.num_attention_heads,
            key_heads=c.num_key_value_heads,
            head_size=c.head_dim,
            eps=c.rms_norm_eps,
            cos_CK=rotary.cos_N1K[:, 0, :half].contiguous(),
            sin_CK=rotary.sin_N1K[:, 0, :half].contiguous(),
            low_rank_scale=c.lora_alpha / c.lora_rank if c.lora_rank else 0.0,
        )

    @torch.no_grad()
    def expected(self, **changes: Any) -> tuple[Tensor, Tensor]:
        """Return the same from torch, in float64, one row's attention after another."""
        fields = {**self.fields, **changes}
        rows = len(self.x_ND)
        num_kv_rows, num_full_rows = (
            fields.get("num_kv_rows", rows),
            fields.get("num_full_rows", rows),
        )
        recursion_N, slot_N = fields["recursion_N"], fields["slot_N"]
        tokens = fields["page_tokens"]
        pool = self.pool.double()
        pages = pool.view(self.pages.shape)
        x_ND = self.x_ND.double()
        rotary = rotary_angles(fields["position_N"], self.config, dtype=torch.float64)
        stored = torch.arange(rows)[(torch.arange(rows) < num_kv_rows) & (slot_N >= 0)]
        page_S, offset_S = slot_N[stored] // tokens, slot_N[stored] % tokens
        for number, packed in enumerate(self.layers):
            layer = Layer(self.config, is_shared=True).double()
            layer.load_state_dict(packed.state_dict())
            of_recursion = [
                (int(r), (recursion_N == r).nonzero()[:, 0]) for r in recursion_N.unique()
            ]
            parts = [layer.before(x_ND[a], rotary.take(a), r, True) for r, a in of_recursion]
            order = torch.cat([a for _, a in of_recursion]).argsort()
            q_NHK, k_NGK, v_NGK = (torch.cat(one)[order] for one in zip(*parts, strict=True))
            place = pages[:, fields["first_kv_layer"] + number]
            place[page_S, 0, :, offset_S] = k_NGK[stored]
            place[page_S, 1, :, offset_S] = v_NGK[stored]
            out_NHK = torch.zeros_like(q_NHK)
            for n, count in enumerate(fields["count_N"].tolist()):
                table = fields["tables_TM"][fields["table_N"][n]]
                page, offset = places(table, count, fields["page_tokens"])
                if count:
                    k, v = place[page, 0, :, offset], place[page, 1, :, offset]
                    out_NHK[n] = attend(q_NHK[n], k, v)
            wanted = num_full_rows if number == len(self.layers) - 1 else rows
            for r, a in of_recursion:
                a = a[a < wanted]
                x_ND[a] = layer.after(x_ND[a], out_NHK[a], r)
        return x_ND, pool


def make_case(
    requests: list[tuple[int, int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    page_tokens: int = 5,
    first_kv_layer: int = 0,
    **fields: Any,
) -> Case:
    """Requests are (keys stored before, new rows, recursion), in order of recursion."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "num_recursions": 3,
        "num_hidden_layers": 8,
    }
    config = ModelConfig(**{**values, **fields})
    made = [Layer(config, is_shared=True) for _ in range(layers)]
    for layer in made:
        for param in layer.parameters():
            torch.nn.init.normal_(param, std=param.shape[-1] ** -0.5)
        for norm in (one for one in layer.modules() if isinstance(one, RMSNorm)):
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
        layer.to(dtype)
    longest = max(old + new for old, new, _ in requests)
    per_table = -(-longest // page_tokens)
    pages = torch.randperm(per_table * len(requests) + 1)
    tables_TM = pages[: per_table * len(requests)].view(len(requests), -1).int().contiguous()
    page_layers = first_kv_layer + layers + 1
    per_layer = 2 * config.num_key_value_heads * page_tokens * config.head_dim
    pool = torch.full((len(pages), page_layers * per_layer), NAN, dtype=dtype)
    rows = [
        (t, old + i, recursion)
        for t, (old, new, recursion) in enumerate(requests)
        for i in range(new)
    ]
    table_N, token_N, recursion_N = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    page_N = tables_TM[table_N.long(), token_N.long() // page_tokens].long()
    starts = torch.searchsorted(recursion_N, torch.arange(config.num_recursions + 1))
    case = Case(
        made,
        config,
        torch.randn(len(rows), config.hidden_size),
        pool,
        page_layers,
        {
            "position_N": token_N + 3,
            "recursion_N": recursion_N.contiguous(),
            "table_N": table_N.contiguous(),
            "count_N": token_N + 1,
            "slot_N": page_N * page_tokens + token_N.long() % page_tokens,
            "tables_TM": tables_TM,
            "page_tokens": page_tokens,
            "first_kv_layer": first_kv_layer,
            "recursion_starts": starts.int() if config.lora_rank else None,
        },
    )
    for t, (old, _, _) in enumerate(requests):
        page, offset = places(tables_TM[t], old, page_tokens)
        shape = (old, page_layers, 2, config.num_key_value_heads, config.head_dim)
        case.pages[page, :, :, :, offset] = torch.randn(shape).to(dtype)
    return case
