"""A vLLM server as a child process: started, waited for, killed. Only process groups started here are ever signalled."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from client import Client, ServerFault


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def kv_transfer_config(roots: list[str]) -> str:
    """The one JSON string that puts the depot under vLLM."""
    return json.dumps(
        {
            "kv_connector": "TokendepotConnector",
            "kv_connector_module_path": "tokendepot.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"roots": roots},
        }
    )


def vllm_command(model: pathlib.Path, port: int, max_tokens: int, kv_config: str | None) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(max_tokens), "--block-size", "32", "--enforce-eager", "--max-num-seqs", "8"]
    command += ["--enable-prompt-tokens-details", "--dtype", "bfloat16" if has_gpu() else "float32"]
    if kv_config is not None:
        command += ["--kv-transfer-config", kv_config]
    return command


def vllm_environment(kv_cache_gib: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", PYTHONUNBUFFERED="1")
    if not has_gpu():
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
        # Where layers with and without a sliding window share a group (--disable-hybrid-kv-cache-manager), vLLM 0.32 splits
        # the attention of a token into parts of which some lie before the window, are never written, and are added times
        # 0: what memory held there by chance may be NaN, and then so is every token after the first.
        environment["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    return environment


class Server:
    """One run of a server. `command` gets the port that was chosen."""

    def __init__(self, command: Callable[[int], list[str]], environment: dict[str, str], log: pathlib.Path) -> None:
        self.log = log
        port = free_port()
        self.client = Client(f"http://127.0.0.1:{port}")
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command(port), env=environment, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )

    def wait_ready(self, timeout_s: float, tick: Callable[[float], None]) -> float:
        """Seconds until the server answered; ServerFault with the end of its log when it ends or takes too long."""
        begin = time.monotonic()
        while not self.client.ready():
            waited = time.monotonic() - begin
            if self._process.poll() is not None:
                raise ServerFault(f"the server ended with exit code {self._process.returncode}\n{self.log_tail()}")
            if waited > timeout_s:
                raise ServerFault(f"the server was not ready after {timeout_s:.0f} s\n{self.log_tail()}")
            tick(waited)
            time.sleep(0.25)
        return time.monotonic() - begin

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """kill -9 to the server and all its children; returns when none is left."""
        self.client.close()
        group = self._process.pid
        left_behind = shared_memory_of(group)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                for file in left_behind:
                    file.unlink(missing_ok=True)
                return
            self._process.poll()
            time.sleep(0.05)
        raise ServerFault(f"process group {group} is still there 30 s after kill -9")


def shared_memory_of(group: int) -> set[pathlib.Path]:
    """Shared memory of Python and LMCache and Python's semaphores that the group's processes have mapped: nobody unlinks
    them after kill -9."""
    found = set()
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or os.getpgid(int(entry.name)) != group:
                continue
            maps = (entry / "maps").read_text()
        except OSError:
            continue
        found |= {pathlib.Path(path) for path in re.findall(r"/dev/shm/(?:psm_|sem\.mp-|lmcache_l1_pool_)\w+", maps)}
    return found
