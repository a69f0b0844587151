"""`tokendepot du` on roots that a real engine filled: what it counts, that it counts it once, what it says of damage."""

import json
import os

import pytest
from command_line import flip_byte, run, run_json
from paged import BLOCKS_PER_CHUNK, MANIFEST, Cache, config, filled_root, keys_of, store

import tokendepot
from tokendepot import Depot
from tokendepot.cli import du

OTHER_MANIFEST = json.dumps({"model": "test/other", "kv_dtype": "fp8"})


@pytest.fixture
def two_models(memory_root):
    """8 chunks of one namespace and 3 of another."""
    first = filled_root(memory_root, chunks=8)
    second = filled_root(memory_root, chunks=3, manifest=OTHER_MANIFEST)
    return memory_root, first[0].hex(), second[0].hex()


def bytes_of_extents(root):
    return sum(e["bytes"] for e in tokendepot.list_extents(str(root)))


def bytes_of_files(root):
    return sum(path.stat().st_size for path in (root / "segments").iterdir())


def test_du_counts_extents_and_bytes_of_each_namespace_largest_first(two_models):
    root, first, second = two_models
    found = run_json("du", root)
    rows = [(row["namespace"], row["model"], row["extents"]) for row in found["rows"]]
    assert rows == [(first, "test/model", 8), (second, "test/other", 3)]
    assert sum(row["live_bytes"] for row in found["rows"]) == bytes_of_extents(root)
    text = run("du", root).stdout
    for expected in ("test/model", "test/other", first[:12], second[:12], "11 extents"):
        assert expected in text


def test_the_total_is_live_and_dead_bytes_of_all_segment_files(two_models):
    root, _, _ = two_models
    for way in du.WAYS:
        total = run_json("du", root, "--by", way)["total"]
        assert total["extents"] == 11
        assert total["live_bytes"] == bytes_of_extents(root)
        assert total["file_bytes"] == bytes_of_files(root)
        assert total["dead_bytes"] == total["file_bytes"] - total["live_bytes"] > 0


@pytest.mark.parametrize("way", ["root", "age"])
def test_rows_of_files_add_up_to_the_total(two_models, way):
    found = run_json("du", two_models[0], "--by", way)
    for field in ("extents", "live_bytes", "dead_bytes", "file_bytes"):
        assert sum(row[field] for row in found["rows"]) == found["total"][field]


def test_several_roots_are_told_apart_and_a_namespace_is_summed_over_them(memory_root, tmp_path):
    namespace, _, _ = filled_root(memory_root, chunks=4)
    filled_root(tmp_path / "lower", chunks=2)
    by_root = run_json("du", memory_root, tmp_path / "lower", "--by", "root")["rows"]
    assert [(row["root"], row["extents"]) for row in by_root] == [(str(memory_root), 4), (str(tmp_path / "lower"), 2)]
    by_namespace = run_json("du", memory_root, tmp_path / "lower")["rows"]
    assert [(row["namespace"], row["extents"]) for row in by_namespace] == [(namespace.hex(), 6)]


def test_a_root_that_is_named_twice_is_counted_once(two_models, tmp_path):
    root, _, _ = two_models
    (tmp_path / "link").symlink_to(root)
    found = run_json("du", root, f"{root}/", tmp_path / "link")
    assert found["roots"] == [str(root)]
    assert found["total"]["extents"] == 11


def test_a_manifest_that_one_root_has_lost_is_taken_from_another(memory_root, tmp_path):
    namespace, _, _ = filled_root(memory_root, chunks=1)
    filled_root(tmp_path / "lower", chunks=1)
    (memory_root / "manifests" / f"{namespace.hex()}.json").unlink()
    found = run_json("du", memory_root, tmp_path / "lower", code=1)
    assert [(row["namespace"], row["model"], row["extents"]) for row in found["rows"]] == [(namespace.hex(), "test/model", 2)]


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(-7200, 0), (0, 0), (3599, 0), (3600, 1), (86399, 1), (86400, 2), (7 * 86400, 3), (30 * 86400, 4), (10**9, 4)],
)
def test_ages_fall_into_buckets_and_the_future_into_the_youngest(seconds, bucket):
    now = 1.8e9
    assert du.age_of(now - seconds, now) == du.AGES[bucket][0]
    assert du.age_of(0.0, now) == du.NEVER


def test_what_was_just_stored_is_of_the_youngest_age(two_models):
    rows = run_json("du", two_models[0], "--by", "age")["rows"]
    used = {row["age"]: row["extents"] for row in rows if row["extents"]}
    assert used == {"under 1 hour": 11}
    assert "By age of last use" in run("du", two_models[0], "--by", "age").stdout


def test_groups_are_counted_within_their_namespace(two_models):
    root, first, second = two_models
    rows = run_json("du", root, "--by", "group")["rows"]
    counted = {(row["namespace"], row["group"], row["kind"]): row["extents"] for row in rows}
    assert counted == {(first, 0, "canonical"): 8, (second, 0, "canonical"): 3}
    assert sum(row["live_bytes"] for row in rows) == bytes_of_extents(root)


def test_what_is_removed_becomes_dead_bytes(two_models):
    root, first, _ = two_models
    before = run_json("du", root)["total"]
    assert run("rm", root, "--namespace", first, "--yes").returncode == 0
    after = run_json("du", root)["total"]
    assert after["extents"] == 3
    assert after["file_bytes"] == before["file_bytes"]
    assert after["dead_bytes"] - before["dead_bytes"] == before["live_bytes"] - after["live_bytes"] > 0


def test_an_empty_depot_has_no_rows(memory_root):
    Depot.open(config(memory_root)).close()
    found = run_json("du", memory_root)
    assert found["rows"] == [] and found["total"]["live_bytes"] == 0
    assert "0 extents" in run("du", memory_root).stdout


@pytest.mark.parametrize("way", du.WAYS)
def test_what_a_damaged_journal_spoke_of_is_not_live_and_ends_with_1(two_models, way):
    root, _, _ = two_models
    journal = max((root / "journals").iterdir(), key=lambda path: path.stat().st_size)
    flip_byte(journal, 128 * 2 + 50)
    found = run_json("du", root, "--by", way, code=1)
    assert [d["file"] for d in found["damaged_files"]] == [f"{root}/journals/{journal.name}"]
    assert found["total"]["extents"] == 10
    assert "Damaged" in run("du", root, "--by", way).stdout


def test_a_segment_that_was_cut_short_is_damage_and_has_no_dead_bytes(two_models):
    root, _, _ = two_models
    segment = next(s for s in tokendepot.inspect_root(str(root))["segments"] if s["live_bytes"])
    os.truncate(root / "segments" / segment["file"], 4096)
    found = run_json("du", root, code=1)
    assert f"{root}/segments/{segment['file']}" in [d["file"] for d in found["damaged_files"]]
    assert found["total"]["dead_bytes"] == bytes_of_files(root) - 4096 - (found["total"]["live_bytes"] - segment["live_bytes"])
    assert sum(row["dead_bytes"] for row in run_json("du", root, "--by", "age", code=1)["rows"]) == found["total"]["dead_bytes"]


def test_du_changes_nothing(two_models):
    root, _, _ = two_models

    def state():
        return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in [root, *root.rglob("*")])

    before = state()
    for way in du.WAYS:
        run_json("du", root, "--by", way)
    assert state() == before


def test_du_while_an_engine_stores_counts_what_was_acknowledged(memory_root):
    depot = Depot.open(config(memory_root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(16 * BLOCKS_PER_CHUNK, seed=2)
    cache.lend_to(depot)
    for round_number in range(3):
        keys = keys_of(namespace, 16, first_token=round_number * 100_000)
        assert store(depot, namespace, keys, job=round_number + 1)["items_ok"] == 16
        assert run_json("du", memory_root)["total"]["extents"] == 16 * (round_number + 1)
    depot.close()


@pytest.mark.parametrize("arguments", [["du"], ["du", "/"], ["du", "/nonexistent/path"], ["du", "/etc/passwd"]])
def test_paths_that_are_no_root_end_with_2(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr


def test_an_unknown_way_to_group_is_refused_with_the_ways_there_are(two_models):
    result = run("du", two_models[0], "--by", "size")
    assert result.returncode == 2
    for word in ("size", *du.WAYS):
        assert word in result.stderr


def test_a_root_of_a_later_version_is_refused_and_not_touched(memory_root):
    filled_root(memory_root, chunks=1)
    flip_byte(memory_root / "DEPOT", 8)
    before = os.stat(memory_root / "DEPOT").st_mtime_ns
    result = run("du", memory_root)
    assert result.returncode == 2 and "version" in result.stderr
    assert os.stat(memory_root / "DEPOT").st_mtime_ns == before
