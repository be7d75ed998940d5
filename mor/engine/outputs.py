"""What the engine hands out: a piece per tick while a request runs, the whole when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field

from mor.config import ModelConfig
from mor.engine.core import Request
from mor.engine.sampler import TokenLogprobs
from mor.model.cost import generation_flops


@dataclass(slots=True)
class StepOutput:
    """What one tick brought for one answer."""

    request_id: str
    index: int
    """which of the n answers"""
    token_ids: list[int] = field(default_factory=list)
    """tokens drawn in this tick"""
    text: str = ""
    """text that is now certain; a stop string or a half character is held back"""
    depths: list[int] = field(default_factory=list)
    """depths that are now known: of the prompt's tokens first, then of the answer's, each one tick
    or more after its token; the last token of an answer is never run and has none"""
    finish_reason: str | None = None
    """stop, length, abort or error, when the answer is done"""
    stop_reason: int | str | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """of the tokens, where they were asked for"""
    result: RequestOutput | None = None
    """the whole, with the last piece of a request of `AsyncEngine`"""


@dataclass(slots=True)
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]
    depths: list[int]
    """depth of each token; the last one is never run and has none"""
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt_token_ids: list[int]
    prompt_depths: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    """prompt tokens that came from the prefix cache"""
    mean_depth: float
    """of all tokens that went through the model, in every answer"""
    flops_saved: float
    """share of the FLOPs that full depth would have cost, 0 .. 1"""
    ttft_s: float
    """seconds from arrival to the first token; 0 without one"""


def completion_of(request: Request) -> CompletionOutput:
    """Return an answer as it stands."""
    return CompletionOutput(
        index=request.index,
        text=request.text,
        token_ids=list(request.output_ids),
        depths=request.depths[len(request.prompt_ids) :],
        logprobs=request.logprobs if request.params.logprobs is not None else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        error=request.error,
    )


def output_of(request_id: str, answers: list[Request], config: ModelConfig) -> RequestOutput:
    """Join the answers to one prompt."""
    first = answers[0]
    depths = [depth for answer in answers for depth in answer.depths]
    spent = full = 0.0
    for answer in answers:
        heads = max(len(answer.output_ids), 1)
        spent += generation_flops(config, answer.depths, head_tokens=heads)
        deepest = [config.num_recursions] * len(answer.depths)
        full += generation_flops(config, deepest, head_tokens=heads)
    started = [answer.first_token_s for answer in answers if answer.first_token_s]
    return RequestOutput(
        request_id=request_id,
        prompt_token_ids=first.prompt_ids,
        prompt_depths=first.depths[: len(first.prompt_ids)],
        prompt_logprobs=(
            first.prompt_logprobs if first.params.prompt_logprobs is not None else None
        ),
        outputs=[completion_of(answer) for answer in answers],
        num_cached_tokens=max(answer.num_cached_tokens for answer in answers),
        mean_depth=sum(depths) / len(depths) if depths else 0.0,
        flops_saved=1 - spent / full if full else 0.0,
        ttft_s=min(started) - first.arrival_s if started else 0.0,
    )
