"""Trial X4: a shared file system that shows files late, forgets them or lists them late. Each is a miss, and passes."""

import errno
import time

import pytest
from paged import MANIFEST, WANT, Cache, config, filled_root, keys_of, load, store

from tokendepot import Depot

CHUNKS = 8


def reader(root):
    depot = Depot.open(config(root, roots=[{"path": root, "capacity": "16MiB", "segment": "1MiB", "io": "threads"}]))
    cache = Cache(64)
    cache.lend_to(depot)
    return depot, cache


def found_again(depot, keys, chunks=CHUNKS):
    end = time.monotonic() + 10
    while depot.longest_prefix(keys, [WANT]) != chunks:
        assert time.monotonic() < end, "what is visible is never found"
        time.sleep(0.02)
    return True


def miss_and_come_back(faults, root, field, error):
    faults.network = 1
    namespace, keys, stored = filled_root(root, chunks=CHUNKS)
    depot, cache = reader(root)
    setattr(faults, field, int(error))
    before = faults.opens
    missed = load(depot, namespace, keys)
    assert missed["items_ok"] == 0 and len(missed["failures"]) == CHUNKS
    assert (cache.data == 0).all()
    time.sleep(0.5)
    assert faults.opens - before <= 4 * CHUNKS, "what is not there is not asked for again and again"

    setattr(faults, field, 0)
    depot.close()
    depot, cache = reader(root)
    assert depot.longest_prefix(keys, [WANT]) == CHUNKS, "nothing was condemned for what a client did not see"
    assert load(depot, namespace, keys)["items_ok"] == CHUNKS
    assert (cache.data[:, :, :32] == stored.data).all()
    depot.close()


def listings_lag(faults, root):
    faults.network = 1
    depot, cache = reader(root)
    namespace = depot.register_namespace(MANIFEST)
    faults.hide_newer_s = 3600
    other, source = reader(root)
    source.data[:] = Cache(64, 5).data
    keys = keys_of(namespace, CHUNKS)
    assert store(other, namespace, keys)["items_ok"] == CHUNKS
    other.close()
    time.sleep(0.2)
    assert depot.longest_prefix(keys, [WANT]) == 0
    faults.hide_newer_s = 0
    assert found_again(depot, keys)
    assert load(depot, namespace, keys)["items_ok"] == CHUNKS
    assert (cache.data[:, :, :32] == source.data[:, :, :32]).all()
    depot.close()


def renames_fail(faults, root, error):
    faults.network = 1
    depot, cache = reader(root)
    namespace = depot.register_namespace(MANIFEST)
    cache.data[:] = Cache(64, 5).data
    faults.rename_error = int(error)
    for job in range(40):  # more than the capacity: segments would be recycled
        done = store(depot, namespace, keys_of(namespace, CHUNKS, job * 100_000), job=job + 1)
        assert done["items_ok"] + len(done["failures"]) == CHUNKS
    faults.rename_error = 0
    keys = keys_of(namespace, CHUNKS, 9_000_000)
    end = time.monotonic() + 10
    while store(depot, namespace, keys, job=1000 + int(time.monotonic() * 1000))["items_ok"] != CHUNKS:
        assert time.monotonic() < end, "stores never work again"
        time.sleep(0.05)
    stored = cache.data[:, :, :32].copy()
    cache.data[:] = 0
    assert load(depot, namespace, keys)["items_ok"] == CHUNKS and (cache.data[:, :, :32] == stored).all()
    depot.close()


@pytest.mark.parametrize(
    ("field", "error"),
    [("open_error", errno.ENOENT), ("open_error", errno.ESTALE), ("read_error", errno.ESTALE)],
    ids=["open ENOENT", "open ESTALE", "read ESTALE"],
)
def test_a_file_that_a_client_does_not_see_is_missed_and_later_served(tmp_path, faulty_system, field, error):
    faulty_system.run(miss_and_come_back, tmp_path / "root", field, str(error))


def test_a_listing_that_lags_hides_and_then_shows_what_others_stored(tmp_path, faulty_system):
    faulty_system.run(listings_lag, tmp_path / "root")


@pytest.mark.parametrize("error", [errno.EEXIST, errno.ENOTEMPTY])
def test_renames_that_fail_cost_stores_and_nothing_else(tmp_path, faulty_system, error):
    faulty_system.run(renames_fail, tmp_path / "root", str(error))
