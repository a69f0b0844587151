"""The half in the scheduler process: keys, look-ups, promises, and which chunks a step completes.

Contracts with vLLM that this file stands on:
* get_num_new_matched_tokens() may be called many times; what the last call promised is remembered, never derived
  again.
* Loads are asynchronous only. A promise that cannot be planned is sent to the workers as failed, so that the request
  is rescheduled; it never silently becomes a shorter load.
* Only tokens that are final are stored: computed + scheduled - drafts, at most the tokens whose ids are known.
* A block is stored only in a step in which the request owns it: a step that fills it, or one that lists the whole
  table. What becomes of it while it is being read is the matter of fence.py.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from tokendepot import _core
from tokendepot.engines.metrics import MISSED, readings_of_start
from tokendepot.engines.vllm import versions
from tokendepot.engines.vllm.adapters import Adapters, PendingError
from tokendepot.engines.vllm.events import DepotEvents, wanted
from tokendepot.engines.vllm.fence import StoreFence
from tokendepot.engines.vllm.groups import FULL, Group, describe_groups, loads_are_safe
from tokendepot.engines.vllm.identity import manifest
from tokendepot.engines.vllm.messages import (
    GroupBlocks,
    HoldOrder,
    LoadOrder,
    StepOrders,
    StepReport,
    StoreOrder,
)
from tokendepot.engines.vllm.misses import Misses, other_namespaces
from tokendepot.engines.vllm.places import NULL_BLOCK, everything, everywhere, places_of
from tokendepot.engines.vllm.repeats import Repeats
from tokendepot.engines.vllm.settings import RefusedError, Settings
from tokendepot.engines.vllm.sharing import Sharing
from tokendepot.engines.vllm.stats import JournalLag
from tokendepot.engines.vllm.tracked import Hold, Load, Promise, Storing, Tracked, bar
from tokendepot.engines.vllm.worth import Worth, starting_values

STORE_MEMORY_S = 60.0  # how long a store that no worker reports counts as on its way
HOLD_GRACE_S = 5.0  # beyond the workers' own deadline, for the steps that carry order and answer
SEEN_STORE_S = 2.0  # after its end: until the workers' journals have been read
TOKENS_PER_CALL = 1 << 16  # keys made in one look-up, about 3 ms; a longer prompt is asked for again


class SchedulerHalf:
    """One per engine. Not thread-safe: vLLM calls it from the scheduler's thread only."""

    def __init__(self, settings: Settings, vllm_config: Any, kv_cache_config: Any) -> None:
        self._settings = settings
        self._chunk = settings.chunk_tokens
        self._groups = describe_groups(vllm_config, kv_cache_config, settings)
        self._wants = [group.want() for group in self._groups]
        # This process must never make a CUDA context: it looks up and plans, and moves no byte.
        self._depot = _core.Depot.open(settings.engine_options("host"), catalog=True, writer=False)
        try:
            self._manifest = manifest(vllm_config, self._groups, settings, kv_cache_config)
            self._namespace = self._depot.register_namespace(json.dumps(self._manifest))
        except BaseException:
            self._depot.close()
            raise
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        self._ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._may_load = bool(transfer.is_kv_consumer)
        self._hold_first = not loads_are_safe(self._groups)
        self._may_store = bool(transfer.is_kv_producer)
        self._drop_last_chunk = versions.chunk_drop_needed(vllm_config.speculative_config)
        self._fence = StoreFence(self._groups, self._ranks)
        self._worth = Worth(*starting_values(self._groups, self._depot.stats()))
        self._misses = Misses(self._depot, other_namespaces(settings.root_paths, self._namespace))
        self._lag = JournalLag()
        self._events: DepotEvents | None = None
        if wanted(vllm_config):
            roots = [root["path"] for root in self._depot.stats()["roots"]]
            self._events = DepotEvents(roots, self._chunk, self._namespace)
        self._repeats = Repeats()
        self._sharing = Sharing(
            self._groups,
            bool(vllm_config.cache_config.enable_prefix_caching),
            settings.load_timeout + HOLD_GRACE_S,
        )
        self._adapters = Adapters(settings.root_paths)
        self._requests: dict[str, Tracked] = {}
        self._pending: list[LoadOrder] = []
        self._loads: dict[int, Load] = {}
        self._holds: dict[int, Hold] = {}  # by job, until every rank has ended it
        self._new_holds: list[HoldOrder] = []
        self._drops: list[int] = []
        self._storing = Storing(self._ranks)
        self._next_job = 1
        self._counts = readings_of_start(self._depot.stats())
        self._off = ""
        self._said: set[str] = set()
        self._log_start(vllm_config)

    def _log_start(self, vllm_config: Any) -> None:
        versions.log.info(
            "tokendepot: namespace %s, chunks of %d tokens, groups: %s",
            self._namespace.hex()[:16],
            self._chunk,
            ", ".join(
                f"{g.index} {g.attention} {g.kind} {g.layers} layers x {g.heads} heads" for g in self._groups
            ),
        )
        if self._hold_first:
            versions.log.info(
                "tokendepot: this vLLM cannot survive a failed load of a model with %d KV-cache groups, so workers "
                "verify chunks in their slab before they are promised",
                len(self._groups),
            )
        versions.use_recompute_policy(vllm_config.kv_transfer_config)

    # --- look-up and promise -------------------------------------------------------------------------------------

    def matched_tokens(self, request: Any, local_tokens: int) -> int | None:
        """Tokens beyond `local_tokens` that the depot can load; None = ask again. May be asked any number of times."""
        tracked = self._track(request)
        tracked.promise, tracked.not_worth, tracked.found, tracked.asked_chunks = None, 0, None, 0
        if self._off or not self._may_load or tracked.load_failed:
            return 0
        if request.skip_reading_prefix_cache:  # it wants its prompt computed, for the prompt's log probabilities
            return 0
        now = time.monotonic()
        if self._hold_has_failed(tracked, now):
            return 0
        if self._sharing.goes_on(request.request_id, local_tokens, now):
            return None
        if self._sharing.end(request.request_id, local_tokens):
            self._count("shared_loads", 1)
        try:
            chain = self._chain(tracked)
        except PendingError:
            return None
        if chain is None:
            return 0
        # At least one token is left to compute, or there would be no logits to sample from.
        chunks = (request.num_tokens - 1) // self._chunk
        if chunks * self._chunk - local_tokens < self._settings.min_load_tokens:
            return 0
        ready = len(chain) + max(1, TOKENS_PER_CALL // self._chunk)
        self._extend(tracked, min(chunks, ready))
        if ready < chunks:
            return None
        keys = chain.keys(0, chunks)
        hit = self._depot.longest_prefix(keys, self._wants)
        tracked.found = hit > 0
        tracked.asked_chunks, tracked.missing, tracked.local_tokens = chunks, hit, local_tokens
        if hit and self._drop_last_chunk:
            hit = self._depot.longest_prefix(chain.keys(0, hit - 1), self._wants)
        external = hit * self._chunk - local_tokens
        if external < self._settings.min_load_tokens:
            return 0
        if tracked.hold is None and not self._is_worth_loading(request, local_tokens, hit * self._chunk):
            tracked.not_worth = external
            return 0
        to_load = range(local_tokens // self._chunk, hit)
        if tracked.hold is None and self._sharing.begin(request.request_id, keys, to_load, local_tokens, now):
            return None
        if self._hold_first:
            verified = self._verified(tracked, keys, hit)
            if not verified:
                return verified
            hit, external = verified, verified * self._chunk - local_tokens
            if external < self._settings.min_load_tokens:
                return 0
        tracked.promise = Promise(local_tokens, hit * self._chunk)
        return external

    def _is_worth_loading(self, request: Any, local_tokens: int, hit_tokens: int) -> bool:
        fixed = self._settings.min_load_is_fixed
        return fixed or self._worth.of_load(local_tokens, hit_tokens, request.num_tokens)

    def _verified(self, tracked: Tracked, keys: bytes, hit: int) -> int | None:
        """Chunks of the prefix that all ranks hold, verified, in memory; None = they are at it."""
        hold = tracked.hold
        if hold is None:
            plan = self._plan(keys, everywhere(self._groups, hit))
            if plan is None:
                return 0
            job, self._next_job = self._next_job, self._next_job + 1
            now = time.monotonic()
            until = now + self._settings.load_timeout + HOLD_GRACE_S
            tracked.hold = self._holds[job] = Hold(
                job, tracked.request.request_id, hit, keys, now, until
            )
            self._sharing.brings(tracked, keys[: hit * _core.KEY_BYTES])
            self._new_holds.append(HoldOrder(job, plan))
            return None
        return hold.chunks if hold.ended_by >= self._ranks else None

    def _hold_has_failed(self, tracked: Tracked, now: float) -> bool:
        """Then the request computes. Asked before the look-up, which does not find any more what has failed."""
        hold = tracked.hold
        if hold is None or not (hold.failed or now > hold.until):
            return False
        self._let_go(tracked)
        tracked.load_failed = True
        self._count("failed_requests", 1)
        return True

    def _let_go(self, tracked: Tracked) -> None:
        """The workers free what they hold for a request that will not use it."""
        if tracked.hold is not None:
            self._drops.append(tracked.hold.job)
            tracked.hold = None
            self._sharing.brings_nothing(tracked.request.request_id)

    def allocated(self, request: Any, tables: list[list[int]], external_tokens: int) -> None:
        """Turns the promise into a load order for this step. `external_tokens` may be less than promised."""
        tracked = self._track(request)
        if not tracked.counted:
            tracked.counted = True
            self._count("queried_tokens", request.num_tokens)
            if tracked.not_worth:
                self._count("not_worth_tokens", tracked.not_worth)
                self._count(f"{MISSED}not_worth_loading", tracked.not_worth)
            self._explain_miss(tracked)
            self._watch_repeats(tracked)
        if external_tokens <= 0:
            self._let_go(tracked)
            return
        self._fence.allocated(tables, tracked.promise.local_tokens if tracked.promise else 0)
        promise, tracked.promise = tracked.promise, None
        order = self._order(tracked, tables, promise, external_tokens)
        self._pending.append(order)
        self._count("hit_tokens", external_tokens)

    def _explain_miss(self, tracked: Tracked) -> None:
        """Of what was asked for, all from the first missing chunk on counts by the cause of that chunk."""
        at, chain = tracked.missing, tracked.chain
        missed = tracked.asked_chunks * self._chunk - max(at * self._chunk, tracked.local_tokens)
        if missed <= 0 or chain is None or at >= len(chain):
            return
        cause = self._guard(lambda: self._misses.cause(chain.keys(at, at + 1), tracked.request, first=at == 0))
        if cause is not None:
            self._count(f"{MISSED}{cause}", missed)

    def _watch_repeats(self, tracked: Tracked) -> None:
        if tracked.found is None or tracked.chain is None:
            return
        if self._repeats.looked_up(tracked.chain.keys(0, 1), tracked.found, time.monotonic()):
            self._count("missed_repeats", 1)
            if complaint := self._repeats.complaint():
                self._say_once("repeats", complaint)

    def _order(
        self, tracked: Tracked, tables: list[list[int]], promise: Promise | None, external: int
    ) -> LoadOrder:
        job, self._next_job = self._next_job, self._next_job + 1
        request_id = tracked.request.request_id
        local = promise.local_tokens if promise else 0
        end = local + external
        groups, complete = places_of(self._groups, tables, local, end)
        plan = None
        keys = tracked.chain.keys(0, -(-end // self._chunk)) if tracked.chain is not None else b""
        hold, tracked.hold = tracked.hold, None
        keepable = promise is not None and complete and end <= promise.hit_tokens and not self._off
        held_job = hold.job if hold is not None and keepable else 0
        if keepable and not held_job:
            plan = self._plan(keys, groups)
        broken = plan is None and not held_job
        began = hold.began if hold is not None else time.monotonic()
        self._loads[job] = Load(
            request_id, keys, local, external, tracked.request.num_tokens, began, failed=broken
        )
        if broken:
            tracked.load_failed = True
            self._count("broken_promises", 1)
            self._count(f"{MISSED}evicted", external)
            self._sharing.brings_nothing(request_id)
            groups = everything(self._groups, tables, local, end)
        else:
            self._sharing.brings(tracked, keys)
        return LoadOrder(job, request_id, plan, groups, held_job)

    def _plan(self, keys: bytes, groups: list[GroupBlocks]) -> bytes | None:
        """None when an extent has gone since the look-up, or the depot is in trouble."""
        arguments = [
            (want, places.first_chunk, places.per_chunk, places.ids())
            for want, places in zip(self._wants, groups, strict=True)
        ]
        try:
            return bytes(self._depot.plan_load(self._namespace, keys, arguments, self._settings.load_timeout))
        except _core.DepotError as error:
            if error.kind != "not_found":
                self._say(f"a load cannot be planned ({error.kind}): {error}")
        except (TypeError, ValueError) as error:
            self.turn_off(f"planning a load: {type(error).__name__}: {error}")
        return None

    # --- what a step stores --------------------------------------------------------------------------------------

    def step(self, output: Any) -> StepOrders:
        """The orders of this step; called once a step, after all calls of allocated(). Loads survive any trouble."""
        orders = StepOrders(
            loads=self._pending, holds=self._new_holds, drops=self._drops, counts=self._counts
        )
        self._pending, self._new_holds, self._drops, self._counts = [], [], [], {}
        orders.fence = True  # unless it is known that none is needed
        try:
            orders.fence = self._fence.needed_by(output)
            orders.stores = self._stores_of(output)
            orders.timed = self._timed(output)
            orders.computes = output.total_num_scheduled_tokens > 0
            self._guard(lambda: self._add_counts(self._lag.delta(self._depot.stats)))
        except Exception as error:  # the loads of this step must reach the workers whatever happens here
            self.turn_off(f"choosing what to store: {type(error).__name__}: {error}")
        return orders

    def _timed(self, output: Any) -> int:
        """The number under which this step is timed, 0 when it is not."""
        cached = output.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        before |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        return self._worth.step_begins(
            [(before.get(name, 0), count) for name, count in output.num_scheduled_tokens.items()]
        )

    def _stores_of(self, output: Any) -> list[StoreOrder]:
        items: list[list[tuple[bytes, int, int, list[int]]]] = [[] for _ in self._groups]
        drafts = output.scheduled_spec_decode_tokens
        for new in output.scheduled_new_reqs:
            tracked = self._requests.get(new.req_id)
            if tracked is not None:
                tracked.tables = [list(ids) for ids in new.block_ids]
                tracked.next_chunk = 0
                self._collect(tracked, new.num_computed_tokens, output, drafts, True, items)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            new_ids = cached.new_block_ids[index]
            whole_table = request_id in cached.resumed_req_ids
            if whole_table:
                # Preempted before: the old blocks belong to others, all that counts is the new table.
                tracked.tables = [list(ids) for ids in new_ids or ()]
                tracked.next_chunk = 0
            elif new_ids is not None:
                for table, ids in zip(tracked.tables, new_ids, strict=True):
                    table.extend(ids)
            self._collect(tracked, cached.num_computed_tokens[index], output, drafts, whole_table, items)
        return [
            self._store_order(group, group_items)
            for group, group_items in zip(self._groups, items, strict=True)
            if group_items
        ]

    def _collect(
        self,
        tracked: Tracked,
        computed: int,
        output: Any,
        drafts: dict[str, Any],
        whole_table: bool,
        items: list[list[tuple[bytes, int, int, list[int]]]],
    ) -> None:
        """Adds the chunks of one request that are complete after this step and not stored yet."""
        request = tracked.request
        if self._off or not self._may_store or not tracked.tables:
            return
        final = (
            computed
            + output.num_scheduled_tokens[request.request_id]
            - len(drafts.get(request.request_id, ()))
        )
        final = min(final, request.num_tokens)
        if self._settings.store == "prompt":
            final = min(final, request.num_prompt_tokens)
        first, last = tracked.next_chunk, final // self._chunk
        if last <= first:
            return
        try:
            chain = self._chain(tracked)
        except PendingError:
            return
        if chain is None:
            return
        self._extend(tracked, last)
        keys = chain.keys(first, last)
        now = time.monotonic()
        for group, want, table, into in zip(self._groups, self._wants, tracked.tables, items, strict=True):
            stored = self._depot.stored(keys, want)
            for chunk in range(first, last):
                offset = chunk - first
                key = keys[offset * _core.KEY_BYTES : (offset + 1) * _core.KEY_BYTES]
                if stored[offset] or self._storing.has(key, group.index, now):
                    continue
                blocks = self._owned_blocks(group, table, chunk, computed, whole_table)
                if blocks is not None:
                    into.append((key, chunk, group.index, blocks))
                    if self._events is not None:
                        self._events.learn(key, chunk, tracked)
                    self._storing.add(key, group.index, now + STORE_MEMORY_S)
        tracked.next_chunk = last

    def _owned_blocks(
        self, group: Group, table: list[int], chunk: int, computed: int, whole_table: bool
    ) -> list[int] | None:
        """Blocks of the chunk's stored tail, None when one is not the request's any more."""
        end = (chunk + 1) * self._chunk
        if group.attention != FULL and end <= computed and not whole_table:
            return None  # slid out of the window in an earlier step; the ids we remember may be another request's
        last = end // group.block_tokens
        blocks = table[last - group.stored_blocks : last]
        return blocks if len(blocks) == group.stored_blocks and NULL_BLOCK not in blocks else None

    def _store_order(self, group: Group, items: list[tuple[bytes, int, int, list[int]]]) -> StoreOrder:
        job, self._next_job = self._next_job, self._next_job + 1
        self._storing.begin(job, items, time.monotonic())
        self._fence.begin(job, (block for *_, blocks in items for block in blocks))
        return StoreOrder(job, group.index, bytes(_core.plan_store(self._namespace, items)))

    # --- reports of the workers ----------------------------------------------------------------------------------

    def report(self, report: StepReport | None, finished_loads: set[str]) -> None:
        """What all ranks said in one step; `finished_loads` are the requests whose load every rank has ended."""
        if report is not None:
            for number in report.steps:
                self._worth.step_ended(number)
            if report.disabled:
                self.turn_off(report.disabled)
            for (job, chunk, group), reason in report.failed_chunks.items():
                self._load_failed(job, chunk, group, reason)
            for job, ranks in report.ended_holds.items():
                self._hold_ended(job, ranks, failed=job in report.failed_holds)
            for job, item in report.failed_stores:
                self._storing.failed(job, item)
            for job, ranks in report.ended_stores.items():
                self._fence.ended(job, ranks)
                seen = time.monotonic() + SEEN_STORE_S
                for key in self._storing.ended(job, ranks, seen):
                    self._repeats.stored(key, seen)
        if finished_loads:
            self._learn_from_loads(finished_loads)
            for request_id in finished_loads:
                self._sharing.ended(request_id, time.monotonic())
            self._loads = {
                job: load for job, load in self._loads.items() if load.request_id not in finished_loads
            }

    def _learn_from_loads(self, finished: set[str]) -> None:
        now = time.monotonic()
        for load in self._loads.values():
            if load.request_id in finished and not load.failed:
                self._worth.loaded(load.tokens, now - load.began)
                saved = self._worth.saved(load.local, load.local + load.tokens, load.total, now - load.began)
                self._count("saved_seconds", saved)

    def _forget(self, keys: bytes, chunk: int, group: int, reason: str) -> str:
        """Not promised again until somebody stores it anew, which the recomputing request does. Returns the cause."""
        key = keys[chunk * _core.KEY_BYTES : (chunk + 1) * _core.KEY_BYTES]
        if len(key) == _core.KEY_BYTES:
            self._guard(lambda: self._depot.forget(key, group))
            self._storing.forget(key, group)
        return self._misses.failed(key, reason)

    def _hold_ended(self, job: int, ranks: int, *, failed: bool) -> None:
        hold = self._holds.get(job)
        if hold is None:
            return
        hold.ended_by += ranks
        hold.failed |= failed
        if hold.ended_by >= self._ranks:
            del self._holds[job]
            self._sharing.ended(hold.request_id, time.monotonic())

    def _load_failed(self, job: int, chunk: int, group: int, reason: str) -> None:
        hold = self._holds.get(job)
        if hold is not None:
            self._missed_chunk(hold, chunk, self._forget(hold.keys, chunk, group, reason))
            return
        load = self._loads.get(job)
        if load is None:
            return
        self._missed_chunk(load, chunk, self._forget(load.keys, chunk, group, reason))
        if not load.failed:
            load.failed = True
            self._sharing.brings_nothing(load.request_id)
            self._count("failed_requests", 1)
            tracked = self._requests.get(load.request_id)
            if tracked is not None:
                tracked.load_failed = True

    def _missed_chunk(self, of: Load | Hold, chunk: int, cause: str) -> None:
        """Once for all groups and ranks."""
        if chunk not in of.missed:
            of.missed.add(chunk)
            self._count(f"{MISSED}{cause}", self._chunk)

    def take_events(self) -> list[Any]:
        """KV events since the last call; none where the engine's configuration wants none."""
        return self._events.take() if self._events is not None and not self._off else []

    # --- requests ------------------------------------------------------------------------------------------------

    def _track(self, request: Any) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is not None and tracked.request is not request:
            self._let_go(tracked)
            self._sharing.forget(request.request_id)
        if tracked is None or tracked.request is not request:
            tracked = self._requests[request.request_id] = Tracked(request, barred=bar(request))
            if tracked.barred:
                self._say(f"a request takes no part in the depot: {tracked.barred}")
        return tracked

    def arrived(self, request: Any) -> None:
        """A hint that the request's adapter will be needed soon."""
        if request.lora_request is not None:
            self._adapters.prepare(request.lora_request)

    def finished(self, request: Any) -> None:
        """Loads end by themselves and stores are fenced, so no block is held back."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self._let_go(tracked)
        self._sharing.forget(request.request_id)

    def _chain(self, tracked: Tracked) -> _core.KeyChain | None:
        """The request's keys; None when it takes no part. Raises PendingError while its adapter is being identified."""
        if tracked.chain is None and not tracked.barred:
            request = tracked.request
            lora = b""
            if request.lora_request is not None:
                try:
                    lora = self._adapters.identity(request.lora_request)
                except RefusedError as error:
                    tracked.barred = str(error)
                    self._say(f"a request takes no part in the depot: {error}")
                    return None
            tracked.media = [
                (str(item.identifier), int(item.mm_position.offset), int(item.mm_position.length))
                for item in request.mm_features or ()
            ]
            tracked.chain = _core.KeyChain(self._namespace, self._chunk, request.cache_salt or "", lora)
        return tracked.chain

    def _extend(self, tracked: Tracked, chunks: int) -> None:
        """Appends whole chunks only, so that every token is read exactly once and only when its id is final."""
        chain = tracked.chain
        assert chain is not None
        have, wanted = chain.tokens_seen, chunks * self._chunk
        if wanted > have:
            chain.append(tracked.request.all_token_ids[have:wanted], tracked.media)

    # --- the rest ------------------------------------------------------------------------------------------------

    def reset(self) -> bool:
        """After reset_cache() nothing that was stored before is served again by this process.

        vLLM resets connectors when the weights may have changed under it, which the manifest cannot see. So this engine
        goes on in a namespace of its own; a restart with the original weights finds the original one.
        """
        if not self._off:
            self._manifest["reset"] = uuid.uuid4().hex
            fresh = self._guard(lambda: self._depot.register_namespace(json.dumps(self._manifest)))
            if fresh is None:  # switched off it serves nothing older either, and vLLM takes a False for its own failure
                self.turn_off("the namespace after a reset cannot be registered")
            else:
                self._namespace = fresh
                if self._events is not None:
                    self._events.move_to(fresh)
        self._storing.clear()
        for tracked in self._requests.values():
            self._let_go(tracked)
            tracked.chain, tracked.promise = None, None
            if tracked.tables:
                tracked.barred = "its KV was computed in part before a reset"
        return not self._loads and not self._pending

    def turn_off(self, reason: str) -> None:
        """From now on every answer is a miss; loads under way end by themselves."""
        if not self._off:
            self._off = reason
            self._count("switched_off", 1)
            versions.log.error("tokendepot: switched off, the engine goes on without it: %s", reason)

    def close(self) -> None:
        self._off = self._off or "closed"
        self._adapters.close()
        if self._events is not None:
            self._events.close()
        self._guard(self._depot.close)

    def _add_counts(self, counts: dict[str, float]) -> None:
        for name, amount in counts.items():
            self._count(name, amount)

    def _count(self, name: str, amount: float) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except _core.DepotError as error:
            self._say(str(error))
            return None

    def _say(self, text: str) -> None:
        """Once for each text: requests repeat, the operator needs it once."""
        self._say_once(text, text)

    def _say_once(self, subject: str, text: str) -> None:
        if subject not in self._said and len(self._said) < 64:
            self._said.add(subject)
            versions.log.warning("tokendepot: %s", text)

