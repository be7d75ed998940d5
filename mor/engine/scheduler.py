"""Which rows run in a tick: admission, chunks of prompts, preemption, and when the coda runs.

A tick's rows: first one row for each request that decodes, then the chunks already inside, then new
chunks of prompts while the budget lasts. The oldest request wins: it takes pages from the youngest.
Bound: a row spends at most R ticks in the block and waits at most R ticks for the coda; the oldest
prompt starts a chunk in the first tick that has room, R + 1 ticks at most.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from mor.engine.blocks import BlockManager
from mor.engine.config import EngineConfig
from mor.engine.core import Batch, Flight, Request
from mor.engine.prefix import Entry, PrefixCache


class Scheduler:
    """Requests and flights; knows pages and rows, no tensors."""

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        prefix: PrefixCache | None,
        *,
        num_recursions: int,
        num_rows: int,
        coda_period: Callable[[int], int],
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.prefix = prefix
        self.num_recursions = num_recursions
        self.coda_period = coda_period
        """ticks between calls of the coda for so many requests in flight"""
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """in order of arrival"""
        self.prompting: list[Request] = []
        """those whose tokens have not all entered, in order of arrival"""
        self.drawn: list[Request] = []
        """those whose newest token has just been drawn"""
        self.entering: list[Flight] = []
        self.in_block: list[Flight] = []
        self.ready: list[Flight] = []
        """flights that left the block and wait for the coda"""
        self.tick = 0
        self.last_coda_tick = 0
        self.free_rows = list(range(num_rows - 1, -1, -1))
        self.single_rows = list(np.arange(num_rows).reshape(-1, 1))
        self.free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self.num_preemptions = 0
        self.num_rows_run = 0
        """rows of all ticks together"""
        self.active_share = np.ones(num_recursions)
        """running mean of the share of tokens active at each recursion"""
        self.depth_counts = np.zeros(num_recursions, np.int64)
        """tokens that went through, by their depth"""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Batch:
        """Choose the rows of the next tick and reserve their pages."""
        self.tick += 1
        self.entering = []
        self._decode()
        rows = len(self.entering) + sum(len(flight.active) for flight in self.in_block)
        budget = self.config.max_num_batched_tokens - rows
        budget -= self._prefill(budget)
        copies = self._admit(budget)
        entering, self.entering = self.entering, []
        self.in_block += entering
        self.num_rows_run += sum(len(flight.active) for flight in self.in_block)
        return Batch(copies, entering, list(self.in_block))

    def _decode(self) -> None:
        """Start the newest token of every request that has drawn one."""
        if not self.drawn:
            return
        drawn, self.drawn = self.drawn, []
        slots = np.array([request.slot for request in drawn])
        short = set(self.blocks.reserve_one(slots).tolist())
        late = [request for request in drawn if request.slot in short] if short else []
        for request in drawn:
            if request.slot not in short:
                self._start(request, 1)
        for request in sorted(late, key=lambda request: request.arrival_s):
            if request.slot < 0:
                continue  # an older request has just taken its pages
            if self._reserve(request, 1):
                self._start(request, 1)
            else:
                self.drawn.append(request)

    def _prefill(self, budget: int) -> int:
        """Start chunks of running requests' prompts, oldest first; returns the rows taken."""
        taken = 0
        for request in list(self.prompting):
            if taken >= budget:
                break
            if request.slot >= 0:
                taken += self._chunk(request, budget - taken)
        return taken

    def _chunk(self, request: Request, budget: int) -> int:
        """Start as many tokens of a prompt as budget and rows allow; returns how many."""
        count = min(request.num_pending, budget, self.num_spare_rows)
        if count <= 0 or not self._reserve(request, count):
            return 0
        self._start(request, count)
        if request.num_pending == 0:
            self.prompting.remove(request)
        return count

    def _start(self, request: Request, count: int) -> None:
        """Send the next tokens of a request into the model."""
        rows = self.single_rows[self.free_rows.pop()]
        if count > 1:
            more = [rows, *(self.single_rows[self.free_rows.pop()] for _ in range(count - 1))]
            rows = np.concatenate(more)
        self.entering.append(Flight(request, request.num_started, rows, rows))
        request.num_started += count

    def _reserve(self, request: Request, count: int) -> bool:
        """Reserve places, taking pages from younger requests if need be."""
        while not self.blocks.reserve(request.slot, count):
            youngest = self.running[-1]
            if youngest is request:
                return False
            self.preempt(youngest)
        return True

    def preempt(self, request: Request) -> None:
        """Take all pages of a request; its depths so far are replayed when it comes back."""
        self._leave(request)
        self.waiting.appendleft(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _admit(self, budget: int) -> list[tuple[int, int]]:
        """Let waiting requests in while slots, pages and rows last; returns pages to copy."""
        copies: list[tuple[int, int]] = []
        while budget > 0 and self.can_admit():
            request, copied = self.let_in()
            copies += copied
            budget -= self._chunk(request, budget)
        return copies

    def let_in(self) -> tuple[Request, list[tuple[int, int]]]:
        """Let the next waiting request in; returns it, and pages to copy before it begins."""
        request = self.waiting.popleft()
        request.slot = self.free_slots.pop()
        self.blocks.open(request.slot, request.policy.max_recursions)
        self._place(request)
        return request, self._adopt_prefix(request)

    def start_whole(self, request: Request) -> Flight:
        """Send all that is known of a request into the model; the caller keeps its places."""
        self.prompting.remove(request)
        self._start(request, request.num_pending)
        flight = self.entering.pop()
        self.in_block.append(flight)
        self.num_rows_run += flight.count
        return flight

    def keep_newest(self, flight: Flight) -> None:
        """Let a prompt that is through go on as its last token, and free the other rows."""
        self.free_rows.extend(flight.rows[:-1].tolist())
        flight.start, flight.rows = flight.stop - 1, flight.rows[-1:]
        flight.active = flight.rows

    def can_admit(self) -> bool:
        """Tell whether slots and pages last for the next waiting request."""
        if not (self.waiting and self.free_slots):
            return False
        expected = self._pages_expected(self.waiting[0])
        return not self.running or expected <= self.blocks.num_available

    @property
    def num_spare_rows(self) -> int:
        """Tokens of prompts that can start: one row stays for every request, so that it decodes."""
        return len(self.free_rows) - self.config.max_num_seqs

    def num_to_run(self) -> int:
        """Return the tokens of the next waiting request that the prefix cache does not have."""
        request = self.waiting[0]
        if self.prefix is None or not request.params.cache_prefix:
            return request.num_tokens
        tokens = request.tokens(0, request.num_tokens)
        chain = self.prefix.match(request.policy, tokens, len(tokens) - 1)
        return len(tokens) - len(chain) * self.prefix.block_size

    def _place(self, request: Request) -> None:
        """Put a request among the running ones, in order of arrival."""
        for requests in (self.running, self.prompting):
            bisect.insort(requests, request, key=lambda request: request.arrival_s)

    def _pages_expected(self, request: Request) -> int:
        """Pages that a request's tokens will take at the depths seen so far, and one a table."""
        layout, tokens = self.blocks.layout, request.num_tokens
        depth = request.policy.max_recursions
        shares = self.active_share[: min(depth, layout.num_depths)]
        block = sum(int(tokens * share) // layout.block_page_tokens + 1 for share in shares)
        own = tokens // layout.own_page_tokens + 1 if layout.own_layers else 0
        return own + block

    def _adopt_prefix(self, request: Request) -> list[tuple[int, int]]:
        """Begin a request on the pages of the prefix cache, where it has its first tokens."""
        request.entry, request.num_kept = None, 0
        request.is_cacheable = self.prefix is not None and request.params.cache_prefix
        if self.prefix is None or request.params.prompt_logprobs is not None:
            return []
        tokens = request.tokens(0, request.num_tokens)
        # The last token runs whatever is known, since its logits are wanted.
        chain = self.prefix.match(request.policy, tokens, len(tokens) - 1)
        if not chain or self.blocks.num_available < self._pages_to_adopt(chain):
            return []
        count = len(chain) * self.prefix.block_size
        depths = list(b"".join(entry.depths for entry in chain))
        pages = self.prefix.pages_of(chain)
        copies = self.blocks.adopt(request.slot, pages, chain[-1].counts)
        request.entry, request.num_kept = chain[-1], count
        request.num_started = request.num_done = count
        request.num_cached_tokens = max(request.num_cached_tokens, count)
        if len(request.depths) < count:
            request.depths = depths
        return copies

    def _pages_to_adopt(self, chain: list[Entry]) -> int:
        """Pages that adopting takes at most: those that no request uses yet, and copies."""
        assert self.prefix is not None
        pages = [page for table in self.prefix.pages_of(chain) for page in table]
        unused = int((self.blocks.users[pages] == 0).sum()) if pages else 0
        return unused + self.blocks.layout.num_tables

    def collect(self, batch: Batch) -> list[Flight]:
        """Sort flights after the block; returns those that pass the coda now."""
        self.in_block = [flight for flight in batch.in_block if len(flight.active)]
        self.ready += [flight for flight in batch.in_block if not len(flight.active)]
        period = min(self.coda_period(len(self.running)), self.num_recursions)
        if self.in_block and self.tick - self.last_coda_tick < period:
            return []
        # A chunk may leave the block before the one ahead of it, whose keys the coda needs.
        due, waits, done = [], [], {}
        for flight in sorted(self.ready, key=lambda f: f.start):
            request = flight.request
            if flight.start == done.setdefault(request.slot, request.num_done):
                done[request.slot] = flight.stop
                due.append(flight)
            else:
                waits.append(flight)
        self.ready = waits
        if due:
            self.last_coda_tick = self.tick
        return due

    def retire(self, flight: Flight) -> None:
        """Free the rows of a flight that is through."""
        self.free_rows.extend(flight.rows.tolist())

    def remember(self, request: Request) -> None:
        """Give finished stretches of a request to the prefix cache."""
        size = self.config.block_size
        while request.is_cacheable and request.num_done - request.num_kept >= size:
            assert self.prefix is not None
            at = request.num_kept
            entry = request.entry
            counts = [0] * self.blocks.layout.num_tables if entry is None else entry.counts
            depths = request.depths[at : at + size]
            entry = self.prefix.extend(
                request.policy,
                entry,
                request.tokens(at, at + size),
                depths,
                request.slot,
                self._counts_after(counts, depths),
            )
            if entry is None:
                request.is_cacheable = False
                return
            request.entry, request.num_kept = entry, at + size

    def _counts_after(self, counts: list[int], depths: list[int]) -> list[int]:
        tables = range(1, len(counts))
        has_own = self.blocks.layout.own_layers > 0
        own = counts[0] + (len(depths) if has_own else 0)
        return [own, *(counts[t] + sum(1 for depth in depths if depth >= t) for t in tables)]

    def finish(self, request: Request) -> None:
        """Take a request out, at any point; all that it held is free."""
        if request.slot >= 0:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _leave(self, request: Request) -> None:
        for flights in (self.entering, self.in_block, self.ready):
            for flight in [f for f in flights if f.request is request]:
                flights.remove(flight)
                self.retire(flight)
        self.blocks.close(request.slot)
        self.free_slots.append(request.slot)
        for requests in (self.running, self.prompting, self.drawn):
            if request in requests:
                requests.remove(request)
        request.slot = -1
        request.num_started = request.num_done = request.num_kept = 0
        request.entry = None

    def see_depths(self, depths: Sequence[int]) -> None:
        """Count the depths of tokens that went through, and move the mean shares by them."""
        at_depth = np.bincount(depths, minlength=self.num_recursions + 1)[1:]
        self.depth_counts += at_depth
        shares = at_depth[::-1].cumsum()[::-1] / len(depths)
        weight = min(0.1, len(depths) / 256)
        self.active_share += weight * (shares - self.active_share)

    def check_integrity(self) -> None:
        """Assert that rows, slots and pages are each in one place."""
        flights = [*self.in_block, *self.ready]
        rows = [row for flight in flights for row in flight.rows.tolist()]
        assert len(set(rows)) == len(rows) and not set(rows) & set(self.free_rows)
        slots = [request.slot for request in self.running]
        assert sorted([*slots, *self.free_slots]) == list(range(self.config.max_num_seqs))
        self.blocks.check_integrity()
        if self.prefix is not None:
            self.prefix.check_integrity()
