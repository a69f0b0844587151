"""Metrics: deltas from both halves -> vLLM's log line and /metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

REASONS = ("absent", "mismatch", "corrupt", "io_error", "timed_out", "cancelled", "dropped", "pinned")
FAILURE = "failures:"  # prefix of "failures:<load|store>:<reason>" in the data
PATHS = ("mapped", "direct", "buffered", "gds_p2p", "gds_compat")
CAUSES = ("capacity", "quota", "ttl", "corrupt")  # by hand is counted by roots' own metrics: no engine does it
EVICTED = "evicted_by:"  # prefix of "evicted_by:<cause>" in the data
CARRIED = "bytes_by:"  # prefix of "bytes_by:<load|store>:<path>" in the data

# Key of the data -> (metric name, help). Prometheus appends "_total".
COUNTERS = {
    "load_extents": ("tokendepot_load_extents", "Extents loaded into the KV cache."),
    "load_bytes": ("tokendepot_load_bytes", "Bytes loaded into the KV cache."),
    "load_seconds": (
        "tokendepot_load_seconds",
        "Seconds from submission to completion, summed over loaded extents.",
    ),
    "store_extents": ("tokendepot_store_extents", "Extents stored."),
    "store_bytes": ("tokendepot_store_bytes", "Bytes stored."),
    "store_seconds": (
        "tokendepot_store_seconds",
        "Seconds from submission to completion, summed over stored extents.",
    ),
    "gds_errors": (
        "tokendepot_gds_errors",
        "Errors of cuFile: extents went the ordinary way, or were not stored.",
    ),
    "open_seconds": (
        "tokendepot_open_seconds",
        "Seconds that opening the depot took, until everything stored could be looked up; summed over starts.",
    ),
    "mended_manifests": (
        "tokendepot_mended_manifests",
        "Manifests that were found damaged and written anew.",
    ),
    "scrubbed_bytes": ("tokendepot_scrubbed_bytes", "Bytes that were read again and checked in the background."),
    "scrub_errors": (
        "tokendepot_scrub_errors",
        "Extents that the scrub found bad, which are condemned, or could not read.",
    ),
    "queried_tokens": ("tokendepot_queried_tokens", "Tokens of prompts that were looked up."),
    "hit_tokens": ("tokendepot_hit_tokens", "Tokens that the depot promised to load."),
    "not_worth_tokens": (
        "tokendepot_not_worth_loading_tokens",
        "Tokens that the depot holds and that were left to be computed because that is faster.",
    ),
    "shared_loads": (
        "tokendepot_shared_loads",
        "Requests that found blocks of another one's load, for which they had waited instead of loading the same.",
    ),
    "missed_repeats": (
        "tokendepot_missed_repeats",
        "Prompts that began with a chunk which this engine had stored, and of which nothing was found.",
    ),
    "broken_promises": (
        "tokendepot_broken_promises",
        "Loads whose extents had gone between look-up and plan.",
    ),
    "switched_off": (
        "tokendepot_switched_off",
        "Parts of the connector (the scheduler's, and each rank's) that do without the depot from some moment on.",
    ),
    "failed_requests": (
        "tokendepot_failed_load_requests",
        "Requests with at least one chunk that failed to load.",
    ),
}
FAILURE_METRIC = (
    "tokendepot_failures",
    "Extents that were not loaded or not stored, by operation and reason.",
)
EVICTED_METRIC = (
    "tokendepot_evicted_bytes",
    "Bytes of extents that this engine's workers stopped serving, by cause.",
)
CARRIED_METRIC = (
    "tokendepot_carried_bytes",
    "Bytes by operation and by the path that really carried them.",
)


class DepotStats(KVConnectorStats):
    """Counts of one interval. `data` is a flat dictionary of numbers, summed over ranks and intervals."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key, value in other.data.items():
            self.data[key] = self.data.get(key, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The periodic log line: totals of the interval, and the rates that follow from them."""
        line: dict[str, int | float] = {}
        for key, value in sorted(self.data.items()):
            line[f"tokendepot_{key}"] = round(value, 4) if isinstance(value, float) else value
        for way in ("load", "store"):
            if seconds := self.data.get(f"{way}_seconds"):
                line[f"tokendepot_{way}_GB_per_s_per_extent"] = round(
                    self.data.get(f"{way}_bytes", 0) / seconds / 1e9, 2
                )
        return line

    def is_empty(self) -> bool:
        return not any(self.data.values())


class EngineCounters:
    """Turns the ever-growing counters of Depot.stats() into deltas."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def delta(self, stats: dict[str, Any]) -> dict[str, float]:
        now: dict[str, float] = {}
        for way in ("load", "store"):
            counts = stats[way]
            now[f"{way}_extents"] = counts["extents"]
            now[f"{way}_bytes"] = counts["bytes"]
            now[f"{way}_seconds"] = counts["nanoseconds"] / 1e9
            for reason in REASONS:
                now[f"{FAILURE}{way}:{reason}"] = counts["failures"][reason]
            for path in PATHS:
                now[f"{CARRIED}{way}:{path}"] = counts["by_path"][path]
        for name in ("gds_errors", "scrubbed_bytes", "scrub_errors"):
            now[name] = sum(root[name] for root in stats["roots"])
        for cause in CAUSES:
            now[f"{EVICTED}{cause}"] = sum(root["evicted_bytes"][cause] for root in stats["roots"])
        change = {key: value - self._before.get(key, 0) for key, value in now.items()}
        self._before = now
        return {key: value for key, value in change.items() if value}


class DepotPromMetrics(KVConnectorPromMetrics):
    """Lives in the API server's process."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for key, (name, text) in COUNTERS.items():
            metric = self._counter(name, text, labelnames)
            self._counters[key] = {
                engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
            }
        for (name, text), label, choices, prefix in (
            (FAILURE_METRIC, "reason", REASONS, FAILURE),
            (CARRIED_METRIC, "path", PATHS, CARRIED),
        ):
            metric = self._counter(name, text, [*labelnames, "operation", label])
            for way in ("load", "store"):
                for choice in choices:
                    self._counters[f"{prefix}{way}:{choice}"] = {
                        engine: metric.labels(*values, way, choice)
                        for engine, values in per_engine_labelvalues.items()
                    }

        name, text = EVICTED_METRIC
        metric = self._counter(name, text, [*labelnames, "cause"])
        for cause in CAUSES:
            self._counters[f"{EVICTED}{cause}"] = {
                engine: metric.labels(*values, cause) for engine, values in per_engine_labelvalues.items()
            }

    def _counter(self, name: str, text: str, labelnames: list[str]) -> Any:
        """A second engine in one process goes on with the first one's counter: names are unique in the registry."""
        if self._counter_cls is Counter:
            registered = getattr(REGISTRY, "_names_to_collectors", {}).get(name)
            if registered is not None and getattr(registered, "_labelnames", None) == tuple(labelnames):
                return registered
        return self._counter_cls(name=name, documentation=text, labelnames=labelnames)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.items():
            counter = self._counters.get(key)
            if counter is not None and value > 0:
                counter[engine_idx].inc(value)
