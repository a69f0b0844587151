"""The command line on roots that a real engine filled: what it says, what it changes, how it ends."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from command_line import flip_byte, run, run_json
from paged import BLOCKS_PER_CHUNK, MANIFEST, WANT, Cache, config, filled_root, keys_of, load, store

import tokendepot
from tokendepot import Depot
from tokendepot.cli import namespaces, show

OTHER_MANIFEST = json.dumps({"model": "test/model", "kv_dtype": "fp8", "groups": [{"heads": 2}]})


@pytest.fixture
def two_models(memory_root):
    """8 chunks of one namespace and 3 of another."""
    first = filled_root(memory_root, chunks=8)
    second = filled_root(memory_root, chunks=3, manifest=OTHER_MANIFEST)
    return memory_root, first[0].hex(), second[0].hex()


def damage(root, number):
    """Flips the last payload byte of an extent and returns the extent."""
    extent = tokendepot.list_extents(str(root))[number]
    flip_byte(root / "segments" / (extent["segment"] + ".seg"), extent["offset"] + extent["bytes"] - 1)
    return extent


# --- version, usage ---


def test_version_names_the_package_and_the_format():
    assert run_json("version") == {"tokendepot": tokendepot.__version__, "format": tokendepot.FORMAT_VERSION}
    assert tokendepot.__version__ in run("version").stdout


def test_the_console_script_is_installed():
    script = shutil.which("tokendepot", path=os.path.dirname(sys.executable))
    assert script is not None
    assert subprocess.run([script, "version"], capture_output=True, timeout=60).returncode == 0


def test_the_package_runs_as_a_module_and_tells_its_version_as_an_option():
    command = [sys.executable, "-m", "tokendepot", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout == run("version").stdout


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_a_command_of_commands_without_one_shows_its_help(arguments):
    result = run(*arguments)
    assert result.returncode == 2 and "Usage: tokendepot" in result.stdout and result.stderr == ""


def test_every_command_documents_its_exit_codes():
    for command in ("stat", "ls", "du", "verify", "evict", "rm", "export", "import", "explain", "repair", "doctor", "replay", "plan", "version"):
        assert "Exit codes: 0" in run(command, "--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["stat"],
        ["stat", "/"],
        ["ls", "/nonexistent/path"],
        ["verify", "/tmp/[/red]\x1b[31m"],
        ["verify", "/etc/passwd"],
        ["evict", "/tmp", "--bytes", "8G"],
        ["evict", "/tmp", "--bytes", "-1"],
        ["evict", "/tmp"],
        ["rm", "/tmp"],
        ["ls", "/tmp", "--limit", "-2"],
        ["frobnicate"],
        ["stat", "--frobnicate", "/tmp"],
    ],
)
def test_wrong_usage_and_paths_that_are_no_root_end_with_2(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr and "\x1b" not in result.stderr


def test_a_marker_that_is_garbled_is_damage(memory_root):
    filled_root(memory_root, chunks=1)
    flip_byte(memory_root / "DEPOT", 20)
    result = run("stat", memory_root)
    assert result.returncode == 1
    assert "DEPOT" in result.stderr


def test_a_closed_pipe_ends_quietly(two_models):
    root, _, _ = two_models
    command = f"{sys.executable} -c 'from tokendepot.cli import main; main()' ls {root} --json | head -c 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.returncode in (0, 128 + signal.SIGPIPE)  # 0 when all was written before the reader left
    assert result.stderr == ""


# --- stat ---


@pytest.mark.parametrize("command", ["stat", "verify", "du"])
def test_damaged_files_are_named_whole_with_what_is_wrong_at_80_columns(memory_root, command):
    filled_root(memory_root, chunks=1)
    (memory_root / "policies").write_bytes(b"not policies")
    flip_byte(next((memory_root / "manifests").iterdir()), 3)
    journal = next((memory_root / "journals").glob("*.log"))
    flip_byte(journal, 60)
    result = run(command, memory_root)
    assert result.returncode == 1
    shown = "".join(result.stdout.split())
    if command == "stat":
        reason = tokendepot.inspect_policies(str(memory_root))["damage"]
        assert re.search(r"^ *policies\b", result.stdout, re.MULTILINE)
        assert all(word in shown for word in reason.split())
    for line in result.stdout.splitlines():
        assert "\u2026" not in line


def test_stat_shows_what_is_in_a_root(two_models):
    root, first, second = two_models
    text = run("stat", root).stdout
    for expected in ("format 1", "mapped on tmpfs", "11 extents", "test/model", first[:12], second[:12], "not live"):
        assert expected in text
    whole = run_json("stat", root)["roots"][0]
    assert {n["digest"]: n["extents"] for n in whole["namespaces"]} == {first: 8, second: 3}
    assert whole["live_bytes"] == sum(e["bytes"] for e in tokendepot.list_extents(str(root)))
    assert whole["damaged_files"] == [] and whole["foreign_files"] == []


def test_stat_names_the_manifest_fields_in_which_two_namespaces_differ(two_models):
    root, first, second = two_models
    text = run("stat", root).stdout
    assert "Manifest fields that differ" in text and "kv_dtype" in text and '"fp8"' in text
    assert run_json("stat", root)["roots"][0]["differences"] == {
        "kv_dtype": {first: '"bf16"', second: '"fp8"'},
        "groups[0].heads": {first: None, second: "2"},
    }


def test_weights_that_differ_behind_one_name_show_as_two_namespaces(memory_root):
    manifests = [json.dumps({"model": "served-name", "weights": f"sha256:{digit * 8}"}) for digit in "ab"]
    namespaces_of = [filled_root(memory_root, chunks=2, manifest=m)[0].hex() for m in manifests]
    differences = run_json("stat", memory_root)["roots"][0]["differences"]
    assert differences == {"weights": dict(zip(namespaces_of, ['"sha256:aaaaaaaa"', '"sha256:bbbbbbbb"']))}


def test_stat_tells_live_writers_from_dead_ones(memory_root):
    filled_root(memory_root, chunks=1)
    depot = Depot.open(config(memory_root))
    assert [j["in_use"] for j in run_json("stat", memory_root)["roots"][0]["journals"]] == [True]
    depot.close()
    assert [j["in_use"] for j in run_json("stat", memory_root)["roots"][0]["journals"]] == [False]


def test_stat_leaves_foreign_files_alone_and_says_so(two_models):
    root, _, _ = two_models
    names = ["notes.txt", "segments/x\x1b[31m.seg", "journals/old.log", "manifests/short.json"]
    for name in names:
        (root / name).write_text("mine")
    result = run("stat", root)
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    assert sorted(run_json("stat", root)["roots"][0]["foreign_files"]) == sorted(names)
    assert all((root / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("kind", ["journal", "manifest", "missing manifest"])
def test_stat_finds_damaged_files(two_models, kind):
    root, first, _ = two_models
    manifest = root / "manifests" / f"{first}.json"
    if kind == "journal":
        flip_byte(next((root / "journals").iterdir()), 128 * 2 + 50)
    elif kind == "manifest":
        flip_byte(manifest, 5)
    else:
        manifest.unlink()
    result = run("stat", root)
    assert result.returncode == 1
    assert "Damaged" in result.stdout
    damaged = run_json("stat", root, code=1)["roots"][0]["damaged_files"]
    assert [d["file"].split("/")[0] for d in damaged] == ["journals" if kind == "journal" else "manifests"]


# --- ls ---


def test_ls_lists_chunks_up_to_a_limit(two_models):
    root, _, _ = two_models
    text = run("ls", root, "--limit", "4").stdout
    assert "11 extents" in text and "7 more" in text
    assert len(re.findall(r"KiB", text)) == 4
    assert len(run_json("ls", root)["extents"]) == 11
    limited = run_json("ls", root, "--limit", "2")
    assert (limited["total"], len(limited["extents"])) == (11, 2)


def test_ls_keeps_to_one_namespace(two_models):
    root, first, second = two_models
    for prefix, count in ((first, 8), (second[:5], 3), (second[:20].upper(), 3)):
        assert run_json("ls", root, "--namespace", prefix)["total"] == count
    result = run("ls", root, "--namespace", "0" * 64)
    assert result.returncode == 2
    assert first[:16] in result.stderr
    assert run("ls", root, "--namespace", "../x").returncode == 2


# --- verify ---


def test_verify_of_a_sound_root_ends_with_0(two_models):
    root, _, _ = two_models
    result = run("verify", root)
    assert result.returncode == 0
    assert "11 extents" in result.stdout and "nothing is damaged" in result.stdout


def test_verify_finds_exactly_the_damaged_extent(root):
    namespace, keys, _ = filled_root(root, chunks=6)
    extent = damage(root, 3)
    result = run("verify", root)
    assert result.returncode == 1
    assert extent["key"].hex()[:12] in result.stdout
    damaged = run_json("verify", root, code=1)["damaged"]
    assert [(d["key"], d["segment"], d["offset"]) for d in damaged] == [
        (extent["key"].hex(), extent["segment"], extent["offset"])
    ]
    assert damaged[0]["reason"].startswith("corrupt: ")

    depot = Depot.open(config(root))
    cache = Cache(24)
    cache.lend_to(depot)
    done = load(depot, namespace, keys)
    depot.close()
    assert done["items_ok"] == 5
    assert [f[3] for f in done["failures"]] == ["corrupt"]


@pytest.mark.parametrize("where", ["header", "first page", "last byte"])
def test_verify_sees_a_flip_anywhere_in_an_extent(memory_root, where):
    filled_root(memory_root, chunks=2)
    extent = tokendepot.list_extents(str(memory_root))[1]
    offset = {"header": 40, "first page": 4096 + 7, "last byte": extent["bytes"] - 1}[where]
    flip_byte(memory_root / "segments" / (extent["segment"] + ".seg"), extent["offset"] + offset)
    damaged = run_json("verify", memory_root, code=1)["damaged"]
    assert [d["offset"] for d in damaged] == [extent["offset"]]


def test_verify_keeps_to_one_namespace(two_models):
    root, first, second = two_models
    broken = damage(root, 0)
    hit, clean = (first, second) if first.startswith(broken["namespace"]) else (second, first)
    assert run("verify", root, "--namespace", clean).returncode == 0
    assert run("verify", root, "--namespace", hit).returncode == 1


def test_verify_finds_a_truncated_segment(two_models):
    root, _, _ = two_models
    extent = tokendepot.list_extents(str(root))[-1]
    os.truncate(root / "segments" / (extent["segment"] + ".seg"), extent["offset"] + 100)
    assert extent["offset"] in [d["offset"] for d in run_json("verify", root, code=1)["damaged"]]


def test_verify_while_an_engine_stores_finds_nothing_wrong(memory_root):
    depot = Depot.open(config(memory_root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(16 * BLOCKS_PER_CHUNK, seed=2)
    cache.lend_to(depot)
    for round_number in range(4):
        keys = keys_of(namespace, 16, first_token=round_number * 100_000)
        assert store(depot, namespace, keys, job=round_number + 1)["items_ok"] == 16
        assert run_json("verify", memory_root)["damaged"] == []
    depot.close()


# --- rm ---


def test_removed_extents_are_a_miss_for_running_and_later_engines(two_models):
    root, first, second = two_models
    running = Depot.open(config(root))
    keys = keys_of(bytes.fromhex(first), 8)
    others = keys_of(bytes.fromhex(second), 3)
    assert running.longest_prefix(keys, [WANT]) == 8

    assert run_json("rm", root, "--namespace", first, "--yes")["removed"] == 8
    running.refresh()
    assert running.longest_prefix(keys, [WANT]) == 0
    assert running.longest_prefix(others, [WANT]) == 3
    running.close()
    later = Depot.open(config(root))
    assert later.longest_prefix(keys, [WANT]) == 0
    assert later.longest_prefix(others, [WANT]) == 3

    cache = Cache(32, seed=5)
    cache.lend_to(later)
    assert store(later, bytes.fromhex(first), keys)["items_ok"] == 8, "what was removed can be stored anew"
    assert later.longest_prefix(keys, [WANT]) == 8
    later.close()
    assert run_json("ls", root, "--namespace", first)["total"] == 8
    assert run("verify", root).returncode == 0


def test_rm_dry_run_changes_nothing(two_models):
    root, first, _ = two_models
    before = sorted((path.name, path.stat().st_size) for path in root.rglob("*"))
    assert "would remove 8 extents" in run("rm", root, "--namespace", first, "--dry-run").stdout
    assert run_json("rm", root, "--namespace", first, "--dry-run")["removed"] == 0
    assert sorted((path.name, path.stat().st_size) for path in root.rglob("*")) == before


def test_rm_asks_first_and_takes_no_for_an_answer(two_models):
    root, first, _ = two_models
    assert run("rm", root, "--namespace", first).returncode == 2, "nobody there to ask"
    assert run("rm", root, "--namespace", first, "--json").returncode == 2

    for answer, code, left in ((b"n\n", 3, 8), (b"y\n", 0, 0)):
        host, terminal = pty.openpty()
        command = [sys.executable, "-c", "from tokendepot.cli import main; main()", "rm", str(root), "--namespace", first]
        child = subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.write(host, answer)
        output, _ = child.communicate(timeout=60)
        os.close(host)
        os.close(terminal)
        assert child.returncode == code
        assert b"8 extents" in output
        assert run_json("ls", root, "--namespace", first)["total"] == left


# --- evict ---


def test_evict_frees_the_coldest_segments(memory_root):
    filled_root(memory_root, chunks=60)
    before = tokendepot.inspect_root(str(memory_root))
    sealed = sorted((s for s in before["segments"] if s["sealed"]), key=lambda s: (s["last_used"], s["segment"]))
    assert len(sealed) >= 3
    would = run_json("evict", memory_root, "--bytes", "1.5MiB", "--dry-run")
    assert (would["segments"], would["bytes"]) == (2, 2 << 20)
    assert tokendepot.inspect_root(str(memory_root))["segments"] == before["segments"]

    done = run_json("evict", memory_root, "--bytes", "1.5MiB")
    assert (done["segments"], done["bytes"], done["asked"], done["enough"]) == (2, 2 << 20, 3 << 19, True)
    left = {s["segment"] for s in tokendepot.inspect_root(str(memory_root))["segments"]}
    assert left == {s["segment"] for s in before["segments"]} - {s["segment"] for s in sealed[:2]}
    assert run("verify", memory_root).returncode == 0


def test_what_was_evicted_is_a_miss_and_never_wrong(root):
    namespace, keys, stored = filled_root(root, chunks=40)
    running = Depot.open(config(root))
    cache = Cache(40 * BLOCKS_PER_CHUNK)
    cache.lend_to(running)
    blocks = list(range(40 * BLOCKS_PER_CHUNK))
    old_plan = running.plan_load(namespace, keys, [(WANT, 0, BLOCKS_PER_CHUNK, blocks)], 10.0)
    evicted = run_json("evict", root, "--bytes", "1GiB", code=3)
    assert evicted["segments"] > 0

    running.submit_load(1, old_plan)
    done = []
    while not done:
        done = running.poll()
    failed = {chunk for _, chunk, _, _ in done[0]["failures"]}
    assert done[0]["items_ok"] + len(failed) == 40
    for chunk in set(range(40)) - failed:
        where = slice(chunk * BLOCKS_PER_CHUNK, (chunk + 1) * BLOCKS_PER_CHUNK)
        assert np.array_equal(cache.data[:, :, where], stored.data[:, :, where])

    running.refresh()
    kept = running.stored(keys, WANT)
    running.close()
    assert kept.count(1) == len(tokendepot.list_extents(str(root))) < 40


def test_evict_says_when_there_is_less_than_asked_for(memory_root):
    filled_root(memory_root, chunks=2)
    result = run("evict", memory_root, "--bytes", "1GiB")
    assert result.returncode == 3
    assert "evicted 0 segments" in result.stdout and "less than" in result.stdout and "open segments" in result.stdout
    told = run_json("evict", memory_root, "--bytes", "1GiB", "--dry-run", code=3)
    assert (told["asked"], told["bytes"], told["enough"]) == (1 << 30, 0, False)


def test_evict_gives_up_with_3_while_an_engine_makes_space(memory_root):
    filled_root(memory_root, chunks=30)
    with open(memory_root / "keeper.lock", "r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        result = run("evict", memory_root, "--bytes", "1MiB")
    assert result.returncode == 3
    assert "keeper.lock" in result.stderr
    assert run("evict", memory_root, "--bytes", "1MiB").returncode == 0


# --- pieces ---


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (1023 << 20, "1.0 GiB"), (3 << 39, "1.5 TiB")],
)
def test_sizes_read_well(count, text):
    assert show.size(count) == text


def test_text_of_others_cannot_steer_the_terminal():
    assert show.clean("a\x1b[31mb\nc\x00é") == "a\\x1b[31mb\\x0ac\\x00é"


def test_long_work_shows_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    from io import StringIO

    from rich.console import Console

    monkeypatch.setattr(show, "PATIENCE_S", 0.0)
    for terminal in (True, False):
        text = StringIO()
        monkeypatch.setattr(show, "err", Console(file=text, force_terminal=terminal, width=80))
        with show.progress_of_bytes("verifying", 4 << 20) as advance:
            advance(1 << 20)
            advance(3 << 20)
        assert "verifying" in text.getvalue()
        assert ("1.0 MiB of 4.0 MiB" in text.getvalue()) != terminal


def test_quick_work_shows_nothing(capsys):
    with show.progress_of_bytes("verifying", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""


def test_an_interrupt_ends_without_a_traceback(two_models):
    root, _, _ = two_models
    program = (
        "import os, signal, tokendepot._core as c\n"
        "def stop(*_): os.kill(os.getpid(), signal.SIGINT)\n"
        "c.verify_extents = stop\n"
        "from tokendepot.cli import main\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", program, "verify", str(root)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 128 + signal.SIGINT
    assert "Traceback" not in result.stderr


def test_flattened_manifests_keep_every_value():
    assert namespaces.flatten({"a": {"b": [1, {"c": None}]}, "d": [], "e": "x"}) == {
        "a.b[0]": "1",
        "a.b[1].c": "null",
        "d": "[]",
        "e": '"x"',
    }
