"""A root whose file system has stopped answering: its own loads end at their deadline, and nothing else waits for it."""

import json
import os
import time

import pytest
from command_line import flip_byte
from paged import BLOCKS_PER_CHUNK, MANIFEST, WANT, Cache, config, filled_root, keys_of, range_of, store

from tokendepot import Depot

THERE, HERE = 80, 8  # chunks: more than a root has in motion, and more than half of the slab
FIRST_HERE = 1_000_000  # token
LONGEST_S = 20.0


def two_roots(first, second, **more):
    size = {"capacity": "32MiB", "segment": "1MiB"}
    roots = [{"path": str(first), **size}, {"path": str(second), **size, "io": "threads"}]
    return json.dumps({"roots": roots, "slab": "2MiB", "free_space_reserve": 0, "poll_ms": 20, **more})


def ended(depot, *jobs):
    """The completions of these jobs, by job."""
    found = {}
    end = time.monotonic() + LONGEST_S
    while not found.keys() >= set(jobs):
        assert time.monotonic() < end, f"jobs {set(jobs) - found.keys()} do not end"
        found |= {done["job"]: done for done in depot.poll()}
        time.sleep(0.001)
    return found


class Engine:
    """Has 80 chunks in the shared root, which may hang, and 8 in the root before it."""

    def __init__(self, faults, shared, first, network=1, **more):
        faults.network = network
        self.namespace, self.there, stored = filled_root(shared, chunks=THERE)
        self.depot = Depot.open(two_roots(first, shared, **more))
        self.depot.register_namespace(MANIFEST)
        self.cache = Cache((THERE + HERE) * BLOCKS_PER_CHUNK)
        self.first_block = THERE * BLOCKS_PER_CHUNK
        self.stored_there = stored.data
        self.stored_here = Cache(HERE * BLOCKS_PER_CHUNK, 11).data
        self.cache.data[:, :, self.first_block :] = self.stored_here
        self.cache.lend_to(self.depot)
        self.here = keys_of(self.namespace, HERE, FIRST_HERE)
        assert store(self.depot, self.namespace, self.here, first_block=self.first_block)["items_ok"] == HERE
        self.cache.data[:] = 0

    def begin(self, job, deadline_s):
        """Loads all that the shared root has."""
        groups = [(WANT, 0, BLOCKS_PER_CHUNK, range_of(0, THERE * BLOCKS_PER_CHUNK))]
        self.depot.submit_load(job, self.depot.plan_load(self.namespace, self.there, groups, deadline_s))

    def load_here(self, job):
        self.cache.data[:, :, self.first_block :] = 0
        blocks = range_of(self.first_block, HERE * BLOCKS_PER_CHUNK)
        plan = self.depot.plan_load(self.namespace, self.here, [(WANT, 0, BLOCKS_PER_CHUNK, blocks)], LONGEST_S)
        self.depot.submit_load(job, plan)
        return job

    def right_here(self):
        return (self.cache.data[:, :, self.first_block :] == self.stored_here).all()

    def right_there(self):
        return (self.cache.data[:, :, : self.first_block] == self.stored_there).all()

    def timed_out(self):
        return [root["timed_out_loads"] for root in self.depot.stats()["roots"]]


def load_while_reads_hang(faults, shared, first, hold):
    engine = Engine(faults, shared, first)
    setattr(faults, hold, 1)
    engine.begin(100, deadline_s=1.0)
    late = {}
    for job in range(10):  # the first ones while the others wait, the last ones long after they were given up
        found = ended(engine.depot, engine.load_here(job))
        late |= found
        assert found[job]["items_ok"] == HERE and engine.right_here()
        time.sleep(0.15)
    late = late.get(100) or ended(engine.depot, 100)[100]
    assert [reason for *_, reason in late["failures"]] == ["timed_out"] * THERE
    assert engine.timed_out() == [0, THERE]

    setattr(faults, hold, 0)
    engine.begin(101, deadline_s=LONGEST_S)
    assert ended(engine.depot, 101)[101]["items_ok"] == THERE and engine.right_there()
    assert engine.timed_out() == [0, THERE]
    engine.depot.close()


def load_while_writes_hang(faults, shared, first):
    engine = Engine(faults, shared, first)
    faults.hold_writes = 1
    engine.begin(100, deadline_s=1.0)  # the first ones come; that they were used is to be journaled
    there = ended(engine.depot, 100)[100]
    assert there["items_ok"] > 0 and {reason for *_, reason in there["failures"]} <= {"timed_out"}
    assert engine.timed_out() == [0, THERE - there["items_ok"]]
    for job in range(10):
        assert ended(engine.depot, engine.load_here(job))[job]["items_ok"] == HERE and engine.right_here()
    faults.hold_writes = 0
    engine.begin(101, deadline_s=LONGEST_S)
    assert ended(engine.depot, 101)[101]["items_ok"] == THERE and engine.right_there()
    engine.depot.close()


def find_bad_bytes_while_writes_hang(faults, shared, first):
    """On a local file system: what is bad there is condemned in the journal, which is written there."""
    engine = Engine(faults, shared, first, network=0, device_threads=1)
    segments = os.path.join(shared, "segments")
    for name in os.listdir(segments):
        flip_byte(os.path.join(segments, name), 8192)  # in the payload of the first extent
    faults.hold_writes = 1
    engine.begin(100, deadline_s=LONGEST_S)
    for job in range(10):
        assert ended(engine.depot, engine.load_here(job))[job]["items_ok"] == HERE and engine.right_here()
        time.sleep(0.05)
    assert engine.depot.longest_prefix(engine.there, [WANT]) == 0, "forgotten here before others are told"
    faults.hold_writes = 0
    corrupt = [reason for *_, reason in ended(engine.depot, 100)[100]["failures"]]
    assert corrupt and set(corrupt) == {"corrupt"}
    engine.depot.close()

    depot = Depot.open(config(shared))
    depot.register_namespace(MANIFEST)
    stored = depot.stored(engine.there, WANT)
    assert stored.count(0) == len(corrupt) and stored[0] == 0, "the next process knows"
    depot.close()


@pytest.mark.parametrize("hold", ["hold_opens", "hold_reads"])
def test_loads_from_other_roots_go_on_while_one_hangs(root, tmp_path, faulty_system, hold):
    faulty_system.run(load_while_reads_hang, tmp_path / "shared", root, hold)


def test_a_journal_that_cannot_be_written_holds_up_no_load(memory_root, tmp_path, faulty_system):
    faulty_system.run(load_while_writes_hang, tmp_path / "shared", memory_root)


def test_bad_bytes_on_a_root_whose_journal_cannot_be_written_hold_up_no_other_root(root, tmp_path, faulty_system):
    faulty_system.run(find_bad_bytes_while_writes_hang, tmp_path / "local", root)
