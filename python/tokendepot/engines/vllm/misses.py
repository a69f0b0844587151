"""Why the first chunk that was not found was not found."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

from tokendepot import _core
from tokendepot.engines.vllm import foreign

FAILED_KEPT = 4096  # chunks whose load failed, the latest ones
NAMESPACES_ASKED = 16  # others than the engine's own, the newest manifests
MANIFESTS_READ = 4 * NAMESPACES_ASKED  # whatever is in them
LONGEST_CHUNK = 1 << 20  # tokens
CAUSE_OF_REASON = {"corrupt": "corrupt", "mismatch": "corrupt", "timed_out": "timed_out", "absent": "evicted"}


def other_namespaces(root_paths: tuple[str, ...], own: bytes) -> list[tuple[bytes, int]]:
    """(digest, tokens of a chunk) of the namespaces that roots hold beside `own`, newest first. Reads files."""
    manifests: list[tuple[float, str]] = []
    for root in root_paths:
        try:
            with os.scandir(os.path.join(root, "manifests")) as entries:
                manifests += [(entry.stat(follow_symlinks=False).st_mtime, entry.path) for entry in entries]
        except OSError:
            continue  # explains nothing, then
    found: dict[bytes, int] = {}
    for _, path in sorted(manifests, reverse=True)[:MANIFESTS_READ]:
        try:
            digest = bytes.fromhex(os.path.basename(path).removesuffix(".json"))
            chunk_tokens = int(foreign.read_json(path)["chunk_tokens"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue
        if len(digest) == len(own) and 0 < chunk_tokens <= LONGEST_CHUNK:
            found.setdefault(digest, chunk_tokens)
    found.pop(own, None)
    return list(found.items())[:NAMESPACES_ASKED]


class Misses:
    """Of one engine. No I/O: what the catalog remembers, and what this engine saw fail."""

    def __init__(self, depot: _core.Depot, others: list[tuple[bytes, int]]) -> None:
        self._depot, self._others = depot, others
        self._failed: OrderedDict[bytes, str] = OrderedDict()

    def failed(self, key: bytes, reason: str) -> str:
        """The cause, when a load of this chunk failed for `reason`."""
        cause = CAUSE_OF_REASON.get(reason, "failed")
        self._failed[key] = cause
        self._failed.move_to_end(key)
        if len(self._failed) > FAILED_KEPT:
            self._failed.popitem(last=False)
        return cause

    def cause(self, key: bytes, request: Any, *, first: bool) -> str:
        """Of a chunk that a look-up did not find. `first`: it is the prompt's first chunk."""
        if key in self._failed:
            return self._failed[key]
        if self._depot.history(key) == "gone":
            return "evicted"
        return "other_namespace" if first and self._is_elsewhere(request) else "absent"

    def _is_elsewhere(self, request: Any) -> bool:
        if request.lora_request is not None or request.mm_features:
            return False
        for namespace, chunk in self._others:
            if request.num_tokens < chunk:
                continue
            chain = _core.KeyChain(namespace, chunk, request.cache_salt or "")
            chain.append(request.all_token_ids[:chunk])
            if self._depot.history(chain.keys(0, 1)) == "stored":
                return True
        return False
