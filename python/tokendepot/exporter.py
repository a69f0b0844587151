"""What roots say about themselves, for Prometheus: read from outside, no engine needed.

A scrape does bounded work. A root is inspected in a thread of its own (a file system that hangs must not hang the
scrape), not again before CACHE_S and REST times the last inspection's duration have passed, and the number of series
has a bound. Labels are made of digests only: no path, model, salt or request can come into them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from . import _core

ROOTS_MAX = 8  # as in the configuration of an engine
SERIES_MAX = 200
NAMED_NAMESPACES = 8  # of a root; fewer where many roots share the series
CACHE_S = 5.0
REST = 10  # so that a root with long journals takes a tenth of a core at most
PATIENCE_S = 5.0  # of one scrape, for all roots; Prometheus gives up after 10 s
HUNG_S = 60.0  # an inspection that takes longer says that the root cannot be used
ID_DIGITS = 8
NAMESPACE_DIGITS = 12

# Name -> (labels besides "root", help).
METRICS = {
    "tokendepot_root_up": ((), "1 where the root could be read, 0 where it could not: then it has no other series."),
    "tokendepot_root_capacity_bytes": ((), "Capacity, where the exporter was told it."),
    "tokendepot_root_used_bytes": ((), "Size of all segment files, which counts against the capacity."),
    "tokendepot_root_live_bytes": ((), "Bytes of extents that can be looked up."),
    "tokendepot_root_dead_bytes": ((), "Bytes of sealed segments that are in no live extent."),
    "tokendepot_root_extents": ((), "Extents that can be looked up."),
    "tokendepot_root_segments": (("state",), "Segment files, sealed or open."),
    "tokendepot_root_journals": (("state",), "Journals: in_use = a running writer holds it, idle = its writer has ended."),
    "tokendepot_root_journal_records": ((), "Records in all journals."),
    "tokendepot_root_journal_bad_records": ((), "Records that cannot be read."),
    "tokendepot_root_journal_bytes": ((), "Size of all journals."),
    "tokendepot_root_damaged_files": ((), "Journals and manifests that are damaged, and the rules."),
    "tokendepot_root_namespaces": ((), "Namespaces, named in labels or not."),
    "tokendepot_root_namespace_bytes": (("namespace",), "Bytes of extents of the largest namespaces; other = of all others."),
    "tokendepot_root_namespace_extents": (("namespace",), "Extents of the same namespaces."),
    "tokendepot_root_filesystem_size_bytes": ((), "Size of the file system."),
    "tokendepot_root_filesystem_free_bytes": ((), "Free on the file system, for who runs the exporter."),
    "tokendepot_root_filesystem_free_inodes": ((), "Files that can be made, where the file system has a bound."),
    "tokendepot_root_last_used_timestamp_seconds": ((), "When an extent was stored or touched last, since 1970."),
    "tokendepot_root_pinned_bytes": ((), "Segment files that pins hold."),
    "tokendepot_root_scrub_finished_timestamp_seconds": ((), "When the last full scrub by an engine ended, since 1970; 0 = never."),
    "tokendepot_root_inspected_timestamp_seconds": ((), "When what is shown here was read, since 1970."),
    "tokendepot_root_inspection_seconds": ((), "How long reading it took."),
}
SERIES_OF_STATES = 2  # of each metric with a label "state"
SERIES_OF_A_ROOT = sum({(): 1, ("state",): SERIES_OF_STATES}.get(labels, 0) for labels, _ in METRICS.values())
SERIES_OF_A_NAMESPACE = sum(labels == ("namespace",) for labels, _ in METRICS.values())


class BadRoots(Exception):
    """The roots cannot be exported together; the text is one sentence."""


@dataclass(frozen=True)
class Sample:
    name: str
    value: float
    labels: tuple[str, ...] = ()


@dataclass
class Inspection:
    """One reading of a root; `error` is None when it came to its end."""

    began: float = field(default_factory=time.monotonic)
    ended: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0
    root_id: str = ""
    samples: list[Sample] = field(default_factory=list)
    error: Exception | None = None


def named_namespaces(roots: int) -> int:
    """How many namespaces of each of `roots` get series of their own, so that all series stay below SERIES_MAX."""
    left = SERIES_MAX // roots - SERIES_OF_A_ROOT
    return max(0, min(NAMED_NAMESPACES, left // SERIES_OF_A_NAMESPACE - 1))


def samples_of(
    root: dict[str, Any], tending: dict[str, Any], journal_bytes: int, disk: os.statvfs_result, named: int
) -> list[Sample]:
    """root: of inspect_root(); tending: of inspect_policies(); the `named` largest namespaces are told apart."""
    sealed = [segment for segment in root["segments"] if segment["sealed"]]
    journals, namespaces = root["journals"], root["namespaces"]
    in_use = sum(journal["in_use"] for journal in journals)
    damaged = sum(journal["damaged"] for journal in journals) + sum(n["damaged"] for n in namespaces)
    damaged += bool(tending["damage"])
    plain = {
        "used_bytes": root["file_bytes"],
        "live_bytes": root["live_bytes"],
        "dead_bytes": sum(segment["file_bytes"] - segment["live_bytes"] for segment in sealed),
        "extents": root["extents"],
        "journal_records": sum(journal["records"] for journal in journals),
        "journal_bad_records": sum(journal["bad_records"] for journal in journals),
        "journal_bytes": journal_bytes,
        "damaged_files": damaged,
        "namespaces": len(namespaces),
        "pinned_bytes": tending["pinned_bytes"],
        "scrub_finished_timestamp_seconds": tending["scrub_finished"],
        "filesystem_size_bytes": disk.f_blocks * disk.f_frsize,
        "filesystem_free_bytes": disk.f_bavail * disk.f_frsize,
    }
    if disk.f_files:
        plain["filesystem_free_inodes"] = disk.f_favail
    last_used = max((segment["last_used"] for segment in root["segments"]), default=0.0)
    if last_used:
        plain["last_used_timestamp_seconds"] = last_used
    found = [Sample(f"tokendepot_root_{name}", value) for name, value in plain.items()]
    for name, state, count in (
        ("segments", "sealed", len(sealed)),
        ("segments", "open", len(root["segments"]) - len(sealed)),
        ("journals", "in_use", in_use),
        ("journals", "idle", len(journals) - in_use),
    ):
        found.append(Sample(f"tokendepot_root_{name}", count, (state,)))
    by_size = sorted(namespaces, key=lambda n: (-n["bytes"], n["digest"]))
    shown = {n["digest"][:NAMESPACE_DIGITS]: (n["bytes"], n["extents"]) for n in by_size[:named]}
    others = [n for n in by_size if n["digest"][:NAMESPACE_DIGITS] not in shown]
    shown["other"] = (sum(n["bytes"] for n in others), sum(n["extents"] for n in others))
    for namespace, (count, extents) in shown.items():
        found.append(Sample("tokendepot_root_namespace_bytes", count, (namespace,)))
        found.append(Sample("tokendepot_root_namespace_extents", extents, (namespace,)))
    return found


class WatchedRoot:
    """A directory, read now and then. Thread-safe."""

    def __init__(self, path: str, capacity: int | None, named: int, complain: Callable[[str], None]) -> None:
        self.path = path
        self.label = ""
        self._capacity = capacity
        self._named = named
        self._complain = complain
        self._down = False
        self._lock = threading.Lock()
        self._last: Inspection | None = None  # that has ended
        self._running: Inspection | None = None

    def first(self) -> None:
        """Fixes the label. Raises DepotError where the path is no root that can be read, BadRoots where it hangs."""
        inspection = self.begin()
        if not inspection.ended.wait(HUNG_S):
            raise BadRoots(f"{self.path} could not be read in {HUNG_S:g} s")
        if inspection.error:
            raise inspection.error
        self.label = inspection.root_id[:ID_DIGITS]

    def begin(self) -> Inspection:
        """The inspection to wait for: the last one while it is young, else one that is under way or begins now."""
        with self._lock:
            if self._running and self._running.ended.is_set():
                self._last, self._running = self._running, None
            if self._running:
                return self._running
            if self._last and time.monotonic() - self._last.began < max(CACHE_S, REST * self._last.seconds):
                return self._last
            self._running = Inspection()
            threading.Thread(target=self._inspect, args=(self._running,), daemon=True).start()
            return self._running

    def samples(self, inspection: Inspection, patience_s: float) -> list[Sample]:
        """Those of `inspection` if it ends in time, else of the one before; those of a root that is down otherwise."""
        reason = ""
        if not inspection.ended.wait(max(0.0, patience_s)):
            if time.monotonic() - inspection.began > HUNG_S:
                reason = f"it could not be read in {HUNG_S:g} s"
            with self._lock:
                inspection = self._last or inspection
        if inspection.error:
            reason = reason or str(inspection.error)
        elif inspection.root_id[:ID_DIGITS] != self.label:
            reason = reason or f"{self.path} now holds the root {inspection.root_id[:ID_DIGITS]}"
        with self._lock:
            said, self._down = self._down, bool(reason)
        if reason and not said:
            self._complain(f"root {self.label} is down: {reason}")
        return [Sample("tokendepot_root_up", 0)] if reason else inspection.samples

    def _inspect(self, inspection: Inspection) -> None:
        try:
            root = _core.inspect_root(self.path)
            inspection.root_id = root["root_id"]
            tending = _core.inspect_policies(self.path)
            found = samples_of(root, tending, self._journal_bytes(root["journals"]), os.statvfs(self.path), self._named)
            if self._capacity is not None:
                found.append(Sample("tokendepot_root_capacity_bytes", self._capacity))
            inspection.seconds = time.monotonic() - inspection.began
            found.append(Sample("tokendepot_root_up", 1))
            found.append(Sample("tokendepot_root_inspected_timestamp_seconds", time.time()))
            found.append(Sample("tokendepot_root_inspection_seconds", inspection.seconds))
            inspection.samples = found
        except Exception as error:  # whatever it is, the root is down and the exporter goes on
            inspection.error = error
            inspection.seconds = time.monotonic() - inspection.began
        finally:
            inspection.ended.set()

    def _journal_bytes(self, journals: list[dict[str, Any]]) -> int:
        """Journals that have gone since they were listed have no bytes."""
        total = 0
        for journal in journals:
            try:
                total += os.stat(os.path.join(self.path, "journals", journal["file"])).st_size
            except FileNotFoundError:
                continue
        return total


class RootsCollector(Collector):
    """One gauge a metric, with a series for each root that has it. Thread-safe."""

    def __init__(self, roots: list[tuple[str, int | None]], complain: Callable[[str], None]) -> None:
        """roots: directory and capacity in bytes, if known. Raises DepotError or BadRoots unless all can be read now.

        complain: is told in one sentence, from any thread, when a root goes down.
        """
        if len(roots) > ROOTS_MAX:
            raise BadRoots(f"{len(roots)} roots are given, expected {ROOTS_MAX} at most")
        named = named_namespaces(len(roots))
        self.roots = [WatchedRoot(path, capacity, named, complain) for path, capacity in roots]
        labels: dict[str, str] = {}
        for root in self.roots:
            root.first()
            if root.label in labels:
                raise BadRoots(
                    f"{labels[root.label]} and {root.path} both have the id {root.label}..., expected different roots; "
                    "they are the same directory, or one is a copy"
                )
            labels[root.label] = root.path

    def collect(self) -> Iterator[GaugeMetricFamily]:
        end = time.monotonic() + PATIENCE_S
        families = {
            name: GaugeMetricFamily(name, text, labels=("root", *labels)) for name, (labels, text) in METRICS.items()
        }
        under_way = [(root, root.begin()) for root in self.roots]
        for root, inspection in under_way:
            for sample in root.samples(inspection, end - time.monotonic()):
                families[sample.name].add_metric((root.label, *sample.labels), sample.value)
        yield from (family for family in families.values() if family.samples)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Names only, so that registering does not scrape."""
        return (GaugeMetricFamily(name, text) for name, (_, text) in METRICS.items())


def registry_of(
    roots: list[tuple[str, int | None]], complain: Callable[[str], None]
) -> tuple[CollectorRegistry, RootsCollector]:
    """A registry with nothing else in it. Arguments and errors are those of RootsCollector."""
    collector = RootsCollector(roots, complain)
    registry = CollectorRegistry()
    registry.register(collector)
    return registry, collector
