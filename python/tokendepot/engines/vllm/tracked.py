"""What the scheduler half remembers of live requests and of the jobs under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokendepot import _core


@dataclass
class Promise:
    local_tokens: int
    hit_tokens: int


@dataclass
class Hold:
    """Extents that the workers verify, or have verified, before they are promised."""

    job: int
    request_id: str
    chunks: int  # of the prefix
    keys: bytes
    began: float
    until: float  # when it is given up
    ended_by: int = 0
    failed: bool = False
    missed: set[int] = field(default_factory=set)  # chunks that failed


@dataclass
class Tracked:
    """What is known about one live request."""

    request: Any
    chain: _core.KeyChain | None = None  # None: the request takes no part (see `barred`)
    barred: str = ""
    media: list[tuple[str, int, int]] = field(default_factory=list)
    promise: Promise | None = None
    hold: Hold | None = None
    load_failed: bool = False  # from then on it computes
    not_worth: int = 0  # tokens that the last look-up found and left to be computed
    tables: list[list[int]] = field(default_factory=list)  # block ids of each group
    next_chunk: int = 0  # chunks before it need no more thought
    counted: bool = False  # in queried_tokens
    found: bool | None = None  # whether the last look-up found anything; None = there was none
    asked_chunks: int = 0  # of the last look-up; 0 = there was none
    missing: int = 0  # chunk at which its hit ended
    local_tokens: int = 0  # that the engine had then


@dataclass
class Load:
    request_id: str
    keys: bytes
    local: int  # tokens that the engine had
    tokens: int  # that are loaded
    total: int  # of the prompt
    began: float
    failed: bool = False
    missed: set[int] = field(default_factory=set)  # chunks that failed


@dataclass
class Store:
    keys: list[tuple[bytes, int]]  # key and group
    firsts: list[tuple[bytes, int]]  # of the keys, those of first chunks
    ended_by: int = 0


class Storing:
    """What is on its way into the depot, and not to be stored again meanwhile. The caller brings the clock's time."""

    MOST_REMEMBERED = 4096  # then what has run out is forgotten

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._jobs: dict[int, Store] = {}
        self._until: dict[tuple[bytes, int], float] = {}  # (key, group) -> when it stops counting

    def has(self, key: bytes, group: int, now: float) -> bool:
        return self._until.get((key, group), 0.0) > now

    def add(self, key: bytes, group: int, until: float) -> None:
        self._until[(key, group)] = until

    def begin(self, job: int, items: list[tuple[bytes, int, int, list[int]]], now: float) -> None:
        """`items` are those of the job's order: key, chunk, group and blocks, all of them added."""
        self._jobs[job] = Store(
            [(key, group) for key, _, group, _ in items],
            [(key, group) for key, chunk, group, _ in items if chunk == 0],
        )
        if len(self._until) > self.MOST_REMEMBERED:
            self._until = {key: until for key, until in self._until.items() if until > now}
            self._jobs = {
                job: store for job, store in self._jobs.items() if any(key in self._until for key in store.keys)
            }

    def failed(self, job: int, item: int) -> None:
        store = self._jobs.get(job)
        if store is not None and item < len(store.keys):
            self._until.pop(store.keys[item], None)

    def ended(self, job: int, ranks: int, until: float) -> list[bytes]:
        """When all ranks have ended it, what they stored counts until then; returns the keys of its first chunks."""
        store = self._jobs.get(job)
        if store is None:
            return []
        store.ended_by += ranks
        if store.ended_by < self._ranks:
            return []
        del self._jobs[job]
        for key in store.keys:
            if key in self._until:  # else a rank failed to store it
                self._until[key] = until
        return [first[0] for first in store.firsts if first in self._until]

    def forget(self, key: bytes, group: int) -> None:
        self._until.pop((key, group), None)

    def clear(self) -> None:
        self._jobs.clear()
        self._until.clear()


def bar(request: Any) -> str:
    """Why a request takes no part, or ""."""
    if getattr(request, "prompt_embeds", None) is not None:
        return "prompt embeddings have no token ids to make keys of"
    if getattr(request, "resumable", False) or getattr(request, "streaming_queue", None) is not None:
        return "the prompt of a streaming session can still change"
    if any(item.identifier is None for item in request.mm_features or ()):
        return "a multimodal item has no content hash"
    return ""
