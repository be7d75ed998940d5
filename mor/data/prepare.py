"""Text into token shards, in two passes over the files and constant memory.

Pass 1 counts, hashes and learns the tokenizer; pass 2 encodes. A document's split follows from
the hash of its bytes, so it stays where it is when the corpus grows.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mor.data.config import PrepareConfig
from mor.data.manifest import Manifest
from mor.data.parquet import PARQUET_SUFFIX
from mor.data.sources import (
    Source,
    check_readers,
    find_sources,
    identity,
    iterate_documents,
    stdlib_files,
)
from mor.data.streams import content_suffix, is_compressed
from mor.data.threads import feed, map_ahead
from mor.data.writer import SplitWriter
from mor.files import atomic_folder
from mor.log import human_bytes, human_count, logger, progress
from mor.tokenizer import Tokenizer, train_bpe

SAMPLE_BYTES = 64_000_000
BATCH_BYTES = 1 << 21
BATCH_DOCUMENTS = 2048
TYPICAL_COMPRESSION = 4
MAX_SKIP_LINES = 20


class Item(NamedTuple):
    """A document as both passes see it; hash is 64 bits of its UTF-8 bytes."""

    text: str
    bytes: int
    hash: int


Batch = list[tuple[str, Item]]
"""Documents, each with its split."""


@dataclass
class Census:
    """What pass 1 learns of the documents; constant size."""

    documents: int = 0
    bytes: int = 0
    lowest: list[int] = field(default_factory=list)  # the two smallest distinct hashes
    highest: int = -1

    def add(self, item: Item) -> None:
        self.documents += 1
        self.bytes += item.bytes
        self.lowest = sorted({*self.lowest, item.hash})[:2]
        self.highest = max(self.highest, item.hash)

    @property
    def distinct(self) -> int:
        """Distinct documents, counted up to 3."""
        return len({*self.lowest, self.highest} - {-1})


@dataclass(frozen=True)
class SplitRule:
    """Split by hash. The extreme hashes are assigned, so that no split is empty."""

    val_fraction: float
    heldout_fraction: float
    assigned: dict[int, str]

    def split_of(self, item_hash: int) -> str:
        """Return train, heldout or val."""
        place = item_hash / 2**64
        if item_hash in self.assigned:
            return self.assigned[item_hash]
        if place < self.val_fraction:
            return "val"
        return "heldout" if place < self.val_fraction + self.heldout_fraction else "train"


def prepare(config: PrepareConfig) -> Manifest:
    """Write shards of the splits train, heldout and val, the tokenizer and a manifest.

    The folder appears whole or not at all; the same input gives the same bytes.
    Raises ValueError for bad input (see `iterate_documents`), too few documents, and an output
    folder that holds files; OSError when the output cannot be written
    """
    out = config.out.absolute()
    _refuse_used(out)
    job = _Job(config)
    with atomic_folder(out) as folder:
        tokenizer = job.first_pass()
        manifest = job.second_pass(tokenizer, folder)
        tokenizer.save(folder)
        manifest.save(folder)
        _refuse_used(out)
    tokens = ", ".join(f"{name} {human_count(s.tokens)}" for name, s in manifest.splits.items())
    logger.info("tokens: %s; in %s", tokens, config.out)
    return manifest


class _Job:
    """The sources of one run and what is known about them so far."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self.empty = self.skipped = 0
        others: list[Path] = []
        self.sources: list[Source]
        if config.corpus == "stdlib":
            self.sources = [*stdlib_files()]
            self.name = f"standard library of Python {platform.python_version()}"
        else:
            self.sources = find_sources(config.input, on_other=others.append)
            self.name = ", ".join(str(name) for name in config.input)
        self.val_sources = find_sources(config.val, on_other=others.append) if config.val else []
        own_val = {identity(source) for source in self.val_sources}
        self.sources = [source for source in self.sources if identity(source) not in own_val]
        if not self.sources:
            raise ValueError(
                "every input file is also given as --val; give other files to train on"
            )
        check_readers([*self.sources, *self.val_sources])
        if others:
            logger.info("%d files left out for their suffix, such as %s", len(others), others[0])
        self.census, self.val_census = Census(), Census()
        self.corpus_sha256 = ""
        self.val_hashes: set[int] = set()
        self.in_both = 0

    def first_pass(self) -> Tokenizer:
        """Count and hash all documents; return the given tokenizer, or one learnt from them."""
        given = None
        if self.config.tokenizer is not None:
            given = Tokenizer.load(self.config.tokenizer, eos_token=self.config.eos_token)
        sizes = _estimate_sizes([*self.sources, *self.val_sources], self.config.limit_bytes)
        with progress("reading", sizes.disk_bytes) as bar:
            scan = self._scan(sizes.text_bytes, on_read=bar.advance)
            if given is None:
                tokenizer = feed(partial(train_bpe, vocab_size=self.config.vocab_size), scan)
            else:
                tokenizer = given
                for _ in scan:
                    pass
        self._check_census()
        logger.info(
            "%d documents, %s of text, vocabulary of %d",
            self.census.documents + self.val_census.documents,
            human_bytes(self.census.bytes + self.val_census.bytes),
            tokenizer.vocab_size,
        )
        if self.in_both:
            logger.warning(
                "left out of the training text: %d documents that --val holds too", self.in_both
            )
        if self.skipped or self.empty:
            logger.warning("left out: %d broken, %d empty", self.skipped, self.empty)
        return tokenizer

    def _scan(self, text_bytes: float, on_read: Callable[[int], None]) -> Iterator[str]:
        """Go through all documents; yield a bounded sample of those likely to be trained on."""
        config = self.config
        digest = hashlib.sha256()
        own_shares = 0.0 if config.val else config.val_fraction
        first_hash = (own_shares + config.heldout_fraction) * 2**64
        # The low bits choose the sample, the high ones the split.
        sample_limit = min(1.0, SAMPLE_BYTES / text_bytes) * 2**32
        sample_bytes, spare = 0, ""
        self.val_hashes = {item.hash for item in self._val_items(hashlib.sha256())}
        for item in self._items(digest, self._on_skip, self._on_empty, on_read):
            self.census.add(item)
            is_chosen = item.hash >= first_hash and item.hash % 2**32 < sample_limit
            if is_chosen and sample_bytes + item.bytes <= SAMPLE_BYTES:
                sample_bytes += item.bytes
                yield item.text
            elif not spare and not sample_bytes and item.hash >= first_hash:
                spare = item.text[:SAMPLE_BYTES]
        if not sample_bytes:  # few documents, or each larger than the sample
            yield spare
        for item in self._val_items(digest, self._on_skip, self._on_empty, on_read):
            self.val_census.add(item)
        self.corpus_sha256 = self._digest_of(digest)

    def _digest_of(self, digest: hashlib._Hash) -> str:
        """Return the digest of what was read, and of whether some of it was left out."""
        if self.in_both:
            digest.update(b"without what --val holds")
        return digest.hexdigest()

    def _check_census(self) -> None:
        if self.in_both and not self.census.bytes:
            raise ValueError(f"--val holds all that {self.name} has; give other text to train on")
        if not self.census.bytes:
            raise ValueError(f"empty corpus: no text in {self.name}; give files that hold text")
        if self.val_sources and not self.val_census.bytes:
            raise ValueError("no text in what --val names; give files that hold text")
        needed = 2 if self.val_sources else 3
        if self.census.distinct < needed:
            raise ValueError(
                f"the corpus has {self.census.distinct} distinct documents, its splits need "
                f"{needed}; give more text, or have it cut finer with --max-document-bytes"
            )

    def second_pass(self, tokenizer: Tokenizer, folder: Path) -> Manifest:
        """Encode every document into its split's shards."""
        rule = self._split_rule()
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        digest = hashlib.sha256()
        total = self.census.bytes + self.val_census.bytes

        def encode(batch: Batch) -> list[list[int]]:
            return tokenizer.encode_batch([item.text for _, item in batch])

        with ExitStack() as stack, progress("encoding", total) as bar:
            writers = {
                name: stack.enter_context(
                    SplitWriter(folder, name, dtype, self.config.shard_tokens)
                )
                for name in ("train", "heldout", "val")
            }
            placed = itertools.chain(
                ((rule.split_of(item.hash), item) for item in self._items(digest)),
                (("val", item) for item in self._val_items(digest)),
            )
            encoded = stack.enter_context(closing(map_ahead(encode, _batches(placed))))
            for batch, ids_of in encoded:
                for (name, item), ids in zip(batch, ids_of, strict=True):
                    if ids:
                        writers[name].add([*ids, tokenizer.eos_token_id], text_bytes=item.bytes)
                    else:
                        self.empty += 1
                for writer in writers.values():
                    writer.write_pending()
                bar.advance(sum(item.bytes for _, item in batch))
            splits = {name: writer.finish() for name, writer in writers.items()}
        if self._digest_of(digest) != self.corpus_sha256:
            raise ValueError("the input changed while it was read; run mor prepare again")
        for name, split in splits.items():
            if not split.tokens:
                raise ValueError(
                    f"the tokenizer found no tokens for the split {name}; give more text"
                )
        return Manifest(
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            tokenizer_sha256=tokenizer.fingerprint(),
            corpus_sha256=self.corpus_sha256,
            documents=sum(split.documents for split in splits.values()),
            skipped=self.skipped,
            empty=self.empty,
            source=self.name,
            splits=splits,
        )

    def _split_rule(self) -> SplitRule:
        config, census = self.config, self.census
        if self.val_sources:
            assigned = {census.lowest[0]: "heldout", census.highest: "train"}
            return SplitRule(0.0, config.heldout_fraction, assigned)
        first, second = census.lowest
        assigned = {first: "val", second: "heldout", census.highest: "train"}
        return SplitRule(config.val_fraction, config.heldout_fraction, assigned)

    def _items(self, digest: hashlib._Hash, *reports: Callable[..., None]) -> Iterator[Item]:
        """Yield the input's documents up to limit_bytes."""
        taken_bytes = 0
        self.in_both = 0
        for item in self._read(self.sources, digest, *reports):
            if item.hash in self.val_hashes:
                self.in_both += 1
                continue
            yield item
            taken_bytes += item.bytes
            if self.config.limit_bytes is not None and taken_bytes >= self.config.limit_bytes:
                return

    def _val_items(self, digest: hashlib._Hash, *reports: Callable[..., None]) -> Iterator[Item]:
        return self._read(self.val_sources, digest, *reports)

    def _read(
        self,
        sources: Sequence[Source],
        digest: hashlib._Hash,
        on_skip: Callable[[str], None] = lambda _: None,
        on_empty: Callable[[str], None] = lambda _: None,
        on_read: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Item]:
        documents = iterate_documents(
            sources,
            text_field=self.config.text_field,
            max_document_bytes=self.config.max_document_bytes,
            skip_bad=self.config.skip_bad,
            on_skip=on_skip,
            on_empty=on_empty,
            on_read=on_read,
        )
        for document in documents:
            data = document.text.encode("utf-8")
            digest.update(data + b"\0")
            short = hashlib.blake2b(data, digest_size=8).digest()
            yield Item(document.text, len(data), int.from_bytes(short, "big"))

    def _on_skip(self, problem: str) -> None:
        self.skipped += 1
        if self.skipped <= MAX_SKIP_LINES:
            logger.warning("skipped: %s", problem)

    def _on_empty(self, _: str) -> None:
        self.empty += 1


def _batches(placed: Iterable[tuple[str, Item]]) -> Iterator[Batch]:
    """Group documents up to BATCH_BYTES of text or BATCH_DOCUMENTS."""
    batch: Batch = []
    size = 0
    for name, item in placed:
        batch.append((name, item))
        size += item.bytes
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Sizes(NamedTuple):
    """What can be said of sources before they are read."""

    disk_bytes: float | None
    """to read; None where the end is not known"""
    text_bytes: float
    """a guess; what comes from a dataset is not counted"""


def _estimate_sizes(sources: Sequence[Source], limit_bytes: int | None) -> Sizes:
    disk_bytes = text_bytes = 0
    for source in sources:
        if isinstance(source, Path):
            size = source.stat().st_size
            disk_bytes += size
            is_packed = is_compressed(source) or content_suffix(source) == PARQUET_SUFFIX
            text_bytes += size * (TYPICAL_COMPRESSION if is_packed else 1)
    is_known = limit_bytes is None and all(isinstance(source, Path) for source in sources)
    return Sizes(
        disk_bytes if is_known else None,
        max(1, text_bytes if limit_bytes is None else min(text_bytes, limit_bytes)),
    )


def _refuse_used(out: Path) -> None:
    """Raise ValueError when out is a file or a folder with content; nothing is created."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the prepared data")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files; give an empty or new folder to --out")
