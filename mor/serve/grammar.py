"""Answers that follow a JSON schema: llguidance walks the grammar, the engine bars other tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from mor.tokenizer import Tokenizer

COMPACT: Any = {"whitespace_flexible": False}
"""no free white space, in which a model could go on for ever"""


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        """Read the tokenizer; eos_ids: tokens that may end an answer that is whole."""
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            file = Path(folder) / "tokenizer.json"
            self._tokenizer = LLTokenizer(str(file), eos_token=list(dict.fromkeys(eos_ids)))

    def of_schema(self, schema: dict[str, Any]) -> JsonConstraint:
        """Return the constraint of a JSON schema; ValueError for one that cannot be followed."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT)
        except Exception as error:  # the library raises ValueError and others for bad schemas
            raise ValueError(f"the JSON schema is not understood: {_first_line(error)}") from error
        fault = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if fault and not fault.startswith("WARNING"):
            raise ValueError(f"the JSON schema cannot be followed: {_first_line(fault)}")
        return JsonConstraint(self._tokenizer, grammar)


class JsonConstraint:
    """A grammar, for any number of answers."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self.tokenizer, self.grammar = tokenizer, grammar

    def start(self) -> _Walk:
        return _Walk(LLMatcher(self.tokenizer, self.grammar, log_level=0))


class _Walk:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher, self.seen = matcher, 0

    def allowed(self, output_ids: Sequence[int]) -> bytes:
        for token in output_ids[self.seen :]:
            self.matcher.consume_token(token)
        self.seen = len(output_ids)
        return self.matcher.compute_bitmask()


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or ["no reason"])[0]
