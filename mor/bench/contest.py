"""A model on its engine, verified and warm, and its timed runs beside what they should take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mor.bench.predict import Layers, Prediction, predict
from mor.bench.serve import Run, new_engine, run_trace
from mor.bench.tables import Tables
from mor.bench.verify import Verified, verify
from mor.bench.workload import RequestSpec
from mor.engine.engine import Engine
from mor.model.mor import MoR

VERIFIED_REQUESTS = 3
VERIFIED_TOKENS = 12
VERIFIED_PROMPT = 256


@dataclass(slots=True, eq=False)
class Side:
    """A model on its engine."""

    name: str
    engine: Engine
    trace: Sequence[RequestSpec]
    verified: Verified
    warm: Run
    """a whole run, which tells the depth of every token"""
    most: int
    """requests that run at a time in the bytes that both sides have"""

    @property
    def model(self) -> MoR:
        return self.engine.model


def build_side(
    name: str,
    model: MoR,
    trace: Sequence[RequestSpec],
    *,
    in_flight: int,
    max_requests: int,
    max_rows: int,
    kv_cache_bytes: int = 0,
) -> Side:
    """Build an engine, hold a few requests to the plain model, and run the trace to its end.

    kv_cache_bytes  0 for as many as are needed
    Raises          ValueError when they do not suffice for so many in flight, RuntimeError when the
                    engine is wrong
    """
    longest = max(request.num_tokens for request in trace) + VERIFIED_TOKENS
    max_model_len = min(longest, model.config.max_position_embeddings)
    engine = new_engine(
        model,
        max_requests=max_requests,
        max_rows=max_rows,
        max_model_len=max_model_len,
        kv_cache_bytes=kv_cache_bytes,
    )
    longest_prompt = min(VERIFIED_PROMPT, max_model_len - VERIFIED_TOKENS)
    few = [
        RequestSpec(request.prompt_ids[:longest_prompt], VERIFIED_TOKENS)
        for request in trace[:VERIFIED_REQUESTS]
    ]
    verified = verify(engine, few, name=name)
    warm = run_trace(engine, trace, in_flight=in_flight)
    if warm.is_short:
        raise ValueError(
            f"{in_flight} requests of {name} do not fit into {kv_cache_bytes} bytes of keys and "
            "values; give more kv_cache_bytes or fewer in_flight"
        )
    return Side(name, engine, trace, verified, warm, in_flight)


@dataclass(slots=True, eq=False)
class Contest:
    """A side at a number of requests in flight, and its runs."""

    side: Side
    in_flight: int
    runs: list[Run] = field(default_factory=list)

    def run(self, *, until_dry: bool) -> None:
        """Run the trace once more; until_dry as in `run_trace`."""
        side = self.side
        run = run_trace(side.engine, side.trace, in_flight=self.in_flight, until_dry=until_dry)
        self.runs.append(run)

    def rates(self) -> list[float]:
        """Return tokens drawn a second while the batch was full, of every run."""
        return [run.window.tokens_per_s for run in self.runs]

    def predict(self, tables: Tables, *, max_rows: int) -> Prediction:
        """Replay the first run; tokens that it did not reach have the depths of the warm-up."""
        side, run = self.side, self.runs[0]
        depths = [one.depths for one in side.warm.served]
        for index, one in enumerate(run.served):
            depths[index] = one.depths + depths[index][len(one.depths) :]
        trace = [
            request._replace(depths=tuple(known))
            for request, known in zip(side.trace, depths, strict=True)
        ]
        layers = Layers.of(side.model.config)
        return predict(tables, layers, trace, in_flight=self.in_flight, max_rows=max_rows)
