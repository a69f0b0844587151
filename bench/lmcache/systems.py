"""LMCache's storage, each made by LMCache from its own JSON; and the controls that say what the machine could do."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import select
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

PAGE = 4096
WORKERS = 8  # of those that say how many; the depot chooses for itself
META_BYTES = 16 << 20
LONGEST_TASK_S = 120.0


def adapter_json(system: str, folder: Path, chunk_bytes: int, volume_bytes: int, direct: bool) -> dict[str, Any]:
    """What follows --l2-adapter. Each has room for a little more than two rounds."""
    if system == "depot":
        return {
            "type": "native_plugin",
            "module_path": "tokendepot.engines.lmcache",
            "class_name": "DepotConnector",
            "adapter_params": {
                "roots": [f"{folder}/depot?capacity={max(5 * volume_bytes // 2, 16 << 20)}"],
                "free_space_reserve": 0,
                "on_error": "fail",
            },
        }
    if system == "fs":
        return {"type": "fs", "base_path": f"{folder}/fs", "use_odirect": direct}
    if system == "fs_native":
        return {"type": "fs_native", "base_path": f"{folder}/fs", "num_workers": WORKERS, "use_odirect": direct}
    slot = chunk_bytes + PAGE
    device = folder / "blocks"
    with open(device, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, META_BYTES + slot * (3 * volume_bytes // chunk_bytes + 8))
    return {
        "type": "raw_block",
        "device_path": str(device),
        "slot_bytes": slot,
        "meta_total_bytes": META_BYTES,
        "use_odirect": direct,
        "num_store_workers": WORKERS,
        "num_load_workers": WORKERS,
    }


class Arena:
    """The chunks of one round in one page-aligned range, as LMCache's L1 keeps them."""

    def __init__(self, chunk_bytes: int, chunks: int, seed: int) -> None:
        self.map = mmap.mmap(-1, chunk_bytes * chunks)
        self.tensor = torch.frombuffer(self.map, dtype=torch.uint8)
        if seed:
            self.tensor.random_(0, 256, generator=torch.Generator().manual_seed(seed))
        else:
            self.tensor.fill_(1)
        self.objects = [
            TensorMemoryObj(
                self.tensor[at : at + chunk_bytes],
                MemoryObjMetadata(
                    shape=torch.Size([chunk_bytes]),
                    dtype=torch.uint8,
                    address=at,
                    phy_size=chunk_bytes,
                    fmt=MemoryFormat.KV_2LTD,
                    ref_count=1,
                ),
                parent_allocator=None,
            )
            for at in range(0, chunk_bytes * chunks, chunk_bytes)
        ]

    def stamp(self, mark: int) -> None:
        """Makes every chunk another one."""
        for number, one in enumerate(self.objects):
            one.raw_data[:8] = torch.tensor(list((mark << 32 | number).to_bytes(8, "little")), dtype=torch.uint8)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()


class Storage:
    def __init__(self, system: str, folder: Path, chunk_bytes: int, volume_bytes: int, direct: bool) -> None:
        self.system = system
        self.folder = folder / system
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        spec = adapter_json(system, self.folder, chunk_bytes, volume_bytes, direct)
        parsed = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)]))
        self.adapter = create_l2_adapter(parsed.adapters[0])

    def close(self) -> None:
        self.adapter.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, descriptor: int) -> None:
        if not select.select([descriptor], [], [], LONGEST_TASK_S)[0]:
            raise RuntimeError(f"{self.system}: nothing ended within {LONGEST_TASK_S:.0f} s")
        os.eventfd_read(descriptor)

    def store(self, keys: list[ObjectKey], arena: Arena) -> None:
        task = self.adapter.submit_store_task(keys, arena.objects)
        ended: dict[int, Any] = {}
        while task not in ended:
            self._wait(self.adapter.get_store_event_fd())
            ended.update(self.adapter.pop_completed_store_tasks())
        if not ended[task].is_successful():
            raise RuntimeError(f"{self.system}: a store failed")

    def load(self, keys: list[ObjectKey], arena: Arena) -> None:
        missed = self.answers(keys, arena).count(False)
        if missed:
            raise RuntimeError(f"{self.system}: {missed} of {len(keys)} chunks were not loaded")

    def answers(self, keys: list[ObjectKey], arena: Arena) -> list[bool]:
        """Loads; whether LMCache is told that it has got each chunk."""
        task = self.adapter.submit_load_task(keys, arena.objects)
        found = None
        while found is None:
            self._wait(self.adapter.get_load_event_fd())
            found = self.adapter.query_load_result(task)
        return [bool(found.test(number)) for number in range(len(keys))]

    def exists(self, keys: list[ObjectKey]) -> int:
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        found = None
        while found is None:
            self._wait(self.adapter.get_lookup_and_lock_event_fd())
            found = self.adapter.query_lookup_and_lock_result(task)
        self.adapter.submit_unlock(keys)
        return found.popcount()


def keys_of(round_number: int, chunks: int) -> list[ObjectKey]:
    return [
        ObjectKey(hashlib.sha256(f"{round_number}/{number}".encode()).digest(), "org/model", 0x01000100)
        for number in range(chunks)
    ]


def in_threads(threads: int, work: Callable[[int], None]) -> float:
    """Seconds until work(0) ... work(threads - 1) are done."""
    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    began = time.perf_counter()
    for one in running:
        one.start()
    for one in running:
        one.join()
    return time.perf_counter() - began


def copy_rate(source: Arena, target: Arena, chunk_bytes: int, threads: int) -> float:
    """GB/s of memcpy between the arenas, chunk by chunk."""
    chunks = len(source.objects)

    def copy(number: int) -> None:
        for chunk in range(number, chunks, threads):
            ctypes.memmove(target.address + chunk * chunk_bytes, source.address + chunk * chunk_bytes, chunk_bytes)

    return chunks * chunk_bytes / in_threads(threads, copy) / 1e9


class RawFile:
    """Plain O_DIRECT reads and writes of whole chunks of one preallocated file, by as many threads as the others have."""

    def __init__(self, folder: Path, arena: Arena, chunk_bytes: int) -> None:
        self.path = folder / "raw"
        with open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, chunk_bytes * len(arena.objects))
        self._file = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        self._views = [memoryview(arena.map)[at : at + chunk_bytes] for at in range(0, len(arena.map), chunk_bytes)]
        self._bytes = chunk_bytes

    def rate(self, call: Callable[[int, list[memoryview], int], int]) -> float:
        """GB/s; `call` is os.preadv or os.pwritev."""

        def move(number: int) -> None:
            for chunk in range(number, len(self._views), WORKERS):
                moved = call(self._file, [self._views[chunk]], chunk * self._bytes)
                if moved != self._bytes:
                    raise RuntimeError(f"{self.path}: {moved} of {self._bytes} bytes moved")

        return len(self._views) * self._bytes / in_threads(WORKERS, move) / 1e9

    def close(self) -> None:
        os.close(self._file)
        self.path.unlink()
        self._views.clear()
