"""What a request may ask for, with vLLM's names and defaults; max_tokens is 128. Imports no torch.

The last three fields are ours: they say how deep the model may think about the request.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from mor.engine.constraint import Constraint

MAX_SAMPLES = 1024
MAX_LOGPROBS = 20
INT64_MAX = 2**63 - 1
SMALLEST = math.ulp(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are drawn and when it ends.

    Raises ValueError, in one line, for a value of the wrong type or outside its range.
    """

    n: int = 1
    """answers to the prompt"""
    max_tokens: int | None = 128
    """new tokens at most; None for what the context leaves"""
    min_tokens: int = 0
    """new tokens before the end of document, a stop token or a stop string may come"""
    temperature: float = 1.0
    """what logits are divided by; 0 takes the best token"""
    top_k: int = 0
    """keep the k best tokens, and those equal to the k-th; 0 or -1 keeps all"""
    top_p: float = 1.0
    """keep the smallest set of best tokens that reaches this share"""
    min_p: float = 0.0
    """keep tokens with at least this share of the best token's probability"""
    repetition_penalty: float = 1.0
    """divide a positive logit, multiply a negative one, of tokens in the prompt or the output"""
    presence_penalty: float = 0.0
    """taken off the logit of every token in the output"""
    frequency_penalty: float = 0.0
    """taken off a token's logit for every time it is in the output"""
    logit_bias: Mapping[int, float] | None = None
    """added to the logits of token ids; ids may be strings of digits, as in JSON"""
    seed: int | None = None
    """the same seed draws the same tokens; None lets the engine choose"""
    stop: str | Sequence[str] | None = None
    """texts that end the answer; kept as a tuple"""
    stop_token_ids: Sequence[int] | None = None
    """token ids that end the answer; kept as a tuple"""
    include_stop_str_in_output: bool = False
    """whether the text ends with what stopped it"""
    ignore_eos: bool = False
    """go on after the end of document"""
    logprobs: int | None = None
    """best tokens whose log-probability is told beside the chosen one's"""
    prompt_logprobs: int | None = None
    """the same for the tokens of the prompt"""
    skip_special_tokens: bool = True
    """leave special tokens out of the text"""
    constraint: Constraint | None = None
    """grammar that the answer must follow; it bars tokens before the draw"""
    cache_prefix: bool = True
    """leave the request's stretches in the prefix cache for others"""

    max_recursions: int | None = None
    """recursions that a token may take; None for all of the model"""
    threshold_shift: float = 0.0
    """added to every recursion's threshold of scores, which are 0 to 1: above 0 fewer go on"""
    target_depth: float | None = None
    """mean depth to reach by thresholds from the scores that the model folder keeps"""

    is_plain_greedy: bool = field(init=False, repr=False, compare=False)
    """whether the best raw logit is the answer, whatever came before"""
    is_plain_draw: bool = field(init=False, repr=False, compare=False)
    """whether the raw logits, a temperature and the draw are all it takes"""
    changes_logits: bool = field(init=False, repr=False, compare=False)
    """whether penalties, a bias or min_tokens change the logits before the draw"""
    has_penalties: bool = field(init=False, repr=False, compare=False)
    """whether the tokens so far change the logits"""

    def __post_init__(self) -> None:
        self._check_whole_numbers()
        self._check_numbers()
        self._check_flags()
        self._check_stops()
        self._check_logit_bias()
        self._check_pairs()
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        self._set("has_penalties", penalties != (0, 0, 1))
        changes = self.has_penalties or self.logit_bias is not None or self.min_tokens > 0
        changes = changes or self.constraint is not None
        self._set("changes_logits", changes)
        self._set("is_plain_greedy", self.temperature == 0 and not changes)
        cuts = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        tells = self.logprobs is not None or self.prompt_logprobs is not None
        self._set("is_plain_draw", not (changes or cuts or tells))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end the answer, beside the end of document."""
        assert isinstance(self.stop_token_ids, tuple)
        return self.stop_token_ids

    def check_vocab(self, vocab_size: int) -> None:
        """Raise ValueError if a token id of these parameters is outside the vocabulary."""
        ids = {"logit_bias": self.logit_bias or (), "stop_token_ids": self.stop_ids}
        for name, named in ids.items():
            outside = [token for token in named if token >= vocab_size]
            if outside:
                raise ValueError(
                    f"{name} has token id {reprlib.repr(outside[0])}; "
                    f"the vocabulary's ids go from 0 to {vocab_size - 1}"
                )

    def _check_whole_numbers(self) -> None:
        self._check_whole("n", low=1, high=MAX_SAMPLES, rule=f"from 1 to {MAX_SAMPLES}")
        self._check_whole("min_tokens", low=0, rule="from 0 up")
        self._check_whole("top_k", low=-1, rule="from 1 up, or 0 or -1 for all")
        if self.max_tokens is not None:
            self._check_whole("max_tokens", low=1, rule="from 1 up, or None for the whole context")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                rule = f"from 0 to {MAX_LOGPROBS}, or None"
                self._check_whole(name, low=0, high=MAX_LOGPROBS, rule=rule)
        if self.seed is not None:
            self._check_whole("seed", low=-INT64_MAX - 1, rule="of 64 bits, or None for any")
        if self.max_recursions is not None:
            self._check_whole("max_recursions", low=1, rule="from 1 up, or None for all")

    def _check_numbers(self) -> None:
        self._check_number("temperature", low=0, rule="0 (greedy) or more")
        self._check_number("top_p", low=SMALLEST, high=1, rule="a share above 0, at most 1")
        self._check_number("min_p", low=0, high=1, rule="a share from 0 to 1")
        rule = "a number from 0.01 to 100 (1 is off)"
        self._check_number("repetition_penalty", low=0.01, high=100, rule=rule)
        for name in ("presence_penalty", "frequency_penalty"):
            self._check_number(name, low=-2, high=2, rule="a number from -2 to 2 (0 is off)")
        self._check_number("threshold_shift", low=-math.inf, rule="a finite number (0 is off)")
        if self.target_depth is not None:
            rule = "a mean depth of 1 or more, or None"
            self._check_number("target_depth", low=1, rule=rule)

    def _check_flags(self) -> None:
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {reprlib.repr(value)}; give true or false")

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = () if stop is None else stop
        is_texts = isinstance(stop, list | tuple) and all(isinstance(s, str) and s for s in stop)
        if not is_texts:
            raise ValueError(
                f"stop is {reprlib.repr(self.stop)}; give a text, or a list of texts, none empty"
            )
        self._set("stop", tuple(stop))
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not (isinstance(ids, list | tuple) and all(_is_whole(t) and t >= 0 for t in ids)):
            raise ValueError(
                f"stop_token_ids is {reprlib.repr(ids)}; give a list of token ids from 0 up"
            )
        self._set("stop_token_ids", tuple(ids))

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                f"logit_bias is {reprlib.repr(self.logit_bias)}; give a table of token ids to bias"
            )
        biases: dict[int, float] = {}
        for key, value in self.logit_bias.items():
            token = _token_id(key)
            if token is None or token in biases:
                raise ValueError(
                    f"logit_bias has the key {reprlib.repr(key)}; give each token id once, from 0"
                )
            bias = _as_float(value)
            if bias is None or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias of token {reprlib.repr(token)} is {reprlib.repr(value)}; "
                    "give a number from -100 to 100"
                )
            biases[token] = bias
        self._set("logit_bias", biases or None)

    def _check_pairs(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; "
                "lower one or raise the other"
            )
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"n is {self.n} with temperature 0, so all answers are the same; "
                "give n = 1 or a temperature above 0"
            )
        if self.target_depth is None:
            return
        if self.threshold_shift != 0:
            raise ValueError(
                f"target_depth is {self.target_depth} and threshold_shift {self.threshold_shift}; "
                "both set the thresholds, give one"
            )
        if self.max_recursions is not None and self.target_depth > self.max_recursions:
            raise ValueError(
                f"target_depth is {self.target_depth}, above max_recursions {self.max_recursions}; "
                "lower one or raise the other"
            )

    def _check_whole(self, name: str, *, low: int, high: int = INT64_MAX, rule: str) -> None:
        value = getattr(self, name)
        if not (_is_whole(value) and low <= value <= high):
            raise ValueError(f"{name} is {reprlib.repr(value)}; give a whole number {rule}")

    def _check_number(self, name: str, *, low: float, high: float = math.inf, rule: str) -> None:
        """Check and keep it as a float."""
        value = getattr(self, name)
        number = _as_float(value)
        if number is None or not low <= number <= high:
            raise ValueError(f"{name} is {reprlib.repr(value)}; give {rule}")
        self._set(name, number)

    def _set(self, name: str, value: Any) -> None:
        """Fill a field while the object is made; nobody has seen it yet."""
        object.__setattr__(self, name, value)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_float(value: object) -> float | None:
    """Return value as a finite float, None where it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _token_id(key: object) -> int | None:
    """Return the id that a key of a table names; JSON writes it as a string of digits."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        key = int(key)
    return key if _is_whole(key) and key >= 0 else None
