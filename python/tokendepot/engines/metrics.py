"""The metrics of a process that has a depot open: one table for every engine, and Depot.stats() as data for it.

Data is a flat dictionary of numbers: "load_bytes", "failures:load:corrupt", "gauge:mapped_bytes", "bucket:load_queue:3",
"root:evicted_bytes:<root>:ttl". Data of several processes or intervals add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

OPERATIONS = ("load", "store")
REASONS = ("absent", "mismatch", "corrupt", "io_error", "timed_out", "cancelled", "dropped", "pinned")
PATHS = ("mapped", "direct", "buffered", "gds_p2p", "gds_compat")
DROPS = ("no_root", "queue_full", "no_space", "late", "next_root")
CAUSES = ("absent", "evicted", "corrupt", "other_namespace", "timed_out", "failed", "not_worth_loading")
EVICTIONS = ("capacity", "quota", "ttl", "corrupt")  # "manual" is nobody's here: every process counts it
MISSED = "missed:"  # prefix of "missed:<cause>" in the data
ROOT = "root:"  # prefix of "root:<what>:<root>[:<label>]" in the data
ROOT_GAUGE = "root_gauge:"  # prefix of "root_gauge:<name>:<root>"
ROOT_DIGITS = 8  # of a root's id in labels, as the exporter has them
NAMED_ROOTS = 4  # with labels of their own; so that all series of an engine stay below 200
OTHER_ROOTS = "other"
BUCKETS = "bucket:"  # prefix of "bucket:<histogram>:<number, or sum>" in the data
GAUGE = "gauge:"  # prefix of "gauge:<name>"
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
        "Errors of cuFile: extents went the ordinary way.",
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
        "Parts of a connector (vLLM: the scheduler's, and each rank's; LMCache: each storage) that do without the depot "
        "from some moment on.",
    ),
    "saved_seconds": (
        "tokendepot_saved_seconds",
        "Seconds of prefill that loads saved, at the measured prefill rate and less the time of the load; an estimate.",
    ),
    "queried_objects": ("tokendepot_queried_objects", "Objects that were looked up."),
    "found_objects": ("tokendepot_found_objects", "Of them, those that the depot holds."),
    "failed_requests": (
        "tokendepot_failed_load_requests",
        "Requests with at least one chunk that failed to load.",
    ),
}
# First word of a key of the data -> (metric name, help, labels with their values); those follow in the key.
LABELLED: dict[str, tuple[str, str, dict[str, tuple[str, ...]]]] = {
    "failures": (
        "tokendepot_failures",
        "Extents that were not loaded or not stored, by operation and reason.",
        {"operation": OPERATIONS, "reason": REASONS},
    ),
    "bytes_by": (
        "tokendepot_carried_bytes",
        "Bytes by operation and by the path that really carried them.",
        {"operation": OPERATIONS, "path": PATHS},
    ),
    "drops": (
        "tokendepot_dropped_stores",
        "Extents that were not stored because a bound was reached, by bound.",
        {"reason": DROPS},
    ),
    "tokens_by": (
        "tokendepot_carried_tokens",
        "Tokens by operation and by the path that really carried them, as rank 0 sees the first group.",
        {"operation": OPERATIONS, "path": PATHS},
    ),
    "missed": (
        "tokendepot_missed_tokens",
        "Tokens of whole chunks of prompts that were not loaded, by cause.",
        {"cause": CAUSES},
    ),
}
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
        "Bytes that engines wrote into a root: stores, copies, rewritten extents, journal records.",
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
        "How long the oldest of them has been waiting at most; under vLLM in the worker of rank 0.",
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
        "Age of others' journal records when they were seen by who looks up, by the writers' clocks.",
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
# Keys of what only an engine counts, which sees prompts and tokens.
OF_PROMPTS = frozenset((
    "queried_tokens", "hit_tokens", "not_worth_tokens", "shared_loads", "missed_repeats", "broken_promises",
    "saved_seconds", "failed_requests", "tokens_by", "missed", "moved_tokens",
))  # fmt: skip
# Keys of what only a store of objects counts, which sees neither.
OF_OBJECTS = frozenset(("queried_objects", "found_objects"))


def labelled_keys(word: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """All keys of the data that begin with a word of LABELLED, each with the values of its labels."""
    for values in product(*LABELLED[word][2].values()):
        yield ":".join((word, *values)), values


def readings(stats: Mapping[str, Any], rank: int = 0) -> dict[str, float]:
    """What a process that loads and stores says, from its Depot.stats(). Only rank 0 tells of tokens and ages."""
    now: dict[str, float] = {f"drops:{reason}": stats["drops"][reason] for reason in DROPS}
    now |= {f"{GAUGE}{name}": value for name, value in _gauges(stats).items()}
    for number, root in enumerate(stats["roots"]):
        label = root["id"][:ROOT_DIGITS] if number < NAMED_ROOTS else OTHER_ROOTS
        for key, value in _of_root(label, root, rank).items():
            now[key] = now.get(key, 0) + value
    for way in OPERATIONS:
        counts = stats[way]
        now[f"{way}_extents"] = counts["extents"]
        now[f"{way}_bytes"] = counts["bytes"]
        now[f"{way}_seconds"] = counts["nanoseconds"] / 1e9
        now |= _buckets(f"{way}_latency", counts["latency"])
        now |= _buckets(f"{way}_queue", counts["queue"])
        for reason in REASONS:
            now[f"failures:{way}:{reason}"] = counts["failures"][reason]
        for path in PATHS:
            now[f"bytes_by:{way}:{path}"] = counts["by_path"][path]
            if rank == 0:  # each rank has a part of the same tokens
                now[f"tokens_by:{way}:{path}"] = counts["tokens_by_path"][path]
    for name in ("gds_errors", "scrubbed_bytes", "scrub_errors"):
        now[name] = sum(root[name] for root in stats["roots"])
    return now


def readings_of_start(stats: Mapping[str, Any]) -> dict[str, float]:
    """What a process that looks up says once it has opened the depot."""
    mended = sum(root["mended_manifests"] for root in stats["roots"])
    return {"open_seconds": stats["open_nanoseconds"] / 1e9, "mended_manifests": mended}


def readings_of_lag(stats: Mapping[str, Any]) -> dict[str, float]:
    """What a process that looks up says of others' journals."""
    now: dict[str, float] = {}
    for root in stats["roots"]:
        for key, value in _buckets("journal_lag", root["journal_lag"]).items():
            now[key] = now.get(key, 0) + value
    return now


def _gauges(stats: Mapping[str, Any]) -> dict[str, float]:
    """The keys of GAUGES."""
    return {
        "mapped_bytes": stats["device"]["mapped_bytes"],
        "registered_bytes": stats["device"]["registered_bytes"],
        "suspended_roots": sum(root["suspended"] for root in stats["roots"]),
    }


def _of_root(label: str, root: Mapping[str, Any], rank: int) -> dict[str, float]:
    found = {f"{ROOT}evicted_bytes:{label}:{cause}": root["evicted_bytes"][cause] for cause in EVICTIONS}
    found[f"{ROOT}written_bytes:{label}"] = root["written_bytes"]
    found[f"{ROOT}timed_out_loads:{label}"] = root["timed_out_loads"]
    found[f"{ROOT_GAUGE}demotion_lag_bytes:{label}"] = root["demotion_lag_bytes"]
    if rank == 0:  # ages have no sum
        found[f"{ROOT_GAUGE}demotion_lag_seconds:{label}"] = root["demotion_lag_ns"] / 1e9
    for way, traffic in (("load", root["loaded"]), ("store", root["stored"])):
        found[f"{ROOT}moved_bytes:{label}:{way}"] = traffic["bytes"]
        if rank == 0:
            found[f"{ROOT}moved_tokens:{label}:{way}"] = traffic["tokens"]
    return found


def _buckets(name: str, counts: Mapping[str, Any]) -> dict[str, float]:
    """LatencyCounts as data: how many in each bucket, and the sum of the seconds."""
    data: dict[str, float] = {f"{BUCKETS}{name}:{number}": count for number, count in enumerate(counts["counts"])}
    return data | {f"{BUCKETS}{name}:sum": counts["nanoseconds"] / 1e9}
