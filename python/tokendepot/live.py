"""What a depot does now: rates between two readings of a metrics endpoint, and what its roots hold."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from . import _core

TIMEOUT_S = 5.0
MOST_BYTES = 32 << 20

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]

# What `rates` shows -> counter (without "_total") and the labels that choose its series.
RATES: dict[str, tuple[str, dict[str, str]]] = {
    "load_bytes": ("tokendepot_load_bytes", {}),
    "store_bytes": ("tokendepot_store_bytes", {}),
    "load_extents": ("tokendepot_load_extents", {}),
    "store_extents": ("tokendepot_store_extents", {}),
    "queried_tokens": ("tokendepot_queried_tokens", {}),
    "hit_tokens": ("tokendepot_hit_tokens", {}),
    "dropped_stores": ("tokendepot_dropped_stores", {}),
    "failed_loads": ("tokendepot_failures", {"operation": "load"}),
    "saved_seconds": ("tokendepot_saved_seconds", {}),
}
# Mean seconds of what ended between the readings, from histograms.
MEANS = {
    "load_latency": "tokendepot_load_latency_seconds",
    "load_queue": "tokendepot_load_queue_seconds",
    "store_latency": "tokendepot_store_latency_seconds",
    "store_queue": "tokendepot_store_queue_seconds",
}


class Unreadable(Exception):
    """An endpoint that cannot be read, or does not speak of a depot; one sentence."""


@dataclass
class Reading:
    """The tokendepot_* series of an endpoint at one moment."""

    when: float
    series: Series

    def total(self, name: str, labels: dict[str, str]) -> float:
        return sum(
            value
            for (found, has), value in self.series.items()
            if found == name and labels.items() <= dict(has).items()
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        sums: dict[str, float] = {}
        for (found, has), value in self.series.items():
            if found == name and (key := dict(has).get(label)) is not None:
                sums[key] = sums.get(key, 0) + value
        return sums


def read(url: str) -> Reading:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text = answer.read(MOST_BYTES).decode()
        series = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            if family.name.startswith("tokendepot_")
            for sample in family.samples
        }
    except urllib.error.URLError as error:
        raise Unreadable(f"{url} cannot be read: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"{url} cannot be read as metrics: {error}") from None
    if not series:
        raise Unreadable(f"{url} has no metrics of a depot; expected those of an engine with the connector, of "
                         "LMCache's server with a depot, or of `tokendepot metrics`")  # fmt: skip
    return Reading(time.monotonic(), series)


@dataclass
class Now:
    """What is shown. Rates are per second; None: not known (no endpoint, one reading only, or not counted there)."""

    rates: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, float | None] = field(default_factory=dict)
    hit_ratio: float | None = None  # between the readings
    hit_ratio_ever: float | None = None  # since the engine started
    misses: dict[str, float] = field(default_factory=dict)  # cause -> tokens a second
    roots: list[dict[str, Any]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)


def compare(before: Reading | None, after: Reading | None) -> Now:
    """Counters that went back belong to an engine that was started anew: there is no rate of this interval."""
    now = Now(dict.fromkeys(RATES), dict.fromkeys(MEANS))
    if after is None:
        return now
    queried = after.total("tokendepot_queried_tokens_total", {})
    now.hit_ratio_ever = after.total("tokendepot_hit_tokens_total", {}) / queried if queried else None
    if before is None or after.when <= before.when:
        return now
    grown = {
        name: after.total(f"{counter}_total", labels) - before.total(f"{counter}_total", labels)
        for name, (counter, labels) in RATES.items()
    }
    if min(grown.values()) < 0:
        return now
    span = after.when - before.when
    shown = {name for name, _ in after.series}  # LMCache's server does not count tokens
    now.rates |= {name: amount / span for name, amount in grown.items() if f"{RATES[name][0]}_total" in shown}
    now.hit_ratio = grown["hit_tokens"] / grown["queried_tokens"] if grown["queried_tokens"] else None
    for name, histogram in MEANS.items():
        count, total = (after.total(f"{histogram}_{p}", {}) - before.total(f"{histogram}_{p}", {}) for p in ("count", "sum"))
        now.seconds[name] = total / count if count > 0 else None
    missed = "tokendepot_missed_tokens_total"
    earlier = before.by(missed, "cause")
    now.misses = {cause: (value - earlier.get(cause, 0)) / span for cause, value in after.by(missed, "cause").items()}
    return now


def inspect(path: str, capacity: int | None, before: Reading | None, after: Reading | None) -> dict[str, Any]:
    """One root: what lies in it, and, where an engine's metrics name it, what moves. Raises DepotError."""
    root = _core.inspect_root(path)
    label = root["root_id"][:8]
    found: dict[str, Any] = {
        "path": path,
        "root": label,
        "capacity_bytes": capacity,
        "used_bytes": root["file_bytes"],
        "live_bytes": root["live_bytes"],
        "extents": root["extents"],
        "writers": sum(journal["in_use"] for journal in root["journals"]),
    }
    for name, operation in (("load_bytes", "load"), ("store_bytes", "store")):
        labels = {"root": label, "operation": operation}
        found[f"{name}_per_second"] = _rate(before, after, "tokendepot_root_moved_bytes_total", labels)
    found["evicted_bytes_per_second"] = _rate(before, after, "tokendepot_root_evicted_bytes_total", {"root": label})
    return found


def _rate(before: Reading | None, after: Reading | None, name: str, labels: dict[str, str]) -> float | None:
    if before is None or after is None or after.when <= before.when:
        return None
    grown = after.total(name, labels) - before.total(name, labels)
    return grown / (after.when - before.when) if grown >= 0 else None
