"""The real server of LMCache on a depot, asked over HTTP, and LMCache's own client that stores into it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import storage

LMCACHE = [sys.executable, "-m", "lmcache.cli.main"]
PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One that answers. `log` is what it has written so far."""

    def __init__(self, root: Path, environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._environment = environment
        self._rpc = free_port()
        self._url = f"http://127.0.0.1:{(http := free_port())}"
        command = [*LMCACHE, "server", "--host", "localhost", "--port", str(self._rpc)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(http), "--supported-transfer-mode", "engine_driven"]
        command += ["--l1-size-gb", "1", "--l1-init-size-gb", "1", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
        command += ["--max-workers", "1", "--l2-adapter", json.dumps(storage.spec([f"{root}?capacity=64MiB"]))]
        with open(log, "wb") as out:
            self._process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_healthy(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self._process.poll() is None, self.log[-3000:]
            try:
                assert json.loads(self.get("/healthcheck"))["status"] == "healthy"
                return
            except OSError:
                time.sleep(0.25)
        raise AssertionError(f"no answer within {PATIENCE_S:g} s: {self.log[-3000:]}")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def client(self, prompts: int) -> None:
        """LMCache's own client looks up, loads and stores `prompts` prompts of two chunks, the same in every call."""
        command = [*LMCACHE, "bench", "server", "--mode", "cpu", "--rpc-url", f"tcp://localhost:{self._rpc}"]
        command += ["--url", self._url, "--num-tokens", "512", "--start", "0", "--end", str(prompts), "--interval", "0"]
        command += ["--kvcache-shape-spec", "(2,64,16,2,32):float16:2", "--num-blocks", "64"]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        # LMCache names its memory after the process, and a killed one leaves it.
        Path(f"/dev/shm/lmcache_l1_pool_{self._process.pid}").unlink(missing_ok=True)


@contextmanager
def running(root: Path, environment: dict[str, str], log: Path) -> Iterator[Server]:
    """Killed with -9 at the end of the block."""
    server = Server(root, environment, log)
    try:
        server.wait_healthy()
        yield server
    finally:
        server.kill()


def wait_for(figure: Callable[[], float], least: float) -> float:
    """The first answer of `figure` that is at least `least`."""
    end = time.monotonic() + PATIENCE_S
    while (now := figure()) < least and time.monotonic() < end:
        time.sleep(0.1)
    assert now >= least, f"{now} within {PATIENCE_S:g} s, expected {least} or more"
    return now
