"""Trial E1: a control group with less memory than /dev/shm. Files on tmpfs count as its memory."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

MIB = 1 << 20
LIMIT = 128 * MIB

# A root of 32 MiB takes 200 MiB of stores: it evicts long before the group is full.
STORE = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
import json
from paged import MANIFEST, WANT, Cache, config, keys_of, load, store
from tokendepot import Depot

root = sys.argv[2]
one = [{"path": root, "capacity": "32MiB", "segment": "1MiB"}]
depot = Depot.open(config(root, roots=one, eviction_grace_ms=0))
namespace = depot.register_namespace(MANIFEST)
cache = Cache(256, 3)
cache.lend_to(depot)
stored, acknowledged = cache.data.copy(), 0
for prompt in range(50):
    keys = keys_of(namespace, 64, prompt * 100_000)
    acknowledged += store(depot, namespace, keys, job=prompt + 1)["items_ok"]
cache.data[:] = 0
found = depot.longest_prefix(keys, [WANT])
assert found > 0 and load(depot, namespace, keys[: 32 * found], job=100)["items_ok"] == found
assert (cache.data[:, :, : 4 * found] == stored[:, :, : 4 * found]).all()
print(json.dumps([acknowledged, depot.stats()["roots"][0]["evicted_segments"]]))
depot.close()
"""

# Far more than the group allows is asked for, and stored.
GREEDY = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
import json
from paged import MANIFEST, WANT, Cache, config, keys_of, load, store
from tokendepot import Depot

root = sys.argv[2]
asked = {"path": root, "capacity": "200MiB", "segment": sys.argv[3]}
depot = Depot.open(config(root, roots=[asked], free_space_reserve="16MiB"))
capacity = depot.stats()["roots"][0]["capacity_bytes"]
namespace = depot.register_namespace(MANIFEST)
cache = Cache(256, 3)
cache.lend_to(depot)
ballast = b"x" * int(sys.argv[4])
for prompt in range(50):
    keys = keys_of(namespace, 64, prompt * 100_000)
    store(depot, namespace, keys, job=prompt + 1)
root = depot.stats()["roots"][0]
print(json.dumps([capacity, root["used_bytes"], root["evicted_segments"], depot.longest_prefix(keys, [WANT])]))
depot.close()
"""

DOCTOR = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
from tokendepot.cli import main
sys.argv[1:] = ["doctor", sys.argv[2]]
main()
"""

BENCH = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
from tokendepot.cli import main
sys.argv[1:] = ["bench", "io", sys.argv[2], "--size", "1MiB", "--op", "write", "--in-flight", "2", "--volume", "256MiB"]
main()
"""


def limited(directory, file):
    group = pathlib.Path(directory, f"tokendepot-test-{os.getpid()}")
    group.mkdir()
    try:
        with open(group / file, "r+") as limit:  # which is not there where the directory is not of this version
            limit.write(str(LIMIT))
    except OSError:
        group.rmdir()
        raise
    return group


@pytest.fixture
def group():
    """The file that takes the processes of a control group with a limit on memory, of version 2 or 1."""
    for directory, file in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        with contextlib.suppress(OSError):
            group = limited(directory, file)
            break
    else:
        pytest.skip("no control group with a limit on memory can be made here")
    yield group / "cgroup.procs"
    group.rmdir()


def run(code, group, root, *arguments):
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    command = [sys.executable, "-c", code, str(group), str(root), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_a_memory_root_below_the_limit_evicts_and_lives(memory_root, group):
    done = run(STORE, group, memory_root)
    assert done.returncode == 0, done.stderr
    acknowledged, evicted = json.loads(done.stdout)
    assert acknowledged * 68 * 1024 > LIMIT, "more was stored than the group could hold"
    assert evicted > 0


def needs_room_in_shared_memory(more_than):
    shm = os.statvfs("/dev/shm")
    if shm.f_blocks * shm.f_frsize <= more_than:
        pytest.skip("/dev/shm is the smaller limit here")


def test_a_memory_root_above_the_limit_is_capped_to_three_quarters_and_the_process_lives(memory_root, group):
    needs_room_in_shared_memory(200 * MIB)
    done = run(GREEDY, group, memory_root, "1MiB", "0")
    assert done.returncode == 0, done.stderr
    capacity, used, evicted, found = json.loads(done.stdout)
    assert capacity == LIMIT // 4 * 3 and 0 < used <= capacity
    assert evicted > 0 and found > 0
    told = [line for line in done.stderr.splitlines() if "lower the capacity, or raise that limit" in line]
    assert len(told) == 1
    for word in (str(memory_root), str(200 * MIB), str(LIMIT), str(capacity), "tmpfs", str(group.parent)):
        assert word in told[0]


def test_a_memory_root_takes_no_memory_that_the_process_itself_has_taken(memory_root, group):
    needs_room_in_shared_memory(200 * MIB)
    ballast = 40 * MIB  # with the rest of the process, more than the capacity leaves
    done = run(GREEDY, group, memory_root, "1MiB", str(ballast))
    assert done.returncode == 0, done.stderr
    _, used, evicted, found = json.loads(done.stdout)
    assert 0 < used < LIMIT - ballast - 16 * MIB, "free_space_reserve counts in the group"
    assert evicted > 0 and found > 0


def test_a_memory_root_whose_segments_do_not_fit_below_the_limit_is_refused(memory_root, group):
    needs_room_in_shared_memory(200 * MIB)
    done = run(GREEDY, group, memory_root, "40MiB", "0")
    assert done.returncode == 1
    assert "all that the memory limit allows, holds fewer than 3 segments of" in done.stderr
    assert not memory_root.exists() or os.listdir(memory_root) == []


def test_the_doctor_names_the_limit_that_a_memory_root_must_stay_below(memory_root, group):
    needs_room_in_shared_memory(LIMIT)
    memory_root.mkdir()
    done = run(DOCTOR, group, memory_root)
    assert "Traceback" not in done.stderr
    assert "limited to 128.0 MiB" in done.stdout and "count as memory of the" in done.stdout


def test_a_benchmark_that_needs_more_than_the_limit_leaves_is_refused_before_it_writes(memory_root, group):
    needs_room_in_shared_memory(512 * MIB)
    memory_root.mkdir()
    done = run(BENCH, group, memory_root)
    assert done.returncode == 2, done.stderr
    assert "of memory are available" in done.stderr and "expected fewer extents in flight" in done.stderr
    assert os.listdir(memory_root) == []
