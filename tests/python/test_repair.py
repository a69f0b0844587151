"""repair: roots that lost journals, marker or manifests, and what it must leave alone."""

import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys

import pytest
from command_line import call, call_as_nobody, call_json, flip_byte
from paged import BLOCKS_PER_CHUNK, MANIFEST, WANT, Cache, config, filled_root, keys_of, split, store

import tokendepot
from tokendepot import Depot

CHUNKS = 40  # three segments, the last of them half filled
RECORD = 128


@pytest.fixture
def damaged(memory_root):
    """(root, keys of its prompt); the test does the damage."""
    _, keys, _ = filled_root(memory_root, CHUNKS)
    return memory_root, keys


def extents(root):
    return {(e["key"], e["segment"], e["offset"], e["bytes"], e["group"], e["part"], e["tokens"]) for e in tokendepot.list_extents(str(root))}


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def journal(root):
    (only,) = (root / "journals").glob("*.log")
    return only


def chunks_an_engine_finds(root, *prompts):
    """Of each prompt the longest prefix, added up."""
    depot = Depot.open(config(root), catalog=True, writer=False)
    found = sum(depot.longest_prefix(keys, [WANT]) for keys in prompts)
    depot.close()
    return found


def repaired(root, *arguments, code=0):
    """Says first what it would do and changes nothing, does it, and has nothing left to do."""
    before = content(root)
    said = call_json("repair", root, *arguments, code=1)
    assert content(root) == before
    done = call_json("repair", root, "--apply", *arguments, code=code)
    for ours in (said, done):
        del ours["applied"]
    assert done == said
    after = content(root)
    again = call_json("repair", root, "--apply", *arguments, code=code)
    assert again["nothing_to_do"] and content(root) == after
    assert {name: data for name, data in after.items() if name.startswith("segments/")} == {
        name: data for name, data in before.items() if name.startswith("segments/")
    }
    return said


def test_a_sound_root_has_nothing_to_repair(damaged):
    root, _ = damaged
    before = content(root)
    for mode in ("--dry-run", "--apply"):
        report = call_json("repair", root, mode)
        assert report["nothing_to_do"] and report["left"] == []
    assert content(root) == before


def test_deleted_journals_are_rebuilt_from_segments(damaged):
    root, keys = damaged
    before = extents(root)
    journal(root).unlink()
    assert chunks_an_engine_finds(root, keys) == 0
    assert sum(s["extents"] for s in repaired(root)["segments"]) == CHUNKS
    assert extents(root) == before
    assert chunks_an_engine_finds(root, keys) == CHUNKS
    assert all(s["sealed"] for s in tokendepot.inspect_root(str(root))["segments"] if s["extents"])
    assert call("verify", root).returncode == 0


def test_a_journal_cut_short_is_completed(damaged):
    root, keys = damaged
    before = extents(root)
    os.truncate(journal(root), 10 * RECORD + 50)
    # Whichever chunks were acknowledged first: not always the prompt's first ones.
    found = chunks_an_engine_finds(root, *split(keys))
    assert 0 < found == len(extents(root)) < CHUNKS
    assert repaired(root)["journals"][0]["bad_records"] == 1
    assert extents(root) == before
    assert call("verify", root).returncode == 0


@pytest.mark.parametrize("record", [0, 5, 20])
def test_a_flipped_record_in_the_middle_comes_back(damaged, record):
    root, keys = damaged
    before = extents(root)
    flip_byte(journal(root), record * RECORD + 60)
    report = repaired(root)
    assert [j["bad_records"] for j in report["journals"]] == [1]
    assert extents(root) == before
    assert chunks_an_engine_finds(root, keys) == CHUNKS
    assert call("verify", root).returncode == 0


def test_what_was_removed_stays_removed(damaged):
    root, keys = damaged
    gone = tokendepot.list_extents(str(root))[7:9]
    tokendepot.remove_extents(str(root), gone)
    before = extents(root)
    assert len(before) == CHUNKS - 2
    largest = max((root / "journals").glob("*.log"), key=lambda p: p.stat().st_size)
    largest.unlink()
    assert sum(s["extents"] for s in repaired(root)["segments"]) == CHUNKS - 2
    assert extents(root) == before


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_lost_marker_is_written_anew(damaged, how):
    root, keys = damaged
    if how == "missing":
        (root / "DEPOT").unlink()
    else:
        flip_byte(root / "DEPOT", 20)
    assert call("stat", root).returncode in (1, 2)
    assert repaired(root)["marker"] == how
    assert chunks_an_engine_finds(root, keys) == CHUNKS
    assert call("verify", root).returncode == 0


def test_marker_and_journals_lost_together_come_back(damaged):
    root, keys = damaged
    before = extents(root)
    (root / "DEPOT").unlink()
    shutil.rmtree(root / "journals")
    repaired(root)
    assert extents(root) == before


def test_a_lost_manifest_is_found_in_another_root(damaged, tmp_path):
    root, _ = damaged
    filled_root(tmp_path / "other", 1)
    (manifest,) = (root / "manifests").iterdir()
    text = manifest.read_bytes()
    manifest.unlink()
    lost = call_json("repair", root, "--apply", code=1)
    assert lost["lost_manifests"] == [manifest.stem] and not manifest.exists()
    assert repaired(root, "--from", tmp_path / "other")["manifests"] == [manifest.stem]
    assert manifest.read_bytes() == text


def test_a_manifest_under_a_wrong_name_proves_itself(damaged):
    root, _ = damaged
    (manifest,) = (root / "manifests").iterdir()
    text = manifest.read_bytes()
    manifest.rename(root / "manifests" / "copy.json")
    assert repaired(root)["manifests"] == [manifest.stem]
    assert manifest.read_bytes() == text and (root / "manifests" / "copy.json").exists()


def test_foreign_files_are_left_alone_and_named(damaged):
    root, _ = damaged
    journal(root).unlink()
    for name in ("journals/notes.txt", "segments/0123.seg", "segments/link.seg", "manifests/readme", "mine"):
        (root / name).write_text("mine")
    left = {item["file"] for item in repaired(root)["left"]}
    assert left == {"journals/notes.txt", "segments/0123.seg", "segments/link.seg", "manifests/readme"}
    for name in left | {"mine"}:
        assert (root / name).read_text() == "mine"


def test_a_torn_extent_at_a_segments_end_stays_out(damaged):
    root, _ = damaged
    last = max(tokendepot.list_extents(str(root)), key=lambda e: (e["segment"], e["offset"]))
    flip_byte(root / "segments" / (last["segment"] + ".seg"), last["offset"] + last["bytes"] - 1)
    journal(root).unlink()
    report = repaired(root)
    assert report["damaged_extents"] == 1 and sum(s["extents"] for s in report["segments"]) == CHUNKS - 1
    assert set(tokendepot.verify_extents(str(root), tokendepot.list_extents(str(root)))) == {"ok"}


def test_a_segment_cut_short_gives_what_is_left_of_it(damaged):
    root, _ = damaged
    victim = sorted(tokendepot.list_extents(str(root)), key=lambda e: (e["segment"], e["offset"]))[5]
    os.truncate(root / "segments" / (victim["segment"] + ".seg"), victim["offset"] + victim["bytes"] - 4096)
    journal(root).unlink()
    assert 5 <= sum(s["extents"] for s in repaired(root)["segments"]) < CHUNKS
    assert set(tokendepot.verify_extents(str(root), tokendepot.list_extents(str(root)))) == {"ok"}


def test_a_damaged_header_hides_that_extent_alone(damaged):
    root, _ = damaged
    victim = tokendepot.list_extents(str(root))[4]
    flip_byte(root / "segments" / (victim["segment"] + ".seg"), victim["offset"] + 30)
    journal(root).unlink()
    assert sum(s["extents"] for s in repaired(root)["segments"]) == CHUNKS - 1


# --- beside engines, and killed ---


def test_beside_an_engine_only_what_it_does_not_fill_is_repaired(memory_root):
    root = memory_root
    _, keys, _ = filled_root(root, CHUNKS)
    dead = journal(root)
    depot = Depot.open(config(root))  # takes over the dead writer's journal
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(8 * BLOCKS_PER_CHUNK, seed=1)
    cache.lend_to(depot)
    more = keys_of(namespace, 8, first_token=50_000)
    store(depot, namespace, more)
    records = dead.read_bytes()
    put = next(i for i in range(len(records) // RECORD) if records[i * RECORD + 6] == 1)  # of the first segment, sealed
    flip_byte(dead, put * RECORD + 60)
    before = dead.read_bytes()
    report = call_json("repair", root, "--apply")
    assert [s["extents"] for s in report["segments"]] == [1]
    assert dead.read_bytes() == before
    assert "a running engine fills it" in {item["why"] for item in report["left"]}
    store(depot, namespace, keys_of(namespace, 8, first_token=90_000), job=9)
    depot.refresh()
    assert depot.longest_prefix(keys, [WANT]) == CHUNKS and depot.longest_prefix(more, [WANT]) == 8
    depot.close()
    assert len(extents(root)) == CHUNKS + 16


def test_a_running_engine_sees_rebuilt_journals(damaged):
    root, keys = damaged
    journal(root).unlink()
    depot = Depot.open(config(root), catalog=True, writer=False)
    assert depot.longest_prefix(keys, [WANT]) == 0
    assert call("repair", root, "--apply").returncode == 0
    depot.refresh()
    assert depot.longest_prefix(keys, [WANT]) == CHUNKS
    depot.close()


REPAIR = "import sys; from tokendepot import _core; _core.repair_root(sys.argv[1], [], True, lambda done, total: None)"


def can_be_traced():
    return shutil.which("strace") is not None and subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_be_traced(), reason="needs strace, which kills it at a system call")
@pytest.mark.parametrize(
    ("call_name", "number"),
    [("pwrite64", 1), ("pwrite64", 2), ("pwrite64", 3), ("link", 1), ("rename", 1), ("fdatasync", 2), ("unlink", 1), ("unlink", 2)],
)
def test_killed_in_its_middle_it_is_completed_by_the_next(damaged, call_name, number):
    root, keys = damaged
    before = extents(root)
    flip_byte(journal(root), 5 * RECORD + 60)
    (root / "DEPOT").unlink()
    (manifest,) = (root / "manifests").iterdir()
    manifest.rename(root / "manifests" / "copy.json")
    command = [
        "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call_name}",
        "-e", f"inject={call_name}:signal=KILL:when={number}", sys.executable, "-c", REPAIR, str(root),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, timeout=60)
    assert result.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), result.stderr
    call("repair", root, "--apply")
    assert call_json("repair", root)["nothing_to_do"]
    assert extents(root) == before and manifest.exists()
    assert chunks_an_engine_finds(root, keys) == CHUNKS
    assert call("verify", root).returncode == 0


# --- refused ---


def refused(*arguments):
    result = call("repair", *arguments)
    assert result.returncode == 2 and result.stdout == ""
    return " ".join(result.stderr.replace("\u2502", " ").split())


def test_directories_that_are_no_depot_are_refused_and_stay_as_they_are(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "0123456789abcdef-00000000.seg").write_bytes(b"x" * 8192)
    before = content(tmp_path)
    for arguments in ((tmp_path, "--apply"), (tmp_path,), (tmp_path / "missing", "--apply"), ("/etc/hostname",)):
        assert refused(*arguments)
    assert "--frobnicate" in refused(tmp_path, "--frobnicate")
    assert content(tmp_path) == before


def test_a_version_from_the_future_is_refused_and_stays_as_it_is(damaged):
    root, _ = damaged
    page = bytearray((root / "DEPOT").read_bytes())
    page[8:12] = struct.pack("<I", 2)
    (root / "DEPOT").write_bytes(page)
    journal(root).unlink()
    before = content(root)
    assert "version 2" in refused(root, "--apply")
    assert content(root) == before


def test_without_permission_it_ends_with_2(damaged):
    root, _ = damaged
    os.chmod(root, 0o755)
    os.chmod(pathlib.Path(root).parent, 0o755)
    code, stderr = call_as_nobody("repair", root, "--apply")
    assert code == 2 and "ermission" in stderr
