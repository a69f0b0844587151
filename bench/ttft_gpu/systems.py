"""What is compared: how each system is configured, and where it keeps KV."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST_BYTES = 24 * 10**9  # memory of the systems that keep KV in the engine's process
LMCACHE_PORT, LMCACHE_HTTP_PORT = 5655, 5656
STORE_QUEUE = "24GiB"  # of the depot: nothing is dropped on a slow disk
# vLLM names the memory of its tiers after the engine's id; it outlives an engine that is killed.
ENGINE_ID = f"ttft-gpu-{os.getpid()}"


@dataclass(frozen=True)
class System:
    restarts: bool  # keeps KV beyond the process; or is asked again after a restart, as what computes is
    needs_place: bool


SYSTEMS = {
    "base": System(restarts=True, needs_place=False),
    "depot": System(restarts=True, needs_place=True),
    "offload": System(restarts=False, needs_place=False),
    "fs": System(restarts=True, needs_place=True),
    "lmcache": System(restarts=True, needs_place=True),
    "lmcache-depot": System(restarts=True, needs_place=True),
}
PLACES = ("shm", "disk", "loop")


def transfer_config(system: str, folder: str, capacity: str, depot: dict[str, Any]) -> dict[str, Any] | None:
    """vLLM's kv_transfer_config; `depot`: options that replace the benchmark's."""
    both: dict[str, Any] = {"kv_role": "kv_both"}
    extra: dict[str, Any]
    if system == "depot":
        extra = {"roots": [f"{folder}?capacity={capacity}"], "store_queue": STORE_QUEUE, "on_error": "fail", **depot}
        return both | {
            "kv_connector": "TokendepotConnector",
            "kv_connector_module_path": "tokendepot.engines.vllm",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
    if system in ("offload", "fs"):
        extra = {"cpu_bytes_to_use": HOST_BYTES}
        if system == "fs":
            extra |= {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs", "root_dir": folder}]}
        return both | {
            "kv_connector": "OffloadingConnector",
            "engine_id": ENGINE_ID,
            "kv_connector_extra_config": extra,
        }
    if system in ("lmcache", "lmcache-depot"):
        extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": LMCACHE_PORT}
        return both | {"kv_connector": "LMCacheMPConnector", "kv_connector_extra_config": extra}
    return None


class Place:
    """An empty folder of one kind of medium; "loop" is an ext4 image in memory, which stands for a fast NVMe."""

    def __init__(self, kind: str, disk: Path, image_bytes: int) -> None:
        self.kind = kind
        self._image = Path("/dev/shm/ttft_gpu.img")
        self.folder = {
            "shm": Path("/dev/shm/ttft_gpu"),
            "disk": disk / "ttft_gpu",
            "loop": Path("/tmp/ttft_gpu_loop"),
        }[kind]
        self.root = self.folder / "kv"
        self.close()
        try:
            self.folder.mkdir(parents=True)
            if kind == "loop":
                with open(self._image, "wb") as file:
                    file.truncate(image_bytes)
                subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(self._image)], check=True)
                subprocess.run(["mount", "-o", "loop", str(self._image), str(self.folder)], check=True)
            self.root.mkdir(mode=0o700)
        except BaseException:
            self.close()
            raise

    def forget_page_cache(self) -> None:
        if self.kind != "shm":
            os.sync()
            try:
                Path("/proc/sys/vm/drop_caches").write_text("3")
            except OSError as error:
                print(f"# page cache not dropped: {error.strerror}", flush=True)

    def close(self) -> None:
        if self.kind == "loop":
            subprocess.run(["umount", str(self.folder)], check=False, stderr=subprocess.DEVNULL)
            self._image.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def lmcache_storage(system: str, folder: str, capacity: str) -> dict[str, Any]:
    """What LMCache's server keeps KV in below its own memory: its --l2-adapter."""
    if system == "lmcache":
        return {"type": "fs_native", "base_path": folder, "num_workers": 16, "use_odirect": False}
    return {
        "type": "native_plugin",
        "module_path": "tokendepot.engines.lmcache",
        "class_name": "DepotConnector",
        "adapter_params": {"roots": [f"{folder}?capacity={capacity}"], "on_error": "fail"},
    }


class LMCacheServer:
    """LMCache in its multi-process mode: the one that gives right answers on vLLM 0.26."""

    def __init__(
        self, adapter: dict[str, Any], log: Path, start: Callable[[list[str], Path], subprocess.Popen]
    ) -> None:
        command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", "localhost"]
        command += ["--port", str(LMCACHE_PORT), "--http-port", str(LMCACHE_HTTP_PORT)]
        command += ["--l1-size-gb", "24", "--l1-init-size-gb", "24", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
        command += ["--max-workers", "4", "--l2-adapter", json.dumps(adapter)]
        self.process = start(command, log)
        try:
            self._wait_ready(log)
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self, log: Path) -> None:
        for _ in range(240):
            if self.process.poll() is not None:
                raise RuntimeError(f"the LMCache server ended with {self.process.returncode}, see {log}")
            with socket.socket() as probe:
                probe.settimeout(0.5)
                if probe.connect_ex(("localhost", LMCACHE_PORT)) == 0:
                    return
            time.sleep(0.5)
        raise RuntimeError(f"the LMCache server does not answer on port {LMCACHE_PORT}, see {log}")

    def stop(self) -> None:
        """Kills it; its memory, which LMCache names after the process, would outlive that."""
        end_session(self.process)
        Path(f"/dev/shm/lmcache_l1_pool_{self.process.pid}").unlink(missing_ok=True)


def end_engine(process: subprocess.Popen) -> None:
    end_session(process)
    Path(f"/dev/shm/vllm_offload_{ENGINE_ID}.mmap").unlink(missing_ok=True)


def end_session(process: subprocess.Popen) -> None:
    """Ends a process that was started in a session of its own, and everything it started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()
