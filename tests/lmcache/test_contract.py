"""LMCache's L2 adapter over a depot, made by LMCache itself from its JSON."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="LMCache was not fetched: scripts/setup lmcache")

from storage import Storage, content, flip_bytes, key, memory, spec

MIB = 1 << 20


def test_chunks_come_back_byte_for_byte_at_any_size(root: Path) -> None:
    sizes = [1, 1000, 4095, 4096, 4097, 65536, 116992, 3098112]
    keys = [key(n) for n in range(len(sizes))]
    with Storage(spec([f"{root}?capacity=256MiB"])) as storage:
        given = [memory(size, seed) for seed, size in enumerate(sizes)]
        assert storage.store(keys, given)
        assert storage.found([*keys, key(99)]) == [True] * len(keys) + [False]
        back = [memory(size) for size in sizes]
        assert storage.load(keys, back) == [True] * len(keys)
        assert [content(one) for one in back] == [content(one) for one in given]


def test_another_process_finds_them_again(root: Path) -> None:
    given = memory(MIB, 1)
    with Storage(spec([f"{root}?capacity=256MiB"])) as storage:
        assert storage.store([key(1)], [given])
    with Storage(spec([f"{root}?capacity=256MiB"])) as storage:
        back = memory(MIB)
        assert storage.load([key(1)], [back]) == [True] and content(back) == content(given)


def test_each_key_of_a_batch_has_its_own_answer(root: Path) -> None:
    with Storage(spec([f"{root}?capacity=256MiB"])) as storage:
        assert storage.store([key(0), key(2)], [memory(MIB, 0), memory(MIB, 2)])
        back = [memory(MIB) for _ in range(3)]
        assert storage.load([key(0), key(1), key(2)], back) == [True, False, True]
        assert content(back[1]) == b"\xee" * MIB, "a miss writes nothing"
        assert storage.load([key(0)], [memory(MIB // 2)]) == [False], "another size is a miss"


def test_keys_that_differ_in_any_field_never_meet(memory_root: Path) -> None:
    models, ranks = ("org/a", "org/b"), (0x01000100, 0x02000200, 0x02010201)
    groups, salts, hashes = (0, 1), ("", "a", "a b", "0" * 64), (1, 2)
    keys = [
        key(number, model, rank, group, salt)
        for model, rank, group, salt, number in itertools.product(models, ranks, groups, salts, hashes)
    ]
    with Storage(spec([f"{memory_root}?capacity=256MiB"])) as storage:
        for position, one in enumerate(keys):
            expected = [True] * position + [False] * (len(keys) - position)
            assert storage.found(keys) == expected
            assert storage.store([one], [memory(4096, position)])
        back = [memory(4096) for _ in keys]
        assert all(storage.load(keys, back))
        assert [content(one) for one in back] == [content(memory(4096, n)) for n in range(len(keys))]
    other = spec([f"{memory_root}?capacity=256MiB"], namespace={"dtype": "float16"})
    with Storage(other) as storage:
        assert storage.found(keys) == [False] * len(keys), "what the operator names differs, too"


def test_a_salt_is_nowhere_in_clear(root: Path) -> None:
    secret = "the-salt-of-one-user"
    with Storage(spec([f"{root}?capacity=256MiB"])) as storage:
        assert storage.store([key(1, salt=secret)], [memory(MIB, 1)])
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files and not any(secret in path.name or secret.encode() in path.read_bytes() for path in files)


def test_a_flipped_byte_is_a_miss_and_heals(root: Path) -> None:
    config = spec([f"{root}?capacity=256MiB"], scrub_rate=0)  # it would find the damage before the load does
    given = [memory(MIB, 1), memory(MIB, 2)]
    with Storage(config) as storage:
        assert storage.store([key(1), key(2)], given)
    assert flip_bytes(root, content(given[0])[1000:1064]) == 1
    with Storage(config) as storage:
        back = [memory(MIB), memory(MIB)]
        assert storage.load([key(1), key(2)], back) == [False, True]
        assert content(back[0]) == b"\xee" * MIB and content(back[1]) == content(given[1])
        assert storage.statistics()["load"]["failures"]["corrupt"] == 1
        assert storage.found([key(1), key(2)]) == [False, True], "it is not promised again"
        assert storage.store([key(1)], [given[0]])
        assert storage.load([key(1)], [back[0]]) == [True] and content(back[0]) == content(given[0])


def test_what_lmcache_deletes_is_gone_for_good(root: Path) -> None:
    config = spec([f"{root}?capacity=256MiB"])
    with Storage(config) as storage:
        assert storage.store([key(1), key(2)], [memory(MIB, 1), memory(MIB, 2)])
        assert storage.adapter.get_usage().total_bytes_used == 2 * MIB
        storage.adapter.delete([key(1), key(3)])
        assert storage.adapter.get_usage().total_bytes_used == MIB
        assert storage.found([key(1), key(2)]) == [False, True]
    with Storage(config) as storage:
        assert storage.found([key(1), key(2)]) == [False, True]


def size_of(segment: Path) -> int:
    """0 when it has been recycled under another name since it was listed."""
    try:
        return os.stat(segment).st_size
    except FileNotFoundError:
        return 0


def test_a_full_root_evicts_and_stays_within_its_capacity(root: Path) -> None:
    with Storage(spec([f"{root}?capacity=64MiB&segment=8MiB"], eviction_grace_ms=0)) as storage:
        for number in range(60):
            assert storage.store([key(number * 2), key(number * 2 + 1)], [memory(MIB, number)] * 2)
            held = sum(size_of(path) for path in (root / "segments").iterdir())
            assert held <= 72 * MIB
        found = storage.found([key(number) for number in range(120)])
        assert found[-2:] == [True, True] and found[:2] == [False, False]


def test_a_disk_that_is_full_fails_the_store_and_nothing_else(memory_root: Path) -> None:
    free = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    config = spec([f"{memory_root}?capacity=64MiB&segment=8MiB"], free_space_reserve=free * 2)
    with Storage(config) as storage:
        assert not storage.store([key(1)], [memory(MIB, 1)])
        assert storage.found([key(1)]) == [False]
        assert storage.load([key(1)], [memory(MIB)]) == [False]


def test_a_load_that_is_too_late_is_a_miss(root: Path) -> None:
    config = spec([f"{root}?capacity=1GiB"])
    keys = [key(number) for number in range(32)]
    with Storage(config) as storage:
        assert storage.store(keys, [memory(4 * MIB, number) for number in range(32)])
    with Storage({**config, "adapter_params": {**config["adapter_params"], "load_timeout": 1e-6}}) as storage:
        back = [memory(4 * MIB) for _ in keys]
        loaded = storage.load(keys, back)
        assert not all(loaded) and storage.statistics()["load"]["failures"]["timed_out"] > 0


def test_two_servers_share_one_root(root: Path) -> None:
    config = spec([f"{root}?capacity=256MiB"], poll_ms=20)
    with Storage(config) as one, Storage(config) as other:
        assert one.store([key(1)], [memory(MIB, 1)])
        deadline = threading.Event()
        for _ in range(200):
            if other.found([key(1)]) == [True]:
                break
            deadline.wait(0.05)
        back = memory(MIB)
        assert other.load([key(1)], [back]) == [True] and content(back) == content(memory(MIB, 1))


def test_stores_and_loads_from_several_threads_stay_apart(root: Path) -> None:
    with Storage(spec([f"{root}?capacity=1GiB"])) as storage:
        client = storage.adapter._client
        wrong: list[str] = []

        def work(first: int) -> None:
            for number in range(first, first + 50):
                client.submit_batch_set([f"m@00000000@0@{number:064x}"], [content(memory(70000, number))])

        threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        numbers = [1000 * n + i for n in range(4) for i in range(50)]
        texts = [f"m@00000000@0@{number:064x}" for number in numbers]
        back = [bytearray(70000) for _ in texts]
        done = threading.Event()
        for _ in range(200):  # completions go to LMCache's thread; what it does not know it names and drops
            if client.stats()["store"]["extents"] == len(texts):
                break
            done.wait(0.05)
        client.submit_batch_get(texts, back)
        for _ in range(200):
            if client.stats()["load"]["extents"] == len(texts):
                break
            done.wait(0.05)
        for number, got in zip(numbers, back, strict=True):
            if bytes(got) != content(memory(70000, number)):
                wrong.append(str(number))
        assert not wrong


def test_keys_that_are_not_lmcaches_are_misses(memory_root: Path) -> None:
    from tokendepot import _core

    connector = _core.LMCacheConnector.open(
        f'{{"roots":["{memory_root}?capacity=64MiB"]}}', namespace_json="{}", load_timeout_s=1
    )
    odd = ["", "@", "@@@", "m@0@0", "m@0@0@", "m@0@0@ab@s@t", "\u00e4@0@0@\u00e4"]
    connector.submit_batch_exists(odd)
    connector.submit_batch_set(odd[:6], [b"x"] * 6)
    connector.submit_batch_delete(odd)
    ended = []
    while len(ended) < 3:
        ended += connector.drain_completions()
    answers = {identity: answer for identity, _, _, answer in ended}
    assert answers == {1: [False] * 7, 2: [False] * 6, 3: [False] * 7}
    connector.close()


def test_a_batch_that_is_under_way_when_the_adapter_closes_is_answered(memory_root: Path) -> None:
    from tokendepot.engines.lmcache import DepotConnector

    connector = DepotConnector(roots=[f"{memory_root}?capacity=1GiB"])
    texts = [f"m@00000000@0@{number:064x}" for number in range(64)]
    batch = connector.submit_batch_set(texts, [bytes(MIB)] * 64)
    connector.close()
    late = connector.submit_batch_exists(texts)
    answers = {identity: answer for identity, _, _, answer in connector.drain_completions()}
    assert len(answers[batch]) == 64 and answers[late] == [False] * 64


def test_a_depot_that_cannot_be_opened_is_one_line_and_every_answer_a_miss(
    memory_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory_root.mkdir()
    (memory_root / "something").write_text("else")
    with Storage(spec([f"{memory_root}?capacity=64MiB"])) as storage:
        assert not storage.store([key(1)], [memory(MIB, 1)])
        assert storage.found([key(1)]) == [False] and storage.load([key(1)], [memory(MIB)]) == [False]
        storage.adapter.delete([key(1)])
    lines = [record.message for record in caplog.records if record.name == "tokendepot.lmcache"]
    assert len(lines) == 1 and str(memory_root) in lines[0] and "runs without it" in lines[0]
    assert [path.name for path in memory_root.iterdir()] == ["something"], "nothing is touched"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"capasity": 1}, ["capasity"]),
        ({"load_timeuot": 1}, ["load_timeuot", "load_timeout"]),
        ({"load_timeout": 0}, ["load_timeout", "0", "86400"]),
        ({"namespace": "x"}, ["namespace", "x", "object"]),
        ({"device": "cuda:0"}, ["device", "cuda:0", "host"]),
        ({"device_threads": 0}, ["device_threads", "0"]),
    ],
)
def test_wrong_parameters_are_refused_by_what_is_allowed(
    memory_root: Path, params: dict, words: list[str]
) -> None:
    from tokendepot.engines.lmcache import RefusedError

    with pytest.raises(RefusedError) as refused:
        Storage(spec([f"{memory_root}?capacity=64MiB"], on_error="fail", **params))
    assert all(word in str(refused.value) for word in words), refused.value
    assert not memory_root.exists()


def test_an_interpreter_that_never_closes_its_adapter_ends(memory_root: Path, environment: dict[str, str]) -> None:
    script = (
        "from storage import *\n"
        f"storage = Storage(spec(['{memory_root}?capacity=64MiB']))\n"
        "assert storage.store([key(1)], [memory(1 << 20, 1)])\n"
        "import os\n"
        "child = os.fork()\n"
        "if child == 0: raise SystemExit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
