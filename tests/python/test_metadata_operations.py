"""What a depot asks of a file system's metadata: nothing for each chunk, so that shared file systems scale.

Counted by strace in a process that stores and loads thousands of chunks, in an empty root, in one that holds hundreds of
segments, and in one that is full. What happens by time instead (reading other writers' journals, confirming the own
journal's lock, the policies) is counted apart, against the configured poll.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from paged import BLOCKS_PER_CHUNK, MANIFEST, Cache, keys_of, store

from tokendepot import Depot

CHUNKS = 2048
SEGMENTS_OF_OTHERS = 300
BY_TIME = r"{}/(journals|policies|scrub|keeper-notes|\.tmp-)"  # the last two: how far the scrub is
CALLS = (
    "open,openat,openat2,creat,stat,lstat,fstat,newfstatat,statx,access,faccessat,faccessat2,getdents64,rename,renameat,"
    "renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,truncate,ftruncate,fallocate,fsync,fdatasync,flock,fcntl"
)
CLIENT = """
import json, os, sys
import numpy as np
from paged import BLOCKS_PER_CHUNK, CHUNK_TOKENS, MANIFEST, WANT, Cache, keys_of, load, range_of, store
from tokendepot import Depot

root, chunks, capacity, beforehand = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
depot = Depot.open(json.dumps({"roots": [{"path": root, "capacity": capacity, "segment": "32MiB"}],
                               "slab": "32MiB", "free_space_reserve": 0, "eviction_grace_ms": 0}))
namespace = depot.register_namespace(MANIFEST)
cache = Cache(64 * BLOCKS_PER_CHUNK, 7)
cache.lend_to(depot)
keys = keys_of(namespace, chunks + beforehand)
part = lambda n: keys[n * 32 : (n + 64) * 32]
for n in range(chunks, chunks + beforehand, 64):
    assert store(depot, namespace, part(n), 1)["items_ok"] == 64
evicted = lambda: depot.stats()["roots"][0]["evicted_segments"]
before = evicted()
for phase in (store, load):
    os.access("/phase-begin", os.F_OK)
    for n in range(0, chunks, 64):
        if phase is load:
            assert depot.longest_prefix(keys[: chunks * 32], [WANT]) == chunks
        assert phase(depot, namespace, part(n), n + 2)["items_ok"] == 64
    os.access("/phase-end", os.F_OK)
print(evicted() - before)
depot.close()
"""


def fill_with_small_segments(root):
    """Another process's: a mebibyte each."""
    depot = Depot.open(json.dumps({"roots": [{"path": str(root), "capacity": "1GiB", "segment": "1MiB"}], "slab": "8MiB"}))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(64 * BLOCKS_PER_CHUNK, 7)
    cache.lend_to(depot)
    chunks = SEGMENTS_OF_OTHERS * 15  # of 68 KiB
    keys = keys_of(namespace, chunks, first_token=10**8)
    for n in range(0, chunks, 32):
        store(depot, namespace, keys[n * 32 : (n + 32) * 32], n + 1)
    depot.close()
    assert len(list((root / "segments").iterdir())) >= SEGMENTS_OF_OTHERS


def strace_works():
    strace = shutil.which("strace")
    return strace and subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("others", "capacity", "beforehand"),
    [
        pytest.param(0, "512MiB", 64, id="empty root"),
        pytest.param(SEGMENTS_OF_OTHERS, "1GiB", 64, id="hundreds of segments"),
        pytest.param(0, "256MiB", 3840, id="full root"),
    ],
)
@pytest.mark.skipif(not strace_works(), reason="strace is not there, or ptrace is forbidden")
def test_no_metadata_operation_is_made_for_each_chunk(tmp_path, others, capacity, beforehand):
    root, trace = tmp_path / "root", tmp_path / "trace"
    if others:
        fill_with_small_segments(root)
    command = ["strace", "-f", "-ttt", "--seccomp-bpf", "-y", "-qq", "-s", "256", "-e", f"trace={CALLS}", "-o", str(trace)]
    client = [sys.executable, "-c", CLIENT, str(root), str(CHUNKS), capacity, str(beforehand)]
    here = pathlib.Path(__file__).parent
    done = subprocess.run([*command, *client], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) >= 4) == (capacity == "256MiB"), "a full root recycles its segments, no other does"
    phases, times, counting = [], [], False
    for line in trace.read_text(errors="replace").splitlines():
        if "/phase-begin" in line or "/phase-end" in line:
            times.append(float(line.split()[1]))
        if "/phase-begin" in line:
            phases.append([])
            counting = True
        elif "/phase-end" in line:
            counting = False
        elif counting and str(root) in line and "resumed>" not in line:
            call = re.match(r"\d+\s+[\d.]+\s+(\w+)\(", line)
            # Duplicating a descriptor and asking for its flags stay in the kernel.
            if call and not (call[1] == "fcntl" and "LK" not in line):
                phases[-1].append(line)
    assert len(phases) == 2
    for calls, begin, end in zip(phases, times[::2], times[1::2], strict=True):
        seconds = end - begin  # by the trace's own clock: a busy machine makes a phase longer, not its calls more frequent
        by_time = [line for line in calls if re.search(BY_TIME.format(root), line)]
        by_chunk = len(calls) - len(by_time)
        print(f"{by_chunk} operations of {CHUNKS} chunks in {seconds:.1f} s, {len(by_time)} by time")
        # Once a second the writer looks whether the segments that it fills are still there, and every ten the keeper for
        # leftovers: its lock and one listing.
        assert by_chunk <= 0.05 * CHUNKS + 4 * seconds, "\n".join(calls)
        # A poll: open the directory and look at it, list it (twice, for its end), look at one journal. Once a second: the
        # own journal's lock, size and name, and the policies. One more of each may be under way at either end.
        assert len(by_time) <= 8 * (seconds / 0.1 + 2) + 20 * (seconds + 2), "\n".join(by_time)
