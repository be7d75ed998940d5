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
from mor.engine.graphs import Inbox

TOLD = (
    "slot_N", "position_N", "count_NC", "limit_N", "threshold_NR", "length_N", "last_N", "end_NW",
    "temperature_N", "seed_N", "sample_N",
)  # fmt: skip
"""what the host knows of a row before it begins"""


class DevicePrompts:
    """Runs passes on its rows; the host fills `inbox`, and reads `record_X`."""

    def __init__(self, tick: DeviceTick, *, num_rows: int, num_prompts: int) -> None:
        """Take at most so many tokens of so many prompts a pass."""
        self.tick, self.num_prompts = tick, num_prompts
        device = tick.tables_TM.device
        self.rows = tick.new_rows(num_rows)
        fresh = tick.new_rows(num_prompts)
        told = {name: getattr(fresh, name).cpu() for name in TOLD}
        row_Q = torch.full((num_prompts,), len(tick.rows.x_ND) - 1)  # the one that nobody reads
        self.inbox = Inbox(
            device,
            num_2=torch.zeros(2, dtype=torch.int64),
            token_N=torch.zeros(num_rows, dtype=torch.int64),
            position_of_N=torch.zeros(num_rows, dtype=torch.int64),
            prompt_N=torch.zeros(num_rows, dtype=torch.int64),
            first_Q=torch.zeros_like(row_Q),
            last_Q=torch.zeros_like(row_Q),
            row_Q=row_Q,
            **told,
        )
        """how many tokens and prompts there are; of each token itself, its position and its prompt,
        tokens of a prompt in a row; of each prompt its first and last row here, the row of the tick
        that it gets, and what that row is to be: counts and length are those before the prompt"""
        self.next = fresh._replace(**{name: self.inbox[name] for name in TOLD})
        """what each prompt's first drawn token is as a row of a tick"""
        self.number_N = torch.arange(num_rows, device=device)
        self.number_Q = torch.arange(num_prompts, device=device)
        self.record_X = torch.zeros(num_prompts + num_rows, dtype=torch.int64, device=device)
        """what the last pass did: the token drawn after each prompt, then the depth of each row"""

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Where these are 0 nothing is stored that anybody reads."""
        return (self.inbox["num_2"],)

    @torch.inference_mode()
    def run(self, num_rows: int, *, draws: bool) -> None:
        """Run a pass over the first rows; `draws` where some prompt has a temperature."""
        tick, rows, to, inbox = self.tick, self.rows.first(num_rows), self.next, self.inbox
        first_Q, last_Q = inbox["first_Q"], inbox["last_Q"]
        prompt_N = inbox["prompt_N"][:num_rows]
        is_in_N = self.number_N[:num_rows] < inbox["num_2"][0]
        rows.token_N.copy_(inbox["token_N"][:num_rows])
        rows.position_N.copy_(inbox["position_of_N"][:num_rows])
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
        enters_Q = self.number_Q < inbox["num_2"][1]
        enters_Q &= tick.goes_further(to, drawn_Q, length_Q)
        self.record_X[: self.num_prompts].copy_(drawn_Q)
        self.record_X[self.num_prompts :][:num_rows].copy_(depth_N)
        to.token_N.copy_(drawn_Q * enters_Q)
        to.x_ND.copy_(tick.run_prelude(to, enters_Q))
        changed = {"count_NC": count_QC, "length_N": length_Q, "is_alive_N": enters_Q}
        if tick.router.is_token_choice:
            changed["start_ND"] = to.x_ND
        for name, tensor in to._asdict().items():
            if len(tensor):
                getattr(tick.rows, name).index_copy_(0, inbox["row_Q"], changed.get(name, tensor))

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
