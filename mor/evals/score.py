"""How likely continuations are, under the causal rule, with the prefix of an item run once.

Shapes: B sequences, T tokens, N packed rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mor.evals.items import Item, Request
from mor.model.mor import MoR
from mor.ops.device import autocast
from mor.tokenizer import Tokenizer

BATCH_TOKENS = 4096
LOGIT_ROWS = 256
"""rows whose logits exist at one time"""


class Answer(NamedTuple):
    """What a model says of an item's requests."""

    log_likelihoods: tuple[float, ...]
    """of each continuation, in nats"""
    is_greedy: tuple[bool, ...]
    """every token of the continuation is the likeliest one"""
    depth_sum: int
    num_tokens: int
    """tokens that ran; a shared prefix ran once"""
    num_cut: int
    """requests that were longer than the context and lost their beginning"""


class _Encoded(NamedTuple):
    """An item as ids: prefix that all its requests share, and what each has behind it."""

    prefix: list[int]
    suffixes: list[list[int]]
    scored: list[int]
    """tokens of each continuation"""
    num_cut: int


def encode_pair(tokenizer: Tokenizer, request: Request) -> tuple[list[int], list[int]]:
    """Return the ids of context and continuation, cut where the ids of the whole are.

    Spaces at the context's end go to the continuation. Source: lm-evaluation-harness,
    `_encode_pair`
    """
    context, continuation = request
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole = tokenizer.encode(context + continuation)
    count = len(tokenizer.encode(context))
    return whole[:count], whole[count:]


def _encode(item: Item, tokenizer: Tokenizer, longest: int) -> _Encoded:
    pairs, num_cut = [], 0
    for request in item.requests:
        context, continuation = encode_pair(tokenizer, request)
        if not context:  # nothing to begin from but the document's start
            context = [tokenizer.bos_token_id]
        over = len(context) + len(continuation) - 1 - longest
        if over > 0:
            context, num_cut = context[over:] or context[-1:], num_cut + 1
            continuation = continuation[: longest + 1 - len(context)]
        pairs.append((context, continuation))
    shared = min(len(context) for context, _ in pairs)
    first = pairs[0][0]
    while any(context[:shared] != first[:shared] for context, _ in pairs):
        shared -= 1
    shared = max(shared, 0)
    return _Encoded(
        first[:shared],
        [(context + continuation)[shared:] for context, continuation in pairs],
        [len(continuation) for _, continuation in pairs],
        num_cut,
    )


def score_items(
    model: MoR, tokenizer: Tokenizer, items: Sequence[Item], *, dtype: torch.dtype
) -> Iterator[tuple[int, Answer]]:
    """Yield (place, answer), batch by batch, longest items first.

    dtype  of products on the model's device
    Raises ValueError for a log-likelihood that is not a number
    """
    longest = model.config.max_position_embeddings
    encoded = [_encode(item, tokenizer, longest) for item in items]
    order = sorted(range(len(items)), key=lambda i: -_cost(encoded[i]))
    while order:
        batch, width = [], _cost(encoded[order[0]])
        while order and (not batch or (len(batch) + 1) * width <= BATCH_TOKENS):
            batch.append(order.pop(0))
        yield from zip(batch, _score(model, [encoded[i] for i in batch], dtype), strict=True)


def _cost(one: _Encoded) -> int:
    """Tokens of the wider of the two passes."""
    widest = max(map(len, one.suffixes))
    return max(len(one.prefix), widest * len(one.suffixes))


@torch.inference_mode()
def _score(model: MoR, batch: Sequence[_Encoded], dtype: torch.dtype) -> list[Answer]:
    """Run the prefixes of a batch, then all suffixes behind them."""
    cache = model.new_cache(len(batch))
    head = _Rows(model, [one.prefix for one in batch], cache, dtype)
    owner = [place for place, one in enumerate(batch) for _ in one.suffixes]
    cache.reorder(torch.tensor(owner, device=model.device))
    # The last token of a suffix is predicted and not run.
    tail = _Rows(model, [ids[:-1] for one in batch for ids in one.suffixes], cache, dtype)
    states, targets, counts = [], [], []
    place = 0
    for index, one in enumerate(batch):
        for ids, scored in zip(one.suffixes, one.scored, strict=True):
            # Token t of a suffix is predicted by the one before it, the first by the prefix's last.
            first = len(ids) - scored
            before = [head.last(index)] if first == 0 else []
            states += [*before, tail.rows(place, max(0, first - 1), len(ids) - 1)]
            targets += ids[first:]
            counts.append(scored)
            place += 1
    picked, best = _log_likelihoods(model, torch.cat(states), targets, dtype)
    answers, at, place = [], 0, 0
    for index, one in enumerate(batch):
        sums, greedy = [], []
        for _ in one.suffixes:
            part = slice(at, at + counts[place])
            sums.append(float(picked[part].double().sum()))
            greedy.append(bool(best[part].all()))
            at, place = at + counts[place], place + 1
        places = range(place - len(one.suffixes), place)
        answers.append(
            Answer(
                tuple(sums),
                tuple(greedy),
                head.depth(index) + sum(tail.depth(p) for p in places),
                len(one.prefix) + sum(len(ids) - 1 for ids in one.suffixes),
                one.num_cut,
            )
        )
        if not all(value == value for value in sums):
            raise ValueError("a log-likelihood is not a number; are the model's weights broken?")
    return answers


class _Rows:
    """States and depths of sequences that ran behind what a cache holds of them."""

    def __init__(
        self, model: MoR, sequences: list[list[int]], cache: object, dtype: torch.dtype
    ) -> None:
        lengths = [len(ids) for ids in sequences]
        self.starts = [0]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)
        width = model.config.hidden_size
        if not self.starts[-1]:
            self.x_ND = torch.empty(0, width, device=model.device)
            self.depth_N = torch.empty(0, dtype=torch.int64)
            return
        ids_BT = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
        for row, ids in enumerate(sequences):
            ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        with autocast(model.device, dtype):
            out = model(
                ids_BT.to(model.device),
                lengths=torch.tensor(lengths, device=model.device),
                rule="causal",
                cache=cache,
                keep_states=True,
            )
        self.x_ND = out.states.x_ND
        real_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        self.depth_N = out.depth.cpu()[real_BT]

    def rows(self, place: int, first: int, end: int) -> Tensor:
        start = self.starts[place]
        return self.x_ND[start + first : start + end]

    def last(self, place: int) -> Tensor:
        end = self.starts[place + 1]
        return self.x_ND[end - 1 : end]

    def depth(self, place: int) -> int:
        return int(self.depth_N[self.starts[place] : self.starts[place + 1]].sum())


def _log_likelihoods(
    model: MoR, x_ND: Tensor, targets: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of each target and whether it is the likeliest token."""
    target_N = torch.tensor(targets, device=x_ND.device)
    assert len(target_N) == len(x_ND)
    picked, best = [], []
    for start in range(0, len(x_ND), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        with autocast(model.device, dtype):
            logit_CV = F.linear(x_ND[rows], model.head_weight_VD).float()
        log_CV = logit_CV.log_softmax(-1)
        picked.append(log_CV.gather(1, target_N[rows, None])[:, 0])
        best.append(log_CV.argmax(-1) == target_N[rows])
    return torch.cat(picked).cpu(), torch.cat(best).cpu()
