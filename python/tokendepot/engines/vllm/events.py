"""KV events of the depot, for the engine's own publisher: what the roots hold of this engine's namespace.

A thread follows the journals from outside, as `tokendepot events` does, so that chunks of other engines, evictions and
removals are told, too. vLLM takes events at the end of a step; what changed while the engine was idle comes with the next.
Of chunks that this engine stores, token ids and parent are told; of others they are not known.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from vllm.distributed import kv_events
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from tokendepot.engines.vllm import versions
from tokendepot.engines.vllm.tracked import Tracked
from tokendepot.holdings import Change, Holdings

POLL_S = 0.1
EVENTS_A_STEP = 1024  # more wait for the next step: the scheduler shall not
CHUNKS_REMEMBERED = 8192  # whose tokens are known, until they are told
STORED_FIELDS = kv_events.BlockStored.__struct_fields__


@dataclass
class ChunkText:
    """What a key was made of."""

    parent: bytes | None  # None: the first chunk of a prompt
    tokens: list[int]
    lora_name: str | None
    extras: tuple[Any, ...] | None


def wanted(vllm_config: Any) -> bool:
    config = getattr(vllm_config, "kv_events_config", None)
    return config is not None and bool(config.enable_kv_cache_events)


class DepotEvents:
    """Of one engine. `take` and `learn` are for the scheduler's thread."""

    def __init__(self, root_paths: list[str], chunk_tokens: int, namespace: bytes) -> None:
        """Raises DepotError where a root cannot be read."""
        self._chunk = chunk_tokens
        self._namespace = namespace.hex()[:16]
        self._holdings = Holdings(root_paths, lambda text: versions.log.warning("tokendepot: events: %s", text))
        self._texts: OrderedDict[bytes, ChunkText] = OrderedDict()
        self._lock = threading.Lock()
        # The last word on each place: bounded by what the roots hold, however long no step takes events.
        self._untold: dict[tuple[bytes, int, str], Change] = {}
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tokendepot-events", daemon=True)
        self._thread.start()

    def learn(self, key: bytes, chunk: int, tracked: Tracked) -> None:
        """Before the chunk is stored, so that its tokens are known when the journal tells of it."""
        if key in self._texts or tracked.chain is None:
            return
        request, first, last = tracked.request, chunk * self._chunk, (chunk + 1) * self._chunk
        lora_name = request.lora_request.lora_name if request.lora_request is not None else None
        extras: tuple[Any, ...] = (lora_name,) if lora_name else ()
        extras += tuple(
            (content, start) for content, start, count in tracked.media if start < last and start + count > first
        )
        if chunk == 0 and request.cache_salt:
            extras += (request.cache_salt,)
        parent = tracked.chain.keys(chunk - 1, chunk) if chunk else None
        self._texts[key] = ChunkText(parent, list(request.all_token_ids[first:last]), lora_name, extras or None)
        self._texts.move_to_end(key)
        if len(self._texts) > CHUNKS_REMEMBERED:
            self._texts.popitem(last=False)

    def take(self) -> list[kv_events.KVCacheEvent]:
        if not self._untold:
            return []
        with self._lock:
            places = list(self._untold)[:EVENTS_A_STEP]
            changes = [self._untold.pop(place) for place in places]
        return [self._event(change) for change in changes]

    def move_to(self, namespace: bytes) -> None:
        """From now on another namespace is served, which is empty; what was told of the old one is taken back."""
        with self._lock:
            old, self._namespace = self._namespace, namespace.hex()[:16]
            for change in self._holdings.everything():
                if change.namespace == old:
                    self._untold[change.key, change.group, change.medium] = change._replace(stored=False)

    def close(self) -> None:
        self._stop.set()
        if os.getpid() == self._pid:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.is_set():
            changes = self._holdings.poll()
            with self._lock:
                for change in changes:
                    if change.namespace == self._namespace:
                        self._untold[change.key, change.group, change.medium] = change
            self._stop.wait(POLL_S)

    def _event(self, change: Change) -> kv_events.KVCacheEvent:
        block = maybe_convert_block_hash(change.key)
        if not change.stored:
            return kv_events.BlockRemoved(block_hashes=[block], medium=change.medium, group_idx=change.group)
        text = self._texts.get(change.key)
        fields: dict[str, Any] = {
            "block_hashes": [block],
            "parent_block_hash": maybe_convert_block_hash(text.parent) if text and text.parent else None,
            "token_ids": text.tokens if text else [],
            "block_size": self._chunk,
            "lora_id": None,
            "medium": change.medium,
            "lora_name": text.lora_name if text else None,
            "extra_keys": [text.extras] if text and text.extras else None,
            "group_idx": change.group,
        }
        return kv_events.BlockStored(**{name: value for name, value in fields.items() if name in STORED_FIELDS})
