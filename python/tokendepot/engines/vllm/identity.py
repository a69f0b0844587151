"""The namespace manifest: what must be equal for KV bytes of two engines to be exchangeable.

Weights are identified by content, never by name or time: a Hugging Face snapshot by its commit (its files are links
into a content-addressed store), any other directory or file by SHA-256 of all its bytes. Content digests are
remembered in `identity-cache.json` in the first root by (path, device, inode, size, mtime, ctime); a change in place
that restores the modification time still changes the inode's ctime.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import vllm

from tokendepot import _core
from tokendepot.engines.vllm import foreign, versions
from tokendepot.engines.vllm.groups import OPAQUE, Group, layer_number
from tokendepot.engines.vllm.settings import RefusedError, Settings

CACHE_FILE = "identity-cache.json"
CACHE_MOST_BYTES = 16 << 20  # some 50,000 files
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".ckpt", ".model")
CONFIG_FILES = (
    "config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "quant_config.json",
    "params.json",
    "adapter_config.json",
    "model.safetensors.index.json",
)
ROPE_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
)
CACHE_DTYPE_ALIASES = {"fp8": "fp8_e4m3"}
READ_BYTES = 8 << 20
HASH_THREADS = min(8, os.cpu_count() or 1)


def manifest(
    vllm_config: Any, groups: list[Group], settings: Settings, kv_cache_config: Any
) -> dict[str, Any]:
    """The manifest as plain JSON data; RefusedError when the model cannot be identified."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    text_config = getattr(model, "hf_text_config", None)
    identity: dict[str, Any] = {
        "format": _core.FORMAT_VERSION,
        "engine_kind": "vllm",
        "model": model_identity(vllm_config, settings),
        "dtype": dtype_name(model.dtype),
        "kv_dtype": kv_dtype_name(str(cache.cache_dtype), spec.dtype),
        "quantization": str(model.quantization) if model.quantization else "",
        "overrides": _overrides(model),
        "rope": {
            name: getattr(text_config, name)
            for name in ROPE_FIELDS
            if getattr(text_config, name, None) is not None
        },
        "chunk_tokens": settings.chunk_tokens,
        "groups": [_group(group, len(groups) > 1) for group in groups],
        "draft": _draft_identity(vllm_config),
    }
    skipped = list(getattr(cache, "kv_cache_dtype_skip_layers", None) or [])
    if skipped:
        identity["kv_dtype_skip_layers"] = skipped
    if any(group.kind == OPAQUE for group in groups):
        identity["packing"] = packing(vllm_config, groups)
    return json.loads(json.dumps(identity, default=str))


def _group(group: Group, one_of_several: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "attention": group.attention,
        "window": group.window,
        "layout": group.kind,
        "heads": group.heads,
        "head_size": group.head_size,
        "planes": group.planes,
        "row_bytes": group.row_bytes,
        "tokens": group.stored_tokens,
        "layers": group.layers,
    }
    if one_of_several:  # a single group has them all, whatever part of them this process knows
        values["layer_numbers"] = [layer_number(name) for name in group.layer_names]
    return values


def packing(vllm_config: Any, groups: list[Group]) -> dict[str, Any]:
    """What decides how an engine packs bytes inside its pages; opaque pages go back to an equal packing only."""
    from vllm.platforms import current_platform

    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if current_platform.is_cpu():
        amx = bool(torch.cpu._is_amx_tile_supported())
        device = f"{torch.backends.cpu.get_cpu_capability()} amx={amx} {os.uname().machine}"
    else:
        device = str(current_platform.get_device_name())
    attention = getattr(vllm_config, "attention_config", None)
    return {
        "engine": vllm.__version__,
        "torch": torch.__version__,
        "device": device,
        "backend": str(getattr(attention, "backend", None) or os.environ.get("VLLM_ATTENTION_BACKEND", "")),
        "cache_layout": str(
            getattr(cache, "kv_cache_layout", None) or os.environ.get("VLLM_KV_CACHE_LAYOUT", "")
        ),
        "block_tokens": [group.block_tokens for group in groups],
        "page_bytes": [group.page_bytes for group in groups],
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
    }


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def kv_dtype_name(configured: str, actual: Any) -> str:
    """The KV type by its resolved name: "auto" is what it stands for, "fp8" is its alias "fp8_e4m3"."""
    if configured == "auto":
        return dtype_name(actual)
    return CACHE_DTYPE_ALIASES.get(configured, configured)


def _overrides(model_config: Any) -> Any:
    overrides = getattr(model_config, "hf_overrides", None) or {}
    if callable(overrides):
        raise RefusedError(
            "hf_overrides is a function, which has no identity that outlives the process: pass a dictionary"
        )
    return overrides


def _draft_identity(vllm_config: Any) -> str:
    """A draft model whose layers live in the same cache belongs to the identity of the bytes."""
    speculative = vllm_config.speculative_config
    if not versions.chunk_drop_needed(speculative):
        return ""
    return f"{speculative.method}:{speculative.model}"


def model_identity(vllm_config: Any, settings: Settings) -> str:
    """ "commit:...", "content:..." or "given:..."; RefusedError when the weights cannot be identified."""
    if settings.model_digest != "auto":
        return f"given:{settings.model_digest}"
    model, load = vllm_config.model_config, getattr(vllm_config, "load_config", None)
    suffix = ""
    if load is not None and "dummy" in str(getattr(load, "load_format", "")):
        suffix = f" dummy weights of seed {model.seed}"
    path = Path(model.model)
    if not path.exists():
        commit = _downloaded_commit(str(model.model), model.revision)
        if commit is None:
            raise RefusedError(
                f'model "{model.model}" is neither a local path nor a downloaded Hugging Face snapshot, so '
                "its weights "
                'cannot be identified: set "model_digest" to a string of your own'
            )
        return f"commit:{commit}{suffix}"
    commit = snapshot_commit(path)
    if commit is not None:
        return f"commit:{commit}{suffix}"
    return f"content:{content_digest(path, settings.root_paths)}{suffix}"


def snapshot_commit(path: Path) -> str | None:
    """The commit of .../snapshots/<commit> when all its weights are links into the content-addressed blobs."""
    if path.parent.name != "snapshots" or not re.fullmatch(r"[0-9a-f]{40}", path.name):
        return None
    blobs = (path.parent.parent / "blobs").resolve()
    files = identity_files(path)
    linked = files and all(file.is_symlink() and file.resolve().parent == blobs for file in files)
    return path.name if linked else None


def _downloaded_commit(repository: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository, "config.json", revision=revision)
    except (ImportError, ValueError, OSError):
        return None
    return snapshot_commit(Path(found).parent) if isinstance(found, str) else None


def identity_files(path: Path) -> list[Path]:
    """The files whose bytes decide what a model (or a LoRA adapter) computes, in stable order."""
    if path.is_file():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and (file.suffix in WEIGHT_SUFFIXES or file.name in CONFIG_FILES)
    )


def content_digest(path: Path, roots: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names and contents of identity_files(); from the cache in the first root where unchanged."""
    files = identity_files(path)
    if not files:
        raise RefusedError(f'"{path}" holds no weights or configuration that could be identified')
    known = _read_cache(roots)
    stamps = {file: _stamp(file) for file in files}
    missing = [
        file for file in files if _cache_key(file) not in known or known[_cache_key(file)][0] != stamps[file]
    ]
    if missing:
        _hash_files(missing, stamps, known)
        _write_cache(roots, known)
    whole = hashlib.sha256()
    for file in files:
        name = file.name if path.is_file() else str(file.relative_to(path))
        whole.update(json.dumps([name, stamps[file][2], known[_cache_key(file)][1]]).encode())
    return whole.hexdigest()


def _hash_files(files: list[Path], stamps: dict[Path, list[int]], known: dict[str, Any]) -> None:
    total, started = sum(stamps[file][2] for file in files), time.monotonic()
    if total > 1 << 30:
        versions.log.info(
            "tokendepot: identifying %.1f GiB of weights by content (remembered afterwards)", total / 2**30
        )
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for file, digest in zip(files, pool.map(_hash_file, files), strict=True):
            if _stamp(file) != stamps[file]:
                raise RefusedError(f'"{file}" changed while it was read, so the model cannot be identified')
            known[_cache_key(file)] = [stamps[file], digest]
    if total > 1 << 30:
        versions.log.info("tokendepot: weights identified in %.1f s", time.monotonic() - started)


def _hash_file(file: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    view = memoryview(buffer)
    try:
        with open(file, "rb", buffering=0) as source:
            while count := source.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        raise RefusedError(f'"{file}" cannot be read to identify the model: {error.strerror}') from error
    return digest.hexdigest()


def _stamp(file: Path) -> list[int]:
    status = os.stat(file)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _cache_key(file: Path) -> str:
    return str(file.absolute())


def _read_cache(roots: tuple[str, ...]) -> dict[str, Any]:
    """{path: [stamp, digest]}; anything unexpected in the file counts as nothing known. So does a file that somebody else
    can have written: it says which model a file's bytes are."""
    for root in roots[:1]:
        try:
            known = foreign.read_json(Path(root, CACHE_FILE), own=True, most_bytes=CACHE_MOST_BYTES)
            return {
                path: entry
                for path, entry in known.items()
                if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
            }
        except (OSError, ValueError, AttributeError):
            return {}
    return {}


def _write_cache(roots: tuple[str, ...], known: dict[str, Any]) -> None:
    """Losing this file costs one more hashing, so a failure to write it is not worth a word to the operator."""
    for root in roots[:1]:
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=root, prefix=CACHE_FILE, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump(known, file)
            os.replace(file.name, Path(root, CACHE_FILE))
        except OSError as error:
            versions.log.debug("tokendepot: %s cannot be written: %s", CACHE_FILE, error)
