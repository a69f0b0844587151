"""The class that vLLM loads. Every hook goes to one of two halves; no error of the depot gets out of here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from tokendepot import _core
from tokendepot.engines.options import effective
from tokendepot.engines.vllm import versions
from tokendepot.engines.vllm.messages import LoadOrder, StepOrders, StepReport
from tokendepot.engines.vllm.scheduler import SchedulerHalf
from tokendepot.engines.vllm.settings import DEFAULTS, RefusedError, on_error_choice, read_settings
from tokendepot.engines.vllm.stats import DepotPromMetrics, DepotStats
from tokendepot.engines.vllm.worker import WorkerHalf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

Answer = TypeVar("Answer")


class TokendepotConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps KV cache in the depot's roots and loads it back. See docs/operations.md for the configuration.

    `on_error` decides about a refusal at start: "disable" logs one error line and the engine runs without the depot,
    "fail" raises. At run time trouble never stops the engine: the depot is switched off and every answer is a miss.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler_half: SchedulerHalf | None = None
        self._worker_half: WorkerHalf | None = None
        self._orphans: list[LoadOrder] = []  # loads ordered from a rank that has no depot
        self._refusal = ""
        self._refusal_uncounted = False
        extra = dict(self._kv_transfer_config.kv_connector_extra_config or {})
        self._fail_at_start = on_error_choice(extra) == "fail"
        self._start(lambda: self._open(extra, vllm_config, role, kv_cache_config))

    def _open(
        self, extra: dict[str, Any], vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any
    ) -> None:
        settings = read_settings(extra)
        if role == KVConnectorRole.SCHEDULER:
            versions.warn_if_untested()
            versions.log.info("tokendepot: %s", effective(extra, DEFAULTS, json.dumps(settings.engine)))
            self._scheduler_half = SchedulerHalf(settings, vllm_config, kv_cache_config)
        else:
            self._worker_half = WorkerHalf(settings, vllm_config, kv_cache_config)

    def _start(self, call: Callable[[], None]) -> None:
        """Runs one step of the start; a refusal disables the connector or stops the engine, as configured."""
        try:
            call()
        except (RefusedError, _core.DepotError) as error:
            self._refuse(str(error), error)
        except Exception as error:  # an engine that changed shape must not fall over its cache
            self._refuse(f"{type(error).__name__}: {error}", error)

    def _refuse(self, reason: str, error: Exception) -> None:
        if self._fail_at_start:
            raise RefusedError(f"tokendepot cannot serve this engine: {reason}") from error
        self._refusal = reason
        versions.log.error("tokendepot: not used, the engine runs without it: %s", reason)
        if self._worker_half is not None:
            self._worker_half.turn_off(reason)
        else:
            self._refusal_uncounted = True

    def _guarded(self, call: Callable[[], Answer], otherwise: Answer) -> Answer:
        """Last line of defence: trouble in a half switches that half off, and the hook answers `otherwise`."""
        try:
            return call()
        except Exception as error:
            versions.log.debug("tokendepot: unexpected", exc_info=True)
            half = self._worker_half or self._scheduler_half
            if half is not None:
                half.turn_off(f"{type(error).__name__}: {error}")
            return otherwise

    # --- scheduler role ------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        half = self._scheduler_half
        if half is not None:
            self._guarded(lambda: half.arrived(request), None)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        half = self._scheduler_half
        if half is None:
            return 0, False
        nothing: int | None = 0
        tokens = self._guarded(lambda: half.matched_tokens(request, num_computed_tokens), nothing)
        return tokens, bool(tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        half = self._scheduler_half
        if half is not None:
            half.allocated(request, [list(ids) for ids in blocks.get_block_ids()], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        half = self._scheduler_half
        if half is not None:
            return half.step(scheduler_output)
        # Only a worker that has a depot counts it for us; one that was refused, too, counts itself.
        return StepOrders(counts={"switched_off": 1} if self._count_refusal() else {})

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        half = self._scheduler_half
        if half is None:
            return
        report = connector_output.kv_connector_worker_meta
        finished = set(connector_output.finished_recving or ())
        self._guarded(lambda: half.report(report if isinstance(report, StepReport) else None, finished), None)

    def take_events(self) -> list[KVCacheEvent]:
        half = self._scheduler_half
        nothing: list[KVCacheEvent] = []
        return self._guarded(half.take_events, nothing) if half is not None else nothing

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler_half is not None:
            self._scheduler_half.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0] if block_ids else [])

    def reset_cache(self) -> bool | None:
        """Nothing stored so far is served again by this process (see SchedulerHalf.reset). False while loads run."""
        half = self._scheduler_half
        return self._guarded(half.reset, False) if half is not None else True

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a store that does not happen is a miss later, nothing more."""
        return False

    # --- worker role ---------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        half = self._worker_half
        if half is not None and not self._refusal:
            self._start(lambda: half.attach(kv_caches))

    def unregister_kv_caches(self) -> None:
        """The engine goes to sleep (0.33): it drained what it knows of, which does not include stores."""
        half = self._worker_half
        if half is not None:
            self._guarded(half.let_go_of_cache, None)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Called every step before its loads and its forward pass, and before the metadata is bound."""
        half, orders = self._worker_half, kv_connector_metadata
        if half is not None and isinstance(orders, StepOrders):
            self._guarded(lambda: half.fence(orders), None)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        half = self._worker_half
        if half is not None:
            self._guarded(lambda: half.start_loads(self._orders()), None)
        else:
            self._orphans += self._orders().loads

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous to steps: a request is computed only when its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Stores take whole chunks after the step (wait_for_save), so that CUDA graphs stay whole."""

    def wait_for_save(self) -> None:
        half = self._worker_half
        if half is not None:
            self._guarded(lambda: half.store(self._orders()), None)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        half = self._worker_half
        if half is None:
            return None, {order.request_id for order in self._orphans} or None
        self._guarded(half.poll, None)
        return None, half.take_finished() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        _, finished = self.get_finished(finished_req_ids)
        finished = finished or set()
        if self._worker_half is not None:
            return versions.transfer_results(finished, self._worker_half.take_failed(finished))
        several = len(self._kv_cache_config.kv_cache_groups) > 1
        return versions.transfer_results(finished, set(finished) if several else set())

    def get_block_ids_with_load_errors(self) -> set[int]:
        if self._worker_half is not None:
            return self._worker_half.take_bad_blocks()
        orphans, self._orphans = self._orphans, []
        if len(self._kv_cache_config.kv_cache_groups) > 1:
            return set()
        return {block for order in orphans for places in order.groups for block in places.wanted()}

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self._worker_half is not None:
            return self._worker_half.take_report()
        return StepReport(disabled=self._refusal) if self._refusal else None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        half = self._worker_half
        if half is not None:
            return self._guarded(half.take_stats, None)
        counted_here = self.role == KVConnectorRole.WORKER and self._count_refusal()
        return DepotStats(data={"switched_off": 1}) if counted_here else None

    def _count_refusal(self) -> bool:
        """True once after a refusal."""
        uncounted, self._refusal_uncounted = self._refusal_uncounted, False
        return uncounted

    def _orders(self) -> StepOrders:
        """What this step is to do; nothing in runs that are no step (warm-up, graph capture)."""
        orders = self._connector_metadata
        return orders if isinstance(orders, StepOrders) else StepOrders()

    # --- both ----------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        for half in (self._worker_half, self._scheduler_half):
            if half is not None:
                half.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return DepotStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return DepotPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
