"""The class that LMCache's `native_plugin` adapter makes and calls: its native connector contract over a depot."""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from tokendepot import _core
from tokendepot.engines.lmcache.metrics import storages
from tokendepot.engines.lmcache.settings import DEFAULTS, RefusedError, on_error_choice, read_settings
from tokendepot.engines.options import effective

log = logging.getLogger("tokendepot.lmcache")


class DepotConnector:
    """Keeps LMCache's chunks in the depot's roots. `params` are LMCache's `adapter_params`, see docs/lmcache.md.

    `on_error` decides about a depot that cannot be opened: "disable" logs one error line and every batch is answered
    as a miss or a failed store, "fail" raises RefusedError, with which LMCache's server does not start. What it counts is
    in prometheus_client's registry, which that server shows at /metrics. Thread-safe.
    """

    def __init__(self, **params: Any) -> None:
        fail = on_error_choice(params) == "fail"
        self._depot: _core.LMCacheConnector | _Closed
        try:
            settings = read_settings(params)
            log.info("tokendepot: %s", effective(params, DEFAULTS, settings.engine_json))
            self._depot = _core.LMCacheConnector.open(
                settings.engine_json,
                namespace_json=settings.namespace_json,
                load_timeout_s=settings.load_timeout,
            )
            storages.opened(self._depot)
        except (RefusedError, _core.DepotError) as error:
            if fail:
                raise RefusedError(f"tokendepot cannot serve this LMCache: {error}") from error
            log.error("tokendepot: not used, LMCache runs without it: %s", error)
            self._depot = _Closed(str(error))
            storages.refused()
        self._lock = threading.Lock()
        self._lookups: set[int] = set()  # batches whose answers are to be counted
        # The engine's threads must end before the interpreter does.
        atexit.register(_close, weakref.ref(self._depot))

    def event_fd(self) -> int:
        return self._depot.event_fd()

    def submit_batch_set(self, keys: Sequence[str], buffers: Sequence[Any]) -> int:
        return self._depot.submit_batch_set(keys, buffers)

    def submit_batch_get(self, keys: Sequence[str], buffers: Sequence[Any]) -> int:
        return self._depot.submit_batch_get(keys, buffers)

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        with self._lock:  # its answer may be drained by another thread before this one knows its number
            job = self._depot.submit_batch_exists(keys)
            self._lookups.add(job)
        return job

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        return self._depot.submit_batch_delete(keys)

    def drain_completions(self) -> list[tuple[int, bool, str, list[bool]]]:
        ended = self._depot.drain_completions()
        with self._lock:
            answers = [found for job, _, _, found in ended if job in self._lookups]
            self._lookups.difference_update(job for job, *_ in ended)
        if answers:
            storages.looked_up(sum(map(len, answers)), sum(map(sum, answers)))
        return ended

    def stats(self) -> dict[str, Any]:
        """The fields of include/tokendepot/stats.h by their names; empty where no depot is open."""
        return dict(json.loads(self._depot.stats_json()))

    def close(self) -> None:
        storages.closed(self._depot)
        self._depot.close()


class _Closed:
    """The same contract where there is no depot: every key is a miss, every store fails."""

    def __init__(self, why: str) -> None:
        self._why = why
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._next = 0
        self._ended: list[tuple[int, bool, str, list[bool]]] = []

    def event_fd(self) -> int:
        return self._event

    def _refuse(self, keys: Sequence[str], ok: bool = False) -> int:
        with self._lock:
            self._next += 1
            self._ended.append((self._next, ok, "" if ok else self._why, [False] * len(keys)))
            os.eventfd_write(self._event, 1)
            return self._next

    def submit_batch_set(self, keys: Sequence[str], buffers: Sequence[Any]) -> int:
        return self._refuse(keys)

    def submit_batch_get(self, keys: Sequence[str], buffers: Sequence[Any]) -> int:
        return self._refuse(keys)

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        return self._refuse(keys, ok=True)

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        return self._refuse(keys, ok=True)

    def drain_completions(self) -> list[tuple[int, bool, str, list[bool]]]:
        with self._lock:
            ended, self._ended = self._ended, []
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                pass
        return ended

    def stats_json(self) -> str:
        return "{}"

    def close(self) -> None:
        with self._lock:
            if self._event >= 0:
                os.close(self._event)
            self._event = -1


def _close(depot: weakref.ref[Any]) -> None:
    alive = depot()
    if alive is not None:
        alive.close()
