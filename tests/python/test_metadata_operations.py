"""What a depot asks of a file system's metadata: nothing for each chunk, so that shared file systems scale.

Counted by strace in a process that stores and loads thousands of chunks, in an empty root, in one that holds hundreds of
segments, and in one that is full.
"""

import json

import pytest
from metadata import A_CHUNK, CHUNKS, strace_works, traced
from paged import BLOCKS_PER_CHUNK, MANIFEST, Cache, keys_of, store

from tokendepot import Depot

SEGMENTS_OF_OTHERS = 300
# By the clock, at the default poll_ms of 100. A poll: open the directory, look at it twice, list it until its end: 5. Once a
# second: the own journal's lock, size and name, size and name of two segments, the policies: 8.
A_SECOND = 60


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
    root = tmp_path / "root"
    if others:
        fill_with_small_segments(root)
    evicted, phases = traced(root, tmp_path / "trace", capacity, beforehand)
    assert (evicted >= 4) == (capacity == "256MiB"), "a full root recycles its segments, no other does"
    for phase in phases:
        print(phase)
        assert len(phase.for_chunks) <= A_CHUNK * CHUNKS, "\n".join(phase.for_chunks)
        # What is under way at either end is counted in a phase that it does not belong to.
        assert len(phase.by_clock) <= A_SECOND * (phase.seconds + 1), "\n".join(phase.by_clock)
