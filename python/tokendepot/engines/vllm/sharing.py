"""One load for all requests that share a prefix.

Requests with a long common prefix often arrive together, and each would load it into blocks of its own. So a request
waits ("ask again") while another one's load or hold brings at least half of the chunks that it would load itself. After
that the engine's own prefix cache has the blocks, and only the rest is loaded or computed.

Why nobody waits for ever:
* Who is waited for has its load or hold under way and waits for nobody.
* The engine puts loaded blocks into its prefix cache when it sees that the load has ended, and changes the request's
  status then: that ends the wait, and so does the failure or the end of the request that is waited for.
* A load that has ended is waited for a second at most, should the engine not come to its request.
* All waits of a request together last no longer than one load may.
* A request whose wait brought nothing (blocks evicted at once, an adapter of equal content under another name) does
  not wait again.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.request import RequestStatus

from tokendepot import _core
from tokendepot.engines.vllm.groups import FULL, Group
from tokendepot.engines.vllm.tracked import Tracked

UNSEEN_S = 1.0  # between the end of a load and the engine's look at its request, which may be of low priority


@dataclass
class Bringing:
    """A load or hold under way, of one request."""

    owner: Tracked
    keys: bytes  # of the prefix that the engine's cache has when it has ended
    revoked: bool = False  # it brings nothing any more
    ended: float | None = None  # when, on all ranks

    def is_under_way(self, now: float) -> bool:
        if self.revoked or (self.ended is not None and now >= self.ended + UNSEEN_S):
            return False
        hold = self.owner.hold
        if hold is not None:
            return not hold.failed and now < hold.until
        return bool(self.owner.request.status == RequestStatus.WAITING_FOR_REMOTE_KVS)


@dataclass
class Wait:
    """Of one request, for another one's load or hold."""

    brought: Bringing
    local_tokens: int  # that the waiting request found in the engine's prefix cache when it began


class Sharing:
    """Which requests wait for which. Not thread-safe. Times are of time.monotonic()."""

    def __init__(self, groups: list[Group], prefix_caching: bool, patience_s: float) -> None:
        """Without the engine's prefix cache blocks are not shared, and nobody waits."""
        self._prefix_caching = prefix_caching
        self._every_prefix = all(group.attention == FULL for group in groups)
        self._patience_s = patience_s
        self._bringing: dict[str, Bringing] = {}  # by the id of the request that owns the load
        self._waits: dict[str, Wait] = {}  # by the id of the request that waits
        self._until: dict[str, float] = {}  # when a request has waited enough; outlives its waits

    def brings(self, owner: Tracked, keys: bytes) -> None:
        """A load or hold of `owner` begins. Who waits for a hold also waits for the load that it becomes."""
        bringing = self._bringing.setdefault(owner.request.request_id, Bringing(owner, keys))
        bringing.keys, bringing.ended = keys, None

    def ended(self, request_id: str, now: float) -> None:
        """What `brings` announced has ended on all ranks; the engine has yet to see it."""
        bringing = self._bringing.get(request_id)
        if bringing is not None:
            bringing.ended = now

    def brings_nothing(self, request_id: str) -> None:
        """The load or hold of a request has failed or is not wanted any more."""
        bringing = self._bringing.pop(request_id, None)
        if bringing is not None:
            bringing.revoked = True

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self.brings_nothing(request_id)
        self._waits.pop(request_id, None)
        self._until.pop(request_id, None)

    def begin(self, request_id: str, keys: bytes, chunks: range, local_tokens: int, now: float) -> bool:
        """Whether a request that would load `chunks` of the prompt with these keys has to wait, from now on."""
        if not self._prefix_caching or now >= self._until.get(request_id, now + self._patience_s):
            return False
        self._bringing = {owner: brought for owner, brought in self._bringing.items() if brought.is_under_way(now)}
        for owner_id, brought in self._bringing.items():
            if owner_id != request_id and self._is_worth_waiting(brought.keys, keys, chunks):
                self._waits[request_id] = Wait(brought, local_tokens)
                self._until.setdefault(request_id, now + self._patience_s)
                return True
        return False

    def goes_on(self, request_id: str, local_tokens: int, now: float) -> bool:
        """Whether the request has to wait still. Cheap: the engine asks at every step."""
        wait = self._waits.get(request_id)
        return (
            wait is not None
            and local_tokens <= wait.local_tokens
            and now < self._until[request_id]
            and wait.brought.is_under_way(now)
        )

    def end(self, request_id: str, local_tokens: int) -> bool:
        """Ends the wait of a request, if it has one. True when it brought something."""
        wait = self._waits.pop(request_id, None)
        if wait is None:
            return False
        if wait.brought.revoked:
            return False
        if local_tokens <= wait.local_tokens:
            self._until[request_id] = 0.0
        return local_tokens > wait.local_tokens

    def _is_worth_waiting(self, brought: bytes, keys: bytes, chunks: range) -> bool:
        """Keys are chained: prompts with an equal key are equal up to there."""
        count = len(brought) // _core.KEY_BYTES
        half = chunks.start + (len(chunks) + 1) // 2 - 1
        # Of a window only the last blocks are loaded, so that the engine finds this very prefix and no shorter one.
        last = half if self._every_prefix else count - 1
        return half < count and last < chunks.stop and _key(brought, last) == _key(keys, last)


def _key(keys: bytes, at: int) -> bytes:
    return keys[at * _core.KEY_BYTES : (at + 1) * _core.KEY_BYTES]
