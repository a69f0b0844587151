"""The connector with a clock at every hook and a switch before it; vLLM loads it in place of the plain one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tokendepot.engines.vllm import TokendepotConnector

from hook_events import DIRECTORY_VARIABLE, HOOKS, Recorder, Switch


class TimedConnector(TokendepotConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._recorder = Recorder(os.environ[DIRECTORY_VARIABLE], len(kv_cache_config.kv_cache_groups))
        self._switch = Switch(os.environ[DIRECTORY_VARIABLE])
        super().__init__(vllm_config, role, kv_cache_config)

    def without_depot(self, call: Callable[[], Any]) -> Any:
        """The answer of a connector that has no depot: every hook returns at once."""
        halves = self._scheduler_half, self._worker_half
        self._scheduler_half = self._worker_half = None
        try:
            return call()
        finally:
            self._scheduler_half, self._worker_half = halves


def _describe(name: str, arguments: tuple[Any, ...], answer: Any) -> tuple[bool, int, int]:
    if name == "build_connector_meta":
        output = arguments[0]
        busy = bool(answer.loads or answer.stores or answer.holds or answer.drops)
        return busy, len(output.num_scheduled_tokens), output.total_num_scheduled_tokens
    return name == "build_connector_worker_meta" and answer is not None, 0, 0


def _timed(number: int, name: str) -> Callable[..., Any]:
    plain = getattr(TokendepotConnector, name)

    def hook(self: TimedConnector, *arguments: Any, **named: Any) -> Any:
        if not self._switch.on:
            return self.without_depot(lambda: plain(self, *arguments, **named))
        return self._recorder.timed(
            number,
            lambda: plain(self, *arguments, **named),
            lambda answer: _describe(name, arguments, answer),
        )

    return hook


for _number, _name in enumerate(HOOKS):
    if hasattr(TokendepotConnector, _name):  # older vLLMs know fewer hooks
        setattr(TimedConnector, _name, _timed(_number, _name))
