"""Every command on a root with damage in it, with an engine that has it open and without: one that says what it found, and leaves
what is whole as it is."""

import json

import numpy as np
import pytest
from command_line import call, flip_byte
from paged import BLOCKS_PER_CHUNK, MANIFEST, WANT, Cache, config, filled_root, load
from test_compatibility import COMMANDS

from tokendepot import Depot

CHUNKS = 24
RECORD_BYTES = 128
# Has tests of its own, for it serves until it is ended, or wants another directory.
ELSEWHERE = {"events", "replay", "bench"}


def record_of_a_journal(root):
    flip_byte(max((root / "journals").iterdir(), key=lambda file: file.stat().st_size), 6 * RECORD_BYTES + 40)


def second_half_of_a_segment(root):
    segment = max((root / "segments").iterdir(), key=lambda file: file.stat().st_mtime)
    with open(segment, "r+b") as file:
        file.truncate(segment.stat().st_size // 2)


def byte_of_an_extent(root):
    for segment in (root / "segments").iterdir():
        flip_byte(segment, 9000)


def manifest(root):
    flip_byte(next((root / "manifests").iterdir()), 10)


@pytest.mark.parametrize("engine", ["open", "closed"])
@pytest.mark.parametrize("damage", [record_of_a_journal, second_half_of_a_segment, byte_of_an_extent, manifest])
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - ELSEWHERE))
def test_a_command_on_a_damaged_root_ends_in_words_and_nothing_wrong_is_served(memory_root, tmp_path, command, damage, engine):
    namespace, keys, stored = filled_root(memory_root, chunks=CHUNKS)
    export, prompt = tmp_path / "export", tmp_path / "prompt"
    assert call("export", memory_root, "--namespace", namespace.hex()[:12], "--out", export).returncode == 0
    prompt.write_text(json.dumps(list(range(64))))
    running = Depot.open(config(memory_root)) if engine == "open" else None
    damage(memory_root)
    places = {"ROOT": memory_root, "FILE": export, "PROMPT": prompt, "FRESH": tmp_path / "fresh", "0": namespace.hex()}
    done = call(command, *(places.get(text, text) for text in COMMANDS[command]))
    # 0: done; 1: it found damage, or nothing that it could do; 2: what it was to work on is not there any more; 3: done in part.
    assert done.returncode in (0, 1, 2, 3), done.stderr
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
    assert done.stdout or done.stderr
    if running is not None:
        running.close()
    depot = Depot.open(config(memory_root))
    depot.register_namespace(MANIFEST)
    cache = Cache(CHUNKS * BLOCKS_PER_CHUNK)
    cache.lend_to(depot)
    for chunk in range(CHUNKS):
        key = keys[32 * chunk : 32 * (chunk + 1)]
        if not depot.longest_prefix(key, [WANT]):
            continue
        first = chunk * BLOCKS_PER_CHUNK
        if load(depot, namespace, key, job=chunk + 1, first_block=first)["items_ok"]:
            blocks = np.s_[:, :, first : first + BLOCKS_PER_CHUNK]
            assert (cache.data[blocks] == stored.data[blocks]).all(), chunk
    depot.close()
