"""Which chunks lie on which medium, over several roots: what KV events tell routers. Needs no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import _core

CHANGES_A_POLL = 4096  # of each root: a list of millions would hold up every other thread of the interpreter
CPU, STORAGE = "CPU", "STORAGE"  # as vLLM names media: host memory, and everything that outlives the host's power


class Change(NamedTuple):
    """A chunk of one group came to a medium, or is not on it any more. It may be told again without having changed."""

    stored: bool
    key: bytes
    namespace: str  # the first 16 hex digits of its digest
    group: int
    tokens: int  # held
    medium: str


class Holdings:
    """Follows roots from outside. A root that cannot be read holds nothing until it can. Not thread-safe."""

    def __init__(self, roots: list[str], complain: Callable[[str], None]) -> None:
        """Raises DepotError where a root cannot be opened now. `complain` gets one sentence when a root is lost later."""
        self._complain = complain
        self._watches: list[tuple[str, _core.RootWatch | None]] = [(path, _core.watch_root(path)) for path in roots]
        self._media = [CPU if watch.in_memory else STORAGE for _, watch in self._watches if watch]
        # Bit r = root r holds it; only for media with several roots, others need no counting.
        self._held: dict[tuple[bytes, int, str], int] = {}

    @property
    def root_ids(self) -> list[str]:
        return [watch.root_id for _, watch in self._watches if watch]

    def lost_roots(self) -> int:
        """How many cannot be read, as of the last poll. The only function that any thread may call."""
        return sum(watch is None for _, watch in self._watches)

    def poll(self) -> list[Change]:
        """What changed since the last call, at first everything; what is too much for one call comes with the next."""
        found: list[Change] = []
        for root in range(len(self._watches)):
            found += self._poll_root(root)
        return found

    def everything(self) -> list[Change]:
        """All that is held, as of the last poll. A chunk that two roots of one medium hold is there twice."""
        return [
            Change(*entry, medium)
            for (_, watch), medium in zip(self._watches, self._media, strict=True)
            if watch is not None
            for entry in watch.stored()
        ]

    def _poll_root(self, root: int) -> list[Change]:
        path, watch = self._watches[root]
        try:
            if watch is None:
                watch = _core.watch_root(path)
                self._watches[root] = (path, watch)
            return self._merge(root, watch.poll(CHANGES_A_POLL))
        except _core.DepotError as error:
            if watch is None:
                return []
            self._complain(f"root {path} is lost: {error}")
            self._watches[root] = (path, None)
            return self._merge(root, [(False, *entry[1:]) for entry in watch.stored()])

    def _merge(self, root: int, changes: list[tuple[bool, bytes, str, int, int]]) -> list[Change]:
        medium = self._media[root]
        if self._media.count(medium) == 1:
            return [Change(*change, medium) for change in changes]
        merged = []
        for change in changes:
            stored, key, _, group, _ = change
            place = (key, group, medium)
            before = self._held.get(place, 0)
            after = before | 1 << root if stored else before & ~(1 << root)
            if after:
                self._held[place] = after
            else:
                self._held.pop(place, None)
            if bool(before) != bool(after):
                merged.append(Change(*change, medium))
        return merged
