"""What a folder of token shards says about itself: `manifest.json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.files import read_json, write_json

KIND = "mor tokens"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
DTYPE_BYTES = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of little-endian token ids."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInfo:
    """One split: its documents, tokens (ends included) and UTF-8 bytes of text."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of `manifest.json`.

    corpus_sha256  over the documents' UTF-8 bytes in order, a zero byte behind each
    skipped        broken files and lines left out
    empty          files, lines and documents without text or tokens
    """

    dtype: str
    vocab_size: int
    eos_token_id: int
    tokenizer_sha256: str
    corpus_sha256: str
    documents: int
    skipped: int
    empty: int
    source: str
    splits: dict[str, SplitInfo]

    def save(self, folder: Path) -> None:
        head = {"kind": KIND, "format_version": FORMAT_VERSION}
        write_json(folder / MANIFEST_FILE, head | dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of folder; ValueError when it is missing, foreign or not whole."""
        file = folder / MANIFEST_FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no {MANIFEST_FILE}; make the folder with mor prepare")
        data = read_json(file)
        if data.pop("kind", None) != KIND:
            raise ValueError(f"{file} is not of mor prepare; make the folder with mor prepare")
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{file}: format version is {version}, this mor reads {FORMAT_VERSION}; "
                "run mor prepare again"
            )
        try:
            splits = {name: _split_info(split) for name, split in data.pop("splits").items()}
            manifest = cls(**data, splits=splits)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not whole ({error}); run mor prepare again") from error
        if manifest.dtype not in DTYPE_BYTES:
            raise ValueError(f"{file}: dtype {manifest.dtype!r} is not one of {list(DTYPE_BYTES)}")
        return manifest


def _split_info(data: dict[str, Any]) -> SplitInfo:
    shards = tuple(Shard(**shard) for shard in data["shards"])
    for count in (data["documents"], data["tokens"], data["bytes"], *(s.tokens for s in shards)):
        if not isinstance(count, int):
            raise TypeError(f"{count!r} is not a count")
    return SplitInfo(**data | {"shards": shards})
