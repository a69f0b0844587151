"""The native module: what goes in comes back, what is wrong is refused in words, no call holds the interpreter up."""

import array
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged import (
    BLOCKS_PER_CHUNK,
    MANIFEST,
    PART,
    WANT,
    Cache,
    config,
    filled_root,
    keys_of,
    load,
    range_of,
    split,
    store,
    wait_for,
)

import tokendepot
from tokendepot import SKIP_BLOCK, Depot, DepotError, GroupWant, KeyChain, describe_plan, plan_store


@pytest.fixture
def depot(memory_root):
    depot = Depot.open(config(memory_root))
    yield depot
    depot.close()


def refusal(call, *arguments, **named):
    with pytest.raises(DepotError) as caught:
        call(*arguments, **named)
    return caught.value


# --- storing and loading ---


def test_what_was_stored_comes_back_after_a_restart(root):
    namespace, keys, stored = filled_root(root, chunks=8)
    depot = Depot.open(config(root))
    assert depot.register_namespace(MANIFEST) == namespace
    assert depot.longest_prefix(keys, [WANT]) == 8
    assert depot.stored(keys, WANT) == b"\x01" * 8

    cache = Cache(40)
    cache.lend_to(depot)
    done = load(depot, namespace, keys, first_block=8)
    assert (done["kind"], done["items_ok"], done["failures"]) == ("load", 8, [])
    assert done["bytes"] > stored.data.nbytes
    assert np.array_equal(cache.data[:, :, 8:40], stored.data)
    assert not cache.data[:, :, :8].any()
    depot.close()


def test_skipped_blocks_are_not_touched(memory_root):
    namespace, keys, stored = filled_root(memory_root, chunks=2)
    depot = Depot.open(config(memory_root))
    cache = Cache(8)
    cache.lend_to(depot)
    blocks = [SKIP_BLOCK, 1, SKIP_BLOCK, 3] + [SKIP_BLOCK] * 4
    plan = depot.plan_load(namespace, keys, [(WANT, 0, BLOCKS_PER_CHUNK, blocks)], 10.0)
    assert len(describe_plan(plan)["items"]) == 1
    depot.submit_load(3, plan)
    assert wait_for(depot, 3)["items_ok"] == 1
    for block in range(8):
        expected = stored.data[:, :, block] if block in (1, 3) else 0
        assert (cache.data[:, :, block] == expected).all()
    depot.close()


def test_an_unknown_prompt_is_a_miss(memory_root):
    namespace, keys, _ = filled_root(memory_root, chunks=4)
    depot = Depot.open(config(memory_root))
    other = keys_of(namespace, 4, first_token=1)
    assert depot.longest_prefix(other, [WANT]) == 0
    assert depot.stored(keys[:32] + other[:32] + keys[32:64], WANT) == b"\x01\x00\x01"
    error = refusal(depot.plan_load, namespace, other, [(WANT, 0, BLOCKS_PER_CHUNK, range_of(0, 16))], 1.0)
    assert error.kind == "not_found"
    depot.close()


def test_another_salt_is_another_prompt(memory_root):
    namespace, _, _ = filled_root(memory_root, chunks=2)
    depot = Depot.open(config(memory_root))
    assert depot.longest_prefix(keys_of(namespace, 2, salt=""), [WANT]) == 2
    assert depot.longest_prefix(keys_of(namespace, 2, salt="tenant"), [WANT]) == 0
    assert depot.longest_prefix(keys_of(namespace, 2, lora=b"adapter"), [WANT]) == 0
    depot.close()


def test_a_forgotten_chunk_is_not_promised(memory_root):
    _, keys, _ = filled_root(memory_root, chunks=4)
    depot = Depot.open(config(memory_root))
    depot.forget(split(keys)[2], 0)
    assert depot.longest_prefix(keys, [WANT]) == 2
    depot.close()


def test_a_second_depot_sees_what_the_first_one_stores(memory_root):
    first = Depot.open(config(memory_root))
    second = Depot.open(config(memory_root), writer=False)
    namespace = first.register_namespace(MANIFEST)
    cache = Cache(8, seed=1)
    cache.lend_to(first)
    keys = keys_of(namespace, 2)
    assert store(first, namespace, keys)["items_ok"] == 2
    second.refresh()
    assert second.longest_prefix(keys, [WANT]) == 2
    first.close()
    second.close()


def test_a_flipped_byte_is_a_failed_item_and_nothing_is_written(root):
    namespace, keys, _ = filled_root(root, chunks=3)
    extent = next(e for e in tokendepot.list_extents(str(root)) if e["key"] == split(keys)[1])
    with open(root / "segments" / (extent["segment"] + ".seg"), "r+b") as file:
        file.seek(extent["offset"] + extent["bytes"] - 4096)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    depot = Depot.open(config(root))
    cache = Cache(12)
    cache.lend_to(depot)
    done = load(depot, namespace, keys)
    assert done["items_ok"] == 2
    assert [(chunk, group, reason) for _, chunk, group, reason in done["failures"]] == [(1, 0, "corrupt")]
    assert depot.stats()["load"]["failures"]["corrupt"] == 1
    assert depot.longest_prefix(keys, [WANT]) == 1
    depot.close()


# --- refusals ---


def test_errors_have_a_kind_and_one_sentence(tmp_path):
    error = refusal(Depot.open, '{"rots":[]}')
    assert (error.kind, error.errno) == ("invalid_argument", 0)
    assert "roots" in str(error) and "\n" not in str(error)
    assert isinstance(error, Exception)

    error = refusal(Depot.open, config(tmp_path / "no" / "parent"))
    assert error.kind == "not_found"
    assert error.errno != 0


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.longest_prefix(b"x" * 31, [WANT]),
        lambda d: d.forget(b"short", 0),
        lambda d: d.plan_load(b"short", b"", [], 1.0),
        lambda d: plan_store(b"n" * 32, [(b"k" * 32, 0, 0, [2**31])]),
        lambda d: GroupWant(0, "diagonal", PART, 16),
        lambda d: KeyChain(b"n" * 31, 16),
        lambda d: KeyChain(b"n" * 32, 0),
        lambda d: Cache(2).lend_to(d) or Cache(2).lend_to(d),
    ],
)
def test_wrong_values_are_invalid_arguments(depot, call):
    assert refusal(call, depot).kind in ("invalid_argument", "busy")


@pytest.mark.parametrize("value", [None, 7, "tokens", [1.5], {"a": 1}, np.zeros(3), np.zeros((2, 2), np.int32), b"abc"])
def test_wrong_types_are_type_errors(value):
    with pytest.raises(TypeError):
        KeyChain(b"n" * 32, 4).append(value)


def test_a_damaged_plan_is_refused(depot):
    plan = bytearray(plan_store(b"n" * 32, [(b"k" * 32, 0, 0, [1, 2])]))
    plan[-1] ^= 1
    assert refusal(depot.submit_store, 1, bytes(plan)).kind == "corrupt"
    assert refusal(depot.submit_load, 1, b"").kind == "corrupt"
    assert refusal(describe_plan, b"nonsense").kind == "corrupt"


def test_options_come_back_with_their_defaults():
    options = tokendepot.parse_options('{"roots":["/var/lib/depot?capacity=1.5GiB"]}')
    assert options["roots"][0]["capacity"] == 3 << 29
    assert options["io_depth"] == 16
    assert tokendepot.parse_options(json.dumps(options)) == options
    assert tokendepot.parse_size("1MiB") == 1 << 20
    assert refusal(tokendepot.parse_size, "8G").kind == "invalid_argument"


# --- plans ---


def test_plans_describe_themselves(memory_root):
    namespace, keys, _ = filled_root(memory_root, chunks=1)
    depot = Depot.open(config(memory_root))
    load_plan = describe_plan(depot.plan_load(namespace, keys, [(WANT, 0, 4, np.arange(4, dtype=np.int32))], 2.5))
    extent = tokendepot.list_extents(str(memory_root))[0]
    assert load_plan["kind"] == "load" and load_plan["namespace"] == namespace and load_plan["deadline_s"] == 2.5
    item = load_plan["items"][0]
    assert item["blocks"] == [0, 1, 2, 3]
    for field in ("key", "group", "kind", "part", "tokens", "segment", "offset", "bytes"):
        assert item[field] == extent[field]
    depot.close()

    store_plan = describe_plan(plan_store(namespace, [(keys, 3, 1, (5, 6))]))
    assert store_plan == {
        "kind": "store",
        "namespace": namespace,
        "items": [{"key": keys, "chunk": 3, "group": 1, "blocks": [5, 6]}],
    }


# --- keys ---


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        lambda t: np.array(t, np.int32),
        lambda t: np.array(t, np.uint32),
        lambda t: np.array(t, np.int64),
        lambda t: np.repeat(np.array(t, np.int64), 3)[::3],
        lambda t: array.array("i", t),
        lambda t: [np.int64(x) for x in t],
    ],
)
def test_tokens_in_any_form_make_the_same_keys(form):
    tokens = [(i * 7919) % 262144 for i in range(100)]
    reference, chain = KeyChain(b"n" * 32, 16), KeyChain(b"n" * 32, 16)
    reference.append(tokens)
    assert chain.append(form(tokens)) == 6
    assert chain.keys() == reference.keys()
    assert (len(chain), chain.tokens_seen) == (6, 100)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=80), st.lists(st.integers(0, 80), max_size=4), st.integers(1, 20)
)
def test_keys_do_not_depend_on_how_the_prompt_arrives(tokens, cuts, chunk):
    whole, pieces = KeyChain(b"n" * 32, chunk), KeyChain(b"n" * 32, chunk)
    whole.append(tokens)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for first, last in zip(edges, edges[1:]):
        pieces.append(tokens[first:last])
    assert pieces.keys() == whole.keys()
    assert len(whole) == len(tokens) // chunk


@pytest.mark.parametrize(
    "tokens", [[2**32], [-1], [2**70], np.array([-1], np.int32), np.array([2**32], np.int64), [0, 1, -5]]
)
def test_token_ids_that_no_u32_holds_are_refused(tokens):
    error = refusal(KeyChain(b"n" * 32, 1).append, tokens)
    assert error.kind == "invalid_argument"
    assert f"tokens[{len(tokens) - 1}] is {tokens[-1]}" in str(error)


def test_media_change_the_keys_of_the_chunks_that_they_touch_and_of_those_behind():
    def keys(media):
        chain = KeyChain(b"n" * 32, 4)
        chain.append(range_of(0, 16), media)
        return split(chain.keys())

    plain, image, other = keys(()), keys([("hash", 5, 2)]), keys([(b"other", 5, 2)])
    assert [a == b for a, b in zip(plain, image)] == [True, False, False, False]
    assert image[1] != other[1]
    assert keys([(b"hash", 5, 2)]) == image


def test_a_range_of_keys_is_clamped():
    chain = KeyChain(b"n" * 32, 1)
    chain.append(range_of(0, 5))
    keys = chain.keys()
    assert chain.keys(1, 3) == keys[32:96]
    assert chain.keys(3) == keys[96:]
    assert chain.keys(4, 99) == keys[128:]
    assert chain.keys(9) == b"" and chain.keys(3, 2) == b"" and chain.keys(-7, 1) == keys[:32]


# --- life of a handle ---


def test_a_closed_depot_says_so(depot):
    depot.close()
    depot.close()
    for call in (depot.poll, depot.stats, depot.refresh, lambda: depot.flush(0.0), lambda: depot.register_namespace("{}")):
        assert refusal(call).kind == "closed"


def test_after_fork_the_child_is_answered_closed_and_the_parent_goes_on(memory_root):
    depot = Depot.open(config(memory_root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(8, seed=3)
    cache.lend_to(depot)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            kinds = []
            for call in (depot.poll, depot.stats, lambda: depot.longest_prefix(b"k" * 32, [WANT])):
                try:
                    call()
                except DepotError as error:
                    kinds.append(error.kind)
            depot.close()
            del depot
            code = 0 if kinds == ["closed"] * 3 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store(depot, namespace, keys_of(namespace, 2))["items_ok"] == 2
    depot.close()


def test_a_process_that_forgets_to_close_ends_cleanly(memory_root):
    program = (
        "import sys, tokendepot\n"
        "kept = tokendepot.Depot.open(sys.argv[1])\n"
        "kept.register_namespace('{\"model\":\"m\"}')\n"
        "sys.keep = kept\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, config(memory_root)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "leaked" not in result.stderr


def test_a_waiting_call_lets_other_threads_run(depot):
    namespace = depot.register_namespace(MANIFEST)
    started, finished = threading.Event(), threading.Event()
    chain = KeyChain(namespace, 256)
    tokens = np.zeros(40_000_000, np.int32)

    def hash_much():
        started.set()
        chain.append(tokens)
        finished.set()

    hasher = threading.Thread(target=hash_much)
    hasher.start()
    started.wait()
    turns = 0
    while not finished.is_set():
        depot.longest_prefix(b"k" * 32, [WANT])
        depot.poll()
        turns += 1
    hasher.join()
    assert turns > 10, "the other thread was held up while one hashed"
    assert len(chain) == 40_000_000 // 256


def test_threads_share_one_depot(memory_root):
    namespace, keys, stored = filled_root(memory_root, chunks=8)
    depot = Depot.open(config(memory_root))
    cache = Cache(32)
    cache.lend_to(depot)
    problems = []

    def look(_):
        for _ in range(300):
            if depot.longest_prefix(keys, [WANT]) != 8 or depot.stored(keys, WANT) != b"\x01" * 8:
                problems.append("a stored chunk was missed")

    def submit(number):
        chunk = split(keys)[number]
        blocks = range_of(number * BLOCKS_PER_CHUNK, BLOCKS_PER_CHUNK)
        depot.submit_load(number, depot.plan_load(namespace, chunk, [(WANT, 0, BLOCKS_PER_CHUNK, blocks)], 10.0))

    threads = [threading.Thread(target=look, args=(0,)) for _ in range(2)]
    threads += [threading.Thread(target=submit, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    done = {}
    end = time.monotonic() + 20
    while len(done) < 8 and time.monotonic() < end:
        for completion in depot.poll():
            done[completion["job"]] = completion["items_ok"]
    for thread in threads:
        thread.join()
    depot.close()
    assert problems == []
    assert done == {i: 1 for i in range(8)}
    assert np.array_equal(cache.data, stored.data)


def test_closing_while_threads_call_is_safe(memory_root):
    _, keys, _ = filled_root(memory_root, chunks=4)
    depot = Depot.open(config(memory_root))
    kinds = set()

    def call():
        try:
            while True:
                depot.longest_prefix(keys, [WANT])
                depot.poll()
                depot.wait_gathered(0.001)
        except DepotError as error:
            kinds.add(error.kind)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    depot.close()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert kinds == {"closed"}


# --- typing ---


def test_the_stub_names_what_the_module_has():
    stub = pathlib.Path(tokendepot.__file__).with_name("_core.pyi").read_text()
    scope = {}
    exec(compile("from __future__ import annotations\n" + stub, "_core.pyi", "exec"), scope)
    for name in tokendepot.__all__:
        assert name == "__version__" or name in scope or name in scope["__annotations__"]
    for kind in (Depot, KeyChain, GroupWant):
        declared = {m for m in vars(scope[kind.__name__]) if not m.startswith("_")}
        declared |= set(getattr(scope[kind.__name__], "__annotations__", {}))
        assert declared == {m for m in dir(kind) if not m.startswith("_")}
    assert pathlib.Path(tokendepot.__file__).with_name("py.typed").exists()


def test_the_module_asks_for_no_static_thread_local_memory() -> None:
    """What a process has left of it is too little for the CUDA runtime: the import would fail."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf on this machine")
    told = subprocess.run([readelf, "-dW", tokendepot._core.__file__], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in told and "STATIC_TLS" not in told


def test_an_interpreter_ends_while_threads_are_inside_the_module(tmp_path: pathlib.Path) -> None:
    """A daemon thread that comes back to an interpreter that has ended must not take the process with it."""
    script = (
        "import sys, threading, time\n"
        "from tokendepot import _core\n"
        "def ask():\n"
        "    while True: _core.parse_options(sys.argv[1])\n"
        "for _ in range(16): threading.Thread(target=ask, daemon=True).start()\n"
        "time.sleep(0.05)\n"
    )
    for _ in range(10):
        ended = subprocess.run(
            [sys.executable, "-c", script, config(tmp_path)], capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
