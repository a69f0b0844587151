"""Trial E5: two users on one directory. A root belongs to who made it; another one is refused in one sentence. What can only
be read is served, and what cannot be read is missed.
"""

import json
import os
import pathlib
import stat
import subprocess
import sys
import tempfile

import pytest

OWNER, OTHER = 65534, 65533

STORE = """
import numpy.random
from paged import filled_root
become()
filled_root(sys.argv[2])
"""

STORE_MANY = """
import json, time
import numpy.random
from paged import BLOCKS_PER_CHUNK, MANIFEST, Cache, config, keys_of, store
from tokendepot import Depot
become()
chunks = int(sys.argv[3])
depot = Depot.open(config(sys.argv[2], **json.loads(sys.argv[4])))
namespace = depot.register_namespace(MANIFEST)
cache = Cache(chunks * BLOCKS_PER_CHUNK, 7)
cache.lend_to(depot)
keys = keys_of(namespace, chunks)
for n in range(chunks):
    while store(depot, namespace, keys[n * 32 : n * 32 + 32], n + 1, n * BLOCKS_PER_CHUNK)["items_ok"] == 0:
        time.sleep(0.01)  # dropped while the next segment is made ready
depot.close()
"""

OPEN = """
from paged import config
from tokendepot import Depot, DepotError
become()
try:
    Depot.open(config(sys.argv[2]))
except DepotError as refused:
    print(f"{refused.kind}: {refused}")
"""

BECOME = """
import os, sys

def become():
    os.setgroups([])
    os.setresgid(0, 0, 0)  # of one group, as pods often are
    os.setresuid(*[int(sys.argv[1])] * 3)
    os.umask(0o022)
"""


def as_user(user, code, root, *arguments, prefix=()):
    """What goes wrong on the way is in `stderr`; modules are read before the process becomes the user."""
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    command = [*prefix, sys.executable, "-c", BECOME + code, str(user), root, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)


@pytest.fixture
def open_directory():
    """One in which every user may make files."""
    if os.geteuid() != 0:
        pytest.skip("not root: no process can become another user")
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/tmp") as directory:
        os.chmod(directory, 0o1777)
        yield directory


def test_what_one_user_stored_only_that_user_reads(open_directory):
    root = open_directory + "/root"
    stored = as_user(OWNER, STORE, root)
    assert stored.returncode == 0, stored.stderr
    for directory, _, files in os.walk(root):
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700, directory
        for name in files:
            assert stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode) == 0o600, name

    before = sorted((str(path), names, files) for path, names, files in os.walk(root))
    refused = as_user(OTHER, OPEN, root)
    assert refused.returncode == 0, refused.stderr
    assert refused.stdout.startswith("permission: ") and root in refused.stdout and refused.stdout.count("\n") == 1
    assert sorted((str(path), names, files) for path, names, files in os.walk(root)) == before
    assert as_user(OWNER, OPEN, root).stdout == "", "its owner opens it as before"


LOAD = """
import json
import numpy.random
from paged import BLOCKS_PER_CHUNK, MANIFEST, WANT, Cache, config, keys_of, load, store
from tokendepot import Depot
become()
chunks = int(sys.argv[3])
depot = Depot.open(config(sys.argv[2], poll_ms=1000, **json.loads(sys.argv[4])))
namespace = depot.register_namespace(MANIFEST)
cache, expected = Cache(chunks * BLOCKS_PER_CHUNK), Cache(chunks * BLOCKS_PER_CHUNK, 7)
cache.lend_to(depot)
keys = keys_of(namespace, chunks)
found = depot.longest_prefix(keys, [WANT])
done = load(depot, namespace, keys, 1)
failed = {chunk for _, chunk, _, _ in done["failures"]}
at = lambda chunk: slice(chunk * BLOCKS_PER_CHUNK, (chunk + 1) * BLOCKS_PER_CHUNK)
exact = [c for c in range(chunks) if c not in failed and (cache.data[:, :, at(c)] == expected.data[:, :, at(c)]).all()]
stored = store(depot, namespace, keys_of(namespace, 1, first_token=10**6), 2)["items_ok"]
print(json.dumps([found, len(exact), len(failed), stored]))
depot.close()
"""
BIND_READ_ONLY = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"']


def loaded(user, root, chunks, more="{}", prefix=()):
    """[chunks looked up, loaded byte for byte, missed; stored of one more]"""
    done = as_user(user, LOAD, root, str(chunks), more, prefix=prefix)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def everything_in(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in pathlib.Path(root).rglob("*")}


def test_a_root_on_a_read_only_bind_mount_serves_its_chunks_and_takes_none(open_directory):
    root = open_directory + "/root"
    assert as_user(OWNER, STORE, root).returncode == 0
    bind = [*BIND_READ_ONLY, root]
    refused = subprocess.run([*bind, "true"], capture_output=True, text=True)
    if refused.returncode != 0:
        pytest.skip(f"no bind mount can be made: {refused.stderr.strip()}")
    before = everything_in(root)
    assert loaded(OWNER, root, 8, prefix=bind) == [8, 8, 0, 0]
    assert everything_in(root) == before


def test_of_a_hundred_segments_one_that_cannot_be_read_is_one_miss(open_directory):
    root, one_each = open_directory + "/root", '{"roots": [{"path": "%s", "capacity": "64MiB", "segment": "68KiB"}]}'
    stored = as_user(OWNER, STORE_MANY, root, "100", one_each % root)
    assert stored.returncode == 0, stored.stderr
    segments = sorted(pathlib.Path(root, "segments").iterdir())
    assert len(segments) >= 100
    segments[50].chmod(0)
    assert loaded(OWNER, root, 100, one_each % root) == [100, 99, 1, 1]
