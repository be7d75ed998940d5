"""Token ids into the shard files of one split."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from mor.data.manifest import Shard, SplitInfo


class SplitWriter:
    """Appends documents to the shards of one split; every shard but the last is full."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._name = folder, name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._pending: list[np.ndarray] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._in_shard = 0
        self._shards: list[Shard] = []
        self._documents = self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, ids: list[int], *, text_bytes: int) -> None:
        """Take the ids of one document, its end included."""
        self._pending.append(np.array(ids, dtype=self._dtype))
        self._documents += 1
        self._bytes += text_bytes

    def write_pending(self) -> None:
        """Write what was added, into as many shards as it takes."""
        tokens = np.concatenate([np.empty(0, dtype=self._dtype), *self._pending])
        self._pending.clear()
        while len(tokens):
            if self._file is None:
                self._file = (self._folder / self._shard_name()).open("wb")
            part = tokens[: self._shard_tokens - self._in_shard]
            tokens = tokens[len(part) :]
            data = part.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._in_shard += len(part)
            if self._in_shard == self._shard_tokens:
                self._close_shard()

    def finish(self) -> SplitInfo:
        """Close the last shard and return what was written."""
        self.write_pending()
        self._close_shard()
        return SplitInfo(
            documents=self._documents,
            tokens=sum(shard.tokens for shard in self._shards),
            bytes=self._bytes,
            shards=tuple(self._shards),
        )

    def _shard_name(self) -> str:
        return f"{self._name}-{len(self._shards):05d}.bin"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._shards.append(
            Shard(file=self._shard_name(), tokens=self._in_shard, sha256=self._digest.hexdigest())
        )
        self._file, self._in_shard, self._digest = None, 0, hashlib.sha256()
