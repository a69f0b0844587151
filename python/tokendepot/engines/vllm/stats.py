"""Metrics: deltas from both halves -> vLLM's log line and /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from tokendepot.engines.metrics import (
    BOUNDS_S,
    BUCKETS,
    COUNTERS,
    GAUGE,
    GAUGES,
    HISTOGRAMS,
    LABELLED,
    OF_OBJECTS,
    OPERATIONS,
    ROOT,
    ROOT_GAUGE,
    ROOT_GAUGES,
    ROOT_METRICS,
    labelled_keys,
    readings,
    readings_of_lag,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

LAG_EVERY_S = 30.0  # asking costs time on the scheduler's thread that grows with the segments


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
        for way in OPERATIONS:
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
        now = readings(stats, self._rank)
        change = {key: value - self._before.get(key, 0) for key, value in now.items()}
        # Series of roots begin with the first message: with 0, or Prometheus would take what follows for their beginning.
        first, self._before = not self._before, now
        return {key: value for key, value in change.items() if value or (first and key.startswith((ROOT, ROOT_GAUGE)))}


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
        now = readings_of_lag(stats())
        change = {key: value - self._before.get(key, 0) for key, value in now.items()}
        self._before = now
        return {key: value for key, value in change.items() if value}


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
            if key in OF_OBJECTS:
                continue
            metric = self._metric(self._counter_cls, Counter, name, text, labelnames)
            self._counters[key] = {
                engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
            }
        for word, (name, text, labels) in LABELLED.items():
            metric = self._metric(self._counter_cls, Counter, name, text, [*labelnames, *labels])
            for key, chosen in labelled_keys(word):
                self._counters[key] = {
                    engine: metric.labels(*values, *chosen) for engine, values in per_engine_labelvalues.items()
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
