"""KV events of roots in vLLM's wire format, without an engine: what `tokendepot events` runs.

Messages are (topic, sequence number as 8 bytes big endian, msgpack of an EventBatch), numbered from 0 without gaps. The
ROUTER socket answers an 8-byte number with all batches kept from there on and an end mark, as vLLM's publisher does. The
first batch says AllBlocksCleared, so that nothing of an earlier publisher stays, and then all that is stored follows; the
same is sent again when somebody asks for batches that are not kept any more.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from .holdings import Change, Holdings

BATCH_EVENTS = 512
BATCHES_KEPT = 10_000  # as many as vLLM keeps unless told otherwise
HIGH_WATER = 100_000
POLL_MS = 100
LINGER_MS = 500
FRESH_START_EVERY_S = 10.0
END = (-1).to_bytes(8, "big", signed=True)
SUBSCRIPTION = {b"\x01": 1, b"\x00": -1}  # first byte of what subscribers send -> change


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None


# Fields that vLLM 0.20 to 0.33 all have. Up to 0.23 an event is an array in this order, from 0.24 on a map.
STORED_FIELDS: list[Any] = [
    ("block_hashes", list),
    ("parent_block_hash", Any),
    ("token_ids", list),
    ("block_size", int),
    ("lora_id", Any),
    ("medium", str),
    ("lora_name", Any),
    ("extra_keys", Any, None),
    ("group_idx", int, 0),
]
REMOVED_FIELDS: list[Any] = [("block_hashes", list), ("medium", str), ("group_idx", int, 0)]


class Wire:
    """How events are written: as maps (vLLM from 0.24 on) or as arrays; hashes as numbers or as the 32 bytes."""

    def __init__(self, *, arrays: bool, number_hashes: bool) -> None:
        self._number_hashes = number_hashes
        self._stored = msgspec.defstruct("BlockStored", STORED_FIELDS, tag=True, array_like=arrays)
        self._removed = msgspec.defstruct("BlockRemoved", REMOVED_FIELDS, tag=True, array_like=arrays)
        self._cleared = msgspec.defstruct("AllBlocksCleared", [], tag=True, array_like=arrays)
        self._encoder = msgspec.msgpack.Encoder()

    def event(self, change: Change) -> Any:
        """Tokens and parents of chunks are known to engines only."""
        hashes = [hash_of(change.key, number=self._number_hashes)]
        if not change.stored:
            return self._removed(hashes, change.medium, change.group)
        return self._stored(hashes, None, [], change.tokens, None, change.medium, None, None, change.group)

    def cleared(self) -> Any:
        return self._cleared()

    def encode(self, events: list[Any]) -> bytes:
        return self._encoder.encode(EventBatch(time.time(), events, data_parallel_rank=0))


def hash_of(key: bytes, *, number: bool) -> bytes | int:
    """A depot key as a block hash: its bytes, or what vLLM makes of a long hash, the last 8 bytes as a number."""
    return int.from_bytes(key[-8:], "big") if number else key


@dataclass
class Sent:
    """What a Publisher did. All but `subscriptions` only grow."""

    events: Counter[str] = field(default_factory=Counter)  # by name: BlockStored, BlockRemoved, AllBlocksCleared
    batches: int = 0
    dropped_batches: int = 0  # a subscriber at least had HIGH_WATER batches waiting and did not get them
    replays: int = 0
    fresh_starts: int = 0
    subscriptions: int = 0


class Publisher:
    """Owns two sockets. Not thread-safe; `sent` may be read by any thread."""

    def __init__(self, endpoint: str, replay_endpoint: str | None, topic: str, wire: Wire) -> None:
        """Raises zmq.ZMQError where an endpoint cannot be bound."""
        self._topic, self._wire = topic.encode(), wire
        self.sent = Sent()
        self._context = zmq.Context()
        self._publish = self._context.socket(zmq.XPUB)  # a PUB that says who subscribes
        self._replay = self._context.socket(zmq.ROUTER)
        try:
            self._publish.set_hwm(HIGH_WATER)
            self._publish.setsockopt(zmq.XPUB_VERBOSER, 1)  # each subscriber counts, also of the same topic
            self._publish.bind(endpoint)
            if replay_endpoint is not None:
                self._replay.bind(replay_endpoint)
        except zmq.ZMQError:
            self.close()
            raise
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=BATCHES_KEPT)
        self._next = 0

    @property
    def endpoints(self) -> list[str]:
        """As bound: a port of 0 has become a real one."""
        bound = (s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (self._publish, self._replay))
        return [text.rstrip("\x00") for text in bound if text.rstrip("\x00")]

    def send(self, events: list[Any]) -> None:
        self.sent.events.update(type(event).__name__ for event in events)
        for first in range(0, len(events), BATCH_EVENTS):
            payload = self._wire.encode(events[first : first + BATCH_EVENTS])
            self._send_batch((self._topic, self._next.to_bytes(8, "big"), payload))
            self._kept.append((self._next, payload))
            self._next += 1

    def _send_batch(self, message: tuple[bytes, ...]) -> None:
        """Never waits. A subscriber whose queue is full goes without, as with PUB, but it is counted: with NODROP
        ZeroMQ refuses, and then sends to all others without."""
        self.sent.batches += 1
        self._publish.setsockopt(zmq.XPUB_NODROP, 1)
        try:
            self._publish.send_multipart(message, zmq.DONTWAIT)
        except zmq.Again:
            self.sent.dropped_batches += 1
            self._publish.setsockopt(zmq.XPUB_NODROP, 0)
            self._publish.send_multipart(message)

    def _count_subscriptions(self) -> None:
        while self._publish.poll(0):
            self.sent.subscriptions += SUBSCRIPTION.get(self._publish.recv()[:1], 0)

    def answer_replays(self, timeout_ms: int) -> bool:
        """Waits so long for requests and answers those that are there. True: somebody asked for what is not kept."""
        self._count_subscriptions()
        lacking = False
        while self._replay.poll(timeout_ms):
            timeout_ms = 0
            frames = self._replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue  # not of this protocol
            self.sent.replays += 1
            who, start = frames[0], int.from_bytes(frames[2], "big")
            lacking |= bool(self._kept) and start < self._kept[0][0]
            for number, payload in self._kept:
                if number >= start:
                    self._replay.send_multipart((who, b"", self._topic, number.to_bytes(8, "big"), payload))
            self._replay.send_multipart((who, b"", b"", END, b""))
        return lacking

    def close(self) -> None:
        """Gives subscribers LINGER_MS for what is on its way to them."""
        self._publish.close(linger=LINGER_MS)
        self._replay.close(linger=0)
        # On a busy machine ZeroMQ has been seen to wait for ever, whatever the linger, for a slow subscriber that has gone.
        ending = threading.Thread(target=self._context.term, daemon=True)
        ending.start()
        ending.join(2 * LINGER_MS / 1e3)


def follow(holdings: Holdings, publisher: Publisher, wire: Wire, stopped: Callable[[], bool]) -> None:
    """Publishes until `stopped`."""
    publisher.send([wire.cleared()])
    fresh_start_due = time.monotonic() + FRESH_START_EVERY_S
    lacking = False
    while not stopped():
        changes = holdings.poll()
        publisher.send([wire.event(change) for change in changes])
        lacking |= publisher.answer_replays(0 if changes else POLL_MS)
        if lacking and time.monotonic() >= fresh_start_due:
            lacking, fresh_start_due = False, time.monotonic() + FRESH_START_EVERY_S
            publisher.sent.fresh_starts += 1
            publisher.send(list(_all(holdings, wire)))


def _all(holdings: Holdings, wire: Wire) -> Iterator[Any]:
    yield wire.cleared()
    yield from (wire.event(change) for change in holdings.everything())
