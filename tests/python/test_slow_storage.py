"""Trial X5: a medium that takes a third of a second for each write, and an engine that stores all the time."""

import time

from paged import BLOCKS_PER_CHUNK, MANIFEST, WANT, Cache, config, keys_of, range_of, split, store

from tokendepot import Depot, plan_store

CHUNKS, BLOCKS = 8, 32
STEPS = 100


def store_all_the_time(faults, root):
    roots = [{"path": root, "capacity": "64MiB", "segment": "1MiB", "io": "threads"}]
    depot = Depot.open(config(root, roots=roots, store_queue="2MiB"))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(2 * BLOCKS, 3)
    cache.lend_to(depot)
    hot = keys_of(namespace, CHUNKS)
    assert store(depot, namespace, hot)["items_ok"] == CHUNKS
    expected = cache.data[:, :, :BLOCKS].copy()

    faults.write_delay_ms = 300
    longest = 0.0
    for step in range(STEPS):
        keys = split(keys_of(namespace, CHUNKS, (step + 1) * 100_000))
        plan = plan_store(namespace, [(key, i, 0, range_of(BLOCKS + 4 * i, 4)) for i, key in enumerate(keys)])
        begin = time.monotonic()
        depot.submit_store(1000 + step, plan)
        longest = max(longest, time.monotonic() - begin)
    assert longest < 0.3, "a step waited for the medium"
    drops = depot.stats()["drops"]
    assert drops["queue_full"] >= (STEPS - 1) * CHUNKS - 4 * (2 << 20) // (64 << 10), "the queue has a bound"
    depot.poll()

    # Jobs of stores end between the hot load's; those it waits for are its own.
    cache.data[:, :, :BLOCKS] = 0
    begin = time.monotonic()
    groups = [(WANT, 0, BLOCKS_PER_CHUNK, range_of(0, BLOCKS))]
    depot.submit_load(5000, depot.plan_load(namespace, hot, groups, 10.0))
    while not any(done["job"] == 5000 and done["items_ok"] == CHUNKS for done in depot.poll()):
        assert time.monotonic() - begin < 10, "a load waits for stores"
        time.sleep(0.001)
    assert (cache.data[:, :, :BLOCKS] == expected).all()
    begin = time.monotonic()
    depot.close()
    assert time.monotonic() - begin < 12, "close() has ten seconds"


def test_a_slow_medium_costs_stores_and_neither_steps_nor_loads(tmp_path, faulty_system):
    faulty_system.run(store_all_the_time, tmp_path / "root")
