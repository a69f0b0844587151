"""kill -9 to the process that stores, and the real server of LMCache on a depot."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="LMCache was not fetched: scripts/setup lmcache")

from storage import Storage, content, key, memory, spec

MIB = 1 << 20
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("usable", [True, False])
def test_lmcaches_server_starts_on_a_depot_and_without_one(
    memory_root: Path, environment: dict[str, str], tmp_path: Path, usable: bool
) -> None:
    if not usable:
        memory_root.mkdir()
        (memory_root / "something").write_text("else")
    http = free_port()
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", "localhost"]
    command += ["--port", str(free_port()), "--http-host", "127.0.0.1", "--http-port", str(http)]
    command += ["--l1-size-gb", "1", "--l1-init-size-gb", "1", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
    command += ["--max-workers", "1", "--l2-adapter", json.dumps(spec([f"{memory_root}?capacity=64MiB"]))]
    log = tmp_path / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        healthy = False
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{http}/healthcheck", timeout=1) as answer:
                    healthy = json.load(answer)["status"] == "healthy"
                break
            except OSError:
                time.sleep(0.25)
        assert healthy
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    said = log.read_text()
    assert (memory_root / "DEPOT").exists() == usable
    assert said.count("runs without it") == (0 if usable else 1)
