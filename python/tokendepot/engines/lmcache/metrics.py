"""What the depots of this process count, in the registry that LMCache's server shows at its /metrics."""

from __future__ import annotations

import json
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import accumulate
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tokendepot.engines.metrics import (
    BOUNDS_S,
    BUCKETS,
    COUNTERS,
    GAUGE,
    GAUGES,
    HISTOGRAMS,
    LABELLED,
    OF_PROMPTS,
    ROOT,
    ROOT_GAUGE,
    ROOT_GAUGES,
    ROOT_METRICS,
    labelled_keys,
    readings,
    readings_of_lag,
    readings_of_start,
)

log = logging.getLogger("tokendepot.lmcache")

# Exact: what is added in another order when a storage closes must not come out less by a rounding error, which Prometheus
# would take for a restart.
Sums = dict[str, Fraction]
OLDEST = f"{ROOT_GAUGE}demotion_lag_seconds:"  # an age: of several storages the largest, not the sum


class StorageCollector(Collector):
    """All storages that this process has opened, added up. Thread-safe.

    Counters go on when one is closed and another is opened. Names and labels are those of engines/metrics.py, without
    what only an engine counts and without vLLM's labels: one server serves many models and engines. A scrape in which a
    depot cannot be asked shows nothing of the depots, and all else of the registry.
    """

    def __init__(self) -> None:
        self._shown = self._complained = False
        self.forget()

    def forget(self) -> None:
        """What a forked child does: the storages are its parent's, which may have held the lock."""
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._ended: Sums = {}

    def opened(self, depot: Any) -> None:
        """From now on `depot.stats_json()` is asked at each scrape, until closed(). Keeps no depot alive."""
        self._show()
        with self._lock:
            self._open.add(depot)

    def refused(self) -> None:
        """A storage goes on without a depot."""
        self._show()
        with self._lock:
            _add(self._ended, {"switched_off": 1})

    def looked_up(self, asked: int, found: int) -> None:
        """One batch of objects of any storage."""
        with self._lock:
            _add(self._ended, {"queried_objects": asked, "found_objects": found})

    def closed(self, depot: Any) -> None:
        """To be called before the depot is closed: it cannot be asked later."""
        with self._lock:
            if depot not in self._open:
                return
            self._open.discard(depot)
            try:
                last = _asked(depot)
            except Exception as error:  # its figures are not worth more than its end
                log.warning("tokendepot: what a closed depot counted is left out of the metrics: %s", error)
                return
            _add(self._ended, {key: value for key, value in last.items() if not key.startswith((GAUGE, ROOT_GAUGE))})

    def collect(self) -> Iterator[Metric]:
        try:
            with self._lock:
                data = dict(self._ended)
                for depot in self._open:
                    _add(data, _asked(depot))
            yield from list(_families({key: float(value) for key, value in data.items()}))
        except Exception as error:  # whatever it is, LMCache's own metrics must be shown
            if not self._complained:
                log.error("tokendepot: metrics of the depot are not shown: %s: %s", type(error).__name__, error)
            self._complained = True

    def describe(self) -> Iterator[Metric]:
        """Names only, so that registering does not scrape."""
        yield from _families({})

    def _show(self) -> None:
        """In the registry, from the first storage on."""
        with self._lock:
            shown, self._shown = self._shown, True
        if shown:
            return
        try:
            REGISTRY.register(self)
        except ValueError as error:
            log.warning("tokendepot: metrics of the depot are not shown: %s", error)


storages = StorageCollector()
os.register_at_fork(after_in_child=storages.forget)


def _asked(depot: Any) -> dict[str, float]:
    """Empty when the depot has been closed."""
    stats = json.loads(depot.stats_json())
    return readings(stats) | readings_of_start(stats) | readings_of_lag(stats) if stats else {}


def _add(sums: Sums, more: Mapping[str, float]) -> None:
    for key, value in more.items():
        before, exact = sums.get(key, Fraction(0)), Fraction(value)
        sums[key] = max(before, exact) if key.startswith(OLDEST) else before + exact


def _families(data: Mapping[str, float]) -> Iterator[Metric]:
    """Every metric of the table; series of roots where `data` has roots."""
    for key, (name, text) in COUNTERS.items():
        if key not in OF_PROMPTS:
            yield CounterMetricFamily(name, text, value=data.get(key, 0))
    for word, (name, text, labels) in LABELLED.items():
        if word not in OF_PROMPTS:
            series = [(values, data.get(key, 0)) for key, values in labelled_keys(word)]
            yield _filled(CounterMetricFamily(name, text, labels=[*labels]), series)
    for what, (name, text, labels) in ROOT_METRICS.items():
        if what not in OF_PROMPTS:
            series = _of_roots(data, f"{ROOT}{what}:")
            yield _filled(CounterMetricFamily(name, text, labels=["root", *labels]), series)
    for gauge, (name, text) in ROOT_GAUGES.items():
        yield _filled(GaugeMetricFamily(name, text, labels=["root"]), _of_roots(data, f"{ROOT_GAUGE}{gauge}:"))
    for gauge, (name, text) in GAUGES.items():
        yield GaugeMetricFamily(name, text, value=data.get(f"{GAUGE}{gauge}", 0))
    bounds = [*map(floatToGoString, BOUNDS_S), "+Inf"]
    for histogram, (name, text) in HISTOGRAMS.items():
        counts = accumulate(data.get(f"{BUCKETS}{histogram}:{number}", 0) for number in range(len(bounds)))
        seconds = data.get(f"{BUCKETS}{histogram}:sum", 0)
        yield HistogramMetricFamily(name, text, buckets=list(zip(bounds, counts, strict=True)), sum_value=seconds)


def _of_roots(data: Mapping[str, float], prefix: str) -> list[tuple[list[str], float]]:
    """Label values, the root's first, and value."""
    return [(key[len(prefix) :].split(":"), value) for key, value in data.items() if key.startswith(prefix)]


def _filled(family: Any, series: Iterable[tuple[Iterable[str], float]]) -> Metric:
    for values, value in series:
        family.add_metric(list(values), value)
    return family
