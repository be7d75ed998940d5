"""`DeviceTick` on a GPU: what stands between its layers is a launch each."""

from __future__ import annotations

from torch import Tensor

from mor.engine.device_tick import IDLE, WENT_ON, DeviceRows, DeviceTick
from mor.engine.layers import LayerRows
from mor.ops.triton.tick import Kind, advance, join_and_ask, locate


class FusedTick(DeviceTick):
    """Its twin with the kernels of `mor.ops.triton.tick`; shapes as there."""

    def _join_and_ask(self, rows: DeviceRows, block_ND: Tensor) -> tuple[Tensor, Tensor]:
        router = self.router
        if router.joined_RD is None or not self.has_gate:
            return super()._join_and_ask(rows, block_ND)
        config, is_random = self.config, self.config.router == "random"
        return join_and_ask(
            rows.x_ND,
            block_ND,
            router.joined_RD,
            router.joined_bias_R,
            rows.threshold_NR,
            recursion_N=rows.recursion_N,
            limit_N=rows.limit_N,
            is_alive_N=rows.is_alive_N,
            gating=config.gating,
            factor=2.0 if config.gating == "residual" else config.router_alpha,
            shares_R=router.shares_R if is_random else None,
            position_N=rows.position_N,
            token_N=rows.token_N,
            seed=config.router_seed,
        )

    def advance(
        self, rows: DeviceRows, record_N2: Tensor, drawn_N: Tensor, goes_on_N: Tensor
    ) -> Tensor:
        return advance(
            drawn_N,
            goes_on_N,
            rows.end_NW,
            rows.last_N,
            is_alive_N=rows.is_alive_N,
            recursion_N=rows.recursion_N,
            position_N=rows.position_N,
            token_N=rows.token_N,
            length_N=rows.length_N,
            record_N2=record_N2,
            went_on=WENT_ON,
            idle=IDLE,
        )

    def _own_rows(self, rows: DeviceRows, is_in_N: Tensor) -> LayerRows:
        return self._locate(rows, is_in_N, self.layout.own_page_tokens, "own")

    def _block_rows(self, rows: DeviceRows) -> LayerRows:
        kind: Kind = "first" if self.keeps_first_keys else "each"
        return self._locate(rows, rows.is_alive_N, self.layout.block_page_tokens, kind)

    def _locate(self, rows: DeviceRows, is_in_N: Tensor, page_tokens: int, kind: Kind) -> LayerRows:
        places = locate(
            rows.slot_N,
            rows.position_N,
            rows.recursion_N,
            rows.count_NC,
            is_in_N,
            self.tables_TM,
            page_tokens=page_tokens,
            kind=kind,
        )
        return LayerRows(
            **places._asdict(),
            recursion_starts=(),
            tables_TM=self.tables_TM,
            num_kv_rows=len(is_in_N),
            num_full_rows=len(is_in_N),
            host_table_N=None,
            max_count=0,
        )
