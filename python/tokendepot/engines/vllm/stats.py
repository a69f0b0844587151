"""Metrics: deltas from both halves -> vLLM's log line and /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

REASONS = ("absent", "mismatch", "corrupt", "io_error", "timed_out", "cancelled", "dropped", "pinned")
FAILURE = "failures:"  # prefix of "failures:<load|store>:<reason>" in the data
PATHS = ("mapped", "direct", "buffered", "gds_p2p", "gds_compat")
CARRIED = "bytes_by:"  # prefix of "bytes_by:<load|store>:<path>" in the data
CARRIED_TOKENS = "tokens_by:"  # prefix of "tokens_by:<load|store>:<path>" in the data
DROPS = ("no_root", "queue_full", "no_space", "late", "next_root")
DROPPED = "drops:"  # prefix of "drops:<reason>" in the data
CAUSES = ("absent", "evicted", "corrupt", "other_namespace", "timed_out", "failed", "not_worth_loading")
MISSED = "missed:"  # prefix of "missed:<cause>" in the data
EVICTIONS = ("capacity", "quota", "ttl", "corrupt")  # causes; "manual" is nobody's here: every process counts it
ROOT = "root:"  # prefix of "root:<what>:<root>[:<more>]" in the data
ROOT_GAUGE = "root_gauge:"  # prefix of "root_gauge:<name>:<root>": a change, not a value
ROOT_DIGITS = 8  # of a root's id in labels, as the exporter has them
NAMED_ROOTS = 4  # with labels of their own; so that all series of an engine stay below 200
OTHER_ROOTS = "other"
BUCKETS = "bucket:"  # prefix of "bucket:<histogram>:<number, or sum>" in the data
GAUGE = "gauge:"  # prefix of "gauge:<name>": a change, not a value
LAG_EVERY_S = 30.0  # asking costs time on the scheduler's thread that grows with the segments
BOUNDS_S = (0.0001, 0.0004, 0.0016, 0.0064, 0.0256, 0.1024, 0.4096, 1.6384, 6.5536, 26.2144)  # LatencyCounts

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
        "Extents that the scrub found bad, which are condemned but on network file systems, or could not read.",
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
    "saved_seconds": (
        "tokendepot_saved_seconds",
        "Seconds of prefill that loads saved, at the measured prefill rate and less the time of the load; an estimate.",
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
CARRIED_METRIC = (
    "tokendepot_carried_bytes",
    "Bytes by operation and by the path that really carried them.",
)
CARRIED_TOKENS_METRIC = (
    "tokendepot_carried_tokens",
    "Tokens by operation and by the path that really carried them, as rank 0 sees the first group.",
)
DROPPED_METRIC = ("tokendepot_dropped_stores", "Extents that were not stored because a bound was reached, by bound.")
MISSED_METRIC = ("tokendepot_missed_tokens", "Tokens of whole chunks of prompts that were not loaded, by cause.")
# What of "root:<what>:..." -> (metric name, help, labels besides root).
ROOT_METRICS = {
    "moved_bytes": ("tokendepot_root_moved_bytes", "Bytes loaded from and stored into a root.", ("operation",)),
    "moved_tokens": (
        "tokendepot_root_moved_tokens",
        "Tokens loaded from and stored into a root, as rank 0 sees the first group.",
        ("operation",),
    ),
    "written_bytes": (
        "tokendepot_root_written_bytes",
        "Bytes that engines wrote into a root: stores, copies of demoted segments, journal records.",
        (),
    ),
    "evicted_bytes": ("tokendepot_root_evicted_bytes", "Bytes of extents that went from a root, by cause.", ("cause",)),
    "timed_out_loads": (
        "tokendepot_root_timed_out_loads",
        "Extents that had not come from a root by their deadline.",
        (),
    ),
}
ROOT_GAUGES = {
    "demotion_lag_bytes": (
        "tokendepot_demotion_lag_bytes",
        "Of extents in a root that the next one does not have yet; lost with the first.",
    ),
    "demotion_lag_seconds": (
        "tokendepot_demotion_lag_seconds",
        "How long the oldest of them has been waiting at most, in the worker of rank 0.",
    ),
}
# Name of "bucket:<name>:..." -> (metric name, help).
HISTOGRAMS = {
    "load_latency": ("tokendepot_load_latency_seconds", "Of one loaded extent, from submission to its end."),
    "load_queue": ("tokendepot_load_queue_seconds", "Of one extent to load, from submission to its beginning."),
    "store_latency": ("tokendepot_store_latency_seconds", "Of one stored extent, from submission to its journal record."),
    "store_queue": ("tokendepot_store_queue_seconds", "Of one extent to store, from submission to its beginning."),
    "journal_lag": (
        "tokendepot_journal_lag_seconds",
        "Age of others' journal records when the scheduler saw them, by the writers' clocks.",
    ),
}
GAUGES = {
    "mapped_bytes": ("tokendepot_mapped_bytes", "Of segments, mapped into the workers."),
    "registered_bytes": ("tokendepot_registered_bytes", "Of them, what the device reaches without a copy."),
    "suspended_roots": (
        "tokendepot_suspended_roots",
        "Roots that have no room for stores at the moment and are tried again, summed over workers.",
    ),
}


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
            if key.startswith((ROOT, ROOT_GAUGE, BUCKETS, GAUGE)):
                continue
            line[f"tokendepot_{key}"] = round(value, 4) if isinstance(value, float) else value
        for way in ("load", "store"):
            if seconds := self.data.get(f"{way}_seconds"):
                line[f"tokendepot_{way}_GB_per_s_per_extent"] = round(
                    self.data.get(f"{way}_bytes", 0) / seconds / 1e9, 2
                )
        return line

    def is_empty(self) -> bool:
        return not self.data


class EngineCounters:
    """Turns the ever-growing counters of a worker's Depot.stats() into deltas; those of gauges may be negative."""

    def __init__(self, rank: int) -> None:
        self._before: dict[str, float] = {}
        self._rank = rank

    def delta(self, stats: dict[str, Any]) -> dict[str, float]:
        now: dict[str, float] = {}
        now |= {f"{DROPPED}{reason}": stats["drops"][reason] for reason in DROPS}
        now |= {f"{GAUGE}{name}": value for name, value in _gauges(stats).items()}
        for number, root in enumerate(stats["roots"]):
            label = root["id"][:ROOT_DIGITS] if number < NAMED_ROOTS else OTHER_ROOTS
            for key, value in self._of_root(label, root).items():
                now[key] = now.get(key, 0) + value
        for way in ("load", "store"):
            counts = stats[way]
            now[f"{way}_extents"] = counts["extents"]
            now[f"{way}_bytes"] = counts["bytes"]
            now[f"{way}_seconds"] = counts["nanoseconds"] / 1e9
            now |= buckets(f"{way}_latency", counts["latency"])
            now |= buckets(f"{way}_queue", counts["queue"])
            for reason in REASONS:
                now[f"{FAILURE}{way}:{reason}"] = counts["failures"][reason]
            for path in PATHS:
                now[f"{CARRIED}{way}:{path}"] = counts["by_path"][path]
                if self._rank == 0:  # each rank has a part of the same tokens
                    now[f"{CARRIED_TOKENS}{way}:{path}"] = counts["tokens_by_path"][path]
        for name in ("gds_errors", "scrubbed_bytes", "scrub_errors"):
            now[name] = sum(root[name] for root in stats["roots"])
        change = {key: value - self._before.get(key, 0) for key, value in now.items()}
        # Series of roots begin with the first message: with 0, or Prometheus would take what follows for their beginning.
        first, self._before = not self._before, now
        return {key: value for key, value in change.items() if value or (first and key.startswith((ROOT, ROOT_GAUGE)))}

    def _of_root(self, label: str, root: dict[str, Any]) -> dict[str, float]:
        found = {f"{ROOT}evicted_bytes:{label}:{cause}": root["evicted_bytes"][cause] for cause in EVICTIONS}
        found[f"{ROOT}written_bytes:{label}"] = root["written_bytes"]
        found[f"{ROOT}timed_out_loads:{label}"] = root["timed_out_loads"]
        found[f"{ROOT_GAUGE}demotion_lag_bytes:{label}"] = root["demotion_lag_bytes"]
        if self._rank == 0:  # ages have no sum
            found[f"{ROOT_GAUGE}demotion_lag_seconds:{label}"] = root["demotion_lag_ns"] / 1e9
        for way, traffic in (("load", root["loaded"]), ("store", root["stored"])):
            found[f"{ROOT}moved_bytes:{label}:{way}"] = traffic["bytes"]
            if self._rank == 0:
                found[f"{ROOT}moved_tokens:{label}:{way}"] = traffic["tokens"]
        return found


def _gauges(stats: dict[str, Any]) -> dict[str, float]:
    """The keys of GAUGES."""
    return {
        "mapped_bytes": stats["device"]["mapped_bytes"],
        "registered_bytes": stats["device"]["registered_bytes"],
        "suspended_roots": sum(root["suspended"] for root in stats["roots"]),
    }


class JournalLag:
    """What the scheduler's depot counts, now and then."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._due = 0.0

    def delta(self, stats: Callable[[], dict[str, Any]]) -> dict[str, float]:
        """Asks `stats` (of a depot) once each LAG_EVERY_S at most."""
        if time.monotonic() < self._due:
            return {}
        self._due = time.monotonic() + LAG_EVERY_S
        now: dict[str, float] = {}
        for root in stats()["roots"]:
            for key, value in buckets("journal_lag", root["journal_lag"]).items():
                now[key] = now.get(key, 0) + value
        change = {key: value - self._before.get(key, 0) for key, value in now.items()}
        self._before = now
        return {key: value for key, value in change.items() if value}


def buckets(name: str, counts: dict[str, Any]) -> dict[str, float]:
    """LatencyCounts as data: how many in each bucket, and the sum of the seconds."""
    data: dict[str, float] = {f"{BUCKETS}{name}:{number}": count for number, count in enumerate(counts["counts"])}
    return data | {f"{BUCKETS}{name}:sum": counts["nanoseconds"] / 1e9}


class DepotPromMetrics(KVConnectorPromMetrics):
    """Lives in the API server's process. Labels come from fixed lists, and from root ids in the data."""

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
            metric = self._metric(self._counter_cls, Counter, name, text, labelnames)
            self._counters[key] = {
                engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
            }
        for (name, text), label, choices, prefix in (
            (FAILURE_METRIC, "reason", REASONS, FAILURE),
            (CARRIED_METRIC, "path", PATHS, CARRIED),
            (CARRIED_TOKENS_METRIC, "path", PATHS, CARRIED_TOKENS),
        ):
            metric = self._metric(self._counter_cls, Counter, name, text, [*labelnames, "operation", label])
            for way in ("load", "store"):
                for choice in choices:
                    self._counters[f"{prefix}{way}:{choice}"] = {
                        engine: metric.labels(*values, way, choice)
                        for engine, values in per_engine_labelvalues.items()
                    }

        for (name, text), label, choices, prefix in (
            (DROPPED_METRIC, "reason", DROPS, DROPPED),
            (MISSED_METRIC, "cause", CAUSES, MISSED),
        ):
            metric = self._metric(self._counter_cls, Counter, name, text, [*labelnames, label])
            for choice in choices:
                self._counters[f"{prefix}{choice}"] = {
                    engine: metric.labels(*values, choice) for engine, values in per_engine_labelvalues.items()
                }
        self._of_roots = {
            what: self._metric(self._counter_cls, Counter, name, text, [*labelnames, "root", *labels])
            for what, (name, text, labels) in ROOT_METRICS.items()
        }
        self._root_gauges = {
            name: self._metric(self._gauge_cls, Gauge, *about, [*labelnames, "root"], multiprocess_mode="livesum")
            for name, about in ROOT_GAUGES.items()
        }
        self._gauges = {
            name: self._metric(self._gauge_cls, Gauge, *about, labelnames, multiprocess_mode="livesum")
            for name, about in GAUGES.items()
        }
        self._histograms = {
            name: self._metric(self._histogram_cls, Histogram, *about, labelnames, buckets=BOUNDS_S)
            for name, about in HISTOGRAMS.items()
        }
        for metric in (*self._gauges.values(), *self._histograms.values()):
            for values in per_engine_labelvalues.values():
                metric.labels(*values)  # shown from the start, with 0

    def _metric(self, kind: Any, plain: Any, name: str, text: str, labelnames: list[str], **more: Any) -> Any:
        """A second engine in one process goes on with the first one's metric: names are unique in the registry."""
        if kind is plain:
            registered = getattr(REGISTRY, "_names_to_collectors", {}).get(name)
            if registered is not None and getattr(registered, "_labelnames", None) == tuple(labelnames):
                return registered
        return kind(name=name, documentation=text, labelnames=labelnames, **more)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            kind, _, rest = key.partition(":")
            name, *more = rest.split(":")
            if kind + ":" == GAUGE and name in self._gauges:
                self._gauges[name].labels(*values).inc(value)
            elif kind + ":" == ROOT_GAUGE and name in self._root_gauges:
                self._root_gauges[name].labels(*values, *more).inc(value)
            elif kind + ":" == BUCKETS and name in self._histograms:
                _add_to_bucket(self._histograms[name].labels(*values), more[0], value)
            elif kind + ":" == ROOT and name in self._of_roots:
                self._of_roots[name].labels(*values, *more).inc(max(0, value))
            elif (counter := self._counters.get(key)) is not None and value > 0:
                counter[engine_idx].inc(value)


def _add_to_bucket(histogram: Any, bucket: str, value: float) -> None:
    """What was counted elsewhere. prometheus_client has no public way to add to a bucket; wrappers of it (Ray's) get
    observations of the bucket's bound."""
    counts = getattr(histogram, "_buckets", None)
    if counts is not None:
        (histogram._sum if bucket == "sum" else counts[int(bucket)]).inc(value)
    elif bucket != "sum":
        for _ in range(int(value)):
            histogram.observe(BOUNDS_S[min(int(bucket), len(BOUNDS_S) - 1)])
