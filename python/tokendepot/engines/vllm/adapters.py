"""Identity of LoRA adapters, found out beside the scheduler's thread."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokendepot.engines.vllm.identity import content_digest, identity_files, snapshot_commit
from tokendepot.engines.vllm.settings import RefusedError


class PendingError(Exception):
    """The adapter's content is still being read; ask again."""


@dataclass
class Adapter:
    name: str
    path: str
    files: tuple[tuple[Any, ...], ...]
    identity: Future[bytes]


class Adapters:
    """Content identity by vLLM's adapter id.

    vLLM loads an adapter once and goes on using it, so files that change later are not what computes; an adapter whose
    id is seen again with another name, path or other files has no identity any more.
    """

    def __init__(self, roots: tuple[str, ...]) -> None:
        self._roots = roots
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokendepot-adapters")
        self._known: dict[int, Adapter] = {}

    def prepare(self, lora_request: Any) -> None:
        """Starts reading the adapter if that was not started."""
        number = int(lora_request.lora_int_id)
        if number in self._known:
            return
        name, path = str(lora_request.lora_name), str(lora_request.lora_path)
        files = _file_states(path)
        if files:
            work = self._pool.submit(self._identify, name, Path(path))
            self._known[number] = Adapter(name, path, files, work)

    def identity(self, lora_request: Any) -> bytes:
        """Name and content digest as one byte string. Raises PendingError, or RefusedError when it has none."""
        self.prepare(lora_request)
        name, path = str(lora_request.lora_name), str(lora_request.lora_path)
        adapter = self._known.get(int(lora_request.lora_int_id))
        if adapter is None:
            raise RefusedError(
                f'LoRA adapter "{name}" is not a local path, so its content cannot be identified'
            )
        if (adapter.name, adapter.path, adapter.files) != (name, path, _file_states(path)):
            raise RefusedError(
                f'LoRA adapter "{name}" changed since it was first used, so its content is not known any more'
            )
        if not adapter.identity.done():
            raise PendingError
        return adapter.identity.result()

    def _identify(self, name: str, path: Path) -> bytes:
        return f"{name}\0{snapshot_commit(path) or content_digest(path, self._roots)}".encode()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _file_states(path: str) -> tuple[tuple[Any, ...], ...]:
    """What the files look like from outside; empty when there are none."""
    try:
        return tuple(
            (str(file), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            for file in identity_files(Path(path))
            for status in [os.stat(file)]
        )
    except OSError:
        return ()
