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

DOCTOR = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
from tokendepot.cli import main
sys.argv[1:] = ["doctor", sys.argv[2]]
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


def run(code, group, root):
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    command = [sys.executable, "-c", code, str(group), str(root)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_a_memory_root_below_the_limit_evicts_and_lives(memory_root, group):
    done = run(STORE, group, memory_root)
    assert done.returncode == 0, done.stderr
    acknowledged, evicted = json.loads(done.stdout)
    assert acknowledged * 68 * 1024 > LIMIT, "more was stored than the group could hold"
    assert evicted > 0


def test_the_doctor_names_the_limit_that_a_memory_root_must_stay_below(memory_root, group):
    shm = os.statvfs("/dev/shm")
    if shm.f_blocks * shm.f_frsize <= LIMIT:
        pytest.skip("/dev/shm is the smaller limit here")
    memory_root.mkdir()
    done = run(DOCTOR, group, memory_root)
    assert "Traceback" not in done.stderr
    assert "limited to 128.0 MiB" in done.stdout and "count as memory of the" in done.stdout
