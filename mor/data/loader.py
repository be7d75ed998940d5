"""Token shards as training batches: memory-mapped, and a pure function of the sample number.

Shapes: B rows, T input tokens of a row. Row i of a split covers its tokens i*T to i*T + T, one
more than T since the labels are the inputs moved by one.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mor.config import ModelConfig
from mor.data.manifest import DTYPE_BYTES, Manifest
from mor.log import logger
from mor.tokenizer import Tokenizer

MIN_SPAN = 16
"""tokens of the shortest span that `repeat_rows` repeats"""


class Batch(NamedTuple):
    """Rows to train or evaluate on.

    input_ids_BT  int64
    labels_BT     int64, the token that follows each input
    segment_BT    int64 number of the document within the row, which attention must not cross;
                  None when no row holds a boundary behind its first token
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    segment_BT: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        segment_BT = None if self.segment_BT is None else self.segment_BT.to(device)
        return Batch(self.input_ids_BT.to(device), self.labels_BT.to(device), segment_BT)


class TokenSplit:
    """The tokens of one split as one stream over its memory-mapped shards."""

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        """Map the shards; ValueError when one is missing or not as long as the manifest says."""
        info = manifest.splits[name]
        self.name, self.tokens, self.bytes = name, info.tokens, info.bytes
        self._vocab_size = manifest.vocab_size
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._shards: list[np.memmap] = []
        self._starts = [0]
        for shard in info.shards:
            _check_shard(folder / shard.file, shard.tokens * DTYPE_BYTES[manifest.dtype])
            self._shards.append(np.memmap(folder / shard.file, dtype=dtype, mode="r"))
            self._starts.append(self._starts[-1] + shard.tokens)
        if self._starts[-1] != info.tokens:
            raise ValueError(
                f"{folder}: the shards of {name} hold {self._starts[-1]} tokens, the manifest says "
                f"{info.tokens}; run mor prepare again"
            )

    def rows(self, row_tokens: int) -> int:
        """Return how many rows of row_tokens inputs the split holds."""
        if row_tokens < 1:
            raise ValueError(f"a row has {row_tokens} tokens; give 1 or more")
        return max(0, (self.tokens - 1) // row_tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens start to start + count of the stream, int64 [count].

        Raises ValueError outside the stream and for ids beyond the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise ValueError(
                f"tokens {start} to {start + count} are outside the split {self.name}, "
                f"which has {self.tokens}"
            )
        out = np.empty(count, dtype=np.int64)
        filled = 0
        index = bisect.bisect_right(self._starts, start) - 1
        while filled < count:
            first = start + filled - self._starts[index]
            part = self._shards[index][first : first + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            index += 1
        if count and out.max() >= self._vocab_size:
            raise ValueError(
                f"split {self.name} holds token id {out.max()}, but the vocabulary has "
                f"{self._vocab_size} entries; run mor prepare again"
            )
        return out


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A folder of mor prepare."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> PreparedData:
        """Read the manifest and check every shard's size.

        Raises ValueError when something is missing, foreign or not whole.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; make it with mor prepare")
        data = cls(folder, Manifest.load(folder))
        for name in data.manifest.splits:
            data.split(name)
        return data

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the shards were made with; ValueError when it changed."""
        tokenizer = Tokenizer.load(self.folder, eos_token=self.manifest.eos_token_id)
        if tokenizer.fingerprint() != self.manifest.tokenizer_sha256:
            raise ValueError(
                f"{self.folder / 'tokenizer.json'} is not the one that the shards were made with; "
                "run mor prepare again"
            )
        return tokenizer

    def check_model(self, model: Path, config: ModelConfig) -> None:
        """Raise ValueError where a model's folder does not know the shards' tokens."""
        if self.manifest.vocab_size > config.vocab_size:
            raise ValueError(
                f"{self.folder} has token ids beyond the model's vocabulary of "
                f"{config.vocab_size} entries; prepare the text with the model's tokenizer"
            )
        if not (model / "tokenizer.json").is_file():
            logger.warning(
                "%s has no tokenizer.json; trusting that the data's ids are its own", model
            )
            return
        tokenizer = Tokenizer.load(model, eos_token=config.eos_token_id)
        if tokenizer.fingerprint() != self.tokenizer().fingerprint():
            raise ValueError(
                f"{self.folder} was prepared with another tokenizer than {model} has; prepare the "
                f"text with --tokenizer {model}"
            )

    def split(self, name: str) -> TokenSplit:
        """Return train, heldout or val; ValueError for another name."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise ValueError(f"{self.folder} has no split {name!r}; it has {known}")
        return TokenSplit(self.folder, name, self.manifest)


class TrainLoader:
    """Rows of a split in an order that is shuffled anew every epoch.

    A batch is a pure function of the sample number, so the whole state of the data order is how
    many samples were taken. Keeps the order of two epochs, 4 bytes a row each.
    """

    def __init__(self, split: TokenSplit, *, row_tokens: int, seed: int, eos_token_id: int) -> None:
        """Raises ValueError when the split holds not even one row."""
        self._split, self._row_tokens = split, row_tokens
        self._seed, self._eos_token_id = seed, eos_token_id
        self.rows = _count_rows(split, row_tokens)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, first_sample: int, count: int) -> Batch:
        """Return samples first_sample to first_sample + count, counted from 0 over all epochs."""
        if first_sample < 0 or count < 1:
            raise ValueError(
                f"samples {first_sample} + {count}: start at 0 or later, take 1 or more"
            )
        indices = [self._row_of(sample) for sample in range(first_sample, first_sample + count)]
        return _make_batch(self._split, indices, self._row_tokens, self._eos_token_id)

    def _row_of(self, sample: int) -> int:
        epoch, place = divmod(sample, self.rows)
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self._seed, epoch]).permutation(
                np.arange(self.rows, dtype=np.uint32)
            )
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = order
        return int(order[place])


def repeat_rows(batch: Batch, *, seed: int, first_sample: int) -> Batch:
    """Make every other row one span of its first tokens over and over, 16 of them to half a row.

    What follows can be copied, at a distance that differs by row, so attention learns to look for
    what has followed a token before. A pure function of seed and sample number, as the rows are.
    """
    tokens = torch.cat((batch.input_ids_BT, batch.labels_BT[:, -1:]), dim=1)
    T = batch.input_ids_BT.shape[1]
    longest = max(1, T // 2)
    segment_BT = None if batch.segment_BT is None else batch.segment_BT.clone()
    for row in range(first_sample % 2, len(tokens), 2):
        rng = np.random.default_rng([seed, first_sample + row])
        span = int(rng.integers(min(MIN_SPAN, longest), longest, endpoint=True))
        tokens[row] = tokens[row, torch.arange(T + 1) % span]
        if segment_BT is not None:
            segment_BT[row] = 0
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), segment_BT)


def sequential_batches(
    split: TokenSplit,
    *,
    row_tokens: int,
    batch_rows: int,
    eos_token_id: int,
    limit_rows: int | None = None,
) -> Iterator[Batch]:
    """Yield the rows of split in order, batch_rows at a time; the last batch may be smaller.

    limit_rows  take so many rows, spread evenly over the split
    Raises      ValueError when the split holds not even one row
    """
    if batch_rows < 1 or (limit_rows is not None and limit_rows < 1):
        raise ValueError(f"batch_rows {batch_rows}, limit_rows {limit_rows}: give 1 or more")
    rows = _count_rows(split, row_tokens)
    count = rows if limit_rows is None else min(rows, limit_rows)
    for first in range(0, count, batch_rows):
        places = range(first, min(first + batch_rows, count))
        indices = [place * rows // count for place in places]
        yield _make_batch(split, indices, row_tokens, eos_token_id)


def _make_batch(split: TokenSplit, indices: list[int], row_tokens: int, eos_token_id: int) -> Batch:
    rows = [split.read(index * row_tokens, row_tokens + 1) for index in indices]
    tokens = torch.from_numpy(np.stack(rows))  # [B, T + 1]
    input_ids_BT = tokens[:, :-1].contiguous()
    labels_BT = tokens[:, 1:].contiguous()
    # The end token begins the next document, so the document changes at it.
    is_start_BT = input_ids_BT == eos_token_id
    segment_BT = is_start_BT.cumsum(dim=1) if is_start_BT[:, 1:].any() else None
    return Batch(input_ids_BT, labels_BT, segment_BT)


def _count_rows(split: TokenSplit, row_tokens: int) -> int:
    rows = split.rows(row_tokens)
    if rows < 1:
        raise ValueError(
            f"split {split.name} has {split.tokens} tokens, fewer than context {row_tokens} + 1; "
            "prepare more text or lower --context"
        )
    return rows


def _check_shard(file: Path, expected_bytes: int) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing; run mor prepare again")
    size = file.stat().st_size
    if size != expected_bytes:
        raise ValueError(
            f"{file} has {size} bytes, the manifest says {expected_bytes}; run mor prepare again"
        )
