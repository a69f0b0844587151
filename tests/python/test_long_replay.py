"""A scheduler's depot does not wait for ever for its index: it serves what it has read, and reads on."""

import json
import time

from paged import BLOCKS_PER_CHUNK, MANIFEST, WANT, Cache, filled_root, load

from tokendepot import Depot

CHUNKS = 8
PATIENCE_S = 20.0


def scheduler(first, slow, **options):
    size = {"capacity": "32MiB", "segment": "1MiB"}
    roots = [{"path": str(path), **size, "io": "threads"} for path in (first, slow)]
    engine = {"roots": roots, "slab": "2MiB", "free_space_reserve": 0, "poll_ms": 20, **options}
    return Depot.open(json.dumps(engine), writer=False)


def hits(depot, keys):
    return depot.longest_prefix(keys, [WANT])


def serve_while_journals_are_read(faults, slow, first):
    namespace, here, kept = filled_root(first, chunks=CHUNKS)
    _, there, kept_there = filled_root(slow, chunks=CHUNKS, first_token=1_000_000)
    faults.hold_journals = 1
    depot = scheduler(first, slow, open_wait_ms=100)
    depot.register_namespace(MANIFEST)
    cache = Cache(CHUNKS * BLOCKS_PER_CHUNK)
    cache.lend_to(depot)
    assert hits(depot, there) == 0
    end = time.monotonic() + PATIENCE_S
    while hits(depot, here) < CHUNKS:
        assert time.monotonic() < end, "what was read is not served"
        time.sleep(0.01)
    assert not load(depot, namespace, here)["failures"]
    assert (cache.data == kept.data).all()
    faults.hold_journals = 0
    while hits(depot, there) < CHUNKS:
        assert time.monotonic() < end, "what was read late is not served"
        time.sleep(0.01)
    assert not load(depot, namespace, there)["failures"]
    assert (cache.data == kept_there.data).all()
    depot.close()


def test_hits_are_served_while_journals_are_read(faulty_system, tmp_path):
    told = faulty_system.run(serve_while_journals_are_read, tmp_path / "slow", str(tmp_path / "first"))
    assert told == ""
