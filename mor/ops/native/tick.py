"""One tick of rows of mixed depth, through ctypes: see tick.h for what each call does.

Shapes: D width, R recursions.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.ops.native.compiled import CompiledKernels, LayerGroup, check_memory

Bools = npt.NDArray[np.bool_]

GATINGS = {"none": 0, "weighted": 1, "residual": 2, "additive": 3}
DECIDING = {"fixed": 0, "expert_choice": 1, "threshold": 1, "random": 2}


class _State(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "gate", "position", "token", "depth", "limit")),
        *((name, c_void_p) for name in ("is_replayed", "threshold", "count", "reserved", "held")),
        *((name, c_void_p) for name in ("serves", "tables")),
        *((name, c_void_p) for name in ("embedding", "router", "router_bias", "encoding")),
        ("share", c_void_p),
        ("pool", c_void_p),
        ("width", c_int64),
        ("recursions", c_int64),
        ("num_tables", c_int64),
        ("table_width", c_int64),
        ("page_stride", c_int64),
        ("layer_stride_per_token", c_int64),
        ("own_page_tokens", c_int64),
        ("block_page_tokens", c_int64),
        ("prelude_layers", c_int64),
        ("seed", c_int64),
        ("embedding_is_bf16", c_int32),
        ("keeps_first_keys", c_int32),
        ("gating", c_int32),
        ("deciding", c_int32),
        ("gate_factor", c_float),
    )


class _Flights(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("rows", "slot", "active", "length", "recursion")),
        ("num_rows", c_int64),
        ("num_flights", c_int64),
    )


class State:
    """Arrays that outlive a tick, and what the model is, by the names of tick.h's `State`.

    Arrays and tensors are given as they are and stay where they are; None is a null pointer.
    """

    def __init__(self, **fields: Any) -> None:
        self._kept = fields
        names = [field[0] for field in _State._fields_]
        assert sorted(names) == sorted(fields), set(names) ^ set(fields)
        self.struct = _State(**{name: _address(value) for name, value in fields.items()})


class Ticks:
    """The three calls of a tick on one state."""

    def __init__(self, kernels: CompiledKernels, state: State) -> None:
        self._c, self._state = kernels.c, ctypes.byref(state.struct)
        self._kept = state
        flights, byref = POINTER(_Flights), c_void_p
        self._c.mor_enter.argtypes = [byref, flights, byref, c_int]
        self._c.mor_recursion.argtypes = [byref, flights, byref, c_int, c_void_p, c_void_p]
        self._c.mor_leave.argtypes = [byref, flights, byref, c_int, c_int64, c_void_p, c_float]
        self._c.mor_leave.argtypes += [c_int, c_void_p]

    def enter(self, flights: Flights, prelude: LayerGroup | None) -> None:
        """Embed, run the prelude, and note the gate of recursion 1."""
        check_memory(
            self._c.mor_enter(self._state, flights.struct, _group(prelude), torch.get_num_threads())
        )

    def recursion(self, flights: Flights, block: LayerGroup) -> tuple[Bools, Bools]:
        """Run the block and route; returns which rows take another recursion, and which flights'

        requests hold pages for nothing, now that unused places are given back.
        """
        goes_on = np.empty(flights.struct.num_rows, np.bool_)
        has_spare = np.empty(flights.struct.num_flights, np.bool_)
        check_memory(
            self._c.mor_recursion(
                self._state,
                flights.struct,
                _group(block),
                torch.get_num_threads(),
                goes_on.ctypes.data,
                has_spare.ctypes.data,
            )
        )
        return goes_on, has_spare

    def leave(
        self,
        flights: Flights,
        coda: LayerGroup | None,
        num_full: int,
        *,
        gain_D: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Run coda and last norm; returns the first num_full rows, (M, D)."""
        out = torch.empty(num_full, len(gain_D), dtype=dtype)
        check_memory(
            self._c.mor_leave(
                self._state,
                flights.struct,
                _group(coda),
                torch.get_num_threads(),
                num_full,
                gain_D.data_ptr(),
                eps,
                dtype == torch.bfloat16,
                out.data_ptr(),
            )
        )
        return out


class Flights:
    """Rows of a call; int64 arrays, by the names of tick.h's `Flights`."""

    def __init__(
        self,
        rows: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        active: npt.NDArray[np.int64],
        length: npt.NDArray[np.int64],
        recursion: npt.NDArray[np.int64],
    ) -> None:
        about = np.array((slots, active, length, recursion))
        self._kept = rows, about
        first, step = about.ctypes.data, about.strides[0]
        addresses = [first + step * i for i in range(4)]
        self.struct = _Flights(rows.ctypes.data, *addresses, len(rows), len(slots))


def _address(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return value.data_ptr()
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return value.ctypes.data
    return value


def _group(group: LayerGroup | None) -> Any:
    return None if group is None else ctypes.byref(group.struct)
