"""Plays a trace against a real depot: extents of KV are stored in and loaded from root directories by the engine.

One process is scheduler and worker in one: for each prompt it looks up, loads the leading chunks that are there, and
stores those that are not. Every row of KV carries a stamp that names its block, checked after each load. Where the cache
starts empty, it uses the device "host". Not thread-safe.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _core
from .cache_models import Outcome, note_what_is_held
from .extents import ENGINE_BLOCK_TOKENS, Geometry, automatic_segment_bytes
from .traces import Request, Trace

PAGED_CACHE_BYTES = 64 << 20  # the engine's side: as many chunks as fit are loaded or stored at once
POLL_S = 0.0002
JOB_PATIENCE_S = 60.0
SETTLE_S = 1.0  # until what was evicted has gone from the index: journals are read once a second at least
RESERVE_BYTES = 256 << 20  # what the engine leaves free on a file system by default


class RootError(ValueError):
    """A directory that cannot be a replay's root, in one sentence for the user."""


class WrongBytesError(Exception):
    """A load brought other bytes than were stored: what a depot must never do."""


@dataclass
class RealOutcome(Outcome):
    """What the engine did. Seconds are those between the submission of a job and its end, as the engine reports them.

    Attributes:
        load_s: for each prompt with hits, the seconds of its loads.
        store_s: the sum over all stores.
        lookup_s: for each prompt, the seconds of its lookup.
        late_s: how long after its time the latest prompt was served; 0 where the trace is played as fast as possible.
        failures: loads and stores that did not come about, by the engine's reason.
        stats: the engine's own counters at the end (`Depot.stats`).
    """

    load_s: list[float] = field(default_factory=list)
    store_s: float = 0.0
    lookup_s: list[float] = field(default_factory=list)
    late_s: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def write_amplification(self) -> float:
        """Bytes written into all roots for each byte that stores brought: journal records, extents carried on when their
        segment is evicted, and copies to the next root are in it."""
        written = sum(root["written_bytes"] for root in self.stats["roots"])
        return written / self.stats["store"]["bytes"] if self.stats["store"]["bytes"] else 0.0


class RealDepot:
    """An empty depot in directories of its own, which are emptied at the end.

    Raises:
        RootError: a directory is not empty, or its file system has no room.
        DepotError: the engine refuses a root.
    """

    def __init__(
        self,
        roots: Sequence[tuple[str, int]],
        segment_bytes: int | None,
        geometry: Geometry,
        keep: bool,
        rewrite_percent: int = 0,
    ) -> None:
        """
        roots: (directory, capacity in bytes), fastest first.
        keep: the directories stay as they are at the end.
        rewrite_percent: the depot's option of that name.
        """
        self._geometry = geometry
        self._keep = keep
        self._roots = [(os.path.abspath(path), capacity) for path, capacity in roots]
        self._made = {path for path, _ in self._roots if not os.path.isdir(path)}
        for path, capacity in self._roots:
            _check_is_free(path, capacity)
        self._slots = max(4, PAGED_CACHE_BYTES // geometry.extent_bytes)
        self._block_tokens = math.gcd(geometry.tokens, ENGINE_BLOCK_TOKENS)
        self._blocks_per_chunk = geometry.tokens // self._block_tokens
        self._cache = self._paged_cache()
        segment = {"segment": segment_bytes} if segment_bytes else {}
        described = [{"path": path, "capacity": capacity, **segment} for path, capacity in self._roots]
        staging = 2 * self._slots * geometry.extent_bytes
        cut = segment_bytes or automatic_segment_bytes(self._roots[0][1], geometry.extent_bytes)
        self._chunks_per_segment = cut // geometry.extent_bytes
        self._job = 0
        self._depot = None
        try:
            # The models know neither time nor other processes, so no grace for what others were promised.
            config = {"roots": described, "slab": staging, "store_queue": staging, "eviction_grace_ms": 0}
            config["rewrite_percent"] = rewrite_percent
            self._depot = _core.Depot.open(json.dumps(config))
            manifest = {"model": "replay of a trace", "geometry": vars(geometry)}
            self._namespace = self._depot.register_namespace(json.dumps(manifest))
            part = (0, geometry.layers, 0, geometry.heads)
            self._want = _core.GroupWant(0, "canonical", part, geometry.tokens)
            self._attach(part)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the engine, and unless they are to be kept removes what it has written."""
        if self._depot is not None:
            self._depot.close()
        if self._keep:
            return
        for path, _ in self._roots:
            if path in self._made:
                shutil.rmtree(path, ignore_errors=True)
                continue
            for entry in os.scandir(path) if os.path.isdir(path) else ():
                if entry.is_dir():
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)

    def play(
        self, trace: Trace, outcome: RealOutcome, speed: float | None, advance: Callable[[int], None]
    ) -> None:
        """Plays the trace; `outcome` is right after every prompt, also when an exception ends the play.

        speed: 1 = at the trace's times, 2 = twice as fast; None = each prompt when the one before is done.

        Raises:
            WrongBytesError: a load brought bytes of another block.
        TimeoutError: a job was not reported in a minute.
        """
        seen: set[int] = set()
        began = time.monotonic()
        first_s = trace.requests[0].time_s
        try:
            for request in trace.requests:
                if speed is not None:
                    due = began + (request.time_s - first_s) / speed
                    now = time.monotonic()
                    outcome.late_s = max(outcome.late_s, now - due)
                    time.sleep(max(0.0, due - now))
                hits = self._serve(request, outcome)
                seen.update(request.blocks)
                outcome.requests += 1
                outcome.references += len(request.blocks)
                outcome.input_tokens += request.input_tokens
                outcome.hits += hits
                outcome.hit_tokens += trace.tokens_of(request, hits)
                outcome.unique_stored = len(seen)
                advance(1)
        finally:
            try:
                time.sleep(SETTLE_S)
            finally:  # a Ctrl-C that comes now costs the settling only
                self._note_the_end(trace, outcome)

    def _note_the_end(self, trace: Trace, outcome: RealOutcome) -> None:
        note_what_is_held(trace, outcome, self._holds)
        outcome.stats = self._depot.stats()
        outcome.stored = outcome.stats["store"]["extents"]
        # A promoted extent has two entries while its copy lives: copies that have gone make this too high.
        promoted = sum(root["promoted_extents"] for root in outcome.stats["roots"])
        outcome.evicted = max(0, outcome.stored + promoted - outcome.stats["entries"])
        demoted = sum(root["demoted_segments"] for root in outcome.stats["roots"])
        outcome.copied = demoted * self._chunks_per_segment  # only full segments are copied

    # --- one prompt ---

    def _serve(self, request: Request, outcome: RealOutcome) -> int:
        keys = [self._key_of(block) for block in request.blocks]
        joined = b"".join(keys)
        began = time.perf_counter()
        found = self._depot.longest_prefix(joined, [self._want])
        outcome.lookup_s.append(time.perf_counter() - began)
        hits = self._load(request.blocks, joined, found, outcome) if found else 0
        stored = self._depot.stored(joined, self._want)
        missing = [(keys[i], i, request.blocks[i]) for i in range(hits, len(keys)) if not stored[i]]
        for begin in range(0, len(missing), self._slots):
            self._store(missing[begin : begin + self._slots], outcome)
        return hits

    def _holds(self, blocks: Sequence[int]) -> Sequence[bool]:
        return [has != 0 for has in self._depot.stored(b"".join(map(self._key_of, blocks)), self._want)]

    def _load(self, blocks: Sequence[int], keys: bytes, count: int, outcome: RealOutcome) -> int:
        """Returns how many leading chunks came."""
        seconds = 0.0
        for begin in range(0, count, self._slots):
            end = min(begin + self._slots, count)
            self._stamps()[:, :, : (end - begin) * self._blocks_per_chunk] = 0
            ids = list(range((end - begin) * self._blocks_per_chunk))
            try:
                group = (self._want, begin, self._blocks_per_chunk, ids)
                plan = self._depot.plan_load(self._namespace, keys, [group], JOB_PATIENCE_S)
            except _core.DepotError as error:
                if error.kind != "not_found":
                    raise
                outcome.failures["absent"] = outcome.failures.get("absent", 0) + 1
                return begin
            self._job += 1
            self._depot.submit_load(self._job, plan)
            done = self._wait(outcome)
            seconds += done["seconds"]
            bad = {chunk for _, chunk, _, _ in done["failures"]}
            for slot, chunk in enumerate(range(begin, end)):
                if chunk not in bad and not np.array_equal(self._stamps_of(slot), self._expected(blocks[chunk])):
                    raise WrongBytesError(f"block {blocks[chunk]}: expected its own bytes, a load brought others")
            if bad:
                return min(bad)
        outcome.load_s.append(seconds)
        return count

    def _store(self, chunks: Sequence[tuple[bytes, int, int]], outcome: RealOutcome) -> None:
        items = []
        for slot, (key, chunk, block) in enumerate(chunks):
            self._stamps_of(slot)[...] = self._expected(block)
            first = slot * self._blocks_per_chunk
            items.append((key, chunk, 0, list(range(first, first + self._blocks_per_chunk))))
        self._job += 1
        self._depot.submit_store(self._job, _core.plan_store(self._namespace, items))
        outcome.store_s += self._wait(outcome)["seconds"]

    def _wait(self, outcome: RealOutcome) -> dict[str, Any]:
        end = time.monotonic() + JOB_PATIENCE_S
        while time.monotonic() < end:
            for done in self._depot.poll():
                for *_, reason in done["failures"]:
                    outcome.failures[reason] = outcome.failures.get(reason, 0) + 1
                return done
            time.sleep(POLL_S)
        raise TimeoutError(f"job {self._job}: expected its end within {JOB_PATIENCE_S:.0f} s")

    # --- bytes ---

    def _key_of(self, block: int) -> bytes:
        # A block's number stands for its whole prefix, as a key of the depot does.
        return hashlib.sha256(self._namespace + block.to_bytes(8, "little")).digest()

    def _paged_cache(self) -> np.ndarray:
        g = self._geometry
        blocks = self._slots * self._blocks_per_chunk
        shape = (g.layers, g.planes, blocks, self._block_tokens, g.heads, g.row_bytes)
        # Random bytes: neither a file system nor a disk may make them smaller.
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def _attach(self, part: tuple[int, int, int, int]) -> None:
        _, _, block, token, head, _ = self._cache.strides
        self._depot.attach(
            group=0,
            kind="canonical",
            part=part,
            tokens=self._geometry.tokens,
            block_tokens=self._block_tokens,
            block_count=self._cache.shape[2],
            row_bytes=self._geometry.row_bytes,
            layers=[[(plane.ctypes.data, block, head, token, 0) for plane in layer] for layer in self._cache],
        )

    def _stamps(self) -> np.ndarray:
        """The first 8 bytes of every row."""
        return self._cache[..., :8].view(np.uint64)

    def _stamps_of(self, slot: int) -> np.ndarray:
        first = slot * self._blocks_per_chunk
        return self._stamps()[:, :, first : first + self._blocks_per_chunk]

    def _expected(self, block: int) -> np.ndarray:
        shape = self._stamps_of(0).shape
        rows = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
        return rows + (np.uint64(block + 1) << np.uint64(32))


def _check_is_free(path: str, capacity: int) -> None:
    parent = path if os.path.isdir(path) else os.path.dirname(path)
    try:
        if os.path.isdir(path) and any(True for _ in os.scandir(path)):
            raise RootError(f"root '{path}': expected a directory that is empty or not there yet")
        system = os.statvfs(parent)
    except OSError as error:
        raise RootError(f"root '{path}': expected a directory that can be made: {error.strerror}") from None
    free = system.f_bavail * system.f_frsize
    if capacity + RESERVE_BYTES > free:
        raise RootError(
            f"root '{path}': expected {capacity + RESERVE_BYTES:,} bytes free for this capacity, found {free:,}; "
            "fewer --requests, --layers or smaller --block-bytes need less"
        )
