"""A process under strace that stores and loads thousands of chunks, and what it asks of a file system's metadata meanwhile.

One thread of a depot works by the clock: it reads the other writers' journals, and confirms the own journal's lock, the
policies and the segments that are being filled. What it asks is counted apart, by the second; all else is for the chunks.
"""

import collections
import pathlib
import re
import shutil
import subprocess
import sys

CHUNKS = 2048
A_CHUNK = 0.05  # of the operations that are not by the clock
CALLS = (
    "open,openat,openat2,creat,stat,lstat,fstat,newfstatat,statx,access,faccessat,faccessat2,getdents64,rename,renameat,"
    "renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,truncate,ftruncate,fallocate,fsync,fdatasync,flock,fcntl,statfs,fstatfs"
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


class Phase:
    """Calls on the root, a line of strace's each, while all chunks were stored or loaded."""

    def __init__(self, calls, by_clock, begin, end):
        self.seconds = end - begin  # by the trace's clock: a busy machine makes a phase longer, not its calls more frequent
        self.by_clock = [line for line in calls if line.split()[0] == by_clock]
        self.for_chunks = [line for line in calls if line.split()[0] != by_clock]
        self.a_chunk = len(self.for_chunks) / CHUNKS
        self.a_second = len(self.by_clock) / self.seconds

    def __str__(self):
        return (
            f"{len(self.for_chunks)} operations of {CHUNKS} chunks, {self.a_chunk:.3f} of {A_CHUNK} each; "
            f"by the clock {len(self.by_clock)} in {self.seconds:.1f} s, {self.a_second:.0f} a second"
        )


def strace_works():
    strace = shutil.which("strace")
    return strace and subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode == 0


def traced(root, trace, capacity="512MiB", beforehand=64, python=sys.executable):
    """Stores `beforehand` chunks, which nobody counts, then CHUNKS, and loads these: (segments evicted, [storing, loading])."""
    command = ["strace", "-f", "-ttt", "--seccomp-bpf", "-y", "-qq", "-s", "256", "-e", f"trace={CALLS}", "-o", str(trace)]
    client = [python, "-c", CLIENT, str(root), str(CHUNKS), capacity, str(beforehand)]
    here = pathlib.Path(__file__).parent
    done = subprocess.run([*command, *client], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    phases, times, counting = [], [], False
    for line in pathlib.Path(trace).read_text(errors="replace").splitlines():
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
    listings = collections.Counter(line.split()[0] for calls in phases for line in calls if "getdents64" in line)
    by_clock = listings.most_common(1)[0][0]  # who polls; others list when something has to be known at once
    return int(done.stdout), [
        Phase(calls, by_clock, begin, end) for calls, begin, end in zip(phases, times[::2], times[1::2], strict=True)
    ]
