"""The same demo with LMCache between vLLM and the depot: kill -9 takes LMCache's server, and with it its memory, too."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import client
import driver
import server

START_TIMEOUT_S = 120.0
L1_GB = 2  # LMCache's own memory


class LMCacheClient(client.Client):
    def ready(self) -> bool:
        try:
            return self._request("GET", "/healthcheck").status_code == 200
        except client.ServerFault:
            return False


class LMCacheServer(server.Server):
    """LMCache's server with the depot as its storage; `client` asks its HTTP side."""

    def __init__(self, roots: list[str], log: pathlib.Path) -> None:
        self.port = server.free_port()
        storage = {
            "type": "native_plugin",
            "module_path": "tokendepot.engines.lmcache",
            "class_name": "DepotConnector",
            "adapter_params": {"roots": roots, "on_error": "fail"},
        }

        def command(http_port: int) -> list[str]:
            arguments = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", "localhost"]
            arguments += ["--port", str(self.port), "--http-host", "127.0.0.1", "--http-port", str(http_port)]
            arguments += ["--l1-size-gb", str(L1_GB), "--l1-init-size-gb", str(L1_GB), "--no-l1-use-lazy"]
            arguments += ["--eviction-policy", "LRU", "--max-workers", "2"]
            if not server.has_gpu():
                arguments += ["--supported-transfer-mode", "engine_driven"]
            return [*arguments, "--l2-adapter", json.dumps(storage)]

        super().__init__(command, {**os.environ, "LMCACHE_TRACK_USAGE": "false"}, log)
        url = self.client.url
        self.client.close()
        self.client = LMCacheClient(url)


class LMCacheDemo(driver.Demo):
    # LMCache's transfers from an engine on the CPU take one group of layers.
    vllm_options = ("--disable-hybrid-kv-cache-manager",)
    sees_prompts = False
    cache: LMCacheServer | None = None

    @contextmanager
    def running(self, what: str, model: pathlib.Path, kv_config: str | None) -> Iterator[client.Client]:
        """As without LMCache; its server is there before vLLM, and killed after it."""
        if kv_config is None:
            with super().running(what, model, None) as api:
                yield api
            return
        self.progress.update(self.bar, description=f"starting LMCache, {what}")
        log = self.work / f"lmcache-{what.replace(' ', '-')}.log"
        self.cache = LMCacheServer(self.roots(), log)
        try:
            seconds = self.cache.wait_ready(START_TIMEOUT_S, lambda waited: self.progress.refresh())
            self.say(f"LMCache's server is up ({what}, {seconds:.0f} s)")
            extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": self.cache.port}
            connector = {**json.loads(kv_config), "kv_connector_extra_config": extra}
            with super().running(what, model, json.dumps(connector)) as api:
                yield api
        except client.ServerFault:
            self.options.out.mkdir(parents=True, exist_ok=True)
            (self.options.out / log.name).write_bytes(log.read_bytes())
            raise
        finally:
            self.cache.kill()
        self.say("kill -9 to LMCache's server")

    def kv_transfer_config(self) -> str:
        return json.dumps({"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"})

    def depot(self, api: client.Client) -> client.Client:
        assert self.cache is not None
        return self.cache.client

    def scraped(self, api: client.Client) -> dict[str, str]:
        return {**super().scraped(api), "lmcache": self.depot(api).url}


if __name__ == "__main__":
    sys.exit(driver.main(kind=LMCacheDemo))
