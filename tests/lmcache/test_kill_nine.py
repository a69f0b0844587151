"""kill -9 to the process that stores, and the real server of LMCache on a depot."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="LMCache was not fetched: scripts/setup lmcache")

from server import running
from storage import Storage, content, key, memory, spec, value

WRITER = """
import sys
from storage import *
storage = Storage(spec([sys.argv[1]]))
for number in range(100000):
    if storage.store([key(number)], [memory(300_000, number)]):
        print(number, flush=True)
"""


def test_every_acknowledged_chunk_is_served_after_kill_nine(root: Path, environment: dict[str, str]) -> None:
    acknowledged: list[int] = []
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, f"{root}?capacity=512MiB"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert writer.stdout is not None
    for line in writer.stdout:
        acknowledged.append(int(line))
        if len(acknowledged) == 80:
            break
    writer.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    numbers = acknowledged
    assert len(numbers) >= 80
    with Storage(spec([f"{root}?capacity=512MiB"])) as storage:
        keys = [key(number) for number in numbers]
        assert storage.found(keys) == [True] * len(keys)
        back = [memory(300_000) for _ in keys]
        assert storage.load(keys, back) == [True] * len(keys)
        for number, got in zip(numbers, back, strict=True):
            assert content(got) == content(memory(300_000, number))


@pytest.mark.parametrize("usable", [True, False])
def test_lmcaches_server_starts_on_a_depot_and_without_one(
    memory_root: Path, environment: dict[str, str], tmp_path: Path, usable: bool
) -> None:
    if not usable:
        memory_root.mkdir()
        (memory_root / "something").write_text("else")
    with running(memory_root, environment, tmp_path / "server.log") as server:
        off = value(server.get("/metrics"), "tokendepot_switched_off_total")
    assert off == (0 if usable else 1)
    assert (memory_root / "DEPOT").exists() == usable
    assert server.log.count("runs without it") == (0 if usable else 1)
