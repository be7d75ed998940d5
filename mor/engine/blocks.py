"""Which page holds what: one pool of equal pages, a table per (request, depth).

Table 0 of a request is `own` (prelude and coda, every token); table r holds what recursion r of the
shared block keeps, so the tokens active there (with shared keys and values there is table 1 alone).
A token reserves a place at every depth before recursion 1 and gives back what it did not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mor.config import ModelConfig

Ints = npt.NDArray[np.int64]
DEFAULT_KV_BYTES = 2**31
DEFAULT_PAGE_TOKENS = 16
NO_PLACES = np.zeros(0, np.int64)


class Layout(NamedTuple):
    """How pages are cut: equal bytes for both groups of layers."""

    own_layers: int
    block_layers: int
    own_page_tokens: int
    block_page_tokens: int
    page_elements: int
    num_depths: int
    """tables of the shared block: one per recursion, or one where recursion 1's serve all"""

    @classmethod
    def of(cls, config: ModelConfig, block_size: int = 0) -> Layout:
        """Cut pages for a model; ValueError when own and block layers do not share a size.

        block_size  tokens in a page of the block; 0 for the least from 16 on that fits
        """
        own, block = config.num_own_layers, config.num_block_layers
        step = own // math.gcd(own, block) if own else 1
        block_size = block_size or -(-DEFAULT_PAGE_TOKENS // step) * step
        if block_size % step:
            raise ValueError(
                f"block_size is {block_size}; with {own} layers outside the block and {block} in "
                f"it give a multiple of {step}"
            )
        token_layer = 2 * config.num_key_value_heads * config.head_dim
        return cls(
            own_layers=own,
            block_layers=block,
            own_page_tokens=block * block_size // own if own else block_size,
            block_page_tokens=block_size,
            page_elements=block * block_size * token_layer,
            num_depths=1 if config.kv_strategy == "shared" else config.num_recursions,
        )

    @property
    def num_tables(self) -> int:
        return 1 + self.num_depths

    @property
    def page_tokens(self) -> Ints:
        """Tokens in a page of each table."""
        return np.array([self.own_page_tokens] + [self.block_page_tokens] * self.num_depths)

    def count_pages(self, wanted_bytes: int, page_bytes: int, *, tokens: int, requests: int) -> int:
        """Return the pages of a pool of wanted_bytes.

        0 takes what so many requests of so many tokens need at full depth, at most 2 GiB but
        enough for one. Raises ValueError when not one token fits
        """
        worst = self.worst_pages(tokens, self.num_depths)
        most = max(worst, DEFAULT_KV_BYTES // page_bytes)
        num_pages = wanted_bytes // page_bytes if wanted_bytes else min(worst * requests, most)
        if num_pages < self.num_tables:
            raise ValueError(
                f"kv_cache_bytes is {wanted_bytes}, but one token needs "
                f"{self.num_tables * page_bytes}; give more"
            )
        return num_pages

    def worst_pages(self, tokens: int, depth: int) -> int:
        """Pages that so many tokens of one request take at most."""
        own = -(-tokens // self.own_page_tokens) if self.own_layers else 0
        return own + min(depth, self.num_depths) * -(-tokens // self.block_page_tokens)


class BlockManager:
    """Pages by request: reserve, commit, trim, free. Requests are named by their slot.

    A page is used by requests (`users`) and by entries of the prefix cache (`keepers`); it is free
    when it has neither. `evict` is asked for pages that only the cache keeps.
    """

    def __init__(self, layout: Layout, num_pages: int, max_requests: int, max_tokens: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.page_tokens = layout.page_tokens
        shape = (max_requests, layout.num_tables)
        width = max(-(-max_tokens // int(size)) for size in self.page_tokens)
        self.tables = np.zeros((*shape, width), np.int32)
        self.count = np.zeros(shape, np.int64)
        """tokens stored"""
        self.reserved = np.zeros(shape, np.int64)
        """places kept for tokens that are in flight"""
        self.held = np.zeros(shape, np.int64)
        """pages of each table"""
        self.serves = np.zeros(shape, np.int64)
        """1 where the request can have tokens"""
        self.users = np.zeros(num_pages, np.int64)
        self.keepers = np.zeros(num_pages, np.int64)
        self.free = list(range(num_pages - 1, -1, -1))
        self.num_used = 0
        """pages that some request uses"""
        self.evict: Callable[[], bool] = lambda: False

    @property
    def num_available(self) -> int:
        """Pages that can be had, those that only the cache keeps among them."""
        return self.num_pages - self.num_used

    def open(self, slot: int, depth: int) -> None:
        """Begin a request that goes to `depth` at most."""
        assert not self.held[slot].any() and not self.count[slot].any()
        self.serves[slot] = 0
        self.serves[slot, 0] = self.layout.own_layers > 0
        self.serves[slot, 1 : 1 + depth] = 1

    def missing(self, slot: int, tokens: int) -> Ints:
        """Pages that each table lacks for so many more tokens in flight."""
        places = self.count[slot] + self.reserved[slot] + tokens * self.serves[slot]
        return np.maximum(-(-places // self.page_tokens) - self.held[slot], 0)

    def reserve(self, slot: int, tokens: int) -> bool:
        """Keep a place at every depth for each token, all or none; False when pages are short."""
        missing = self.missing(slot, tokens)
        if int(missing.sum()) > self.num_available:
            return False
        for table in np.flatnonzero(missing):
            for _ in range(missing[table]):
                self._append(slot, int(table), self.take())
        self.reserved[slot] += tokens * self.serves[slot]
        return True

    def reserve_one(self, slots: Ints) -> Ints:
        """Keep a place for one token of each request; returns those that `reserve` must serve."""
        places = self.count[slots] + self.reserved[slots] + self.serves[slots]
        fits = (places <= self.held[slots] * self.page_tokens).all(1)
        kept = slots[fits]
        self.reserved[kept] += self.serves[kept]
        return slots[~fits]

    def commit(self, slots: Ints, table: Ints, stored: Ints, reserved: Ints) -> Ints:
        """Turn places that are reserved into tokens; returns how many stood there before.

        Every (slot, table) may appear once. stored tokens stay, of `reserved` places given up.
        """
        before = self.count[slots, table]
        self.count[slots, table] = before + stored
        self.reserved[slots, table] -= reserved
        return before

    def release(self, slots: Ints, first_table: Ints, tokens: Ints) -> None:
        """Give back the places of tokens that left before first_table, and pages left empty."""
        deeper = np.arange(self.layout.num_tables) >= first_table[:, None]
        np.subtract.at(self.reserved, slots, tokens[:, None] * self.serves[slots] * deeper)
        self.trim(slots)

    def store_one(self, slots: Ints, table: Ints | int) -> None:
        """Turn one reserved place each into a token; every (slot, table) may appear once."""
        self.count[slots, table] += 1
        self.reserved[slots, table] -= 1

    def hold(self, slots: Ints, places: Ints) -> Ints | None:
        """Keep exactly so many places beyond the tokens stored, (requests, tables), all or none.

        Returns where pages were added, as places of the flat `tables`; None when pages are short
        """
        needed = -(-(self.count[slots] + places) // self.page_tokens)
        missing = needed - self.held[slots]
        if missing.max(initial=0) <= 0:  # most ticks
            self.reserved[slots] = places
            self.trim(slots)
            return NO_PLACES
        missing = np.maximum(missing, 0)
        if int(missing.sum()) > self.num_available:
            return None
        self.reserved[slots] = places
        added = []
        for row, table in zip(*missing.nonzero(), strict=True):
            slot = slots[row]
            for _ in range(missing[row, table]):
                at = (slot, table, self.held[slot, table])
                added.append(np.ravel_multi_index(at, self.tables.shape))
                self._append(slot, table, self.take())
        self.trim(slots)
        return np.array(added, np.int64)

    def places_of(self, slot: int) -> Ints:
        """Return where in the flat `tables` a request's pages stand."""
        (_, C, M), held = self.tables.shape, self.held[slot]
        return np.flatnonzero(np.arange(M) < held[:, None]) + slot * C * M

    def trim(self, slots: Ints) -> None:
        """Give back pages without a token or a reserved place."""
        needed = -(-(self.count[slots] + self.reserved[slots]) // self.page_tokens)
        for row in np.flatnonzero((needed < self.held[slots]).any(1)):
            slot = int(slots[row])
            for table in np.flatnonzero(needed[row] < self.held[slot]):
                while self.held[slot, table] > needed[row, table]:
                    self.held[slot, table] -= 1
                    self.drop_user(int(self.tables[slot, table, self.held[slot, table]]))

    def close(self, slot: int) -> None:
        """Give back all that a request holds, whatever is in flight."""
        for table in range(self.layout.num_tables):
            for page in self.tables[slot, table, : self.held[slot, table]].tolist():
                self.drop_user(page)
        self.count[slot] = self.reserved[slot] = self.held[slot] = self.serves[slot] = 0

    def adopt(self, slot: int, pages: list[list[int]], counts: list[int]) -> list[tuple[int, int]]:
        """Let a new request begin on pages of the cache; returns pages to copy, (from, to).

        Full pages are shared; a last page that is not full is copied, since both go on writing.
        The caller has seen to it that one page a table can be had.
        """
        for page in (page for table in pages for page in table):
            self.add_user(page)  # first, so that taking a page does not evict what is adopted
        copies = []
        for table, (table_pages, count) in enumerate(zip(pages, counts, strict=True)):
            for index, page in enumerate(table_pages):
                self.tables[slot, table, index] = page
            self.held[slot, table] = len(table_pages)
            self.count[slot, table] = count
            if count % int(self.page_tokens[table]):
                last = len(table_pages) - 1
                fresh = self.take()
                copies.append((table_pages[last], fresh))
                self.tables[slot, table, last] = fresh
        for page, _ in copies:
            self.drop_user(page)
        return copies

    def take(self) -> int:
        """Return a free page, used once, after dropping entries of the cache if need be."""
        while not self.free:
            if not self.evict():
                raise AssertionError("a page was promised, but none can be had")
        page = self.free.pop()
        self.add_user(page)
        return page

    def add_user(self, page: int) -> None:
        self.num_used += self.users[page] == 0
        self.users[page] += 1

    def drop_user(self, page: int) -> None:
        self.users[page] -= 1
        if self.users[page] == 0:
            self.num_used -= 1
            if self.keepers[page] == 0:
                self.free.append(page)

    def keep(self, page: int) -> None:
        """Let the cache hold a page."""
        self.keepers[page] += 1

    def unkeep(self, page: int) -> None:
        self.keepers[page] -= 1
        if self.keepers[page] == 0 and self.users[page] == 0:
            self.free.append(page)

    def _append(self, slot: int, table: int, page: int) -> None:
        self.tables[slot, table, self.held[slot, table]] = page
        self.held[slot, table] += 1

    @property
    def tokens_stored(self) -> Ints:
        """Tokens of running requests in each table: own layers first, then the depths."""
        return self.count.sum(0)

    def check_integrity(self) -> None:
        """Assert that every page is counted once, and tables hold what they say."""
        users = np.zeros(self.num_pages, np.int64)
        for slot, table in zip(*self.held.nonzero(), strict=True):
            np.add.at(users, self.tables[slot, table, : self.held[slot, table]], 1)
        assert (users == self.users).all(), "users of a page are miscounted"
        assert self.num_used == int((users > 0).sum())
        is_free = (self.users == 0) & (self.keepers == 0)
        assert sorted(self.free) == np.flatnonzero(is_free).tolist(), "the free list is wrong"
        assert (self.keepers >= 0).all() and (self.reserved >= 0).all()
        places = self.count + self.reserved
        assert (places <= self.held * self.page_tokens).all(), "tokens without a page"
        assert (self.held == -(-places // self.page_tokens)).all(), "pages that nobody needs"
