"""Draws of tokens through ctypes: see sample.h. Shapes: M rows, V vocabulary."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.ops.native.compiled import CompiledKernels

DRAW = np.dtype(
    [
        ("temperature", "f8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("number", "f8"),
        ("top_k", "i8"),
    ]
)
"""Of each row: what its parameters say, top_k 0 for all, and a number of [0, 1)."""


class Draws:
    """Draws tokens with the compiled kernels."""

    def __init__(self, kernels: CompiledKernels) -> None:
        self._sample = kernels.c.mor_sample
        self._sample.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int]
        self._sample.restype = None

    def __call__(self, logit_MV: Tensor, best_M: Tensor, draws: npt.NDArray[np.void]) -> Tensor:
        """Return a token of every row, int64; -1 where best_M is.

        logit_MV  fp32
        best_M    what the argmax of the rows is, int64; -1 where that logit is not finite
        draws     M records of DRAW
        """
        assert logit_MV.dtype == torch.float32 and logit_MV.is_contiguous()
        assert draws.dtype == DRAW and len(draws) == len(logit_MV) and draws.flags.c_contiguous
        assert best_M.dtype == torch.int64 and best_M.is_contiguous()
        out_M = torch.empty_like(best_M)
        self._sample(
            logit_MV.data_ptr(),
            *logit_MV.shape,
            draws.ctypes.data_as(ctypes.c_void_p),
            best_M.data_ptr(),
            out_M.data_ptr(),
            torch.get_num_threads(),
        )
        return out_M
