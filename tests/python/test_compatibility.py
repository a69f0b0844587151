"""Roots of other packages: an old one is served as it is, one from the future is refused by everything, untouched."""

import ctypes
import hashlib
import json
import pathlib
import struct
import sys
import tarfile

import numpy as np
import pytest
from command_line import call, call_json
from paged import BLOCKS_PER_CHUNK, WANT, Cache, config, filled_root, keys_of, load, split, store

from tokendepot import Depot, DepotError, list_extents

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "golden"))

from golden import ARCHIVE, CHUNKS, MANIFEST, PROMPTS, REMOVED, pattern, write  # noqa: E402 found by the line above

ARCHIVE_SHA256 = "989fcdfc5455487671b371d655db4c035552620159037ab471497e419eead050"


@pytest.fixture
def golden(root):
    """What the first package left, unpacked."""
    assert hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == ARCHIVE_SHA256, "it is never written anew"
    root.mkdir(mode=0o700)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root)
    return root


def content(root):
    """Every file with its bytes and times, but for the count of who held the keeper's lock."""
    files = sorted(path for path in root.rglob("*") if path.name != "keeper.lock")
    return [(path, path.stat().st_mtime_ns, path.is_file() and hashlib.sha256(path.read_bytes()).digest()) for path in files]


def assert_served(depot, namespace, prompt):
    """All of a golden prompt but what was removed from it comes back byte for byte."""
    first_token, chunks, owner = PROMPTS[prompt]
    keys = split(keys_of(namespace, chunks, first_token, **owner))
    held = [number for number in range(chunks) if (prompt, number) != (0, REMOVED)]
    assert depot.stored(b"".join(keys), WANT) == bytes(number in held for number in range(chunks))
    cache = Cache(CHUNKS * BLOCKS_PER_CHUNK)
    cache.lend_to(depot)
    expected = pattern(prompt).data
    for first, last in ((0, REMOVED), (REMOVED + 1, chunks)) if prompt == 0 else ((0, chunks),):
        wanted = b"".join(keys[first:last])
        blocks = slice(first * BLOCKS_PER_CHUNK, last * BLOCKS_PER_CHUNK)
        done = load(depot, namespace, wanted, job=first + 10, first_block=blocks.start)
        assert (done["items_ok"], done["failures"]) == (last - first, [])
        assert np.array_equal(cache.data[:, :, blocks], expected[:, :, blocks])


# --- old roots ---


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
@pytest.mark.parametrize("read_only", [False, True])
def test_a_root_of_the_first_package_is_served_byte_for_byte(golden, prompt, read_only):
    before = content(golden)
    options = json.loads(config(golden))
    options["roots"][0]["read_only"] = read_only
    depot = Depot.open(json.dumps(options))
    assert_served(depot, depot.register_namespace(MANIFEST), prompt)
    assert depot.stats()["bad_records"] == 0
    depot.close()
    if read_only:
        assert content(golden) == before


def test_a_root_of_the_first_package_is_whole_for_the_tools(golden):
    chunks = sum(chunks for _, chunks, _ in PROMPTS) - 1
    before = content(golden)
    found = call_json("stat", golden)["roots"][0]
    assert (found["format_version"], found["extents"], found["damaged_files"], found["foreign_files"]) == (1, chunks, [], [])
    assert call_json("verify", golden)["damaged"] == []
    assert call("repair", golden).returncode == 0
    assert content(golden) == before


def test_a_root_of_the_first_package_is_filled_on(golden):
    depot = Depot.open(config(golden))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(8 * BLOCKS_PER_CHUNK, seed=5)
    cache.lend_to(depot)
    keys = keys_of(namespace, 8, first_token=90_000)
    assert store(depot, namespace, keys)["items_ok"] == 8
    depot.close()
    for prompt in range(len(PROMPTS)):
        depot = Depot.open(config(golden))
        assert depot.longest_prefix(keys, [WANT]) == 8
        assert_served(depot, namespace, prompt)
        depot.close()


# --- this package's roots, for the first one ---

# What differs from one writing to the next: ids, places, times, and digests over them.
MARKER_HOLES = ((16, 40), (4088, 4096))
EXTENT_HOLES = ((80, 92), (96, 104), (128, 136), (168, 176))
RECORD_HOLES = ((8, 36), (40, 48), (64, 72), (120, 128))
CAUSE = (56, 64)  # of a condemnation: the first package wrote 0 there and does not look at it
CONDEMNATIONS = (3, 4)


def without(data, *holes):
    left = bytearray(data)
    for begin, end in holes:
        left[begin:end] = bytes(end - begin)
    return bytes(left)


def written(root):
    """File or kind of thing -> what is in it, but for the holes."""
    records = []
    for journal in (root / "journals").iterdir():
        data = journal.read_bytes()
        for record in (data[at : at + 128] for at in range(0, len(data), 128)):
            records.append(without(record, *RECORD_HOLES, *[CAUSE] * (record[6] in CONDEMNATIONS)))
    extents = []
    for extent in list_extents(str(root)):
        with open(root / "segments" / (extent["segment"] + ".seg"), "rb") as segment:
            segment.seek(extent["offset"])
            extents.append(without(segment.read(extent["bytes"]), *EXTENT_HOLES))
    manifests = {f"manifest {path.name}": path.read_bytes() for path in (root / "manifests").iterdir()}
    return manifests | {
        "files": sorted({path.relative_to(root).parts[0] for path in root.rglob("*")}),
        "marker": without((root / "DEPOT").read_bytes(), *MARKER_HOLES),
        "records": sorted(records),
        "extents": sorted(extents),
    }


def test_what_is_written_is_what_the_first_package_wrote_byte_for_byte(golden, tmp_path):
    """So the first package reads it. What changes here needs a new format version, and a root of that one beside the golden."""
    write(tmp_path / "new")
    now, then = written(tmp_path / "new"), written(golden)
    assert len(then["records"]) > 20 and len(then["extents"]) > 20
    assert [what for what in now.keys() | then.keys() if now.get(what) != then.get(what)] == []


# --- roots from the future ---


def xxh3(data):
    function = ctypes.CDLL("libxxhash.so.0").XXH3_64bits
    function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_size_t), ctypes.c_uint64
    return function(data, len(data))


def marker_of_a_later_version(root):
    page = bytearray((root / "DEPOT").read_bytes())
    assert page[4088:] == struct.pack("<Q", xxh3(bytes(page[:4088])))
    page[8:12] = struct.pack("<I", 2)
    page[4088:] = struct.pack("<Q", xxh3(bytes(page[:4088])))
    (root / "DEPOT").write_bytes(page)


def journal_of_a_later_version(root):
    """One record in the middle, as a later package may have appended it."""
    journal = max((root / "journals").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(journal.read_bytes())
    record = data[128:256]
    assert record[120:] == struct.pack("<Q", xxh3(bytes(record[:120])))
    record[4:6] = struct.pack("<H", 2)
    record[120:] = struct.pack("<Q", xxh3(bytes(record[:120])))
    data[128:256] = record
    journal.write_bytes(data)


LATER = {"marker": marker_of_a_later_version, "journal": journal_of_a_later_version}
# Command -> arguments; FILE is an export file, PROMPT one of token ids, FRESH a directory that is not there.
COMMANDS = {
    "stat": ["ROOT"],
    "ls": ["ROOT"],
    "du": ["ROOT"],
    "verify": ["ROOT"],
    "scrub": ["ROOT"],
    "evict": ["ROOT", "--bytes", "1MiB"],
    "pin": ["ROOT", "--namespace", "0"],
    "unpin": ["ROOT", "--namespace", "0"],
    "ttl": ["ROOT", "1h"],
    "quota": ["ROOT", "1MiB", "--namespace", "0"],
    "rm": ["ROOT", "--namespace", "0", "--yes"],
    "export": ["ROOT", "--namespace", "0", "--out", "FRESH"],
    "import": ["FILE", "ROOT", "--capacity", "16MiB"],
    "explain": ["PROMPT", "ROOT"],
    "repair": ["ROOT", "--apply"],
    "doctor": ["ROOT"],
    "top": ["ROOT", "--once"],
    "events": ["ROOT", "--endpoint", "tcp://127.0.0.1:0"],
    "metrics": ["ROOT", "--once"],
    "replay": ["TRACE", "--root", "ROOT"],
    "bench": ["io", "ROOT"],
}
WANT_ANOTHER_DIRECTORY = {"replay": "directory that is empty", "bench": "is the root of a depot"}  # of any version
WITHOUT_ROOTS = {"plan", "report", "version"}


def test_every_command_is_tried_on_a_root_from_the_future():
    import typer.main

    from tokendepot.cli.commands import app

    assert COMMANDS.keys() | WITHOUT_ROOTS == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize(
    ("command", "what"),
    # ttl reads no journals; events changes nothing and tells of the other journals.
    [(command, what) for command in COMMANDS for what in LATER if (what, command) not in (("journal", "ttl"), ("journal", "events"))],
)
def test_a_root_from_the_future_is_refused_in_one_sentence_and_not_touched(memory_root, tmp_path, command, what):
    namespace, _, _ = filled_root(memory_root, chunks=2)
    export, prompt = tmp_path / "export", tmp_path / "prompt"
    assert call("export", memory_root, "--namespace", namespace.hex()[:12], "--out", export).returncode == 0
    prompt.write_text(json.dumps(list(range(64))))
    LATER[what](memory_root)
    before = content(memory_root)
    places = {"ROOT": memory_root, "FILE": export, "PROMPT": prompt, "FRESH": tmp_path / "fresh"}
    places["TRACE"] = pathlib.Path(__file__).resolve().parents[1] / "traces/synthetic_trace.jsonl.gz"
    result = call(command, *(places.get(text, text) for text in COMMANDS[command]))
    said = " ".join((result.stderr + (result.stdout if command == "doctor" else "")).split())
    assert result.returncode == (1 if command == "doctor" else 2), said
    expected = [WANT_ANOTHER_DIRECTORY[command]] if command in WANT_ANOTHER_DIRECTORY else ["version 2", "version 1"]
    assert all(words in said for words in expected) and "Traceback" not in said
    assert content(memory_root) == before and not places["FRESH"].exists()


@pytest.mark.parametrize("what", LATER)
def test_an_engine_refuses_a_root_from_the_future_and_does_not_touch_it(root, what):
    filled_root(root, chunks=2)
    LATER[what](root)
    before = content(root)
    with pytest.raises(DepotError, match="version 2.*version 1") as refused:
        Depot.open(config(root))
    assert refused.value.kind == "unsupported"
    assert content(root) == before


def test_extents_from_the_future_are_misses_and_stay_as_they_are(memory_root):
    namespace, keys, stored = filled_root(memory_root, chunks=3)
    extents = {extent["key"]: extent for extent in list_extents(str(memory_root))}
    middle = extents[split(keys)[1]]
    file = memory_root / "segments" / (middle["segment"] + ".seg")
    with open(file, "r+b") as segment:
        segment.seek(middle["offset"])
        header = bytearray(segment.read(4096))
        header[8:12] = struct.pack("<I", 2)
        segment.seek(middle["offset"])
        segment.write(header)
    before = file.read_bytes()
    depot = Depot.open(config(memory_root))
    cache = Cache(3 * BLOCKS_PER_CHUNK)
    cache.lend_to(depot)
    done = load(depot, namespace, keys)
    assert done["items_ok"] == 2
    assert depot.stats()["load"]["failures"]["mismatch"] == 1
    depot.close()
    first_and_last = np.r_[0:BLOCKS_PER_CHUNK, 2 * BLOCKS_PER_CHUNK : 3 * BLOCKS_PER_CHUNK]
    assert np.array_equal(cache.data[:, :, first_and_last], stored.data[:, :, first_and_last])
    assert not cache.data[:, :, BLOCKS_PER_CHUNK : 2 * BLOCKS_PER_CHUNK].any()
    assert file.read_bytes() == before
