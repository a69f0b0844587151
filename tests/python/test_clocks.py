"""Trial E6 with recipe R10: clocks that jump. Nothing is lost, evicted or counted backwards because of them."""

import subprocess

import pytest
from paged import MANIFEST, WANT, Cache, config, filled_root, keys_of, load, store

from tokendepot import Depot

HOUR, DAY = 3600, 86400
CHUNKS = 8
BEFORE_A_REBOOT = ("unshare", "--time", "--monotonic", "100000")


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def jump_while_it_runs(faults, root):
    depot = Depot.open(config(root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(64, 3)
    cache.lend_to(depot)
    pattern = cache.data.copy()
    prompts = [keys_of(namespace, CHUNKS, number * 100_000) for number in range(4)]
    job = 0
    for keys, offset in zip(prompts, (0, -HOUR, 30 * DAY, 0), strict=True):
        faults.wall_offset_s = offset
        cache.data[:] = pattern
        job += 1
        assert store(depot, namespace, keys, job=job)["items_ok"] == CHUNKS
        for known in prompts[: prompts.index(keys) + 1]:
            cache.data[:] = 0
            job += 1
            assert load(depot, namespace, known, job=job)["items_ok"] == CHUNKS
            assert (cache.data[:, :, :32] == pattern[:, :, :32]).all()
    stats = depot.stats()
    assert all(0 <= number < 2**60 for number in numbers(stats)), "an age or a duration went below 0"
    assert stats["roots"][0]["evicted_segments"] == 0
    depot.close()


def all_is_served(_, root, chunks):
    depot = Depot.open(config(root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(64)
    cache.lend_to(depot)
    keys = keys_of(namespace, int(chunks))
    assert depot.longest_prefix(keys, [WANT]) == int(chunks)
    assert load(depot, namespace, keys)["items_ok"] == int(chunks)
    more = keys_of(namespace, CHUNKS, 500_000)
    assert store(depot, namespace, more, job=3)["items_ok"] == CHUNKS
    depot.close()


def fill(_, root):
    filled_root(root, chunks=CHUNKS)


def test_a_wall_clock_that_jumps_loses_and_evicts_nothing(memory_root, faulty_system):
    faulty_system.run(jump_while_it_runs, memory_root)
    faulty_system.run(all_is_served, memory_root, str(CHUNKS))


def test_a_monotonic_clock_that_is_lower_after_a_restart_changes_nothing(memory_root, faulty_system):
    if subprocess.run([*BEFORE_A_REBOOT, "true"], capture_output=True).returncode != 0:
        pytest.skip("time namespaces are not permitted here")
    faulty_system.run(fill, memory_root, prefix=BEFORE_A_REBOOT)
    faulty_system.run(all_is_served, memory_root, str(CHUNKS))
