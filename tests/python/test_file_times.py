"""Trial E6: times of files say nothing. Whatever they are, everything stored is served and nothing goes because of them."""

import os
import time

import pytest

from paged import WANT, Cache, config, filled_root, load

from tokendepot import Depot

HOUR = 3600


@pytest.mark.parametrize("at", [0, time.time() + 2 * HOUR, 4_291_747_200], ids=["1970", "in two hours", "in 2106"])
@pytest.mark.parametrize("writer", [False, True])
def test_odd_times_of_files_neither_hide_nor_evict(memory_root, at, writer):
    namespace, keys, stored = filled_root(memory_root, chunks=8)
    for file in memory_root.rglob("*"):
        os.utime(file, (at, at))
    depot = Depot.open(config(memory_root), writer=writer)
    cache = Cache(32)
    cache.lend_to(depot)
    assert depot.longest_prefix(keys, [WANT]) == 8
    assert load(depot, namespace, keys)["items_ok"] == 8
    assert (cache.data == stored.data).all()
    assert depot.stats()["roots"][0]["evicted_segments"] == 0
    depot.close()
