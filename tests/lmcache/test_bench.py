"""The benchmark against LMCache's own storage, at toy size."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="LMCache was not fetched: scripts/setup lmcache")

BENCH = Path(__file__).resolve().parents[2] / "bench" / "lmcache" / "run.py"
RESULT = re.compile(r"^RESULT lmcache_(\w+?)_(\w+) ([\d.e+]+) (GB/s|CPU-s/GB|keys/s)", re.MULTILINE)


def test_every_system_moves_the_same_bytes_and_is_measured(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--toy", "/dev/shm", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(medium, what) for medium, what, value, _ in RESULT.findall(done.stdout) if float(value) > 0}
    media = set(re.findall(r"^# (\w+) ", done.stdout, re.MULTILINE))
    assert "tmpfs" in media
    for medium in media:
        assert (medium, "exists_native_depot") in found
        for system in ("depot", "fs_native", "fs", "raw_block"):
            for what in ("store", "store_cpu", "load", "load_cpu", "exists", "exists_single"):
                assert (medium, f"{what}_{system}") in found
    assert "RESULT lmcache_tmpfs_flipped_bit_given_depot 0 wrong chunks" in done.stdout


def test_look_ups_below_lmcache_are_of_the_order_that_is_promised(memory_root: Path) -> None:
    """1 M keys/s is promised and three times that measured; a quarter of it, in the best of many batches of 1 to 4 ms, holds
    on a machine that does other things, too."""
    from storage import Storage, key, memory, spec

    from tokendepot.engines.lmcache import DepotConnector

    keys = [key(number) for number in range(64)]
    with Storage(spec([f"{memory_root}?capacity=64MiB"])) as storage:
        assert storage.store(keys, [memory(65536, number) for number in range(64)])
    texts = [f"{one.model_name}@{one.kv_rank:08x}@0@{one.chunk_hash.hex()}" for one in keys] * 16
    connector = DepotConnector(roots=[f"{memory_root}?capacity=64MiB"], on_error="fail")
    best = float("inf")
    for _ in range(100):
        began = time.perf_counter()
        connector.submit_batch_exists(texts)
        ((_, _, _, found),) = connector.drain_completions()
        best = min(best, time.perf_counter() - began)
        assert len(found) == len(texts) and all(found)
    connector.close()
    assert len(texts) / best >= 1e6 / 4


def test_wrong_options_are_refused_by_what_is_allowed(environment: dict[str, str]) -> None:
    command = [sys.executable, str(BENCH), "--systems", "depot,other"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "'other'" in done.stderr and "raw_block" in done.stderr
