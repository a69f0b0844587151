"""What a depot asks of a file system's metadata: nothing for each chunk, so that shared file systems scale.

Counted by strace in a process that stores and loads thousands of chunks. What happens by time instead (reading other
writers' journals, confirming the own journal's lock, the keeper's rounds) is counted apart, against the configured poll.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

CHUNKS = 2048
CALLS = (
    "open,openat,openat2,creat,stat,lstat,fstat,newfstatat,statx,access,faccessat,faccessat2,getdents64,rename,renameat,"
    "renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,truncate,ftruncate,fallocate,fsync,fdatasync,flock,fcntl"
)
CLIENT = """
import json, os, sys
import numpy as np
from paged import BLOCKS_PER_CHUNK, CHUNK_TOKENS, MANIFEST, WANT, Cache, keys_of, load, range_of, store
from tokendepot import Depot

root, chunks = sys.argv[1], int(sys.argv[2])
depot = Depot.open(json.dumps({"roots": [{"path": root, "capacity": "512MiB", "segment": "32MiB"}],
                               "slab": "32MiB", "free_space_reserve": 0}))
namespace = depot.register_namespace(MANIFEST)
cache = Cache(64 * BLOCKS_PER_CHUNK, 7)
cache.lend_to(depot)
keys = keys_of(namespace, chunks + 64)
part = lambda n: keys[n * 32 : (n + 64) * 32]
assert store(depot, namespace, part(chunks), 1)["items_ok"] == 64  # files are open, space is ready
for phase in (store, load):
    os.access("/phase-begin", os.F_OK)
    for n in range(0, chunks, 64):
        if phase is load:
            assert depot.longest_prefix(keys[: chunks * 32], [WANT]) == chunks
        assert phase(depot, namespace, part(n), n + 2)["items_ok"] == 64
    os.access("/phase-end", os.F_OK)
depot.close()
"""


def strace_works():
    strace = shutil.which("strace")
    return strace and subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not strace_works(), reason="strace is not there, or ptrace is forbidden")
def test_no_metadata_operation_is_made_for_each_chunk(tmp_path):
    root, trace = tmp_path / "root", tmp_path / "trace"
    command = ["strace", "-f", "-ttt", "--seccomp-bpf", "-y", "-qq", "-s", "256", "-e", f"trace={CALLS}", "-o", str(trace)]
    client = [sys.executable, "-c", CLIENT, str(root), str(CHUNKS)]
    here = pathlib.Path(__file__).parent
    done = subprocess.run([*command, *client], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
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
        by_time = [line for line in calls if re.search("/(journals|keeper|policies|scrub)", line)]
        by_chunk = len(calls) - len(by_time)
        # Once a second the writer looks whether the segments that it fills are still there.
        assert by_chunk <= 0.05 * CHUNKS + 4 * seconds, "\n".join(calls)
        # A poll: open the directory and look at it, list it (twice, for its end), look at one journal. Once a second: the
        # own journal's lock, size and name, and the keeper's round. One more of each may be under way at either end.
        assert len(by_time) <= 8 * (seconds / 0.1 + 2) + 20 * (seconds + 2), "\n".join(by_time)
