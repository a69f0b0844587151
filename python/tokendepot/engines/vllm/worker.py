"""The half in each worker process: moves this rank's shards and reports what failed.

Contracts with vLLM that this file stands on:
* Every load order is answered on every rank: finished, and with the blocks that failed at the latest in that step.
* A load is answered only when the depot has said that it writes no more of its blocks.
* On the host wait_for_save() returns only when all bytes of this step's stores have left the cache. On a GPU it is
  called while the step's kernels are still queued and must not wait for them: stores are ordered behind them on the
  device, and a block that is given away meanwhile is protected by the fence of the step that writes to it (fence.py).
* handle_preemptions() is called with a step's orders before anything of that step touches the cache.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import torch

from tokendepot import _core
from tokendepot.engines.vllm import self_test, versions
from tokendepot.engines.vllm.geometry import (
    attach_arguments,
    block_cells,
    cache_device,
    check_cells,
    layer_planes,
)
from tokendepot.engines.vllm.groups import CANONICAL, Group, Placement, describe_groups
from tokendepot.engines.vllm.messages import HoldOrder, LoadOrder, StepOrders, StepReport
from tokendepot.engines.vllm.settings import RefusedError, Settings
from tokendepot.engines.vllm.stats import DepotStats, EngineCounters

GATHER_SLICE_S = 5.0
FLUSH_AT_CLOSE_S = 5.0
STATS_EVERY_S = 5.0  # while nothing happens; right away when a job has ended
FAILURE_LINE_EVERY_S = 10.0
STORE_QUEUE_BYTES = 512 << 20  # the engine's default
STORE_QUEUE_STEPS = 2  # whose stores fit the queue unless the operator says otherwise


class WorkerHalf:
    """One per rank. Not thread-safe: vLLM calls it from the worker's thread only."""

    def __init__(self, settings: Settings, vllm_config: Any, kv_cache_config: Any) -> None:
        parallel = vllm_config.parallel_config
        self._placement = Placement(
            parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.rank
        )
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._groups = describe_groups(vllm_config, kv_cache_config, settings)
        self._storing_groups = {group.index for group in self._groups if group.stores(self._placement)}
        self._settings = settings
        self._depot: _core.Depot | None = None  # until attach(): before, nobody knows on which device the cache is
        self._device = "host"
        self._stores_hold_up_step = True
        self._loading: dict[int, LoadOrder] = {}
        self._holding: set[int] = set()  # hold jobs under way
        self._finished: set[str] = set()
        self._failed_requests: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._report = StepReport()
        self._counters = EngineCounters(self._placement.rank)
        self._scheduler_counts: dict[str, float] = {}
        self._stats_due = 0.0
        self._failure_line_due = 0.0
        self._unsaid_failures: dict[str, int] = {}
        self._off = ""
        self._off_uncounted = False

    # --- the cache -----------------------------------------------------------------------------------------------

    def attach(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Opens the depot on the cache's device and lends it the cache. RefusedError: a tensor is not understood."""
        names = [name for group in self._groups for name in group.layer_names]
        self._device = cache_device(kv_caches.get(name) for name in names)
        chosen = self._settings.engine.get("device", self._device)
        if chosen != self._device:
            raise RefusedError(f'"device" is {json.dumps(chosen)} but the KV cache is on "{self._device}"')
        # Engines that zero new blocks do so before they call handle_preemptions().
        self._stores_hold_up_step = self._device == "host" or bool(
            getattr(self._kv_cache_config, "needs_kv_cache_zeroing", False)
        )
        lent = [self._lent(group, kv_caches) for group in self._groups]
        self_test.run(lent, self._device)
        depot = _core.Depot.open(
            self._settings.engine_options(self._device, store_queue=self._store_queue()), catalog=False, writer=True
        )
        try:
            for group in lent:
                depot.attach(**group.arguments)
        except BaseException:
            depot.close()
            raise
        self._depot = depot

    def _store_queue(self) -> int:
        """A step's chunks are submitted at once, so that a queue smaller than a step would drop some of each."""
        step_tokens = int(self._vllm_config.scheduler_config.max_num_batched_tokens)
        token_bytes = sum(
            group.page_bytes * len(group.layer_names) / group.block_tokens for group in self._groups
        )
        return max(STORE_QUEUE_BYTES, int(STORE_QUEUE_STEPS * step_tokens * token_bytes))

    def _lent(self, group: Group, kv_caches: dict[str, torch.Tensor]) -> self_test.Lent:
        block_count = int(self._kv_cache_config.num_blocks)
        cache_dtype = str(self._vllm_config.cache_config.cache_dtype)
        dtype = self._kv_cache_config.kv_cache_groups[group.index].kv_cache_spec.dtype
        layers, cells = [], []
        for name in group.layer_names:
            tensor = kv_caches.get(name)
            if not isinstance(tensor, torch.Tensor):
                raise RefusedError(f"the engine registered no cache tensor for layer {name}")
            check_cells(tensor, dtype, name)
            backend = versions.backend_name(self._vllm_config, name)
            if group.kind == CANONICAL and backend.startswith("CPU"):
                raise RefusedError(
                    f'"layout" is "canonical" but the attention backend {backend} packs its blocks by '
                    "instruction set: "
                    'use "auto" or "opaque"'
                )
            declared = versions.declared_shape(self._vllm_config, name, cache_dtype)
            layers.append(layer_planes(tensor, group, block_count, declared, name))
            cells.append(block_cells(tensor, group, block_count, declared, name))
        arguments = attach_arguments(group, group.part(self._placement), block_count, layers)
        return self_test.Lent(arguments, cells)

    def _mark_stream(self, depot: _core.Depot) -> None:
        """What is submitted from here on touches the cache only after the work that the engine has queued so far."""
        if self._device != "host":
            depot.mark_stream(torch.cuda.current_stream(torch.device(self._device)).cuda_stream)

    def _engine_step(self, begins: bool) -> None:
        """Around the launches of a forward pass, which the depot's own work at the driver would hold up."""
        depot = self._usable()
        if depot is not None and self._device != "host":
            depot.engine_step(begins)

    def fence(self, orders: StepOrders) -> None:
        """Before anything of a step touches the cache."""
        if orders.fence and self._depot is not None and not self._stores_hold_up_step:
            self._wait_gathered(self._depot)
        if orders.computes:
            self._engine_step(True)  # not in start_loads(), which newer releases call after the forward pass

    def let_go_of_cache(self) -> None:
        """Returns when nothing under way touches the cache any more, whose memory the engine takes away now. It comes back
        to the same addresses."""
        if self._depot is None or self._off:
            return
        self._wait_gathered(self._depot)
        while self._loading:  # no longer than load_timeout
            self.poll()
            time.sleep(0.001)

    # --- loads ---------------------------------------------------------------------------------------------------

    def start_loads(self, orders: StepOrders) -> None:
        for name, amount in orders.counts.items():
            self._scheduler_counts[name] = self._scheduler_counts.get(name, 0) + amount
            self._stats_due = 0.0
        if orders.timed:
            self._report.steps.add(orders.timed)
        for job in orders.drops:
            self._drop_held(job)
        for hold in orders.holds:
            self._start_hold(hold)
        for order in orders.loads:
            depot = self._usable()
            if order.held_job and depot is not None:
                self._place(depot, order)
                continue
            if order.plan is None or depot is None:
                self._end_load(order, everything=True)
                continue
            try:
                self._mark_stream(depot)
                depot.submit_load(order.job, order.plan)
                self._loading[order.job] = order
            except Exception as error:  # one order's trouble must not leave the next one unanswered
                self._note_failure(f"load not accepted ({type(error).__name__}: {error}), recomputed")
                self._end_load(order, everything=True)

    def _end_load(self, order: LoadOrder, *, everything: bool = False, bad: set[int] | None = None) -> None:
        """Marks the request finished on this rank, with the blocks that hold no valid bytes."""
        if everything:
            bad = set().union(*(places.wanted() for places in order.groups))
        if bad:
            self._failed_requests.add(order.request_id)
            self._bad_blocks |= bad
        self._finished.add(order.request_id)

    def _start_hold(self, hold: HoldOrder) -> None:
        """Reads and verifies without touching the cache; whatever fails here fails before anything is promised."""
        depot = self._usable()
        if depot is None:
            self._end_hold(hold.job, failed=True)
            return
        try:
            depot.submit_hold(hold.job, hold.plan)
            self._holding.add(hold.job)
        except Exception as error:  # one order's trouble must not leave the next one unanswered
            self._note_failure(f"chunks not verified ahead ({type(error).__name__}: {error})")
            self._end_hold(hold.job, failed=True)

    def _end_hold(self, job: int, *, failed: bool) -> None:
        self._report.ended_holds[job] = 1
        if failed:
            self._report.failed_holds.add(job)

    def _usable(self) -> _core.Depot | None:
        return None if self._off else self._depot

    def _place(self, depot: _core.Depot, order: LoadOrder) -> None:
        """Copies verified bytes into the promised blocks, which no fault of a medium can stop."""
        blocks = [(chunk, places.group, ids) for places in order.groups for chunk, ids in places.by_chunk()]
        try:
            self._mark_stream(depot)
            depot.place(order.job, order.held_job, blocks)
            self._loading[order.job] = order
        except Exception as error:
            versions.log.error("tokendepot: rank %d: verified bytes are gone: %s", self._placement.rank, error)
            self._end_load(order, everything=True)

    def _drop_held(self, job: int) -> None:
        if self._depot is None:
            return
        try:
            self._depot.drop_held(job)
        except _core.DepotError as error:
            versions.log.debug("tokendepot: rank %d: %s", self._placement.rank, error)

    def poll(self) -> None:
        """Takes what ended since the last call. Cheap when nothing did."""
        if self._depot is None:
            return
        self._engine_step(False)  # asked after each step, also after one without a forward pass
        try:
            ended = self._depot.poll()
        except _core.DepotError as error:
            self.turn_off(str(error))
            ended = []
        for completion in ended:
            if completion["job"] in self._holding:
                self._hold_ended(completion)
            elif completion["kind"] == "load":
                self._load_ended(completion)
            else:
                self._store_ended(completion)
            self._stats_due = 0.0

    def _hold_ended(self, completion: dict[str, Any]) -> None:
        job = completion["job"]
        self._holding.discard(job)
        for _, chunk, group, reason in completion["failures"]:
            if reason != "dropped":  # a full slab says nothing against the extent
                self._report.failed_chunks[job, chunk, group] = reason
            self._note_failure(f"chunk not loaded ({reason}), recomputed")
        self._end_hold(job, failed=bool(completion["failures"]))

    def _load_ended(self, completion: dict[str, Any]) -> None:
        order = self._loading.pop(completion["job"], None)
        if order is None:
            return
        bad: set[int] = set()
        places = {groups.group: groups for groups in order.groups}
        for _, chunk, group, reason in completion["failures"]:
            bad |= places[group].of_chunk(chunk)
            self._report.failed_chunks[order.job, chunk, group] = reason
            self._note_failure(f"chunk not loaded ({reason}), recomputed")
        self._end_load(order, bad=bad)

    def take_finished(self) -> set[str]:
        finished, self._finished = self._finished, set()
        return finished

    def take_failed(self, finished: set[str]) -> set[str]:
        """Those of `finished` that failed; empty with one group, whose failures are told block by block."""
        failed = self._failed_requests & finished
        self._failed_requests -= failed
        return failed if len(self._groups) > 1 else set()

    def take_bad_blocks(self) -> set[int]:
        """Block ids say nothing where groups share one pool, and newer engines refuse them there. Older ones have no other
        channel and do not survive it: they are promised verified bytes only, and would rather stop than go on with
        blocks that were never filled."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad if len(self._groups) == 1 or not versions.REQUEST_LEVEL_FAILURES else set()

    # --- stores --------------------------------------------------------------------------------------------------

    def store(self, orders: StepOrders) -> None:
        """Submits this step's stores; on the host also waits until their bytes have left the cache."""
        depot, submitted = self._usable(), False
        for order in orders.stores:
            if order.group not in self._storing_groups or depot is None:
                self._report.ended_stores[order.job] = 1
                continue
            try:
                if not submitted:
                    self._mark_stream(depot)
                depot.submit_store(order.job, order.plan)
                submitted = True
            except _core.DepotError as error:
                self._note_failure(f"store not accepted ({error.kind}: {error})")
                self._report.ended_stores[order.job] = 1
        if depot is not None and submitted and self._stores_hold_up_step:
            self._wait_gathered(depot)

    def _wait_gathered(self, depot: _core.Depot) -> None:
        """Has no way out but success or a closed depot: returning early would store what other requests write."""
        started = time.monotonic()
        try:
            while not depot.wait_gathered(GATHER_SLICE_S):
                self._note_failure(f"storing holds up a step since {time.monotonic() - started:.0f} s")
        except _core.DepotError as error:
            self.turn_off(str(error))

    def _store_ended(self, completion: dict[str, Any]) -> None:
        job = completion["job"]
        self._report.ended_stores[job] = 1
        for item, _, _, reason in completion["failures"]:
            self._report.failed_stores.add((job, item))
            self._note_failure(f"chunk not stored ({reason})")

    # --- reports -------------------------------------------------------------------------------------------------

    def take_report(self) -> StepReport | None:
        self._report.disabled = self._off
        if self._report.is_empty():
            return None
        report, self._report = self._report, StepReport()
        return report

    def take_stats(self) -> DepotStats | None:
        now = time.monotonic()
        if now < self._stats_due:
            return None
        self._stats_due = now + STATS_EVERY_S
        change: dict[str, float] = {}
        if self._depot is not None:
            with contextlib.suppress(_core.DepotError):
                change = self._counters.delta(self._depot.stats())
        if (
            self._placement.rank == 0
        ):  # vLLM before 0.24 asks the workers only, and counts of one rank are enough
            change |= self._scheduler_counts
        self._scheduler_counts = {}
        if self._off_uncounted:
            change["switched_off"] = change.get("switched_off", 0) + 1
            self._off_uncounted = False
        return DepotStats(data=change) if change else None

    def _note_failure(self, reason: str) -> None:
        """One line for the first failure, then at most one each FAILURE_LINE_EVERY_S with the counts since."""
        self._unsaid_failures[reason] = self._unsaid_failures.get(reason, 0) + 1
        now = time.monotonic()
        if now >= self._failure_line_due:
            self._failure_line_due = now + FAILURE_LINE_EVERY_S
            told = ", ".join(f"{text} x{count}" for text, count in self._unsaid_failures.items())
            self._unsaid_failures.clear()
            versions.log.warning("tokendepot: rank %d: %s", self._placement.rank, told)

    def turn_off(self, reason: str) -> None:
        """Fails everything under way and whatever still comes; the scheduler half learns of it and stops promising."""
        if not self._off:
            self._off = reason
            self._off_uncounted, self._stats_due = True, 0.0
            versions.log.error("tokendepot: rank %d switched off: %s", self._placement.rank, reason)
        self._close_depot()
        for order in self._loading.values():
            self._end_load(order, everything=True)
        self._loading.clear()
        for job in self._holding:
            self._end_hold(job, failed=True)
        self._holding.clear()

    def _close_depot(self) -> None:
        """After this the depot writes no byte of the cache any more, unless the GPU itself stands still: what is verified
        and was handed to it before then lands when it goes on."""
        if self._depot is None:
            return
        try:
            self._depot.close()
        except _core.DepotError as error:
            versions.log.warning("tokendepot: rank %d: closing: %s", self._placement.rank, error)

    def close(self) -> None:
        """Orderly end: stores that were accepted get a moment to become durable."""
        if not self._off:
            self._off = "closed"
            try:
                if self._depot is not None:
                    self._depot.flush(FLUSH_AT_CLOSE_S)
            except _core.DepotError as error:
                versions.log.warning("tokendepot: rank %d: closing: %s", self._placement.rank, error)
        self._close_depot()
