"""The benchmark against LMCache's own storage, at toy size."""

from __future__ import annotations

import re
import subprocess
import sys
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


def test_wrong_options_are_refused_by_what_is_allowed(environment: dict[str, str]) -> None:
    command = [sys.executable, str(BENCH), "--systems", "depot,other"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "'other'" in done.stderr and "raw_block" in done.stderr
