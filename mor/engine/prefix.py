"""The prefix cache: keys and values of ragged depth, kept for requests that begin alike.

Every `block_size` tokens of a finished stretch become an entry: how many tokens each table then
holds, and the pages. Routing is causal, so the depths of a prefix do not depend on what follows; an
entry serves requests of the same depth policy only, since other thresholds make other keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from mor.engine.blocks import BlockManager


class Entry:
    """One stretch of tokens after its parent."""

    __slots__ = ("counts", "depths", "is_alive", "key", "num_children", "pages", "parent")

    def __init__(
        self,
        key: tuple[Hashable, Hashable],
        parent: Entry | None,
        depths: bytes,
        counts: list[int],
        pages: list[tuple[int, list[int]]],
    ) -> None:
        self.key = key
        self.parent = parent
        self.depths = depths
        """depth of each token of the stretch"""
        self.counts = counts
        """tokens of each table at the end of the stretch"""
        self.pages = pages
        """of each table: index of the first page that the stretch touches, and its pages"""
        self.num_children = 0
        self.is_alive = True


class PrefixCache:
    """A tree of entries by their tokens. The least recently used leaf goes first."""

    def __init__(self, blocks: BlockManager, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.entries: dict[tuple[Hashable, Hashable], Entry] = {}
        self.leaves: OrderedDict[int, Entry] = OrderedDict()

    def match(self, policy: Hashable, tokens: Sequence[int], limit: int) -> list[Entry]:
        """Return the entries that the first `limit` tokens begin with, first to last."""
        chain: list[Entry] = []
        above: Hashable = policy
        for start in range(0, limit - self.block_size + 1, self.block_size):
            key = above, tuple(tokens[start : start + self.block_size])
            entry = self.entries.get(key)
            if entry is None:
                break
            chain.append(entry)
            above = id(entry)
        if chain and chain[-1].num_children == 0:
            self.leaves.move_to_end(id(chain[-1]))
        return chain

    def extend(
        self,
        policy: Hashable,
        parent: Entry | None,
        tokens: Sequence[int],
        depths: Sequence[int],
        slot: int,
        counts: list[int],
    ) -> Entry | None:
        """Keep the next stretch of a running request; returns its entry, a known one if there is.

        counts   tokens of each table at the end of the stretch
        Returns  None when the stretch before it has been dropped meanwhile, or the same text took
                 other depths in another batch (a score near its threshold): pages would not fit
        """
        if parent is not None and not parent.is_alive:
            return None
        key = policy if parent is None else id(parent), tuple(tokens)
        known = self.entries.get(key)
        if known is not None:
            return known if known.depths == bytes(depths) else None
        blocks = self.blocks
        before = [0] * len(counts) if parent is None else parent.counts
        pages = []
        for table, (low, high) in enumerate(zip(before, counts, strict=True)):
            size = int(blocks.page_tokens[table])
            first, last = low // size, -(-high // size)
            kept = blocks.tables[slot, table, first:last].tolist() if high > low else []
            for page in kept:
                blocks.keep(page)
            pages.append((first, kept))
        entry = Entry(key, parent, bytes(depths), counts, pages)
        self.entries[key] = entry
        self.leaves[id(entry)] = entry
        if parent is not None:
            parent.num_children += 1
            self.leaves.pop(id(parent), None)
        return entry

    def pages_of(self, chain: Sequence[Entry]) -> list[list[int]]:
        """Return every table's pages for the tokens of a chain; a later entry's page wins."""
        tables: list[list[int]] = [[] for _ in chain[-1].counts]
        for entry in chain:
            for table, (first, pages) in zip(tables, entry.pages, strict=True):
                if pages:
                    table[first:] = pages
        return tables

    def evict(self) -> bool:
        """Drop the least recently used leaf; False when nothing is left."""
        if not self.leaves:
            return False
        _, entry = self.leaves.popitem(last=False)
        del self.entries[entry.key]
        entry.is_alive = False
        for _, pages in entry.pages:
            for page in pages:
                self.blocks.unkeep(page)
        parent = entry.parent
        if parent is not None:
            parent.num_children -= 1
            if parent.num_children == 0:
                self.leaves[id(parent)] = parent
                self.leaves.move_to_end(id(parent), last=False)
        return True

    def clear(self) -> None:
        while self.evict():
            pass

    def check_integrity(self) -> None:
        """Assert that pages kept are counted, and that leaves are leaves."""
        keepers = [0] * self.blocks.num_pages
        children: dict[int, int] = {}
        for entry in self.entries.values():
            if entry.parent is not None:
                children[id(entry.parent)] = children.get(id(entry.parent), 0) + 1
            for _, pages in entry.pages:
                for page in pages:
                    keepers[page] += 1
        assert keepers == self.blocks.keepers.tolist(), "keepers of a page are miscounted"
        for entry in self.entries.values():
            assert entry.num_children == children.get(id(entry), 0)
            assert (id(entry) in self.leaves) == (entry.num_children == 0)
