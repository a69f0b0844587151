"""Pins, quotas, times to live and scrub from the command line, beside running engines and on damaged roots."""

import json
import os
import time
from datetime import datetime

import pytest
from command_line import flip_byte, run, run_json
from paged import BLOCKS_PER_CHUNK, CHUNK_TOKENS, WANT, Cache, config, filled_root, keys_of, range_of, store

import tokendepot
from tokendepot import Depot

MANIFEST_WITH_CHUNKS = json.dumps({"model": "test/model", "chunk_tokens": CHUNK_TOKENS})


def until(holds, limit=15.0):
    """Engines obey within two seconds; a busy machine takes longer."""
    end = time.monotonic() + limit
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


def rules(root, kind):
    return run_json(kind, root)["rules"]


def test_a_time_to_live_is_obeyed_by_an_engine_that_runs_already(memory_root):
    namespace, keys, _ = filled_root(memory_root, chunks=40)
    running = Depot.open(config(memory_root))
    assert running.longest_prefix(keys, [WANT]) == 40
    assert "set ttl of the root: 1 s" in run("ttl", memory_root, "1s").stdout
    assert until(lambda: running.longest_prefix(keys, [WANT]) == 0)
    assert until(lambda: not any(s["sealed"] for s in tokendepot.inspect_root(str(memory_root))["segments"]))
    assert running.stats()["roots"][0]["evicted_bytes"]["ttl"] > 0
    running.close()
    assert "removed 1 ttl" in run("ttl", memory_root, "--remove").stdout
    assert rules(memory_root, "ttl") == []


def test_a_quota_takes_the_namespace_s_own_segments_only(memory_root):
    first, first_keys, _ = filled_root(memory_root, chunks=40)
    second, second_keys, _ = filled_root(memory_root, chunks=60, manifest=json.dumps({"model": "other"}))
    running = Depot.open(config(memory_root))
    found_before = running.stored(first_keys, WANT).count(1)
    run("quota", memory_root, "1MiB", "--namespace", second.hex()[:12])
    bytes_of = lambda: {n["digest"]: n["bytes"] for n in tokendepot.inspect_root(str(memory_root))["namespaces"]}  # noqa: E731
    assert until(lambda: bytes_of()[second.hex()] <= 1 << 20)
    running.refresh()
    assert running.stored(first_keys, WANT).count(1) == found_before
    running.close()
    assert "quota" in run("stat", memory_root).stdout


def test_a_pinned_prompt_outlives_stores_that_fill_the_root_many_times(memory_root, tmp_path):
    namespace, keys, _ = filled_root(memory_root, chunks=4, manifest=MANIFEST_WITH_CHUNKS)
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(range_of(0, 4 * CHUNK_TOKENS + 5)))
    pin = ["pin", memory_root, "--namespace", namespace.hex(), "--prompt", prompt, "--capacity", "16MiB"]
    assert run_json(*pin, "--dry-run")["chunks"] == 4
    assert rules(memory_root, "pin") == []
    run_json(*pin)
    assert [r["bytes"] for r in rules(memory_root, "pin")] == [sum(e["bytes"] for e in tokendepot.list_extents(str(memory_root)))]

    depot = Depot.open(config(memory_root, eviction_grace_ms=0))
    cache = Cache(32 * BLOCKS_PER_CHUNK, seed=3)
    cache.lend_to(depot)
    for number in range(1, 30):
        store(depot, namespace, keys_of(namespace, 32, first_token=number * 10_000), job=number)
    assert depot.stats()["roots"][0]["evicted_segments"] > 5
    assert depot.longest_prefix(keys, [WANT]) == 4
    depot.close()
    assert run_json("unpin", memory_root, "--namespace", namespace.hex(), "--prompt", prompt)["removed"] == 1


def test_a_prompt_cannot_be_pinned_in_a_namespace_of_lmcache(memory_root, tmp_path):
    namespace, _, _ = filled_root(memory_root, chunks=1, manifest='{"engine":"lmcache","model":"m"}')
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(range_of(0, CHUNK_TOKENS)))
    result = run("pin", memory_root, "--namespace", namespace.hex(), "--prompt", prompt, "--capacity", "16MiB")
    assert result.returncode == 2 and "cannot be made" in result.stderr
    assert not (memory_root / "policies").exists()


def test_a_pin_beyond_half_of_the_capacity_is_refused_with_the_figures_and_changes_nothing(memory_root):
    namespace, _, _ = filled_root(memory_root, chunks=60)
    result = run("pin", memory_root, "--namespace", namespace.hex(), "--capacity", "3MiB")
    assert result.returncode == 2
    assert str(3 << 19) in result.stderr
    assert not (memory_root / "policies").exists()


def test_values_of_rules_are_told_to_programs_with_their_units(memory_root):
    namespace = filled_root(memory_root, chunks=1)[0].hex()
    assert run_json("ttl", memory_root, "36h")["ttl_seconds"] == 36 * 3600
    assert run_json("quota", memory_root, "1MiB", "--namespace", namespace)["quota_bytes"] == 1 << 20
    forever = run_json("pin", memory_root, "--namespace", namespace, "--capacity", "16MiB")
    assert forever["until"] is None
    ends = datetime.fromisoformat(run_json("pin", memory_root, "--namespace", namespace, "--for", "8h", "--capacity", "16MiB")["until"])
    assert 0 < ends.timestamp() - time.time() <= 8 * 3600
    known = {rule["kind"]: rule for rule in run_json("stat", memory_root)["roots"][0]["tending"]["rules"]}
    assert (known["ttl"]["ttl_seconds"], known["quota"]["quota_bytes"]) == (36 * 3600, 1 << 20)
    assert rules(memory_root, "ttl")[0]["ttl_seconds"] == 36 * 3600
    assert not any("value" in rule for rule in known.values())


def test_what_names_nothing_that_is_there_says_so_and_ends_with_1(memory_root):
    namespace = filled_root(memory_root, chunks=1)[0].hex()
    for kind in ("pin", "ttl", "quota"):
        assert run(kind, memory_root).stdout.splitlines()[0].endswith(": none")
    pinned = run("pin", memory_root, "--namespace", namespace, "--key", "ab" * 32, "--capacity", "16MiB")
    assert pinned.returncode == 1 and "is not there" in pinned.stdout
    assert run_json("pin", memory_root, "--namespace", namespace, "--key", "cd" * 32, "--dry-run", "--capacity", "16MiB", code=1)["absent_chunks"] == 1
    for arguments in (["ttl", "--remove"], ["quota", "--remove", "--namespace", namespace], ["unpin", "--namespace", namespace, "--key", "cd" * 32]):
        command, *rest = arguments
        nothing = run(command, memory_root, *rest)
        assert nothing.returncode == 1 and "there is no such" in nothing.stdout, arguments


def test_evict_leaves_pinned_segments(memory_root):
    namespace, keys, _ = filled_root(memory_root, chunks=60)
    coldest = tokendepot.list_extents(str(memory_root))[0]
    run_json("pin", memory_root, "--namespace", namespace.hex(), "--key", coldest["key"].hex(), "--capacity", "16MiB")
    run_json("evict", memory_root, "--bytes", "1GiB", code=3)
    assert coldest["segment"] in {s["segment"] for s in tokendepot.inspect_root(str(memory_root))["segments"]}


def test_scrub_condemns_what_verify_only_tells(memory_root):
    namespace, keys, _ = filled_root(memory_root, chunks=6)
    extent = tokendepot.list_extents(str(memory_root))[3]
    flip_byte(memory_root / "segments" / (extent["segment"] + ".seg"), extent["offset"] + extent["bytes"] - 1)
    before = sorted((p.name, p.stat().st_size) for p in memory_root.rglob("*"))
    assert len(run_json("verify", memory_root, code=1)["damaged"]) == 1
    assert run_json("scrub", memory_root, "--dry-run", code=1)["condemned"] == 0
    assert sorted((p.name, p.stat().st_size) for p in memory_root.rglob("*")) == before
    found = run_json("scrub", memory_root, "--rate", "1GiB", code=1)
    assert (found["condemned"], [d["offset"] for d in found["damaged"]]) == (1, [extent["offset"]])
    assert run("scrub", memory_root).returncode == 0
    assert len(tokendepot.list_extents(str(memory_root))) == 5
    assert run("verify", memory_root).returncode == 0


# O4: clear one namespace, a wrong name, a dry run, while other processes have the root open.
def test_cleared_namespaces_are_misses_in_every_process_within_a_second_and_others_stay(memory_root):
    first, first_keys, _ = filled_root(memory_root, chunks=8)
    second, second_keys, _ = filled_root(memory_root, chunks=3, manifest=json.dumps({"model": "other"}))
    running = [Depot.open(config(memory_root)) for _ in range(2)]
    assert run("rm", memory_root, "--namespace", "f" * 64, "--yes").returncode == 2
    assert run_json("rm", memory_root, "--namespace", first.hex(), "--dry-run")["bytes"] > 0
    assert all(depot.longest_prefix(first_keys, [WANT]) == 8 for depot in running)
    run_json("rm", memory_root, "--namespace", first.hex(), "--yes")
    end = time.monotonic() + 1.0
    while any(depot.longest_prefix(first_keys, [WANT]) for depot in running) and time.monotonic() < end:
        time.sleep(0.01)
    for depot in running:
        assert depot.longest_prefix(first_keys, [WANT]) == 0
        assert depot.longest_prefix(second_keys, [WANT]) == 3
        assert depot.stats()["roots"][0]["evicted_bytes"]["manual"] > 0
        depot.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["ttl", "ROOT", "soon"],
        ["ttl", "ROOT", "0s"],
        ["ttl", "ROOT", "1h", "--remove"],
        ["ttl", "/tmp"],
        ["ttl", "/nonexistent", "1h"],
        ["quota", "ROOT", "1GiB"],
        ["quota", "ROOT", "8G", "--namespace", "NS"],
        ["quota", "ROOT", "1GiB", "--namespace", "zz"],
        ["pin", "ROOT", "--key", "00"],
        ["pin", "ROOT", "--namespace", "NS", "--key", "00"],
        ["pin", "ROOT", "--namespace", "NS", "--prompt", "/nonexistent"],
        ["pin", "ROOT", "--namespace", "NS", "--for", "-1h"],
        ["pin", "ROOT", "--namespace", "NS", "--frobnicate"],
        ["unpin", "ROOT"],
        ["scrub", "ROOT", "--rate", "fast"],
        ["scrub", "/etc/passwd"],
    ],
)
def test_bad_input_ends_with_2_in_words_and_changes_nothing(memory_root, arguments):
    namespace, _, _ = filled_root(memory_root, chunks=1)
    before = sorted((p.name, p.stat().st_size) for p in memory_root.rglob("*"))
    words = {"ROOT": str(memory_root), "NS": namespace.hex()}
    result = run(*(words.get(word, word) for word in arguments))
    assert result.returncode == 2, result.stderr
    assert result.stderr and "Traceback" not in result.stderr
    assert sorted((p.name, p.stat().st_size) for p in memory_root.rglob("*")) == before


@pytest.mark.parametrize("content, code, word", [(b"TDPOLICY\x01\0\0\0", 1, "bytes"), (b"TDPOLICY\x09\0\0\0" + bytes(40), 2, "version 9")])
def test_policies_that_are_damaged_or_from_the_future_are_told_and_left_alone(memory_root, content, code, word):
    namespace, keys, _ = filled_root(memory_root, chunks=2)
    (memory_root / "policies").write_bytes(content)
    result = run("ttl", memory_root, "1s")
    assert result.returncode == code
    assert word in result.stderr
    assert (memory_root / "policies").read_bytes() == content
    assert "policies" in run("stat", memory_root).stdout
    depot = Depot.open(config(memory_root))
    assert depot.longest_prefix(keys, [WANT]) == 2
    depot.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_without_permission_nothing_changes(memory_root):
    filled_root(memory_root, chunks=1)
    memory_root.chmod(0o500)
    result = run("ttl", memory_root, "1h")
    memory_root.chmod(0o700)
    assert result.returncode == 2
    assert not (memory_root / "policies").exists()


def test_pins_show_when_they_end(memory_root):
    namespace, _, _ = filled_root(memory_root, chunks=2)
    run_json("pin", memory_root, "--namespace", namespace.hex()[:8], "--for", "8h", "--capacity", "16MiB")
    assert "more" in run("pin", memory_root).stdout
