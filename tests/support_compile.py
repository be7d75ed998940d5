"""Compile every kernel for a Hopper GPU on a machine without one; print which use tensor cores.

Runs as a command of its own, since Triton chooses between interpreter and compiler at import. The
wrappers run as they are: a stand-in driver names the GPU, and launches end once they are compiled.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class NoDriver:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def call_all(dtype: torch.dtype, *, K: int, G: int, group: int, P: int) -> None:
    """Call every wrapper once for each way in which its kernel is built."""
    from mor.ops.triton import decode, norm, prefill, select, store, tick

    N, H, D = 32, G * group, 576
    kv = torch.zeros(8, 2, 2, G, P, K, dtype=dtype)[:, 1]
    q_NHK, k_NGK = torch.zeros(N, H, K, dtype=dtype), torch.zeros(N, G, K, dtype=dtype)
    tables_TM, int_N = torch.zeros(16, 16, dtype=torch.int32), torch.zeros(N, dtype=torch.int32)
    long_N, float_N, x_ND = int_N.long(), int_N.float(), torch.zeros(N, D, dtype=dtype)
    turn = {"cos_CK": torch.zeros(64, K), "sin_CK": torch.zeros(64, K), "position_N": int_N}

    for num_splits in (1, 8):
        decode.paged_decode(q_NHK, kv, tables_TM, int_N, int_N, num_splits=num_splits)
    prefill.paged_prefill(q_NHK, kv, tables_TM, int_N, prefill.plan_tiles([0] * N, group=group))
    store.store(k_NGK, k_NGK, kv, long_N)
    store.rotate_and_store(q_NHK, k_NGK, k_NGK, kv, long_N, **turn)
    store.rotate(q_NHK, **turn)
    norm.add_rms_norm(x_ND, x_ND, torch.zeros(3, D), eps=1e-5, recursion_N=int_N)
    norm.add_rms_norm(x_ND, None, torch.zeros(D), eps=1e-5)
    norm.silu_mul(x_ND, x_ND)
    select.go_on(float_N, float_N, float_N > 0)
    select.scatter_rows(select.gather_rows(x_ND, long_N), long_N, x_ND)
    select.gather_rows(long_N, long_N, fill=-1)
    select.hash_uniform(long_N, long_N, seed=1, recursion=1)
    select.hash_uniform(int_N, int_N, seed=-(2**40), recursion=int_N)

    bool_N, table_NC = int_N > 0, torch.zeros(N, 4, dtype=torch.int64)
    for kind in ("own", "first", "each"):
        about = (long_N, long_N, long_N, table_NC, bool_N, tables_TM)
        tick.locate(*about, page_tokens=P, kind=kind)
    for shares_R in (None, torch.zeros(3, dtype=torch.float64)):
        tick.join_and_ask(
            x_ND, x_ND, torch.zeros(3, D), torch.zeros(3), torch.zeros(N, 3, dtype=torch.float64),
            recursion_N=long_N, limit_N=long_N, is_alive_N=bool_N, gating="residual", factor=2.0,
            shares_R=shares_R, position_N=long_N, token_N=long_N, seed=7,
        )  # fmt: skip
    state = {"recursion_N": long_N, "position_N": long_N, "token_N": long_N, "length_N": long_N}
    tick.advance(
        long_N, bool_N, table_NC, long_N, is_alive_N=bool_N, record_N2=table_NC[:, :2].contiguous(),
        went_on=-2, idle=-3, **state,
    )  # fmt: skip


def main() -> None:
    triton.runtime.driver.set_active(NoDriver())
    launch, ptx = JITFunction.run, defaultdict(list)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = launch(self, *args, grid=grid, warmup=True, **options)
        assert made.asm["cubin"], self.__name__
        ptx[self.__name__].append(made.asm["ptx"])
        return made

    JITFunction.run = compile_only
    call_all(torch.bfloat16, K=64, G=3, group=3, P=16)
    print(json.dumps({name: all("mma" in part for part in parts) for name, parts in ptx.items()}))


if __name__ == "__main__":
    main()
