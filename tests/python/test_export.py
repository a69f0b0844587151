"""export and import: what goes to another site, from live and damaged roots, through whole and damaged files."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import call, call_as_nobody, call_json, flip_byte, run
from paged import BLOCKS_PER_CHUNK, CHUNK_TOKENS, MANIFEST, WANT, Cache, config, filled_root, keys_of, load, range_of, split, store

import tokendepot
from tokendepot import Depot, _core

CHUNKS = 12
PAGE = 4096


@pytest.fixture
def site(memory_root):
    """(root, namespace as hex, keys, cache that was stored, directory for files)"""
    namespace, keys, cache = filled_root(memory_root, CHUNKS)
    return memory_root, namespace.hex(), keys, cache, memory_root.parent


def exported(site, *arguments, name="file.tdx"):
    root, namespace, _, _, directory = site
    out = directory / name
    report = call_json("export", root, "--namespace", namespace[:12], "--out", out, *arguments)
    assert report["left_out"] == []
    return out, report


def import_json(file, root, *arguments, code=0, **more):
    start = run if more else call
    result = start("import", file, root, "--capacity", "16MiB", "--free-space-reserve", "0", "--json", *arguments, **more)
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


def imported_here(file, root):
    """The importer's report without a process of its own; None when the file is refused."""
    fd = os.open(file, os.O_RDONLY)
    try:
        importer = _core.Importer.begin(fd, str(root), 16 << 20, True, 0)
        while importer.go_on(1 << 20):
            pass
        return importer.report()
    except tokendepot.DepotError as error:
        assert error.kind in ("invalid_argument", "unsupported")
        return None
    finally:
        os.close(fd)


def loaded(root, keys, chunks):
    """The first chunks of these keys as an engine loads them from this root."""
    depot = Depot.open(config(root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(chunks * BLOCKS_PER_CHUNK)
    cache.lend_to(depot)
    wanted = b"".join(split(keys)[:chunks])
    assert depot.longest_prefix(wanted, [WANT]) == chunks
    assert load(depot, namespace, wanted)["items_ok"] == chunks
    depot.close()
    return cache.data


def identities(root):
    return sorted((e["key"], e["group"], e["part"], e["tokens"], e["bytes"]) for e in tokendepot.list_extents(str(root)))


# --- there and back ---


def test_a_namespace_arrives_at_another_site_byte_for_byte(site, tmp_path):
    root, namespace, keys, cache, _ = site
    file, report = exported(site)
    assert report["extents"] == CHUNKS and report["file_bytes"] == os.path.getsize(file)
    arrived = import_json(file, tmp_path / "new", "--create")
    assert arrived["whole"] and arrived["imported"] == CHUNKS and arrived["namespace"] == namespace
    assert identities(tmp_path / "new") == identities(root)
    assert np.array_equal(loaded(tmp_path / "new", keys, CHUNKS), cache.data)
    assert tokendepot.inspect_root(str(tmp_path / "new"))["namespaces"][0]["manifest"] == json.dumps(
        json.loads(MANIFEST), sort_keys=True, separators=(",", ":")
    )


def test_only_the_prompts_chunks_are_exported_with_prompt(site, tmp_path):
    _, _, keys, _, directory = site
    prompt = directory / "prompt"
    prompt.write_text(json.dumps({"tokens": range_of(0, 5 * CHUNK_TOKENS + 3)}))
    file, report = exported(site, "--prompt", prompt)
    assert (report["extents"], report["prompt_chunks"], report["missing_chunks"]) == (5, 5, 0)
    import_json(file, tmp_path / "new", "--create")
    stored = {e["key"] for e in tokendepot.list_extents(str(tmp_path / "new"))}
    assert stored == set(split(keys)[:5])


def test_chunks_of_a_prompt_that_are_not_there_end_with_1_and_are_counted(site):
    root, namespace, keys, _, directory = site
    tokendepot.remove_extents(str(root), [e for e in tokendepot.list_extents(str(root)) if e["key"] in split(keys)[:2]])
    prompt = directory / "prompt"
    prompt.write_text(json.dumps(range_of(0, 5 * CHUNK_TOKENS)))
    export = ["export", root, "--namespace", namespace, "--prompt", prompt, "--out"]
    report = call_json(*export, directory / "part", code=1)
    assert (report["extents"], report["prompt_chunks"], report["missing_chunks"]) == (3, 5, 2)
    assert (directory / "part").stat().st_size == report["file_bytes"]
    said = call(*export, directory / "again")
    assert said.returncode == 1 and "2 of the prompt's 5 chunks are not there" in said.stdout


def test_a_prompt_of_which_nothing_is_there_makes_no_file(site):
    root, namespace, _, _, directory = site
    prompt = directory / "prompt"
    prompt.write_text(json.dumps(range_of(0, 5 * CHUNK_TOKENS)))
    export = ["export", root, "--namespace", namespace, "--prompt", prompt, "--salt", "other tenant", "--out", directory / "none"]
    report = call_json(*export, code=1)
    assert (report["extents"], report["missing_chunks"], report["file_bytes"]) == (0, 5, 0)
    assert "no file is written" in call(*export).stdout
    assert not (directory / "none").exists()


def test_a_prompt_cannot_be_exported_from_a_namespace_of_lmcache(tmp_path, memory_root):
    namespace = filled_root(memory_root, 2, manifest='{"engine":"lmcache","model":"m"}')[0].hex()
    prompt = memory_root.parent / "prompt"
    prompt.write_text(json.dumps(range_of(0, 2 * CHUNK_TOKENS)))
    assert "cannot be made from a prompt" in refused(
        "export", memory_root, "--namespace", namespace, "--prompt", prompt, "--out", tmp_path / "file"
    )
    assert not (tmp_path / "file").exists()


def test_a_file_streams_from_stdout_to_stdin(site, tmp_path):
    root, namespace, _, _, _ = site
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()"]
    with subprocess.Popen(
        [*command, "export", root, "--namespace", namespace, "--out", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as source:
        arrived = import_json("-", tmp_path / "new", "--create", stdin=source.stdout)
        assert f"{CHUNKS} extents" in source.stderr.read().decode()
    assert source.returncode == 0
    assert arrived["whole"] and arrived["imported"] == CHUNKS


def test_a_second_import_changes_nothing(site, tmp_path):
    file, _ = exported(site)
    import_json(file, tmp_path / "new", "--create")
    before = {p: p.stat().st_size for p in (tmp_path / "new").rglob("*") if p.is_file()}
    again = import_json(file, tmp_path / "new")
    assert (again["imported"], again["present"], again["whole"]) == (0, CHUNKS, True)
    assert {p: p.stat().st_size for p in (tmp_path / "new").rglob("*") if p.is_file()} == before


def test_an_interrupted_import_goes_on_where_it_was(site, tmp_path):
    file, _ = exported(site)
    half = site[4] / "half"
    half.write_bytes(file.read_bytes()[: os.path.getsize(file) // 2])
    first = import_json(half, tmp_path / "new", "--create", code=1)
    assert 0 < first["imported"] < CHUNKS and "without index" in first["reason"]
    rest = import_json(file, tmp_path / "new")
    assert rest["present"] == first["imported"] and rest["imported"] == CHUNKS - first["imported"]


def test_a_running_engine_sees_what_is_imported(site, tmp_path):
    _, _, keys, cache, _ = site
    file, _ = exported(site)
    depot = Depot.open(config(tmp_path / "live"))
    namespace = depot.register_namespace(MANIFEST)
    mine = Cache(CHUNKS * BLOCKS_PER_CHUNK)
    mine.lend_to(depot)
    assert depot.longest_prefix(keys, [WANT]) == 0
    import_json(file, tmp_path / "live")
    end = time.monotonic() + 10
    while depot.longest_prefix(keys, [WANT]) < CHUNKS and time.monotonic() < end:
        time.sleep(0.02)  # by itself: nobody tells it to read journals
    assert load(depot, namespace, keys)["items_ok"] == CHUNKS
    assert np.array_equal(mine.data, cache.data)
    depot.close()


def test_export_beside_an_engine_that_stores_and_evicts_is_a_whole_file(memory_root, tmp_path):
    depot = Depot.open(config(memory_root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(8 * BLOCKS_PER_CHUNK, seed=3)
    cache.lend_to(depot)
    job = 1
    for round_ in range(60):  # more than the capacity
        store(depot, namespace, keys_of(namespace, 8, first_token=round_ * 1000), job)
        job += 1
        if round_ == 30:
            engine_at_work = subprocess.Popen(
                [sys.executable, "-c", "from tokendepot.cli import main; main()", "export", str(memory_root), "--namespace",
                 namespace.hex(), "--out", str(tmp_path / "file")]
            )  # fmt: skip
    assert engine_at_work.wait(60) in (0, 1)  # 1: something was evicted between listing and reading
    depot.close()
    assert import_json(tmp_path / "file", tmp_path / "new", "--create")["whole"]


# --- capacity ---


def test_an_import_stops_at_the_capacity_and_evicts_nothing(site, tmp_path):
    file, _ = exported(site)
    filled_root(tmp_path / "small", 4, first_token=10**6)
    before = identities(tmp_path / "small")
    result = call("import", file, tmp_path / "small", "--capacity", "768KiB", "--free-space-reserve", "0", "--json")
    assert result.returncode in (2, 3)  # 2: the root is refused whole, as by an engine
    assert identities(tmp_path / "small") == before
    arrived = call("import", file, tmp_path / "tight", "--create", "--capacity", "3MiB", "--free-space-reserve", "0", "--json")
    assert arrived.returncode == 0
    other = filled_root(tmp_path / "other", 60, manifest='{"model":"b"}', first_token=5)[0].hex()
    big = tmp_path / "big.tdx"
    call_json("export", tmp_path / "other", "--namespace", other, "--out", big)
    full = call("import", big, tmp_path / "tight", "--capacity", "3MiB", "--free-space-reserve", "0", "--json")
    assert full.returncode == 3
    report = json.loads(full.stdout)
    assert report["full"] and 0 < report["imported"] < 60 and "nothing is evicted" in report["reason"]
    used = sum(p.stat().st_size for p in (tmp_path / "tight" / "segments").iterdir())
    assert used <= 3 << 20
    held = tokendepot.inspect_root(str(tmp_path / "tight"))
    assert {n["digest"]: n["extents"] for n in held["namespaces"]} == {site[1]: CHUNKS, other: report["imported"]}
    assert set(tokendepot.verify_extents(str(tmp_path / "tight"), tokendepot.list_extents(str(tmp_path / "tight")))) == {"ok"}


# --- damage ---


def test_a_damaged_extent_is_left_out_and_named(site, tmp_path):
    root, namespace, _, _, directory = site
    victim = tokendepot.list_extents(str(root))[3]
    flip_byte(root / "segments" / (victim["segment"] + ".seg"), victim["offset"] + victim["bytes"] - 1)
    report = call_json("export", root, "--namespace", namespace, "--out", directory / "file", code=1)
    assert report["extents"] == CHUNKS - 1
    assert [e["key"] for e in report["left_out"]] == [victim["key"].hex()]
    assert "digest" in report["left_out"][0]["reason"]
    arrived = import_json(directory / "file", tmp_path / "new", "--create")
    assert arrived["whole"] and arrived["imported"] == CHUNKS - 1


def test_a_damaged_copy_is_replaced_by_a_sound_one_of_another_root(site, tmp_path):
    root, namespace, _, _, directory = site
    shutil.copytree(root, tmp_path / "copy")
    victim = tokendepot.list_extents(str(root))[3]
    flip_byte(root / "segments" / (victim["segment"] + ".seg"), victim["offset"] + victim["bytes"] - 1)
    report = call_json("export", root, tmp_path / "copy", "--namespace", namespace, "--out", directory / "file")
    assert report["extents"] == CHUNKS


def test_no_flipped_byte_of_a_file_brings_wrong_bytes_in(site, tmp_path):
    _, _, _, cache, _ = site
    file, _ = exported(site)
    size = os.path.getsize(file)
    random = np.random.default_rng(1)
    sound = {e["key"]: e for e in tokendepot.list_extents(str(site[0]))}
    for round_, at in enumerate([9, 60, PAGE + 3, 2 * PAGE + 20, size - 1, size - 100, *random.integers(0, size, 8)]):
        bad = site[4] / "bad"
        shutil.copyfile(file, bad)
        flip_byte(bad, int(at))
        target = tmp_path / f"new{round_}"
        report = imported_here(bad, target)
        if report is None:
            assert at < 2 * PAGE and not target.exists()
            continue
        assert not report["whole"] and report["imported"] >= CHUNKS - 1
        extents = tokendepot.list_extents(str(target))
        assert set(tokendepot.verify_extents(str(target), extents)) == {"ok"}
        assert {e["key"] for e in extents} <= set(sound)


@pytest.mark.parametrize("keep", [0, 7, PAGE, PAGE + 10, 2 * PAGE, 2 * PAGE + 100, -1, -9, -200, -70000])
def test_a_file_cut_short_brings_in_what_is_whole_and_says_so(site, tmp_path, keep):
    file, _ = exported(site)
    cut = site[4] / "cut"
    cut.write_bytes(file.read_bytes()[:keep])
    report = imported_here(cut, tmp_path / "new")
    if 0 <= keep < 2 * PAGE:
        assert report is None and not (tmp_path / "new").exists()
        return
    assert not report["whole"] and report["reason"]
    if keep >= -1000 and keep < 0:
        assert report["imported"] == CHUNKS
    if report["imported"]:
        extents = tokendepot.list_extents(str(tmp_path / "new"))
        assert set(tokendepot.verify_extents(str(tmp_path / "new"), extents)) == {"ok"}


def test_extents_of_another_namespace_in_a_file_stay_out(site, tmp_path):
    file, _ = exported(site)
    other = filled_root(tmp_path / "other", 2, manifest='{"model":"b"}')[0].hex()
    call_json("export", tmp_path / "other", "--namespace", other, "--out", tmp_path / "foreign")
    front, rest = file.read_bytes()[: 2 * PAGE], (tmp_path / "foreign").read_bytes()[2 * PAGE :]
    (tmp_path / "mixed").write_bytes(front + rest)
    report = import_json(tmp_path / "mixed", tmp_path / "new", "--create", code=1)
    assert report["imported"] == 0 and report["junk_bytes"] > 0
    assert tokendepot.list_extents(str(tmp_path / "new")) == []


# --- wrong usage ---


def refused(*arguments, code=2, **more):
    result = (run if more else call)(*arguments, **more)
    assert result.returncode == code, (result.stdout, result.stderr)
    assert result.stdout == ""
    return " ".join(result.stderr.replace("\u2502", " ").split())  # without the frame and its line breaks


def test_wrong_usage_of_export_ends_with_2_and_writes_nothing(site, tmp_path):
    root, namespace, _, _, directory = site
    out = directory / "out"
    assert "is not the root" in refused("export", tmp_path, "--namespace", namespace, "--out", out)
    assert "no namespace" in refused("export", root, "--namespace", "0123", "--out", out)
    assert "--frobnicate" in refused("export", root, "--frobnicate", "--out", out)
    assert "no token ids" in refused("export", root, "--namespace", namespace, "--out", out, "--prompt", "/etc/hostname")
    assert "cannot be read" in refused("export", root, "--namespace", namespace, "--out", out, "--prompt", "/nonexistent")
    assert "go with --prompt" in refused("export", root, "--namespace", namespace, "--out", out, "--salt", "s")
    assert "cannot be written" in refused("export", root, "--namespace", namespace, "--out", "/nonexistent/out")
    out.write_text("mine")
    assert "there already" in refused("export", root, "--namespace", namespace, "--out", out)
    assert out.read_text() == "mine"
    (directory / "link").symlink_to("/nonexistent/target")
    assert "there already" in refused("export", root, "--namespace", namespace, "--out", directory / "link")
    assert [p.name for p in directory.iterdir() if p.name.startswith("out")] == ["out"]


def test_wrong_usage_of_import_ends_with_2_and_changes_nothing(site, tmp_path):
    file, _ = exported(site)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    capacity = ("--capacity", "16MiB")
    assert "is not the root" in refused("import", file, tmp_path / "other", *capacity)
    assert "holds something else" in refused("import", file, tmp_path / "other", *capacity, "--create")
    assert "is not the root" in refused("import", file, tmp_path / "missing", *capacity)
    assert "no export file" in refused("import", "/etc/hostname", tmp_path / "missing", *capacity, "--create")
    assert "--capacity" in refused("import", file, tmp_path / "missing", "--create")
    assert "8G" in refused("import", file, tmp_path / "missing", "--create", "--capacity", "8G")
    for capacity_refused, said in (("100TiB", "larger than its file system"), ("2MiB", "fewer than 3 segments")):
        assert said in refused("import", file, tmp_path / "missing", "--create", "--capacity", capacity_refused)
        assert not (tmp_path / "missing").exists()
    assert "cannot be read" in refused("import", "/nonexistent", tmp_path / "missing", *capacity)
    assert "directory" in refused("import", tmp_path, site[0], *capacity)
    future = bytearray(file.read_bytes())
    future[8] = 9
    (tmp_path / "future").write_bytes(future)
    assert "version 9" in refused("import", tmp_path / "future", tmp_path / "missing", *capacity, "--create")
    assert not (tmp_path / "missing").exists()
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["mine"]


def test_without_permission_both_end_with_2(site):
    root, namespace, _, _, directory = site
    file, _ = exported(site)
    for path in (directory, *directory.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    code, stderr = call_as_nobody("import", file, root, "--capacity", "16MiB")
    assert code == 2 and "cannot be written" in stderr
    os.chmod(root / "journals", 0o700)
    code, stderr = call_as_nobody("export", root, "--namespace", namespace, "--out", "/tmp/tokendepot-never")
    assert code == 2 and "ermission" in stderr
    assert not os.path.exists("/tmp/tokendepot-never")
    for path in directory.rglob("*"):
        os.chmod(path, 0o700)
