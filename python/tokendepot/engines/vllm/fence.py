"""Keeps a block from being written while a store may still be reading it.

A store reads its blocks after the step that filled them, beside later steps. Meanwhile the request may end, be
preempted, or slide its window on, and the engine may give its blocks to another request in the very next step. So
the scheduler half remembers the blocks of every store that not every rank has ended, and where a step writes to one of
them that was not its owner's before, the step's orders carry a fence: workers wait for their stores to have read all
blocks before they submit the step's loads and before its forward pass is launched.

Blocks that a request finds in the prefix cache are read only and need no fence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokendepot.engines.vllm.groups import Group


class StoreFence:
    def __init__(self, groups: list[Group], ranks: int) -> None:
        self._groups = groups
        self._ranks = ranks
        self._reading: dict[int, frozenset[int]] = {}  # store job -> blocks
        self._ended_by: dict[int, int] = {}
        self._allocated: set[int] = set()  # for loads of the step that is being scheduled

    def allocated(self, tables: list[list[int]], local_tokens: int) -> None:
        """A load will fill these tables from `local_tokens` on."""
        if self._reading:  # the stores of this step itself read blocks of requests that run
            self._allocated.update(self._from(tables, local_tokens))

    def needed_by(self, output: Any) -> bool:
        """Whether the step of this SchedulerOutput, or a load in it, writes to a block that is still being read. Call
        once a step, before the step's own stores begin."""
        fresh, self._allocated = self._allocated, set()
        if not self._reading:
            return False
        fresh.update(self._fresh_blocks(output))
        return self._is_read(fresh)

    def begin(self, job: int, blocks: Iterable[int]) -> None:
        self._reading[job] = frozenset(blocks)

    def ended(self, job: int, ranks: int) -> None:
        if job in self._reading:
            self._ended_by[job] = self._ended_by.get(job, 0) + ranks
            if self._ended_by[job] >= self._ranks:
                del self._reading[job], self._ended_by[job]

    def _is_read(self, blocks: set[int]) -> bool:
        return any(not reading.isdisjoint(blocks) for reading in self._reading.values())

    def _fresh_blocks(self, output: Any) -> Iterator[int]:
        for new in output.scheduled_new_reqs:
            yield from self._from(new.block_ids, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            tables = cached.new_block_ids[index]
            if tables is None:
                continue
            whole_table = request_id in cached.resumed_req_ids
            yield from self._from(tables, cached.num_computed_tokens[index] if whole_table else 0)

    def _from(self, tables: Iterable[Iterable[int]], tokens: int) -> Iterator[int]:
        for group, table in zip(self._groups, tables, strict=True):
            yield from list(table)[tokens // group.block_tokens :]
