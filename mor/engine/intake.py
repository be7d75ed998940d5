"""From a prompt and its parameters to requests, or to one line that says why not."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from typing import Any

from mor.config import ModelConfig
from mor.engine.blocks import Layout
from mor.engine.core import Request
from mor.engine.depth import depth_policy
from mor.engine.params import SamplingParams
from mor.engine.sampler import SampleRow
from mor.engine.stops import StopChecker
from mor.tokenizer import Tokenizer

Prompt = str | Sequence[int]
SHOWN_BEFORE = 8
"""tokens of a prompt that the text of an answer is decoded behind"""


class Intake:
    """What a request must fit: the model, its context, and the pages that there are."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        layout: Layout,
        num_pages: int,
        max_model_len: int,
        thresholds: Sequence[float],
        tokenizer: Tokenizer | None,
        calibration: dict[str, Any] | None,
    ) -> None:
        self.config, self.layout, self.num_pages = config, layout, num_pages
        self.max_model_len, self.thresholds = max_model_len, thresholds
        self.tokenizer, self.calibration = tokenizer, calibration

    def requests(self, request_id: str, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """Return one request for each of the n answers; ValueError for what cannot be served."""
        ids = self._prompt_ids(prompt)
        self._check_ids(ids)
        params.check_vocab(self.config.vocab_size)
        policy = depth_policy(
            params, self.config, thresholds=self.thresholds, calibration=self.calibration
        )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        eos = self.config.eos_token_id
        answers = []
        for index in range(params.n):
            output_ids: list[int] = []
            stops = StopChecker(
                params,
                prompt_length=len(ids),
                context=self.max_model_len,
                eos_id=eos,
                tokenizer=self.tokenizer,
                behind=ids[-SHOWN_BEFORE:],
            )
            self._check_pages(len(ids), stops.max_tokens, policy.max_recursions)
            row = SampleRow(
                params=params,
                seed=seed,
                sample=index,
                prompt_ids=ids,
                output_ids=output_ids,
                eos_id=eos,
            )
            answers.append(
                Request(
                    request_id=request_id,
                    index=index,
                    prompt_ids=ids,
                    params=params,
                    policy=policy,
                    stops=stops,
                    sample_row=row,
                    output_ids=output_ids,
                )
            )
        return answers

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text, but there is no tokenizer; give token ids")
            bos = self.config.bos_token_id
            return [*([] if bos is None else [bos]), *self.tokenizer.encode(prompt)]
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise ValueError("the prompt holds what is no token id; give integers") from error

    def _check_ids(self, ids: list[int]) -> None:
        vocab = self.config.vocab_size
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        outside = [token for token in ids if not 0 <= token < vocab]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {vocab} entries")

    def _check_pages(self, num_prompt: int, num_new: int, depth: int) -> None:
        """Refuse a request that would not fit if it were alone and every token went deep."""
        pages = self.layout.worst_pages(num_prompt + num_new, depth)
        if pages > self.num_pages:
            raise ValueError(
                f"{num_prompt} prompt tokens and {num_new} new ones may need {pages} pages of keys "
                f"and values, there are {self.num_pages}; ask for fewer or raise kv_cache_bytes"
            )
