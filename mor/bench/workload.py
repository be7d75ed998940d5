"""The requests of a run: how long prompts and answers are, from a seed or a trace file.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mor.bench.serve_config import Lengths, Mix

SPREAD = 0.6
"""standard deviation of a length's logarithm: the longest tenth is twice the median or more"""


class RequestSpec(NamedTuple):
    """One request of a trace."""

    prompt_ids: tuple[int, ...]
    output_len: int
    arrival_s: float = 0.0
    """seconds after the start of the run"""
    depths: tuple[int, ...] = ()
    """depth of each token that goes through the model; empty to leave them to the router"""

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_run(self) -> int:
        """Tokens that go through the model: the last one drawn does not."""
        return self.prompt_len + self.output_len - 1

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.output_len


def make_trace(count: int, mix: Mix, *, vocab_size: int, seed: int) -> list[RequestSpec]:
    """Draw requests; the first ones do not depend on how many there are."""
    draw = random.Random(seed)
    requests = []
    for _ in range(count):
        prompt_len, output_len = _length(mix.prompt, draw), _length(mix.output, draw)
        ids = tuple(draw.randrange(vocab_size) for _ in range(prompt_len))
        requests.append(RequestSpec(ids, output_len))
    return requests


def _length(lengths: Lengths, draw: random.Random) -> int:
    value = round(lengths.median * math.exp(draw.gauss(0, SPREAD)))
    return min(max(value, lengths.least), lengths.most)


def read_trace(path: Path, *, vocab_size: int, max_recursions: int, seed: int) -> list[RequestSpec]:
    """Read requests, one JSON object a line, in order of arrival; prompts are random ids.

    prompt_len, output_len  tokens; needed
    arrival_s               seconds after the start; 0 unless given
    depths                  one for each token that goes through the model, so
                            prompt_len + output_len - 1 of them
    Raises                  ValueError, in one line, for a file that says something else
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; give JSONL") from error
    draw, requests = random.Random(seed), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); give an object a line") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: {line.strip()[:40]} is no object; give an object a line")
        requests.append(_request(fields, where, vocab_size, max_recursions, draw))
    if not requests:
        raise ValueError(f"{path} holds no request; give an object a line")
    return sorted(requests, key=lambda request: request.arrival_s)


def _request(
    fields: dict[str, Any], where: str, vocab_size: int, max_recursions: int, draw: random.Random
) -> RequestSpec:
    unknown = set(fields) - {"prompt_len", "output_len", "arrival_s", "depths"}
    if unknown:
        raise ValueError(
            f"{where}: {min(unknown)} is unknown; use prompt_len, output_len, arrival_s, depths"
        )
    sizes = []
    for name in ("prompt_len", "output_len"):
        value = fields.get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{where}: {name} is {value!r}; give a whole number of 1 or more")
        sizes.append(value)
    arrival_s = fields.get("arrival_s", 0)
    if type(arrival_s) not in (int, float) or not 0 <= arrival_s < math.inf:
        raise ValueError(f"{where}: arrival_s is {arrival_s!r}; give seconds, 0 or more")
    depths = fields.get("depths", [])
    is_list = isinstance(depths, list)
    if not is_list or any(type(d) is not int or not 1 <= d <= max_recursions for d in depths):
        raise ValueError(f"{where}: depths leave 1..{max_recursions}; give whole numbers")
    ids = tuple(draw.randrange(vocab_size) for _ in range(sizes[0]))
    request = RequestSpec(ids, sizes[1], float(arrival_s), tuple(depths))
    if depths and len(depths) != request.num_run:
        raise ValueError(
            f"{where}: {len(depths)} depths for {request.num_run} tokens that run; give one each"
        )
    return request


def cut_prompts(requests: Sequence[RequestSpec], token_ids: Sequence[int]) -> list[RequestSpec]:
    """Take the prompts from a text, one behind the other; it begins again where it ends.

    Raises ValueError for an empty text
    """
    if not token_ids:
        raise ValueError("the text for prompts is empty; give one with words in it")
    cut, at = [], 0
    for request in requests:
        ids = tuple(token_ids[(at + i) % len(token_ids)] for i in range(request.prompt_len))
        at += request.prompt_len
        cut.append(request._replace(prompt_ids=ids))
    return cut
