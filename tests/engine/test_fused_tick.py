"""The kernels between a tick's layers do what the operators of its readable twin do."""

from __future__ import annotations

import copy

import pytest
import torch
from support_engine import CAPTURED, new_engine, served_model
from torch import Tensor

from mor.engine.device_tick import DeviceRows, DeviceTick
from mor.engine.layers import LayerRows
from mor.model.mor import MoR

pytest.importorskip("triton.language", reason="triton is not installed")
from mor.engine.fused_tick import FusedTick

N = 37


def both_ticks(model: MoR) -> tuple[DeviceTick, DeviceTick]:
    """A tick and its twin on the same rows, some alive, at any recursion."""
    engine = new_engine(model, backend="torch")
    layout, config = engine.layout, model.config
    draw = torch.Generator().manual_seed(3)

    def whole(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size or (N,), generator=draw)

    tables_TM = whole(0, 50, N * layout.num_tables, 9).int().to(model.device)
    ticks = []
    for kind in (FusedTick, DeviceTick):
        tick = kind(model, engine.groups, layout, num_rows=N, tables_TM=tables_TM)
        ticks.append(tick)
    R, W = config.num_recursions, ticks[0].rows.end_NW.shape[1]
    values = {
        "x_ND": torch.randn(N, config.hidden_size, generator=draw),
        "start_ND": torch.randn(N, config.hidden_size, generator=draw),
        "slot_N": torch.randperm(N, generator=draw),
        "is_alive_N": whole(0, 4) > 0,
        "position_N": whole(0, 30),
        "token_N": whole(0, 61),
        "recursion_N": whole(0, R),
        "count_NC": whole(0, 30, N, layout.num_tables),
        "limit_N": whole(1, R + 1),
        "threshold_NR": torch.randn(N, R, generator=draw).double() / 2,
        "length_N": whole(0, 9),
        "last_N": whole(5, 10),
        "end_NW": whole(-1, 9, N, W),
    }
    for tick in ticks:
        for name, value in values.items():
            tensor = getattr(tick.rows, name)
            tensor[:N].copy_(value[: len(tensor)])
    return ticks[0], ticks[1]


def assert_same_rows(one: DeviceRows, other: DeviceRows) -> None:
    for name, mine, its in zip(one._fields, one, other, strict=True):
        torch.testing.assert_close(mine, its, msg=lambda said, name=name: f"{name}: {said}")


def assert_same_places(one: LayerRows, other: LayerRows) -> None:
    for name in ("position_N", "recursion_N", "table_N", "count_N", "slot_N"):
        mine, its = getattr(one, name), getattr(other, name)
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("index", CAPTURED)
@torch.inference_mode()
def test_every_step_is_that_of_the_twin(index: int, device: str) -> None:
    model = copy.deepcopy(served_model(index, torch.float32)).to(device)
    ticks = both_ticks(model)
    rows = [tick.rows.first(N) for tick in ticks]
    is_in_N = rows[0].is_alive_N & (rows[0].position_N > 5)
    own = [tick._own_rows(of, is_in_N) for tick, of in zip(ticks, rows, strict=True)]
    assert_same_places(*own)
    block = [tick._block_rows(of) for tick, of in zip(ticks, rows, strict=True)]
    assert_same_places(*block)
    assert_same_rows(*rows)

    block_ND = torch.randn(N, model.config.hidden_size).to(device)
    goes_on_N = rows[0].is_alive_N & (rows[0].recursion_N + 1 < rows[0].limit_N)
    if model.config.router != "token_choice":
        made = [tick._join_and_ask(of, block_ND) for tick, of in zip(ticks, rows, strict=True)]
        torch.testing.assert_close(made[0][0], made[1][0])
        assert made[0][1].tolist() == made[1][1].tolist()
        goes_on_N = made[1][1]
        assert_same_rows(*rows)

    drawn_N = torch.randint(-1, 9, (N,)).to(device)
    enters = [
        tick.advance(of, tick.record_KN2[0, :N], drawn_N, goes_on_N)
        for tick, of in zip(ticks, rows, strict=True)
    ]
    torch.testing.assert_close(*(tick.record_KN2 for tick in ticks))
    assert enters[0].tolist() == enters[1].tolist()
    assert len(set(enters[0].tolist())) == 2, "some begin with a token and some do not"
    assert_same_rows(*rows)
