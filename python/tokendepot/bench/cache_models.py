"""Caches in memory that a trace is played against: the depot's own policy, LRU and FIFO by block, and one without a bound.

A model takes the blocks of one prompt after the other (`serve`) and answers how many of the leading ones it had. Sizes
are blocks or bytes of blocks; nothing is stored but numbers. Models are not thread-safe.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .extents import SMALLEST_SEGMENT, SizeError, automatic_segment_bytes
from .traces import Trace

SEGMENTS_AT_LEAST = 3


def least_capacity_bytes(extent_bytes: int) -> int:
    """The smallest first root of segments that the engine sizes by itself."""
    return SEGMENTS_AT_LEAST * max(SMALLEST_SEGMENT, extent_bytes)


class Cache(Protocol):
    """Counts blocks: `stored` by stores, `copied` to a tier below, `evicted` so that no tier has them any more."""

    stored: int
    copied: int
    evicted: int

    def serve(self, blocks: Sequence[int]) -> Sequence[int]:
        """Looks a prompt up, uses what leads it and keeps the rest; returns the hits of each tier, in blocks."""

    def holds(self, blocks: Sequence[int]) -> Sequence[bool]:
        """Which of a prompt's blocks some tier has."""


class BlockCache:
    """Keeps single blocks; evicts the least recently used one, or (`fifo`) the oldest. `capacity` None keeps all.

    Every block of a prompt is used, in the prompt's order, also behind the first miss: what engines do.
    """

    def __init__(self, capacity: int | None, fifo: bool = False) -> None:
        if capacity is not None and capacity < 1:
            raise SizeError(f"capacity of {capacity} blocks: expected 1 or more")
        self.stored = self.copied = self.evicted = 0
        self._capacity = capacity
        self._fifo = fifo
        self._kept: OrderedDict[int, None] = OrderedDict()

    def serve(self, blocks: Sequence[int]) -> Sequence[int]:
        kept = self._kept
        hits = 0
        leading = True
        for block in blocks:
            if block in kept:
                hits += leading
                if not self._fifo:
                    kept.move_to_end(block)
                continue
            leading = False
            kept[block] = None
            self.stored += 1
            if self._capacity is not None and len(kept) > self._capacity:
                kept.popitem(last=False)
                self.evicted += 1
        return (hits,)

    def holds(self, blocks: Sequence[int]) -> Sequence[bool]:
        return [block in self._kept for block in blocks]


@dataclass
class _Segment:
    number: int
    last_used: int
    blocks: list[int] = field(default_factory=list)
    tiers: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)  # tiers that evicted it: it does not come back there


class SegmentCache:
    """What the depot does with one writer: extents fill segments; the coldest sealed segment goes when the next needs room.

    The same steps as `RootWriter` and `Keeper` (src/store): one segment is being filled and one is ready beside it, so a
    root of n segments keeps n - 2 sealed ones. A segment is as warm as the last load from it or store into it. Sealed
    segments are copied to the root below, here at once. A block that is stored, but behind a miss, is neither stored
    again nor used. A block that was loaded from a lower root is copied to the first one, here at once, if its use before
    that was later than the last use of the coldest sealed segment there, or if there is room; copies have segments of
    their own, which are not copied down (`Promotion` in src/store; there only while nothing else moves).

    Attributes:
        promoted: blocks copied to the first root.
    """

    def __init__(self, capacities: Sequence[int], extent_bytes: int, segment_bytes: int | None = None) -> None:
        """capacities: bytes of each root, fastest first. segment_bytes: None = what the engine takes by itself."""
        segment = segment_bytes or automatic_segment_bytes(capacities[0], extent_bytes)
        if segment < extent_bytes:
            raise SizeError(f"segments of {segment} bytes: expected room for a block of {extent_bytes} bytes")
        self._segments = [capacity // segment for capacity in capacities]
        for tier, count in enumerate(self._segments):
            least = 1 if tier else SEGMENTS_AT_LEAST
            if count < least:
                raise SizeError(
                    f"capacity of {capacities[tier]} bytes: expected at least {least * segment}, room for {least} "
                    f"segment{'s' * (least > 1)} of {segment} bytes"
                )
        self._per_segment = segment // extent_bytes
        self.stored = self.copied = self.evicted = self.promoted = 0
        self._now = 0
        self._place: dict[int, _Segment] = {}
        self._copy: dict[int, _Segment] = {}
        self._copies: _Segment | None = None  # the segment of copies that is being filled
        self._used: dict[int, int] = {}
        self._current: _Segment | None = None
        self._made = 0
        # The sealed segments of each tier as a heap of (last used, number, segment). Segments get warmer behind the
        # heap's back: what comes up with an old time goes back with its new one.
        self._sealed: list[list[tuple[int, int, _Segment]]] = [[] for _ in capacities]

    def serve(self, blocks: Sequence[int]) -> Sequence[int]:
        hits = [0] * len(self._segments)
        leading = 0
        from_below: list[tuple[int, int]] = []  # block, its use before
        for block in blocks:
            segment = self._copy.get(block) or self._place.get(block)
            if segment is None:
                break
            self._now += 1
            segment.last_used = self._now
            used_before, self._used[block] = self._used.get(block, 0), self._now
            tier = min(segment.tiers)
            hits[tier] += 1
            leading += 1
            if tier > 0:
                from_below.append((block, used_before))
        for block in blocks[leading:]:
            if block not in self._place and block not in self._copy:
                self._store(block)
        for block, used_before in from_below:
            self._promote(block, used_before)
        return hits

    def holds(self, blocks: Sequence[int]) -> Sequence[bool]:
        return [block in self._place or block in self._copy for block in blocks]

    def _promote(self, block: int, used_before: int) -> None:
        segment = self._place.get(block)
        if segment is None or 0 in segment.tiers or block in self._copy:
            return
        if len(self._sealed[0]) + self._open() >= self._segments[0]:
            if not self._sealed[0] or used_before <= self._coldest(0).last_used:
                return
        if self._copies is None or len(self._copies.blocks) == self._per_segment:
            if self._copies is not None:
                self._seal(0, self._copies)
            self._made += 1
            self._copies = _Segment(self._made, self._now, tiers={0}, left=set(range(1, len(self._segments))))
            if len(self._sealed[0]) + self._open() > self._segments[0]:
                self._evict(0)
        self._now += 1
        self._copies.last_used = self._now
        self._copies.blocks.append(block)
        self._copy[block] = self._copies
        self.promoted += 1

    def _open(self) -> int:
        """Segments of the first root that cannot be evicted: the one being filled, the one that is ready, and that of copies."""
        return 2 + (self._copies is not None)

    def _store(self, block: int) -> None:
        if self._current is None or len(self._current.blocks) == self._per_segment:
            self._next_segment()
        self._now += 1
        self._used[block] = self._current.last_used = self._now
        self._current.blocks.append(block)
        self._place[block] = self._current
        self.stored += 1

    def _next_segment(self) -> None:
        full = self._current
        self._made += 1
        self._current = _Segment(self._made, self._now, tiers={0})
        if full is None:
            return
        self._seal(0, full)
        self._copy_down(0, full)
        if len(self._sealed[0]) + self._open() > self._segments[0]:
            self._evict(0)

    def _seal(self, tier: int, segment: _Segment) -> None:
        heapq.heappush(self._sealed[tier], (segment.last_used, segment.number, segment))

    def _copy_down(self, tier: int, segment: _Segment) -> None:
        below = tier + 1
        if below == len(self._segments) or below in segment.tiers or below in segment.left:
            return
        if len(self._sealed[below]) + 1 > self._segments[below]:
            self._evict(below)
        segment.tiers.add(below)
        self._seal(below, segment)
        self.copied += len(segment.blocks)

    def _coldest(self, tier: int) -> _Segment:
        sealed = self._sealed[tier]
        while sealed[0][0] != sealed[0][2].last_used:
            stale = sealed[0][2]
            heapq.heapreplace(sealed, (stale.last_used, stale.number, stale))
        return sealed[0][2]

    def _evict(self, tier: int) -> None:
        coldest = self._coldest(tier)
        heapq.heappop(self._sealed[tier])
        self._copy_down(tier, coldest)
        coldest.tiers.remove(tier)
        coldest.left.add(tier)
        if not coldest.tiers:
            for block in coldest.blocks:
                if self._copy.get(block) is coldest:
                    del self._copy[block]
                elif self._place.get(block) is coldest:
                    del self._place[block]
                    self.evicted += 1


@dataclass
class Outcome:
    """What a cache did with a trace, or (requests < all of them) with its beginning. Counts of blocks unless named tokens."""

    requests: int = 0
    references: int = 0
    input_tokens: int = 0
    hits: int = 0
    hits_by_tier: list[int] = field(default_factory=list)
    hit_tokens: int = 0
    stored: int = 0
    copied: int = 0
    evicted: int = 0
    unique_stored: int = 0
    held: int = 0  # at the end, different blocks
    unreachable: int = 0  # of these, without one before them in each prompt that has them: no look-up finds them

    @property
    def hit_rate(self) -> float:
        return self.hits / self.references if self.references else 0.0

    @property
    def token_hit_rate(self) -> float:
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0

    @property
    def writes_per_unique(self) -> float:
        """Blocks written, copies to lower tiers included, for each different block: what is evicted and wanted again is written again."""
        return (self.stored + self.copied) / self.unique_stored if self.unique_stored else 0.0


def note_what_is_held(trace: Trace, outcome: Outcome, holds: Callable[[Sequence[int]], Sequence[bool]]) -> None:
    """Sets `held` and `unreachable` from what a cache has now of the prompts that were played."""
    held: set[int] = set()
    reached: set[int] = set()
    for request in trace.requests[: outcome.requests]:
        there = [bool(has) for has in holds(request.blocks)]
        leading = there.index(False) if False in there else len(there)
        reached.update(request.blocks[:leading])
        held.update(block for block, has in zip(request.blocks, there, strict=True) if has)
    outcome.held, outcome.unreachable = len(held), len(held - reached)


def play(trace: Trace, cache: Cache, outcome: Outcome, advance: Callable[[int], None] = lambda requests: None) -> None:
    """Plays a trace against a cache. `outcome` is right after every request, also when an exception ends the play; what is
    held is counted at the end only."""
    seen: set[int] = set()
    for request in trace.requests:
        tiers = cache.serve(request.blocks)
        hits = sum(tiers)
        seen.update(request.blocks)
        outcome.requests += 1
        outcome.references += len(request.blocks)
        outcome.input_tokens += request.input_tokens
        outcome.hits += hits
        outcome.hits_by_tier = [a + b for a, b in zip(outcome.hits_by_tier or [0] * len(tiers), tiers, strict=True)]
        outcome.hit_tokens += trace.tokens_of(request, hits)
        outcome.stored, outcome.copied, outcome.evicted = cache.stored, cache.copied, cache.evicted
        outcome.unique_stored = len(seen)
        advance(1)
    note_what_is_held(trace, outcome, cache.holds)
