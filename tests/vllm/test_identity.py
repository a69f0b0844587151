"""What a namespace is made of: digests of weights, names of types, manifests; and what of it somebody else may have written."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tokendepot.engines.vllm import identity
from tokendepot.engines.vllm.identity import content_digest, kv_dtype_name, snapshot_commit
from tokendepot.engines.vllm.misses import other_namespaces


def test_kv_type_names_resolve_auto_and_aliases() -> None:
    assert kv_dtype_name("auto", torch.float16) == "float16"
    assert kv_dtype_name("auto", torch.bfloat16) == kv_dtype_name("bfloat16", torch.bfloat16)
    assert kv_dtype_name("fp8", torch.uint8) == kv_dtype_name("fp8_e4m3", torch.uint8)
    assert kv_dtype_name("fp8", torch.uint8) != kv_dtype_name("fp8_e5m2", torch.uint8)


def test_a_snapshot_is_its_commit_only_while_its_files_are_links(tmp_path) -> None:
    commit = "a" * 40
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / commit
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (blobs / name).write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert snapshot_commit(snapshot) == commit
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").write_text("replaced")
    assert snapshot_commit(snapshot) is None


def test_content_digests_are_remembered_by_inode_state(tmp_path, monkeypatch) -> None:
    model, root = tmp_path / "model", tmp_path / "root"
    model.mkdir()
    root.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    weights.write_bytes(b"A" * 1000)
    status = os.stat(weights)
    first = content_digest(model, (str(root),))
    hashed = []
    original = identity._hash_file
    monkeypatch.setattr(identity, "_hash_file", lambda file: hashed.append(file.name) or original(file))
    assert content_digest(model, (str(root),)) == first and hashed == []
    with open(weights, "r+b") as file:
        file.write(b"B")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_digest(model, (str(root),)) != first and hashed == ["model.safetensors"]
    (root / identity.CACHE_FILE).write_text("garbage")
    with open(weights, "r+b") as file:
        file.write(b"A")
    assert content_digest(model, (str(root),)) == first
    (root / identity.CACHE_FILE).write_text(json.dumps({str(weights): "odd", "x": [1]}))
    assert content_digest(model, (str(root),)) == first


@pytest.mark.parametrize("how", ["group may write", "anybody may write", "another user's", "a link", "a pipe", "too long"])
def test_digests_that_somebody_else_can_have_written_are_not_believed(how: str, tmp_path, monkeypatch) -> None:
    """A forged one would lend this model's files another model's namespace."""
    weights, root = tmp_path / "model.safetensors", tmp_path / "root"
    weights.write_bytes(b"A" * 1000)
    root.mkdir()
    honest = content_digest(weights, (str(root),))
    cache = root / identity.CACHE_FILE
    known = json.loads(cache.read_text())
    forged = json.dumps({path: [stamp, "0" * 64] for path, (stamp, _) in known.items()})
    cache.write_text(forged)
    assert content_digest(weights, (str(root),)) != honest, "one's own is believed, or this test would show nothing"
    if how in ("a link", "a pipe"):
        cache.unlink()
        if how == "a pipe":
            os.mkfifo(cache)
        else:
            (tmp_path / "elsewhere").write_text(forged)
            cache.symlink_to(tmp_path / "elsewhere")
    elif how == "too long":
        monkeypatch.setattr(identity, "CACHE_MOST_BYTES", len(forged) - 1)
    elif how == "another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(cache, 12345, 12345)
    else:
        cache.chmod(0o620 if how == "group may write" else 0o602)
    assert content_digest(weights, (str(root),)) == honest


def test_manifests_that_are_none_are_passed_over_and_never_waited_for(tmp_path) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    good, other = bytes(range(32)), bytes(32)
    (manifests / f"{good.hex()}.json").write_text('{"chunk_tokens": 256}')
    (manifests / f"{other.hex()}.json").write_text('{"chunk_tokens": 64}')
    os.mkfifo(manifests / f"{'11' * 32}.json")
    (manifests / f"{'22' * 32}.json").symlink_to("/dev/zero")
    (manifests / f"{'33' * 32}.json").write_text("[" * 100_000)
    with open(manifests / f"{'44' * 32}.json", "wb") as holes:
        holes.truncate(64 << 30)
    for number, tokens in enumerate(("0", "-1", str(1 << 40), "Infinity", '"x"', "null", "[]")):
        (manifests / f"{bytes([80 + number] * 32).hex()}.json").write_text(f'{{"chunk_tokens": {tokens}}}')
    for name in ("no-number.json", "5.json", "55.json"):
        (manifests / name).write_text('{"chunk_tokens": 256}')
    (manifests / f"{'66' * 32}.json").mkdir()
    assert other_namespaces((str(tmp_path / "nowhere"), str(tmp_path)), other) == [(good, 256)]
