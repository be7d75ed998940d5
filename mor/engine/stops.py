"""When an answer ends, and which part of its text is safe to show before. Imports no torch.

A stop string may span tokens, so text that could be the beginning of one is held back until more
text decides. Which stop string ends an answer, and where, depends on the text alone, not on how
tokens split it: the first to be complete does, and of those that end together the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from mor.engine.params import SamplingParams
from mor.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]


class _Match(NamedTuple):
    """Where a stop string is; the smallest one is the first to be complete."""

    end: int
    start: int
    stop: str


class StopChecker:
    """Follows one answer, token by token.

    finish_reason  None while the answer goes on; then "stop" or "length"
    stop_reason    the stop string or the stop token that ended it, None for the end of document
    num_tokens     tokens so far, the one that ended the answer among them
    max_tokens     tokens at which it ends, whatever they are
    end_ids        tokens that end it
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_length: int,
        context: int,
        eos_id: int | None = None,
        tokenizer: Tokenizer | None = None,
        behind: Sequence[int] = (),
    ) -> None:
        """Begin an answer.

        context    tokens of prompt and answer together, at most
        behind     the prompt's last tokens, which tell whether a first space is one
        tokenizer  what tells the text; without one there is none
        Raises     ValueError when the prompt fills the context, or for stop strings without text
        """
        if prompt_length >= context:
            raise ValueError(
                f"the prompt has {prompt_length} tokens, but prompt and answer together may have "
                f"{context}; shorten the prompt"
            )
        if params.stop_strings and tokenizer is None:
            raise ValueError(
                f"stop is {params.stop_strings[0]!r}, but there is no tokenizer to tell the text; "
                "give stop_token_ids"
            )
        room = context - prompt_length
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self._min_tokens = params.min_tokens
        self._eos_id = None if params.ignore_eos else eos_id
        self._stop_ids = frozenset(params.stop_ids)
        self.end_ids = [*params.stop_ids, *([] if self._eos_id is None else [self._eos_id])]
        self._stops = params.stop_strings
        self._shows_stop = params.include_stop_str_in_output
        self._decoder = None
        if tokenizer is not None:
            self._decoder = StreamDecoder(tokenizer, behind=behind)
        self._hidden_ids: frozenset[int] = frozenset()
        if tokenizer is not None and params.skip_special_tokens:
            self._hidden_ids = tokenizer.special_ids
        self._beginning = ""
        """end of the text so far that a stop string may begin with"""
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def push(self, token: int) -> str:
        """Take the next token and return the text that is safe to show now.

        Sets finish_reason where the answer ends; all text has been returned then. A token that
        ends it, or a stop string, is part of the text only with include_stop_str_in_output.
        """
        assert self.finish_reason is None, "the answer has ended"
        self.num_tokens += 1
        may_stop = self.num_tokens > self._min_tokens
        is_end = may_stop and (token == self._eos_id or token in self._stop_ids)
        if is_end:
            self.finish_reason = "stop"
            self.stop_reason = None if token == self._eos_id else token
        elif self.num_tokens >= self.max_tokens:
            self.finish_reason = "length"
        if self._decoder is None:
            return ""
        is_hidden = token in self._hidden_ids or (is_end and not self._shows_stop)
        text = "" if is_hidden else self._decoder.push(token)
        if self.finish_reason is not None:
            text += self._decoder.flush()
        return self._shown(text, may_stop=may_stop) if self._stops else text

    def flush(self) -> str:
        """Return the text that was held back, for an answer that somebody else ends."""
        if self._decoder is None or self.finish_reason is not None:
            return ""
        held, self._beginning = self._beginning, ""
        return ("" if self._shows_stop else held) + self._decoder.flush()

    def _shown(self, text: str, *, may_stop: bool) -> str:
        """Look for stop strings that new text completes; return what may be shown of all text."""
        known = len(self._beginning)
        text = self._beginning + text
        num_shown = known if self._shows_stop else 0
        match = self._first_match(text, known) if may_stop else None
        if match is not None:
            self.finish_reason, self.stop_reason = "stop", match.stop
            return text[num_shown : match.end if self._shows_stop else match.start]
        self._beginning = self._possible_beginning(text) if self.finish_reason is None else ""
        is_safe = self._shows_stop or not self._beginning
        return text[num_shown:] if is_safe else text[: -len(self._beginning)]

    def _first_match(self, text: str, known: int) -> _Match | None:
        """Return the first stop string to end in text after its first known characters."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                matches.append(_Match(start + len(stop), start, stop))
        return min(matches, default=None)

    def _possible_beginning(self, text: str) -> str:
        """Return the longest end of text that is the beginning of a stop string, not all of it."""
        longest = max(len(stop) for stop in self._stops) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            end = text[start:]
            if any(stop.startswith(end) and stop != end for stop in self._stops):
                return end
        return ""
