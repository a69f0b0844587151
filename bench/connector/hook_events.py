"""What the hooks of a connector took, one record a call: written in the engine's processes, read by the benchmark."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIRECTORY_VARIABLE = "TOKENDEPOT_BENCH_HOOKS"  # tells the engine's processes where to write

# In the order of one engine step, the scheduler's before and after the worker's.
HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_transfer_results",
    "get_finished",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "get_kv_connector_kv_cache_events",
    "build_connector_worker_meta",
    "clear_connector_metadata",
    "update_connector_output",
    "take_events",
    "request_finished",
    "request_finished_all_groups",
)
STEP = HOOKS.index("build_connector_meta")  # called once an engine step
_RECORD = struct.Struct("<qqHHii")
_MOST_RECORDS = 1 << 20
_FILE = "hooks-{who}.bin"
_GROUPS = "groups"
_SWITCH = "switch"


class Switch:
    """One byte that the benchmark and the engine's processes share: whether the hooks reach the depot."""

    def __init__(self, directory: str | Path) -> None:
        with open(Path(directory) / _SWITCH, "a+b") as file:
            if not file.tell():
                file.write(b"\1")
                file.flush()
            self._byte = mmap.mmap(file.fileno(), 1)

    @property
    def on(self) -> bool:
        return self._byte[0] != 0

    def set(self, on: bool) -> None:
        self._byte[0] = on


@dataclass(frozen=True)
class Event:
    """Times are nanoseconds of the monotonic clock, which all processes of a machine share."""

    begin: int
    duration: int
    hook: int
    busy: bool  # it gave or reported work: something to load, to store or to verify
    requests: int  # of the step, told by build_connector_meta only
    tokens: int


@dataclass
class Step:
    requests: int
    tokens: int
    busy: bool = False
    took: dict[int, int] = field(default_factory=dict)  # hook -> ns

    @property
    def total(self) -> int:
        return sum(self.took.values())


class Recorder:
    """Records calls of one connector object; a call within another one is part of that."""

    def __init__(self, directory: str, groups: int) -> None:
        path = Path(directory)
        (path / _GROUPS).write_text(str(groups))
        with open(path / _FILE.format(who=f"{os.getpid()}-{id(self)}"), "x+b") as file:
            file.truncate(_MOST_RECORDS * _RECORD.size)
            self._records = mmap.mmap(file.fileno(), 0)  # a system call for each record would be part of the step
        self._count = 0
        self._inside = False

    def timed(self, hook: int, call: Callable[[], Any], describe: Callable[[Any], tuple[bool, int, int]]) -> Any:
        """call()'s answer; `describe` turns it into (busy, requests, tokens) outside of what is timed."""
        if self._inside:
            return call()
        self._inside = True
        begin = time.perf_counter_ns()
        try:
            answer = call()
        finally:
            duration = time.perf_counter_ns() - begin
            self._inside = False
        busy, requests, tokens = describe(answer)
        if self._count < _MOST_RECORDS:
            _RECORD.pack_into(self._records, self._count * _RECORD.size, begin, duration, hook, busy, requests, tokens)
            self._count += 1
        return answer


def group_count(directory: Path) -> int:
    """KV-cache groups of the engine that wrote here."""
    return int((directory / _GROUPS).read_text())


def read_events(directory: Path) -> list[Event]:
    """Of all processes that wrote here, by time."""
    events = []
    for file in directory.glob(_FILE.format(who="*")):
        for begin, duration, hook, busy, requests, tokens in _RECORD.iter_unpack(file.read_bytes()):
            if not begin:
                break
            events.append(Event(begin, duration, hook, bool(busy), requests, tokens))
    return sorted(events, key=lambda event: event.begin)


def steps_of(events: Iterable[Event]) -> list[Step]:
    """Engine steps, each from its build_connector_meta to the next one's; what comes before the first is left out."""
    steps: list[Step] = []
    for event in events:
        if event.hook == STEP:
            steps.append(Step(event.requests, event.tokens))
        if steps:
            step = steps[-1]
            step.busy |= event.busy
            step.took[event.hook] = step.took.get(event.hook, 0) + event.duration
    return steps
