"""LMCache's storage as its controllers use it: adapters made by LMCache from its JSON, objects in host memory."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 30.0


def spec(roots: Sequence[str], **params: Any) -> dict[str, Any]:
    """What follows --l2-adapter."""
    return {
        "type": "native_plugin",
        "module_path": "tokendepot.engines.lmcache",
        "class_name": "DepotConnector",
        "adapter_params": {"roots": list(roots), **params},
    }


def key(number: int, model: str = "org/model", rank: int = 0x01000100, group: int = 0, salt: str = "") -> ObjectKey:
    return ObjectKey(hashlib.sha256(str(number).encode()).digest(), model, rank, group, salt)


def memory(size: int, seed: int | None = None) -> TensorMemoryObj:
    """An object of LMCache's: pseudo-random bytes of `seed`, or 0xEE."""
    if seed is None:
        raw = torch.full((size,), 0xEE, dtype=torch.uint8)
    else:
        raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    meta = MemoryObjMetadata(
        shape=torch.Size([size]),
        dtype=torch.uint8,
        address=0,
        phy_size=size,
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
    )
    return TensorMemoryObj(raw, meta, parent_allocator=None)


def content(held: TensorMemoryObj) -> bytes:
    return bytes(held.byte_array)


class Storage:
    """An L2 adapter with calls that wait. Objects are held until their task has ended, as LMCache's controllers do."""

    def __init__(self, adapter_spec: dict[str, Any]) -> None:
        parsed = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(adapter_spec)]))
        self.adapter = create_l2_adapter(parsed.adapters[0])

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *_: object) -> None:
        self.adapter.close()

    @staticmethod
    def _wait(descriptor: int) -> None:
        assert select.select([descriptor], [], [], PATIENCE_S)[0], "no completion"
        os.eventfd_read(descriptor)

    def store(self, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> bool:
        task = self.adapter.submit_store_task(keys, objects)
        ended: dict[int, Any] = {}
        while task not in ended:
            self._wait(self.adapter.get_store_event_fd())
            ended.update(self.adapter.pop_completed_store_tasks())
        return bool(ended[task].is_successful())

    def found(self, keys: list[ObjectKey]) -> list[bool]:
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        self._wait(self.adapter.get_lookup_and_lock_event_fd())
        bits = self.adapter.query_lookup_and_lock_result(task)
        self.adapter.submit_unlock(keys)
        return [bool(bits.test(i)) for i in range(len(keys))]

    def load(self, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> list[bool]:
        task = self.adapter.submit_load_task(keys, objects)
        self._wait(self.adapter.get_load_event_fd())
        bits = self.adapter.query_load_result(task)
        return [bool(bits.test(i)) for i in range(len(keys))]

    def statistics(self) -> dict[str, Any]:
        return self.adapter._client.stats()


def value(text: str, name: str, **labels: str) -> float:
    """Of the one series in Prometheus' text that has these labels among its own."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, f"{name}{labels}: {found}"
    return found[0]


def flip_bytes(root: Path, wanted: bytes) -> int:
    """Changes one bit behind each place where `wanted` is stored; returns how many there were."""
    flipped = 0
    for segment in (root / "segments").iterdir():
        stored = segment.read_bytes()
        at = stored.find(wanted)
        while at >= 0:
            with open(segment, "r+b") as file:
                file.seek(at)
                file.write(bytes([stored[at] ^ 1]))
            flipped += 1
            at = stored.find(wanted, at + 1)
    return flipped
