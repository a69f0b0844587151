"""explain: where the chunks of a prompt are, and why the first missing one is missing."""

import json
import os
import shutil

import pytest
from command_line import call, call_as_nobody, call_json, flip_byte, run
from paged import BLOCKS_PER_CHUNK, CHUNK_TOKENS, MANIFEST, Cache, config, filled_root, keys_of, range_of, split, store

import tokendepot
from tokendepot import Depot

CHUNKS = 6


@pytest.fixture
def filled(memory_root):
    """(root, namespace as hex, keys, file of the prompt's token ids)"""
    namespace, keys, _ = filled_root(memory_root, CHUNKS)
    prompt = memory_root.parent / "prompt"
    prompt.write_text(json.dumps(range_of(0, CHUNKS * CHUNK_TOKENS + 5)))
    return memory_root, namespace.hex(), keys, prompt


def prompt_of(directory, first, count):
    file = directory / f"prompt-{first}-{count}"
    file.write_text(" ".join(map(str, range_of(first, count))))
    return file


def reasons(report, group=0):
    return " | ".join(report["groups"][group]["reasons"])


def test_a_prompt_that_is_all_there_is_shown_with_its_places(filled):
    root, namespace, keys, prompt = filled
    report = call_json("explain", prompt, root)
    assert report["namespace"] == namespace and report["chunk_tokens"] == CHUNK_TOKENS
    assert report["usable_chunks"] == report["chunks"] == CHUNKS
    known = {e["key"].hex(): e for e in tokendepot.list_extents(str(root))}
    assert [e["key"] for e in report["extents"]] == [key.hex() for key in split(keys)]
    for e in report["extents"]:
        assert (e["segment"], e["offset"]) == (known[e["key"]]["segment"], known[e["key"]]["offset"])
        assert e["root"] == str(root) and e["stored_at"] > 0
    shown = call("explain", prompt, root)
    assert shown.returncode == 0 and "all there" in shown.stdout


def test_what_was_never_stored_is_told_as_such(filled):
    root, _, _, _ = filled
    report = call_json("explain", prompt_of(root.parent, 0, 9 * CHUNK_TOKENS), root, code=1)
    assert (report["usable_chunks"], report["groups"][0]["first_missing"]) == (CHUNKS, CHUNKS)
    assert "never stored here" in reasons(report) and "evicted from" not in reasons(report)


def test_a_prompt_that_differs_in_its_first_token_has_nothing(filled):
    root, _, _, _ = filled
    report = call_json("explain", prompt_of(root.parent, 1, CHUNKS * CHUNK_TOKENS), root, code=1)
    assert report["usable_chunks"] == 0 and report["extents"] == []


def test_eviction_is_told_with_its_time(memory_root):
    namespace, keys, _ = filled_root(memory_root, 40)
    assert call("evict", memory_root, "--bytes", "1").returncode == 0
    report = call_json("explain", prompt_of(memory_root.parent, 0, 40 * CHUNK_TOKENS), memory_root, code=1)
    assert report["usable_chunks"] == 0 and f"evicted from {memory_root} at 20" in reasons(report)


def test_removal_is_told_with_its_time(filled):
    root, _, keys, prompt = filled
    third = [e for e in tokendepot.list_extents(str(root)) if e["key"] == split(keys)[2]]
    tokendepot.remove_extents(str(root), third)
    report = call_json("explain", prompt, root, code=1)
    assert report["usable_chunks"] == 2 and f"removed from {root}" in reasons(report)
    assert len(report["extents"]) == CHUNKS - 1


def test_a_segment_file_that_is_gone_is_told(memory_root):
    filled_root(memory_root, 40)
    first = min((memory_root / "segments").iterdir())
    first.unlink()
    report = call_json("explain", prompt_of(memory_root.parent, 0, 40 * CHUNK_TOKENS), memory_root, code=1)
    assert report["usable_chunks"] == 0 and f"{first.stem} is gone from" in reasons(report)


def test_damage_is_seen_with_verify_only(filled):
    root, _, keys, prompt = filled
    hit = next(e for e in tokendepot.list_extents(str(root)) if e["key"] == split(keys)[3])
    flip_byte(root / "segments" / (hit["segment"] + ".seg"), hit["offset"] + hit["bytes"] - 1)
    assert call_json("explain", prompt, root)["usable_chunks"] == CHUNKS
    report = call_json("explain", prompt, root, "--verify", code=1)
    assert report["usable_chunks"] == 3 and "damaged in" in reasons(report)
    assert [bool(e["damaged"]) for e in report["extents"]] == [i == 3 for i in range(CHUNKS)]


def test_what_is_left_of_a_prompt_says_in_which_namespace_its_front_was_evicted(memory_root):
    root, prompt = memory_root, prompt_of(memory_root.parent, 0, CHUNKS * CHUNK_TOKENS)
    namespace, keys, _ = filled_root(root, CHUNKS, manifest=json.dumps({"model": "m", "chunk_tokens": CHUNK_TOKENS}))
    namespace = namespace.hex()
    filled_root(root, 3 * CHUNKS, manifest='{"model":"another"}', first_token=90_000)
    gone = [e for e in tokendepot.list_extents(str(root)) if e["key"] in split(keys)[:2]]
    tokendepot.remove_extents(str(root), gone)
    report = call_json("explain", prompt, root, code=1)
    assert (report["namespace"], report["usable_chunks"]) == (namespace, 0)
    assert f"removed from {root}" in reasons(report) and "never stored" not in reasons(report)
    tokendepot.remove_extents(str(root), [e for e in tokendepot.list_extents(str(root)) if e["key"] in split(keys)])
    report = call_json("explain", prompt, root, code=1)
    assert report["namespace"] == namespace and "never stored" not in reasons(report)


@pytest.mark.parametrize("groups", [[{"layout": "canonical", "layers": 2, "heads": 2, "tokens": CHUNK_TOKENS, "window": 0, "attention": "full"}], None])
def test_a_root_whose_only_namespace_lost_everything_still_says_when(memory_root, groups):
    stated = {"model": "m", "chunk_tokens": CHUNK_TOKENS, **({"groups": groups} if groups else {})}
    filled_root(memory_root, 3, manifest=json.dumps(stated))
    tokendepot.remove_extents(str(memory_root), tokendepot.list_extents(str(memory_root)))
    report = call_json("explain", prompt_of(memory_root.parent, 0, 3 * CHUNK_TOKENS), memory_root, code=1)
    assert report["chunks"] == 3 and f"removed from {memory_root}" in reasons(report)


def test_where_nothing_tells_how_long_a_chunk_was_that_is_said(filled):
    root, _, _, prompt = filled
    tokendepot.remove_extents(str(root), tokendepot.list_extents(str(root)))
    result = call("explain", prompt, root)
    assert result.returncode == 2 and "how long a chunk" in result.stderr


def test_a_namespace_of_lmcache_is_refused_and_does_not_hide_others(memory_root):
    lmcache = filled_root(memory_root, 3, manifest='{"engine":"lmcache","model":"m","kv_rank":1}', first_token=90_000)[0].hex()
    prompt = prompt_of(memory_root.parent, 0, 3 * CHUNK_TOKENS)
    refused = call("explain", prompt, memory_root)
    assert refused.returncode == 2 and refused.stdout == "" and "cannot be made from a prompt" in refused.stderr
    filled_root(memory_root, 3)
    assert call_json("explain", prompt, memory_root)["usable_chunks"] == 3
    named = call("explain", prompt, memory_root, "--namespace", lmcache[:10])
    assert named.returncode == 2 and "cannot be made from a prompt" in named.stderr


def test_a_sound_copy_in_another_root_makes_up_for_damage(filled, tmp_path):
    root, namespace, keys, prompt = filled
    assert call("export", root, "--namespace", namespace, "--out", tmp_path / "file").returncode == 0
    assert call("import", tmp_path / "file", tmp_path / "copy", "--capacity", "16MiB", "--create").returncode == 0
    hit = next(e for e in tokendepot.list_extents(str(root)) if e["key"] == split(keys)[3])
    flip_byte(root / "segments" / (hit["segment"] + ".seg"), hit["offset"] + hit["bytes"] - 1)
    report = call_json("explain", prompt, root, tmp_path / "copy", "--verify")
    assert report["usable_chunks"] == CHUNKS and len(report["extents"]) == 2 * CHUNKS


def test_the_manifest_field_that_differs_is_named_with_both_values(filled):
    root, namespace, _, _ = filled
    other = filled_root(root, 2, manifest='{"model":"test/model","kv_dtype":"fp8"}', first_token=7000)[0].hex()
    prompt = prompt_of(root.parent, 7000, 2 * CHUNK_TOKENS)
    assert call_json("explain", prompt, root)["namespace"] == other
    report = call_json("explain", prompt, root, "--namespace", namespace[:10], code=1)
    assert f'namespace {other[:12]} has it: kv_dtype is "bf16" here and "fp8" there' in reasons(report)
    assert "model" not in reasons(report)


def test_a_salt_that_hides_what_is_stored_without_is_named_and_not_shown(filled):
    root, _, _, prompt = filled
    result = call("explain", prompt, root, "--salt", "tenant-secret")
    assert result.returncode == 1 and "there without the salt" in result.stdout
    assert "tenant-secret" not in result.stdout
    adapter = call("explain", prompt, root, "--lora", "a=" + "0" * 64)
    assert adapter.returncode == 1 and "there without the LoRA adapter" in adapter.stdout


def test_what_was_stored_with_salt_and_adapter_is_found_with_both(memory_root):
    depot = Depot.open(config(memory_root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(3 * BLOCKS_PER_CHUNK, seed=2)
    cache.lend_to(depot)
    digest = "ab" * 32
    store(depot, namespace, keys_of(namespace, 3, salt="s", lora=f"a\0{digest}".encode()))
    depot.close()
    prompt = prompt_of(memory_root.parent, 0, 3 * CHUNK_TOKENS)
    assert call_json("explain", prompt, memory_root, "--salt", "s", "--lora", f"a={digest}")["usable_chunks"] == 3
    assert call_json("explain", prompt, memory_root, code=1)["usable_chunks"] == 0


def test_a_part_that_is_there_alone_is_named(memory_root):
    stated = {"model": "m", "chunk_tokens": CHUNK_TOKENS, "groups": [
        {"layout": "canonical", "layers": 2, "heads": 4, "tokens": CHUNK_TOKENS, "window": 0, "attention": "full"}]}  # fmt: skip
    filled_root(memory_root, 2, manifest=json.dumps(stated))  # heads 0 and 1 of 4
    report = call_json("explain", prompt_of(memory_root.parent, 0, 2 * CHUNK_TOKENS), memory_root, code=1)
    assert report["usable_chunks"] == 0 and "only a part of it is there: layers 0 to 1, heads 0 to 1" in reasons(report)


def test_a_window_group_needs_only_the_end(memory_root):
    window = {"layout": "canonical", "layers": 2, "heads": 2, "tokens": CHUNK_TOKENS, "window": 33, "attention": "window"}
    _, keys, _ = filled_root(memory_root, 4, manifest=json.dumps({"model": "m", "chunk_tokens": CHUNK_TOKENS, "groups": [window]}))
    first = [e for e in tokendepot.list_extents(str(memory_root)) if e["key"] == split(keys)[0]]
    tokendepot.remove_extents(str(memory_root), first)
    assert call_json("explain", prompt_of(memory_root.parent, 0, 4 * CHUNK_TOKENS), memory_root)["usable_chunks"] == 4


def test_a_prompt_comes_from_stdin_and_as_text(filled, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    root, _, _, prompt = filled
    with open(prompt) as ids:
        assert json.loads(run("explain", "-", root, "--json", stdin=ids).stdout)["usable_chunks"] == CHUNKS
    words = {f"w{i}": i for i in range(200)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in range_of(0, CHUNKS * CHUNK_TOKENS)))
    assert call_json("explain", tmp_path / "text", root, "--tokenizer", tmp_path)["usable_chunks"] == CHUNKS


def test_beside_an_engine_that_writes_it_shows_what_is_acknowledged_and_changes_nothing(memory_root):
    depot = Depot.open(config(memory_root, scrub_rate=0))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(4 * BLOCKS_PER_CHUNK, seed=2)
    cache.lend_to(depot)
    store(depot, namespace, keys_of(namespace, 4))

    def sizes():
        """Of all files but those that the keeper makes and changes by itself: its notes, and the next segment."""
        files = [p for p in memory_root.rglob("*") if p.is_file() and not p.match("keeper*") and not p.match("*-00000001.seg")]
        return {p: p.stat().st_size for p in files}

    before = sizes()
    assert call_json("explain", prompt_of(memory_root.parent, 0, 4 * CHUNK_TOKENS), memory_root)["usable_chunks"] == 4
    assert sizes() == before
    depot.close()


@pytest.mark.parametrize("groups", ["x", 7, [1], [{"layout": "canonical", "layers": -1, "heads": 2, "tokens": 1, "window": 0, "attention": "full"}]])
def test_a_manifest_of_anybodys_making_is_no_obstacle(memory_root, groups):
    filled_root(memory_root, 2, manifest=json.dumps({"model": "m", "groups": groups, "chunk_tokens": "many"}))
    report = call_json("explain", prompt_of(memory_root.parent, 0, 2 * CHUNK_TOKENS), memory_root)
    assert report["usable_chunks"] == 2


def test_wrong_usage_ends_with_2(filled, tmp_path):
    root, _, _, prompt = filled
    (tmp_path / "words").write_text("hello")
    (tmp_path / "large").write_text("[4294967296]")
    (tmp_path / "short").write_text("1 2 3")
    (tmp_path / "empty").write_text("")
    shutil.copytree(root, tmp_path / "copy")
    for arguments, said in (
        ((prompt, tmp_path), "is not the root"),
        ((prompt, root, "--frobnicate"), "--frobnicate"),
        ((tmp_path / "missing", root), "cannot be read"),
        ((tmp_path / "words", root), "no token ids"),
        ((tmp_path / "large", root), "4294967296"),
        ((tmp_path / "short", root), "less than one chunk"),
        ((tmp_path / "empty", root), "holds no token"),
        ((prompt, root, "--namespace", "0000"), "no namespace"),
        ((prompt, root, "--lora", "name"), "NAME=PATH"),
        ((prompt, root, tmp_path / "copy"), "both have the id"),
        ((prompt, root, "--tokenizer", "/nonexistent"), "tokenizer.json"),
    ):
        result = call("explain", *arguments)
        assert result.returncode == 2 and result.stdout == "", arguments
        assert said in " ".join(result.stderr.replace("\u2502", " ").split()), (said, result.stderr)


def test_without_permission_it_ends_with_2(filled):
    root, _, _, prompt = filled
    os.chmod(root.parent, 0o755)
    os.chmod(prompt, 0o644)
    code, stderr = call_as_nobody("explain", prompt, root)
    assert code == 2 and "ermission" in stderr
