"""CPU kernels for decoding with small Llama layers, called through ctypes.

`load()` compiles them or says in one log line why it cannot; then the caller takes torch's path.
Weights, keys and values are bf16 or fp32; the residual stream and logits are always fp32. A row has
the same bits whatever the rows beside it and the number of threads. (One exception: where a later
row of the same table stores values that are not finite, earlier rows of that call may get NaN.)
Wrong shapes are bugs of ours: they are asserted.

Shapes: N rows, D width, H query heads, G key heads, K head size, V vocabulary, T block tables,
M pages of a table, P tokens of a page, R recursions, L layers of a group.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from mor.log import logger
from mor.ops.native.build import BuildError, open_library
from mor.ops.native.structs import RowsStruct
from mor.ops.native.weights import LayerGroup, PackedWeight


class NativeRows:
    """Rows of a call: where each stands, what it sees and where its keys and values go.

    position_N, recursion_N (from 0), table_N, count_N (keys it sees; 0 = nothing, attention gives
    0) int32; slot_N int64 (-1 = do not store); tables_TM int32; pool (pages, elements) in the
    weights' dtype, of which a page of `page_tokens` holds (layers, 2, G, P, K); `first_kv_layer` is
    the page's layer that the group's first one uses. Rows from `num_kv_rows` on make no keys and
    values; the last layer only makes keys and values for rows from `num_full_rows` on.
    `recursion_starts` (R + 1) int32 says where each recursion's rows begin; only low-rank additions
    need it, and rows then come in order of recursion.
    """

    def __init__(
        self,
        position_N: Tensor,
        recursion_N: Tensor,
        table_N: Tensor,
        count_N: Tensor,
        slot_N: Tensor,
        *,
        tables_TM: Tensor,
        pool: Tensor,
        page_tokens: int,
        first_kv_layer: int = 0,
        num_kv_rows: int | None = None,
        num_full_rows: int | None = None,
        recursion_starts: Tensor | None = None,
    ) -> None:
        rows = len(position_N)
        # the struct holds addresses: what they point to must live as long
        self.tensors = (position_N, recursion_N, table_N, count_N, slot_N, tables_TM, pool)
        self.recursion_starts = recursion_starts
        for tensor in (position_N, recursion_N, table_N, count_N):
            assert tensor.dtype == torch.int32 and len(tensor) == rows and tensor.is_contiguous()
        assert slot_N.dtype == torch.int64 and len(slot_N) == rows and slot_N.is_contiguous()
        assert tables_TM.dtype == torch.int32 and tables_TM.stride(1) == 1
        assert pool.dim() == 2 and pool.stride(1) == 1
        self.struct = RowsStruct(
            position_N.data_ptr(),
            recursion_N.data_ptr(),
            table_N.data_ptr(),
            count_N.data_ptr(),
            slot_N.data_ptr(),
            tables_TM.data_ptr(),
            None if recursion_starts is None else recursion_starts.data_ptr(),
            pool.data_ptr(),
            rows,
            rows if num_kv_rows is None else num_kv_rows,
            rows if num_full_rows is None else num_full_rows,
            tables_TM.stride(0),
            pool.stride(0),
            0,
            page_tokens,
            first_kv_layer,
        )


class CompiledKernels:
    """The compiled kernels; one instance, from `load()`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        p, i, l = c_void_p, c_int, c_int64  # noqa: E741
        kernels = {
            "mor_instructions": ([], c_char_p),
            "mor_linear": ([p, i, p, i, l, l, p, i, l, i], i),
            "mor_layers": ([p, p, p, i], i),
            "mor_attention": ([p, i, i, i, i, p, p, i], i),
            "mor_store": ([p, i, i, i, p, p], None),
            "mor_rms_norm": ([p, p, l, l, c_float, p, i, i], None),
            "mor_argmax": ([p, l, l, p, i], None),
        }
        for name, (arguments, result) in kernels.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
        self.c = library
        self.instructions: str = library.mor_instructions().decode()

    def pack_weight(self, weight: Tensor) -> PackedWeight:
        """Repack a weight (outputs, inputs), bf16 or fp32, for `linear`."""
        return PackedWeight(weight)

    def layer_group(self, layers: Sequence[Mapping[str, Tensor]], **kwargs: Any) -> LayerGroup:
        """Pack layers for `layers`; see LayerGroup."""
        return LayerGroup(layers, **kwargs)

    def linear(
        self,
        x: Tensor,
        weight: PackedWeight,
        *,
        out: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return x W^T, summed in fp32; x (N, inputs), fp32 or bf16, is rounded to W's dtype.

        out: where the result goes, (N, outputs) fp32 or, of bf16 weights, bf16; else a new tensor
        of `dtype`.
        """
        assert x.dim() == 2 and x.shape[1] == weight.inputs and x.is_contiguous()
        if out is None:
            out = torch.empty(len(x), weight.outputs, dtype=dtype)
        is_bf16 = weight.dtype == torch.bfloat16
        assert is_bf16 or out.dtype == x.dtype == torch.float32
        assert out.shape == (len(x), weight.outputs) and out.is_contiguous()
        check_memory(
            self.c.mor_linear(
                ctypes.byref(weight.struct),
                is_bf16,
                x.data_ptr(),
                _is_float(x.dtype),
                weight.inputs,
                len(x),
                out.data_ptr(),
                _is_float(out.dtype),
                weight.outputs,
                torch.get_num_threads(),
            )
        )
        return out

    def layers(self, x_ND: Tensor, group: LayerGroup, rows: NativeRows) -> None:
        """Run the group's layers on x_ND (fp32), in place; keys and values go to pages."""
        assert x_ND.dtype == torch.float32 and x_ND.is_contiguous()
        assert len(x_ND) == rows.struct.rows and x_ND.shape[1] == group.width
        assert rows.tensors[-1].dtype == group.dtype
        assert not group.low_rank or rows.recursion_starts is not None
        if not len(x_ND):
            return
        rows.struct.layer_stride = group.layer_stride_per_token * rows.struct.page_tokens
        check_memory(
            self.c.mor_layers(
                ctypes.byref(group.struct),
                ctypes.byref(rows.struct),
                x_ND.data_ptr(),
                torch.get_num_threads(),
            )
        )

    def paged_attention(
        self,
        q_NHK: Tensor,
        kv_P2GPK: Tensor,
        *,
        tables_TM: Tensor,
        table_N: Tensor,
        count_N: Tensor,
    ) -> Tensor:
        """Return softmax(q k^T / sqrt(K)) v of each row over the first count keys of its table.

        kv_P2GPK: one layer's view (pages, 2, G, P, K) of a pool, bf16 or fp32; out has its dtype.
        """
        rows, heads, size = q_NHK.shape
        out = torch.empty(rows, heads, size, dtype=kv_P2GPK.dtype)
        queries = q_NHK.float().contiguous()
        struct = _view_rows(kv_P2GPK, rows)
        struct.table, struct.count = table_N.data_ptr(), count_N.data_ptr()
        struct.tables, struct.tables_stride = tables_TM.data_ptr(), tables_TM.stride(0)
        assert table_N.dtype == count_N.dtype == tables_TM.dtype == torch.int32
        check_memory(
            self.c.mor_attention(
                ctypes.byref(struct),
                heads,
                kv_P2GPK.shape[2],
                size,
                kv_P2GPK.dtype == torch.bfloat16,
                queries.data_ptr(),
                out.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return out

    def store(self, k_NGK: Tensor, v_NGK: Tensor, kv_P2GPK: Tensor, slot_N: Tensor) -> None:
        """Write keys and values to their slots (page * P + offset) of a layer's view; -1 = none."""
        struct = _view_rows(kv_P2GPK, len(slot_N))
        assert slot_N.dtype == torch.int64
        struct.slot = slot_N.data_ptr()
        k_NGK, v_NGK = (one.to(kv_P2GPK.dtype).contiguous() for one in (k_NGK, v_NGK))
        self.c.mor_store(
            ctypes.byref(struct),
            k_NGK.shape[1],
            k_NGK.shape[2],
            kv_P2GPK.dtype == torch.bfloat16,
            k_NGK.data_ptr(),
            v_NGK.data_ptr(),
        )

    def rms_norm(
        self, x_ND: Tensor, gain_D: Tensor, eps: float, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the root-mean-square norm of fp32 rows, in fp32 or bf16; gain_D is fp32."""
        assert x_ND.dtype == gain_D.dtype == torch.float32 and x_ND.is_contiguous()
        out = torch.empty(x_ND.shape, dtype=dtype)
        self.c.mor_rms_norm(
            x_ND.data_ptr(),
            gain_D.data_ptr(),
            *x_ND.shape,
            eps,
            out.data_ptr(),
            _is_float(dtype),
            torch.get_num_threads(),
        )
        return out

    def argmax_rows(self, logits_NV: Tensor) -> Tensor:
        """Return the place of each row's largest logit (fp32), int64; -1 if that is not finite."""
        assert logits_NV.dtype == torch.float32 and logits_NV.is_contiguous()
        out_N = torch.empty(len(logits_NV), dtype=torch.int64)
        self.c.mor_argmax(
            logits_NV.data_ptr(), *logits_NV.shape, out_N.data_ptr(), torch.get_num_threads()
        )
        return out_N


@functools.cache
def load() -> CompiledKernels | None:
    """Return the kernels, compiled at first use, or None where they cannot be had."""
    try:
        kernels = CompiledKernels(open_library())
    except (BuildError, OSError) as error:
        logger.warning("CPU kernels: none, so torch's slower path is taken: %s", error)
        return None
    logger.info("CPU kernels: compiled, %s", kernels.instructions)
    return kernels


def _view_rows(kv_P2GPK: Tensor, rows: int) -> RowsStruct:
    _, _, heads, tokens, size = kv_P2GPK.shape
    assert kv_P2GPK.stride()[2:] == (tokens * size, size, 1) and kv_P2GPK.stride(1) == (
        heads * tokens * size
    )
    return RowsStruct(
        pool=kv_P2GPK.data_ptr(),
        rows=rows,
        page_stride=kv_P2GPK.stride(0),
        layer_stride=kv_P2GPK.stride(1),
        page_tokens=tokens,
    )


def _is_float(dtype: torch.dtype) -> bool:
    assert dtype in (torch.bfloat16, torch.float32)
    return dtype == torch.float32


def check_memory(is_done: int) -> None:
    """Raise MemoryError where a kernel says that it had none."""
    if not is_done:
        raise MemoryError("no memory is left for activations; use fewer rows in a call")
