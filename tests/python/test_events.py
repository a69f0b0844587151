"""`tokendepot events` on roots that a real engine fills: a router that listens knows what they hold, at any time."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import msgspec
import pytest
import zmq
from paged import MANIFEST, Cache, config, filled_root, keys_of, split, store
from prometheus_client.parser import text_string_to_metric_families

import tokendepot
from tokendepot import Depot, publisher, publisher_metrics
from tokendepot.holdings import Change

COMMAND = [sys.executable, "-c", "from tokendepot.cli import main; main()", "events"]
WAIT_S = 20.0


class Router:
    """What a router knows: (hash, group, medium) of all blocks that it was told of."""

    def __init__(self, endpoint, replay=None, topic=""):
        self.context = zmq.Context()
        self.context.setsockopt(zmq.LINGER, 0)  # of all sockets: who fails must not hang at the end
        self.live = self.context.socket(zmq.SUB)
        self.live.connect(endpoint)
        self.live.subscribe(topic)
        self.replay = replay
        self.next = None  # sequence number that is expected
        self.blocks = set()
        self.seen = []  # events, as they came

    def close(self):
        self.context.destroy(linger=0)

    def catch_up(self, since=0):
        """Asks for everything from `since` on; what comes live later and is older than that is passed over."""
        asking = self.context.socket(zmq.DEALER)
        asking.connect(self.replay)
        asking.send_multipart((b"", since.to_bytes(8, "big")))
        while asking.poll(10_000):
            _, _, number, payload = asking.recv_multipart()
            if number == publisher.END:
                return
            self.take(int.from_bytes(number, "big"), payload)
        raise AssertionError("no end of the replay")

    def listen(self, seconds=0.0):
        while self.live.poll(int(seconds * 1000)):
            seconds = 0.0
            _, number, payload = self.live.recv_multipart()
            self.take(int.from_bytes(number, "big"), payload)

    def take(self, number, payload):
        if self.next is not None and number < self.next:
            return
        assert self.next is None or number == self.next, "a batch was lost"
        self.next = number + 1
        when, events, rank = msgspec.msgpack.decode(payload)
        assert abs(time.time() - when) < 60 and events and rank == 0
        for event in events:
            self.seen.append(event)
            kind, hashes, medium, group = self.parts(event)
            places = {(block, group, medium) for block in hashes}
            if kind == "AllBlocksCleared":
                self.blocks.clear()
            elif kind == "BlockStored":
                self.blocks |= places
            else:
                self.blocks -= places

    @staticmethod
    def parts(event):
        if isinstance(event, dict):
            return event["type"], event.get("block_hashes", ()), event.get("medium"), event.get("group_idx", 0)
        kind = event[0]
        if kind == "AllBlocksCleared":
            return kind, (), None, 0
        medium, group = (6, 9) if kind == "BlockStored" else (2, 3)
        return kind, event[1], event[medium], event[group] if len(event) > group else 0

    def until_equal(self, expected):
        end = time.monotonic() + WAIT_S
        while self.blocks != expected and time.monotonic() < end:
            self.listen(0.05)
        assert self.blocks == expected


@contextlib.contextmanager
def publishing(*arguments):
    """The process and the endpoints that it printed."""
    command = [*COMMAND, *map(str, arguments), "--endpoint", "tcp://127.0.0.1:0", "--replay", "tcp://127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"events on (\S+) and replays on (\S+)", line):
                yield process, found[1], found[2]
                break
        else:
            raise AssertionError("it ended before it published")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_where_it_publishes_is_one_object_with_json(memory_root):
    filled_root(memory_root, chunks=1)
    endpoints = ["--endpoint", "tcp://127.0.0.1:0", "--replay", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    with subprocess.Popen([*COMMAND, str(memory_root), *endpoints, "--json"], stdout=subprocess.PIPE, text=True) as process:
        lines = ""
        while not lines.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, lines
            lines += line
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    told = json.loads(lines)
    assert [root["path"] for root in told["roots"]] == [str(memory_root)]
    assert told["events"] != told["replays"] and told["events"].startswith("tcp://127.0.0.1:")
    assert told["metrics"].endswith("/metrics")


def held(*roots, number=True):
    """What the catalog of each root holds, as a router would know it."""
    return {
        (publisher.hash_of(extent["key"], number=number), extent["group"], medium(root))
        for root in roots
        for extent in tokendepot.list_extents(str(root))
    }


def medium(root):
    return "CPU" if tokendepot.inspect_root(str(root))["file_system"] == "tmpfs" else "STORAGE"


def test_a_router_follows_stores_evictions_removals_and_a_restart_and_ends_equal_to_the_catalog(memory_root):
    filled_root(memory_root, chunks=8)
    with publishing(memory_root) as (process, endpoint, replay):
        router = Router(endpoint, replay)
        router.catch_up()
        router.until_equal(held(memory_root))
        assert len(router.blocks) == 8

        depot = Depot.open(config(memory_root))
        namespace = depot.register_namespace(MANIFEST)
        cache = Cache(64 * 4, seed=3)
        cache.lend_to(depot)
        assert store(depot, namespace, keys_of(namespace, 40, first_token=10_000))["items_ok"] == 40
        router.until_equal(held(memory_root))
        assert len(router.blocks) == 48
        depot.close()

        tokendepot.evict_segments(str(memory_root), 1)
        router.until_equal(held(memory_root))
        after_eviction = len(router.blocks)
        assert 0 < after_eviction < 48

        some = tokendepot.list_extents(str(memory_root))[:5]
        assert tokendepot.remove_extents(str(memory_root), some) == 5
        router.until_equal(held(memory_root))
        assert len(router.blocks) == after_eviction - 5

        late = Router(endpoint, replay)  # hears nothing of what was before but by the replay
        late.catch_up()
        late.until_equal(router.blocks)
        assert late.next == router.next
        late.close()
        router.close()
        process.terminate()
        assert process.wait(10) == 0

    with publishing(memory_root) as (_, endpoint, replay):
        router = Router(endpoint, replay)
        router.blocks = {(1, 0, "CPU")}  # of the publisher before
        router.catch_up()
        router.until_equal(held(memory_root))
        router.close()


def test_a_store_evicts_what_is_oldest_and_the_router_hears_of_both(memory_root):
    filled_root(memory_root, chunks=8)
    with publishing(memory_root) as (_, endpoint, replay):
        router = Router(endpoint, replay)
        router.catch_up()
        depot = Depot.open(config(memory_root))
        namespace = depot.register_namespace(MANIFEST)
        cache = Cache(160, seed=3)
        cache.lend_to(depot)
        for job in range(20):  # more than the capacity of 16 MiB holds
            store(depot, namespace, keys_of(namespace, 40, first_token=20_000 * (job + 1)), job=job + 1)
        depot.close()
        router.until_equal(held(memory_root))
        kinds = [Router.parts(event)[0] for event in router.seen]
        assert kinds.count("BlockRemoved") >= 8 and kinds.count("AllBlocksCleared") == 1
        router.close()


def test_media_are_told_apart_and_a_lost_root_holds_nothing_until_it_is_back(memory_root, root):
    filled_root(memory_root, chunks=4)
    filled_root(root, chunks=6)
    with publishing(memory_root, root) as (_, endpoint, replay):
        router = Router(endpoint, replay)
        router.catch_up()
        router.until_equal(held(memory_root, root))
        aside = root.with_name("aside")
        root.rename(aside)
        router.until_equal(held(memory_root))
        aside.rename(root)
        router.until_equal(held(memory_root, root))
        router.close()


@pytest.mark.parametrize("form", ["map", "array"])
def test_events_have_the_fields_and_the_order_of_the_releases_that_want_this_form(memory_root, form):
    _, keys, _ = filled_root(memory_root, chunks=1)
    with publishing(memory_root, "--form", form, "--hashes", "bytes", "--topic", "kv") as (_, endpoint, replay):
        router = Router(endpoint, replay, topic="kv")
        router.catch_up()
        router.until_equal({(split(keys)[0], 0, "CPU")})
        stored = router.seen[-1]
        router.close()
    if form == "map":
        wanted = {
            "type": "BlockStored", "block_hashes": [keys], "parent_block_hash": None, "token_ids": [], "block_size": 32,
            "lora_id": None, "medium": "CPU", "lora_name": None,
        }  # fmt: skip
        assert {name: stored[name] for name in wanted} == wanted
    else:
        assert stored[:8] == ["BlockStored", [keys], None, [], 32, None, "CPU", None]


def test_who_asks_for_batches_that_are_not_kept_is_told_everything_anew(memory_root, monkeypatch):
    _, keys, _ = filled_root(memory_root, chunks=3)
    monkeypatch.setattr(publisher, "BATCHES_KEPT", 2)
    monkeypatch.setattr(publisher, "FRESH_START_EVERY_S", 0.0)
    wire = publisher.Wire(arrays=False, number_hashes=True)
    one = publisher.Publisher("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "", wire)
    holdings = publisher.Holdings([str(memory_root)], pytest.fail)
    router = Router(*one.endpoints)
    asking = router.context.socket(zmq.DEALER)
    asking.connect(router.replay)
    for _ in range(3):
        one.send([wire.cleared()])  # the first of them is not kept any more
    end = time.monotonic() + WAIT_S
    while not router.seen and time.monotonic() < end:  # until the subscription is there
        one.send([wire.cleared()])
        router.listen(0.05)
    asking.send_multipart((b"", (0).to_bytes(8, "big")))

    def told_anew():
        router.listen()
        kinds = [Router.parts(event)[0] for event in router.seen]
        return (kinds[-3:] == ["BlockStored"] * 3 and kinds.count("BlockStored") == 6) or time.monotonic() > end

    publisher.follow(holdings, one, wire, told_anew)
    assert [Router.parts(event)[0] for event in router.seen[-4:]] == ["AllBlocksCleared", *["BlockStored"] * 3]
    assert router.blocks == held(memory_root)
    router.close()
    one.close()


def test_what_is_published_is_counted_for_prometheus(memory_root):
    other = memory_root.with_name("other")  # of the same medium, with a chunk that both have
    filled_root(memory_root, chunks=8)
    filled_root(other, chunks=1)
    with publishing(memory_root, other, "--metrics", "127.0.0.1:0") as (process, endpoint, replay):
        url = re.search(r"http://\S+", process.stdout.readline())[0]

        def until(**expected):
            end = time.monotonic() + WAIT_S
            while not (found := counted(url)).items() >= expected.items() and time.monotonic() < end:
                time.sleep(0.05)
            assert found.items() >= expected.items()

        routers = [Router(endpoint, replay), Router(endpoint, replay)]
        routers[0].catch_up()
        until(subscriptions=2, replays_total=1, lost_roots=0, BlockStored=8, BlockRemoved=0, AllBlocksCleared=1)
        routers.pop().close()
        until(subscriptions=1)
        other.rename(other.with_name("aside"))
        until(lost_roots=1)
        some = tokendepot.list_extents(str(memory_root))[:3]
        assert tokendepot.remove_extents(str(memory_root), some) == 3
        routers[0].until_equal(held(memory_root))
        until(BlockRemoved=3, dropped_batches_total=0, fresh_starts_total=0)
        told = counted(url)
        assert told["BlockStored"] - told["BlockRemoved"] == len(routers[0].blocks) and told["batches_total"] == routers[0].next
        routers[0].close()


def counted(url):
    """Metric without its prefix, or name of the event, -> value."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert {family.name for family in families} == {
        publisher_metrics.PREFIX + name for name in (*publisher_metrics.COUNTERS, *publisher_metrics.GAUGES)
    }
    samples = [sample for family in families for sample in family.samples if not sample.name.endswith("_created")]
    return {sample.labels.get("event", sample.name.removeprefix(publisher_metrics.PREFIX)): sample.value for sample in samples}


def test_batches_that_a_slow_subscriber_does_not_get_are_counted_and_the_others_get_them(monkeypatch):
    monkeypatch.setattr(publisher, "HIGH_WATER", 4)
    wire = publisher.Wire(arrays=False, number_hashes=False)
    one = publisher.Publisher("tcp://127.0.0.1:0", None, "", wire)
    context = zmq.Context()
    slow, quick = context.socket(zmq.SUB), context.socket(zmq.SUB)
    slow.set_hwm(1)
    for reader in (slow, quick):
        reader.connect(one.endpoints[0])
        reader.subscribe("")
    end = time.monotonic() + WAIT_S
    while one.sent.subscriptions < 2 and time.monotonic() < end:
        one.answer_replays(10)
    large = wire.event(Change(True, bytes(32), "", 0, 1, "x" * (1 << 20)))
    sent = 0
    while not one.sent.dropped_batches and time.monotonic() < end:
        one.send([large])
        sent += 1
        assert quick.poll(10_000), "who keeps up gets every batch"
        assert int.from_bytes(quick.recv_multipart()[1], "big") == sent - 1
    assert one.sent.dropped_batches == 1 and one.sent.batches == sent > 4
    context.destroy(linger=0)
    one.close()


def test_a_publisher_ends_even_when_zeromq_does_not(monkeypatch):
    one = publisher.Publisher("tcp://127.0.0.1:0", None, "", publisher.Wire(arrays=False, number_hashes=False))
    never = threading.Event()
    term = one._context.term
    monkeypatch.setattr(one._context, "term", lambda: never.wait(60))
    begun = time.monotonic()
    one.close()
    assert time.monotonic() - begun < 30, "a slow subscriber that went once made it wait for ever"
    never.set()
    term()


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["/nowhere"], 2, "/nowhere is not the root of a depot"),
        (["ROOT", "--endpoint", "5557"], 2, "--endpoint is '5557', expected tcp://ADDRESS:PORT or ipc://PATH"),
        (["ROOT", "--endpoint", "tcp://nowhere.invalid:1"], 3, "cannot publish on tcp://nowhere.invalid:1"),
        (["ROOT", "--form", "list"], 2, "list"),
        (["ROOT", "--metrics", "9478"], 2, "--metrics is '9478', expected ADDRESS:PORT"),
        (["ROOT", "--metrics", "127.0.0.1:70000"], 2, "--metrics is '127.0.0.1:70000'"),
        (["ROOT", "--metrics", "192.0.2.1:9478"], 3, "cannot serve metrics on 192.0.2.1:9478"),
        ([], 2, "ROOT"),
    ],
)
def test_bad_input_is_one_sentence(memory_root, arguments, code, complaint):
    filled_root(memory_root, chunks=1)
    arguments = [str(memory_root) if text == "ROOT" else text for text in arguments]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
    assert complaint in said and "Traceback" not in said
