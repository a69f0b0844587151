"""LMCache's storage on a depot against LMCache's own: store, load and exists through LMCache's adapters, in turns.

usage: run.py [--toy] [--chunk-bytes N] [--chunks N] [--rounds N] [--systems depot,fs_native,...] [FOLDER ...]

LMCache must be importable (scripts/setup lmcache; PYTHONPATH). Each FOLDER is a medium: on tmpfs the limit is memcpy by
two threads, elsewhere plain O_DIRECT reads and writes of one preallocated file, and all systems use O_DIRECT. Lines:
RESULT lmcache_<medium>_<what>_<system> value unit limit value ratio value; values and ratios are medians over the rounds,
in which the systems and the limit take turns. On tmpfs one bit of each is changed at the end. Default folders: /dev/shm and TOKENDEPOT_BENCH_DIR (/var/tmp).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ["LMCACHE_TRACK_USAGE"] = "false"
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")

import torch  # noqa: E402

from tokendepot import _core  # noqa: E402

from systems import Arena, RawFile, Storage, copy_rate, keys_of  # noqa: E402

SYSTEMS = ("depot", "fs_native", "fs", "raw_block")
COPY_THREADS = 2
WARM_UP_ROUNDS = 3  # until the depot writes into recycled segments
EXISTS_BATCH = 1024


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--chunk-bytes", type=int, default=2 << 20)
    parser.add_argument("--chunks", type=int, default=128, help="of one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    chosen = parser.parse_args()
    chosen.systems = chosen.systems.split(",")
    for name in chosen.systems:
        if name not in SYSTEMS:
            parser.error(f"--systems has {name!r} but must be some of {', '.join(SYSTEMS)}")
    if chosen.chunk_bytes < 4096 or chosen.chunk_bytes % 4096:
        parser.error(f"--chunk-bytes is {chosen.chunk_bytes} but must be a multiple of 4096")
    for name in ("chunks", "rounds"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} is {getattr(chosen, name)} but must be 1 or more")
    if chosen.toy:
        chosen.chunk_bytes, chosen.chunks, chosen.rounds = 65536, 16, 1
    chosen.folders = chosen.folders or [Path("/dev/shm"), Path(os.environ.get("TOKENDEPOT_BENCH_DIR", "/var/tmp"))]
    for folder in chosen.folders:
        if not folder.is_dir():
            parser.error(f"{folder} is not a directory")
    return chosen


def is_memory(folder: Path) -> bool:
    told = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True)
    return told.stdout.strip() == "tmpfs"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Medium:
    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.memory = is_memory(folder)
        self.name = "tmpfs" if self.memory else "disk"
        self.bytes = options.chunk_bytes * options.chunks
        self.folder = Path(tempfile.mkdtemp(prefix="tokendepot-bench-", dir=folder))
        self.given = Arena(options.chunk_bytes, options.chunks, seed=7)
        self.back = Arena(options.chunk_bytes, options.chunks, seed=0)
        self.rates: dict[tuple[str, str], list[float]] = defaultdict(list)  # (what, system or "limit") -> GB/s
        self.costs: dict[tuple[str, str], list[float]] = defaultdict(list)  # CPU-s/GB
        self.lookups: dict[tuple[str, str], list[float]] = defaultdict(list)  # keys/s

    def limits(self, raw: RawFile | None) -> None:
        if raw is None:
            for what in ("store", "load"):
                rate = copy_rate(self.given, self.back, self.options.chunk_bytes, COPY_THREADS)
                self.rates[what, "limit"].append(rate)
            return
        self.rates["store", "limit"].append(raw.rate(os.pwritev))
        self.rates["load", "limit"].append(raw.rate(os.preadv))

    def turn(self, storage: Storage, number: int, counted: bool) -> None:
        keys = keys_of(number, self.options.chunks)
        self.given.stamp(number)
        for what in ("store", "load"):
            self.back.tensor.fill_(0)
            cpu, began = cpu_seconds(), time.perf_counter()
            (storage.store if what == "store" else storage.load)(keys, self.given if what == "store" else self.back)
            seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
            if counted:
                self.rates[what, storage.system].append(self.bytes / seconds / 1e9)
                self.costs[what, storage.system].append(cpu / self.bytes * 1e9)
        if not bool((self.back.tensor == self.given.tensor).all()):
            raise RuntimeError(f"{storage.system}: other bytes came back")
        if counted:
            self.look_up(storage, keys)
        if storage.system != "depot":  # it evicts; the others would fill the medium
            storage.adapter.delete(keys)

    def look_up(self, storage: Storage, keys: list) -> None:
        batch = (keys * (EXISTS_BATCH // len(keys) + 1))[:EXISTS_BATCH]
        self.time("exists", storage.system, len(batch), lambda: storage.exists(batch))
        few = batch[:EXISTS_BATCH // 8]
        self.time("exists_single", storage.system, len(few), lambda: [storage.exists([key]) for key in few])

    def look_up_below_lmcache(self, keys: list) -> None:
        """Without LMCache's bookkeeping around it: its key texts in, answers out."""
        texts = [f"{key.model_name}@{key.kv_rank:08x}@0@{key.chunk_hash.hex()}" for key in keys]
        batch = (texts * (EXISTS_BATCH // len(keys) + 1))[:EXISTS_BATCH]
        roots = json.dumps({"roots": [f"{self.folder}/depot/depot?capacity=1GiB&read_only=true"]})
        connector = _core.LMCacheConnector.open(roots, namespace_json="{}", load_timeout_s=1)

        def ask() -> None:
            connector.submit_batch_exists(batch)
            (_, _, _, found), = connector.drain_completions()
            if not all(found):
                raise RuntimeError("depot: what was stored is not found")

        for _ in range(self.options.rounds):
            self.time("exists_native", "depot", len(batch), ask)
        connector.close()

    def time(self, what: str, system: str, keys: int, call: Callable[[], object]) -> None:
        call()
        began = time.perf_counter()
        call()
        self.lookups[what, system].append(keys / (time.perf_counter() - began))

    def run(self) -> None:
        raw = None if self.memory else RawFile(self.folder, self.back, self.options.chunk_bytes)
        storages = []
        try:
            for system in self.options.systems:
                storages.append(
                    Storage(system, self.folder, self.options.chunk_bytes, self.bytes, direct=not self.memory)
                )
            for number in range(WARM_UP_ROUNDS + self.options.rounds):
                counted = number >= WARM_UP_ROUNDS
                turn = number % len(storages)
                for storage in storages[turn:] + storages[:turn]:
                    self.turn(storage, number, counted)
                if counted:
                    self.limits(raw)
            if "depot" in self.options.systems:
                self.look_up_below_lmcache(keys_of(number, self.options.chunks))
            if self.memory:
                for storage in storages:
                    self.flip_one_bit(storage, number + 1)
        finally:
            for storage in storages:
                storage.close()
            if raw is not None:
                raw.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def flip_one_bit(self, storage: Storage, number: int) -> None:
        """Stores a round anew, changes one bit on the medium and counts the chunks that LMCache is then given wrong."""
        keys = keys_of(number, self.options.chunks)
        self.given.stamp(number)
        storage.store(keys, self.given)
        wanted = bytes(self.given.objects[0].byte_array[:64])  # the stamp makes it the only one
        for file in storage.folder.rglob("*"):
            if not file.is_file() or file.stat().st_size == 0:
                continue
            with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as content:
                at = content.find(wanted)
                if at >= 0:
                    content[at] ^= 1
        self.back.tensor.fill_(0)
        answers = storage.answers(keys, self.back)
        pairs = zip(answers, self.back.objects, self.given.objects, strict=True)
        wrong = sum(told and not torch.equal(got.raw_data, given.raw_data) for told, got, given in pairs)
        line(f"{self.name}_flipped_bit_given_{storage.system}", wrong, "wrong chunks")

    def show(self) -> None:
        for (what, system), values in self.rates.items():
            if system == "limit":
                continue
            limits = self.rates[what, "limit"]
            ratio = statistics.median(mine / limit for mine, limit in zip(values, limits, strict=True))
            line(f"{self.name}_{what}_{system}", statistics.median(values), "GB/s", statistics.median(limits), ratio)
            line(f"{self.name}_{what}_cpu_{system}", statistics.median(self.costs[what, system]), "CPU-s/GB")
        for (what, system), values in self.lookups.items():
            line(f"{self.name}_{what}_{system}", statistics.median(values), "keys/s")


def line(name: str, value: float, unit: str, limit: float | None = None, ratio: float | None = None) -> None:
    beside = "" if limit is None or ratio is None else f" limit {limit:.4g} ratio {ratio:.3f}"
    print(f"RESULT lmcache_{name} {value:.4g} {unit}{beside}", flush=True)


def main() -> int:
    options = arguments()
    for folder in options.folders:
        medium = Medium(folder, options)
        print(f"# {medium.name} {folder}: {options.chunks} chunks of {options.chunk_bytes} bytes a round", flush=True)
        medium.run()
        medium.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
