"""Whole prompts through the model in one pass on the device, beside ticks that decode.

    embed, prelude -> R times: block, join, routers -> coda -> head, draw -> the ticks' rows

A row is a token of a prompt. All rows take part in every step, as in `DeviceTick`, whose functions
run here on rows that stand at one recursion; a token that left sees no key and leaves none. At the
end the token drawn after each prompt has passed the prelude and stands among the rows of the ticks.
Shapes: as in `device_tick`, N tokens of prompts, Q prompts, C tables of a request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.engine.device_tick import DeviceRows, DeviceTick


class DevicePrompts:
    """Runs passes on its rows; the host fills `at_N3` and `next`, and reads `record_X`."""

    def __init__(self, tick: DeviceTick, *, num_rows: int, num_prompts: int) -> None:
        """Take at most so many tokens of so many prompts a pass."""
        self.tick, self.num_prompts = tick, num_prompts
        device = tick.tables_TM.device

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.int64, device=device)

        self.rows = tick.new_rows(num_rows)
        self.next = tick.new_rows(num_prompts)
        """what each prompt's first drawn token is as a row of a tick; before a pass `count_NC` and
        `length_N` are those before the prompt, `is_alive_N` tells which prompts there are"""
        self.at_N3 = zeros(num_rows, 3)
        """of each token: itself, its position, its prompt; tokens of a prompt in a row, in order"""
        self.is_in_N = zeros(num_rows).bool()
        """rows that hold a token"""
        self.span_Q3 = zeros(num_prompts, 3)
        """of each prompt: its first and its last row here, and the row of the tick that it gets"""
        self.record_X = zeros(num_prompts + num_rows)
        """what the last pass did: the token drawn after each prompt, then the depth of each row"""

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Where these are False nothing is stored that anybody reads."""
        return self.is_in_N, self.next.is_alive_N

    @torch.inference_mode()
    def run(self, num_rows: int, *, draws: bool) -> None:
        """Run a pass over the first rows; `draws` where some prompt has a temperature."""
        tick, rows, to, is_in_N = (
            self.tick, self.rows.first(num_rows), self.next, self.is_in_N[:num_rows],
        )  # fmt: skip
        token_N, position_N, prompt_N = self.at_N3[:num_rows].unbind(1)
        first_Q, last_Q, row_Q = self.span_Q3.unbind(1)
        rows.token_N.copy_(token_N)
        rows.position_N.copy_(position_N)
        for name in ("slot_N", "limit_N", "threshold_NR"):
            getattr(rows, name).copy_(getattr(to, name)[prompt_N])
        rows.is_alive_N.copy_(is_in_N)
        rows.x_ND.copy_(tick.run_prelude(rows, is_in_N))
        if tick.router.is_token_choice:
            rows.start_ND.copy_(rows.x_ND)
        depth_N, count_QC, exit_gate_N = self._run_block(rows, prompt_N, first_Q, last_Q)
        out_ND = tick.run_coda(rows, rows.x_ND, is_in_N, depth_N, exit_gate_N)
        drawn_Q = tick.draw(to, out_ND[last_Q], draws=draws)
        length_Q = to.length_N + 1
        enters_Q = to.is_alive_N & tick.goes_further(to, drawn_Q, length_Q)
        self.record_X[: self.num_prompts].copy_(drawn_Q)
        self.record_X[self.num_prompts :][:num_rows].copy_(depth_N)
        to.token_N.copy_(drawn_Q * enters_Q)
        to.x_ND.copy_(tick.run_prelude(to, enters_Q))
        changed = {"count_NC": count_QC, "length_N": length_Q, "is_alive_N": enters_Q}
        if tick.router.is_token_choice:
            changed["start_ND"] = to.x_ND
        for name, tensor in to._asdict().items():
            if len(tensor):
                getattr(tick.rows, name).index_copy_(0, row_Q, changed.get(name, tensor))

    def _run_block(
        self, rows: DeviceRows, prompt_N: Tensor, first_Q: Tensor, last_Q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take rows through the block until they leave; returns depths, counts, exit gates."""
        tick, R = self.tick, self.tick.config.num_recursions
        depth_N = torch.zeros_like(rows.recursion_N)
        count_QC = self.next.count_NC.clone()
        first_N, exit_gate_N = first_Q[prompt_N], None
        for recursion in range(R):
            rows.recursion_N.fill_(recursion)
            is_alive_N = rows.is_alive_N.clone()
            if not tick.keeps_first_keys:
                until_N = is_alive_N.cumsum(0)
                before_N = until_N - is_alive_N.long()
                rank_N = before_N - before_N[first_N]
                rows.count_NC.copy_(self.next.count_NC[prompt_N] + rank_N[:, None])
                count_QC[:, 1 + recursion] += until_N[last_Q] - before_N[first_Q]
            x_ND, goes_on_N, exit_gate_N = tick.recurse(rows)
            rows.x_ND.copy_(x_ND)
            rows.is_alive_N.copy_(goes_on_N)
            depth_N += is_alive_N
        return depth_N, count_QC, exit_gate_N
