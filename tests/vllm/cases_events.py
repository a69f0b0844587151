"""KV events: who listens to the engine's publisher knows what the depot holds."""

from __future__ import annotations

import os
import time

import msgspec
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockStored, KVEventBatch, ZmqEventPublisher
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from harness import Engine
from lab import LENGTH, PROMPTS, Lab, case, keys_of, same

from tokendepot import _core

WAIT_S = 20.0


class Router:
    """Listens as routers do, with vLLM's own types: (hash, group) of the blocks on a depot's media."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.context.setsockopt(zmq.LINGER, 0)
        self.replay = f"{endpoint}-replay"
        self.live = self.context.socket(zmq.SUB)
        self.live.connect(endpoint)
        self.live.subscribe("")
        self.decode = msgspec.msgpack.Decoder(type=KVEventBatch).decode
        self.next = 0
        self.blocks: set = set()
        self.stored: dict = {}  # hash -> the event that told of it last

    def catch_up(self) -> None:
        """Asks for what came before it listened, or was lost."""
        asking = self.context.socket(zmq.DEALER)
        asking.connect(self.replay)
        asking.send_multipart((b"", self.next.to_bytes(8, "big")))
        while asking.poll(10_000):
            _, *topic, number, payload = asking.recv_multipart()  # releases before 0.24 send no topic
            if number == ZmqEventPublisher.END_SEQ:
                return
            self.take(int.from_bytes(number, "big"), payload)
        raise AssertionError("no end of the replay")

    def listen(self) -> None:
        while self.live.poll(50):
            _, number, payload = self.live.recv_multipart()
            if int.from_bytes(number, "big") > self.next:
                self.catch_up()
            self.take(int.from_bytes(number, "big"), payload)

    def take(self, number: int, payload: bytes) -> None:
        if number < self.next:
            return
        assert number == self.next, "a batch was lost"
        self.next += 1
        for event in self.decode(payload).events:
            # An engine clears its own cache; what the roots hold stays.
            if isinstance(event, AllBlocksCleared) or event.medium not in ("CPU", "STORAGE"):
                continue
            places = {(block, event.group_idx) for block in event.block_hashes}
            if isinstance(event, BlockStored):
                self.blocks |= places
                self.stored |= dict.fromkeys(event.block_hashes, event)
            else:
                self.blocks -= places

    def until_equal(self, lab: Lab, engine: Engine) -> None:
        end = time.monotonic() + WAIT_S
        while self.blocks != held(lab, engine) and time.monotonic() < end:
            engine.run([[7] * 5], 1)  # events come with steps
            self.listen()
        assert self.blocks == held(lab, engine)


def held(lab: Lab, engine: Engine) -> set:
    mine = engine.half._namespace.hex()[:16]
    return {
        (maybe_convert_block_hash(extent["key"]), extent["group"])
        for extent in _core.list_extents(str(lab.root))
        if extent["namespace"] == mine
    }


def _endpoint() -> str:
    return f"ipc://@tokendepot-events-{os.getpid()}-{time.monotonic_ns()}"  # abstract: leaves no file


@case
def a_router_that_listens_ends_equal_to_the_catalog(lab: Lab) -> None:
    for hybrid in (False, True):
        where = _endpoint()
        engine = lab.engine(events=where, hybrid=hybrid)
        router = Router(where)
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        router.until_equal(lab, engine)
        assert len(router.blocks) > 2

        some = _core.list_extents(str(lab.root))[:3]
        assert _core.remove_extents(str(lab.root), some) == 3
        router.until_equal(lab, engine)
        _core.evict_segments(str(lab.root), 1 << 30)
        router.until_equal(lab, engine)

        late = Router(where)
        late.catch_up()
        assert late.blocks == router.blocks and late.next == router.next
        lab.stop(engine)

        where = _endpoint()
        engine = lab.engine(events=where, hybrid=hybrid)  # what was there before it started is told, too
        router = Router(where)
        router.until_equal(lab, engine)
        engine.run(PROMPTS[::-1], LENGTH)
        router.until_equal(lab, engine)
        lab.stop(engine)


@case
def events_tell_the_tokens_and_the_parent_of_what_this_engine_stores(lab: Lab) -> None:
    where = _endpoint()
    engine = lab.engine(events=where)
    router = Router(where)
    prompt = PROMPTS[2]
    engine.run([prompt], LENGTH, salt="tenant")
    router.until_equal(lab, engine)
    events = list(router.stored.values())
    by_parent = {event.parent_block_hash: event for event in events}
    at, tokens = None, []
    while at in by_parent:
        event = by_parent.pop(at)
        assert event.block_size == engine.options.chunk == len(event.token_ids)
        extras = [tuple(extra) for extra in event.extra_keys or ()]
        assert extras == ([("tenant",)] if at is None else [])
        tokens += event.token_ids
        at = event.block_hashes[0]
    assert not by_parent and tokens == (prompt + engine.output["r0"])[: len(tokens)] and len(tokens) >= 128
    chain = _core.KeyChain(engine.half._namespace, engine.options.chunk, "tenant")
    chain.append(tokens)
    assert at == maybe_convert_block_hash(bytes(chain.keys())[-32:]), "a router can compute the hashes"
    assert keys_of(engine, tokens)[0] != bytes(chain.keys(0, 1))


@case
def after_a_reset_nothing_of_before_is_told_as_held(lab: Lab) -> None:
    where = _endpoint()
    engine = lab.engine(events=where)
    router = Router(where)
    engine.run(PROMPTS, LENGTH)
    router.until_equal(lab, engine)
    before = set(router.blocks)
    assert engine.scheduler.connector.reset_cache()
    engine.run(PROMPTS, LENGTH)
    router.until_equal(lab, engine)
    assert router.blocks and not router.blocks & before


@case
def an_engine_whose_configuration_wants_no_events_makes_none(lab: Lab) -> None:
    engine = lab.engine()
    engine.run([PROMPTS[0]], LENGTH)
    assert engine.half._events is None and engine.scheduler.connector.take_events() == []
