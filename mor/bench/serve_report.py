"""The numbers of a cell of `mor bench decode`, and those of all cells together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mor.bench.predict import Prediction, efficiency, is_valid
from mor.bench.serve import Run
from mor.bench.train import spread
from mor.bench.verify import Verified
from mor.config import ModelConfig
from mor.engine.engine import Engine
from mor.model import cost
from mor.model.mor import MoR

HEADLINE = (
    "speedup_fixed_batch",
    "speedup_max_batch",
    "speedup_bound",
    "tokens_per_s",
    "twin_tokens_per_s",
)


def speedup_bound(config: ModelConfig, mean_depth: float) -> float:
    """Return G: the layers that a token passes in the twin over those in MoR, the head among them.

    With equal rows in every call, weights and arithmetic both gain this; keys are left out.
    """
    layer = cost.linear_flops(config)
    ends = config.num_own_layers + 2 * config.hidden_size * config.vocab_size / layer
    block = config.num_block_layers
    return (ends + config.num_recursions * block) / (ends + mean_depth * block)


def longest_context(engine: Engine, depths: Sequence[int], kv_bytes: int) -> int:
    """Return the tokens of one request whose keys and values fill so many bytes.

    depths  of tokens that ran, for the share of them at each recursion
    """
    layout, pages = engine.layout, kv_bytes // engine.page_bytes
    at_depth = np.bincount(depths, minlength=layout.num_depths + 1)[1:]
    shares = (at_depth[::-1].cumsum()[::-1] / len(depths))[: layout.num_depths]

    def needs(tokens: int) -> int:
        own = -(-tokens // layout.own_page_tokens) if layout.own_layers else 0
        block = sum(-(-int(tokens * share) // layout.block_page_tokens) for share in shares)
        return own + block

    fits, too_many = 0, pages * layout.block_page_tokens * (1 + layout.block_layers) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needs(middle) <= pages else (fits, middle)
    return fits


def row_of(
    runs: Sequence[Run],
    *,
    regime: str,
    side: str,
    name: str,
    model: MoR,
    prediction: Prediction | None,
    most_requests: int,
    longest_context: int,
    verified: Verified,
) -> dict[str, Any]:
    """Return what one side did in one regime; latencies are of all runs together.

    Without a prediction there is no efficiency, and nothing to be invalid by.
    """
    rates = [run.window.tokens_per_s for run in runs]
    ttft_ms = [1e3 * seconds for run in runs for seconds in run.ttft_s()]
    gaps_ms = [1e3 * seconds for run in runs for seconds in run.gaps_s()]
    depths = [depth for run in runs for depth in run.depths]
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    rate = period = share = None
    if prediction is not None:
        window, period = prediction.window, prediction.period
        rate = window.tokens_per_s
        share = statistics.median(efficiency(run.window, window) for run in runs)
    return {
        "regime": regime,
        "side": side,
        "name": name,
        "in_flight": runs[0].in_flight,
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_rounds": rates,
        "predicted_tokens_per_s": rate,
        "predicted_coda_period": period,
        "efficiency": share,
        "is_valid": share is None or is_valid(share),
        "ttft_p50_ms": _percentile(ttft_ms, 50),
        "ttft_p99_ms": _percentile(ttft_ms, 99),
        "inter_token_p50_ms": _percentile(gaps_ms, 50),
        "inter_token_p95_ms": _percentile(gaps_ms, 95),
        "inter_token_p99_ms": _percentile(gaps_ms, 99),
        "mean_depth": statistics.mean(depths),
        "window_tokens": runs[0].window.num_tokens,
        "kv_bytes": max(run.peak_kv_bytes for run in runs),
        "weight_bytes": weight_bytes,
        "most_requests": most_requests,
        "longest_context": longest_context,
        "verified": verified._asdict(),
    }


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


def cell_of(
    rows: list[dict[str, Any]],
    pairs: dict[str, tuple[list[float], list[float]]],
    *,
    config: ModelConfig,
    shape: str,
    in_flight: int,
    kv_budget_bytes: int,
    depths_are: str,
    routing: str,
    tables: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return a cell: its speed-ups with quartiles, efficiencies, and its rows.

    pairs  tokens a second of MoR and of the twin by regime, round by round
    """
    cell: dict[str, Any] = {
        "shape": shape,
        "recursions": config.num_recursions,
        "layers": config.num_hidden_layers,
        "in_flight": in_flight,
        "depths": depths_are,
        "routing": routing,
    }
    for regime, (mor, twin) in pairs.items():
        ratio = spread(mor, twin)
        cell[f"speedup_{regime}"] = ratio.median
        cell[f"speedup_{regime}_q1"], cell[f"speedup_{regime}_q3"] = ratio.q1, ratio.q3
    mors = [row for row in rows if row["side"] == "mor"]
    twins = [row for row in rows if row["side"] == "twin"]
    return {
        **cell,
        "speedup_bound": speedup_bound(config, mors[0]["mean_depth"]),
        "efficiency": _least(row["efficiency"] for row in mors),
        "twin_efficiency": _least(row["efficiency"] for row in twins),
        "is_valid": all(row["is_valid"] for row in rows),
        "tokens_per_s": mors[0]["tokens_per_s"],
        "twin_tokens_per_s": twins[0]["tokens_per_s"],
        "mean_depth": mors[0]["mean_depth"],
        "kv_budget_bytes": kv_budget_bytes,
        "rows": rows,
        "tables": tables,
    }


def _least(shares: Iterable[float | None]) -> float | None:
    """Return the least efficiency; None where none was predicted."""
    return min((share for share in shares if share is not None), default=None)


def summary(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the headline: the cell of the least speed-up, and the least efficiencies of all."""
    worst = min(cells, key=lambda cell: cell["speedup_fixed_batch"])
    return {
        **{name: worst[name] for name in HEADLINE},
        "efficiency": _least(cell["efficiency"] for cell in cells),
        "twin_efficiency": _least(cell["twin_efficiency"] for cell in cells),
        "is_valid": all(cell["is_valid"] for cell in cells),
    }
