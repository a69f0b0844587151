"""One cell: ours and the limit take turns, then the figures of the rounds become one result."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

from .fleet import Fleet
from .plan import Cell, Plan, config_of

RELATIVE_ERROR = 1 / 128  # of LatencyHistogram in include/tokendepot/workload.h
LATENCY_SPANS = (
    "submission to report as the client sees it: the depot's queue, the medium, digest and the copy to or from the paged cache"
)
PAYLOAD = "random, and every 512 bytes stamped with a word used once: nothing to deduplicate or compress"
CLIENT_BUSY = 0.9  # of the allowed CPUs: above, the client and not the storage may be what is measured
DEVICE_SHARE = 0.99
WARM_UP_S = 0.05

Advance = Callable[[float], None]


def weight_of(plan: Plan, cell: Cell) -> float:
    """About how many seconds a cell takes; only its share of all matters."""
    moved = cell.volume * cell.processes * {"read": 2, "burst": 2, "write": 3, "mixed": 4}[cell.operation]
    return 2 * plan.seconds + 1 + moved / 1e9


def measure(plan: Plan, cell: Cell, own: str, advance: Advance) -> dict[str, Any]:
    """Runs the cell in directories below `own`, which are gone at the end. `advance` is told about seconds done.

    An interrupt after the first round ends it early with what was measured, marked `interrupted`; before, it is raised.
    """
    weight = weight_of(plan, cell)
    part = 2 * plan.seconds / plan.rounds
    directories = [os.path.join(own, f"process-{i}") for i in range(cell.processes)]
    rounds: list[dict[str, Any]] = []
    verified: list[dict[str, Any]] = []
    interrupted = False
    try:
        for directory in directories:
            os.mkdir(directory, 0o700)
        with Fleet(cell.processes) as fleet:
            each = [
                {"config": config_of(cell, i, directory, plan.engine), "process": i}
                for i, directory in enumerate(directories)
            ]
            about = fleet.call(
                "open",
                each,
                kind=cell.operation,
                extent_bytes=cell.sizes,
                volume_bytes=cell.volume,
                in_flight=cell.in_flight,
                request_extents=cell.request_extents,
                keep_cache=plan.keep_cache,
            )
            fleet.call("fill")
            fleet.call("limits", seconds=WARM_UP_S)  # makes its files
            advance((weight - 2 * plan.seconds) * 0.6)
            try:
                for number in range(plan.rounds):
                    rounds.append(_round(fleet, cell, plan.seconds / plan.rounds, number % 2 == 1))
                    advance(part)
                if plan.verify_every:
                    verified = fleet.call("verify", every=plan.verify_every)
            except KeyboardInterrupt:
                if not rounds:
                    raise
                interrupted = True
                fleet.interrupt()
        advance((weight - 2 * plan.seconds) * 0.4)
    finally:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
    return {**_result(plan, cell, about, rounds, verified), "interrupted": interrupted}


def _round(fleet: Fleet, cell: Cell, seconds: float, limit_first: bool) -> dict[str, Any]:
    """`groups`: what the processes did at the same time, one group after the other."""
    limits = fleet.call("limits", seconds=seconds) if limit_first else None
    busy = _cpu_ticks()
    began = time.monotonic()
    if cell.operation == "burst" and cell.processes > 1:
        groups = []  # one burst each, or they would drift apart: their idle times are not those of others
        while not groups or time.monotonic() - began < seconds:
            groups.append(fleet.call("run", seconds=0))
    else:
        groups = [fleet.call("run", seconds=seconds)]
    wall = time.monotonic() - began
    now = _cpu_ticks()
    limits = limits or fleet.call("limits", seconds=seconds)
    return {"groups": groups, "limits": limits, "wall": wall, "cpus_busy": _share(busy, now)}


def _cpu_ticks() -> tuple[int, int]:
    """(not idle, all) ticks of the CPUs that this process may use."""
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    busy = total = 0
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            name, *fields = line.split()
            if name in allowed:
                ticks = [int(field) for field in fields[:8]]
                total += sum(ticks)
                busy += sum(ticks) - ticks[3] - ticks[4]  # idle, waiting for I/O
    return busy, total


def _share(before: tuple[int, int], after: tuple[int, int]) -> float:
    total = after[1] - before[1]
    return (after[0] - before[0]) / total if total > 0 else 0.0


def percentile(buckets: Counter[int], share: float) -> int:
    """The smallest bucket's edge that at least `share` of the counts do not exceed."""
    wanted = share * buckets.total()
    seen = 0
    for edge in sorted(buckets):
        seen += buckets[edge]
        if seen >= wanted:
            return edge
    return 0


def _latencies(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_class: dict[tuple[bool, int], Counter[int]] = {}
    for run in runs:
        for counted in run["classes"]:
            of_class = by_class.setdefault((counted["write"], counted["extent_bytes"]), Counter())
            for edge, count in counted["latency"]:
                of_class[edge] += count
    return [
        {
            "operation": "write" if write else "read",
            "bytes": size,
            "count": buckets.total(),
            "p50_ms": percentile(buckets, 0.5) / 1e6,
            "p99_ms": percentile(buckets, 0.99) / 1e6,
            "p99.9_ms": percentile(buckets, 0.999) / 1e6,
            "max_ms": max(buckets) / 1e6,
        }
        for (write, size), buckets in sorted(by_class.items())
    ]


def _rate(cell: Cell, groups: list[list[dict[str, Any]]], what: str) -> float:
    """Of bytes or extents in a second. A burst ends with its last process; otherwise all go on for the same time."""
    each = []
    for runs in groups:
        if cell.operation == "burst":
            longest = max(run["seconds"] for run in runs)
            each.append(sum(run[what] for run in runs) / longest if longest else 0.0)
        else:
            each.append(sum(run[what] / run["seconds"] for run in runs if run["seconds"]))
    return median(each)


def _bursts(runs: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Seconds until the first and the last request of each burst, whichever process they were of."""
    of_all = zip(*(run["bursts"] for run in runs), strict=False)  # an interrupt may cut off one process's last
    return [(min(first for first, _ in burst), max(last for _, last in burst)) for burst in of_all]


def _limits(of_processes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What all processes got together from each thing that bounds them."""
    return [
        {"what": entries[0]["what"], "gb_per_s": sum(entry["gb_per_s"] for entry in entries)}
        for entries in zip(*of_processes, strict=True)
    ]


def _source(cell: Cell, about: dict[str, Any], paths: dict[str, Counter[str]], device_read: int) -> tuple[str, float | None]:
    """Where the bytes came from or went to, by what the kernel counted; and the share that storage delivered."""
    loaded = paths["loaded"].total() - paths["loaded"]["gds_p2p"]
    share = min(1.0, device_read / loaded) if loaded else None
    if about["in_memory"]:
        return "memory", share
    if share is not None and share < DEVICE_SHARE:
        return "cached", share
    return ("cached" if paths["stored"]["buffered"] else "device"), share


def _result(
    plan: Plan, cell: Cell, about: list[dict[str, Any]], rounds: list[dict[str, Any]], verified: list[dict[str, Any]]
) -> dict[str, Any]:
    groups = [runs for one in rounds for runs in one["groups"]]
    runs = [run for group in groups for run in group]
    rates = [_rate(cell, one["groups"], "bytes") / 1e9 for one in rounds]
    limits = [_limits(one["limits"]) for one in rounds]
    lowest = [min(entry["gb_per_s"] for entry in one) for one in limits]
    total = sum(run["bytes"] for run in runs)
    cpu = sum(run["cpu_seconds"] for run in runs)
    seconds = sum(max(run["seconds"] for run in group) for group in groups)
    paths = {way: Counter[str]() for way in ("loaded", "stored")}
    for run in runs:
        for way, of_way in paths.items():
            of_way.update(run[way])
    source, share = _source(cell, about[0], paths, sum(run["device_read_bytes"] for run in runs))
    client = max((run["client_seconds"] / run["seconds"] for run in runs if run["seconds"]), default=0.0)
    busy = median(one["cpus_busy"] for one in rounds)
    bursts = [burst for group in groups for burst in _bursts(group)]
    result = {
        "root": cell.root.path,
        "device": cell.device,
        "operation": cell.operation,
        "extent_bytes": list(cell.sizes),
        "in_flight": cell.in_flight,
        "processes": cell.processes,
        "volume_bytes": cell.volume,
        "transport": about[0]["transport"],
        "transport_reason": about[0]["reason"],
        "file_system": about[0]["file_system"],
        "source": source,
        "device_read_share": share,
        "seconds": seconds,
        "bytes": total,
        "gb_per_s": median(rates),
        "gb_per_s_min": min(rates),
        "gb_per_s_max": max(rates),
        "ops_per_s": median(_rate(cell, one["groups"], "extents") for one in rounds),
        "limit_gb_per_s": median(lowest),
        "limits": [
            {"what": entry["what"], "gb_per_s": median(one[i]["gb_per_s"] for one in limits)}
            for i, entry in enumerate(limits[0])
        ],
        "ratio": median(ours / theirs if theirs else 0.0 for ours, theirs in zip(rates, lowest, strict=True)),
        "latency": _latencies(runs),
        "cpu_s_per_gb": cpu / (total / 1e9) if total else 0.0,
        "cpus": len(os.sched_getaffinity(0)),
        "cpus_busy_share": busy,
        "own_cpus_busy_share": cpu / (seconds * len(os.sched_getaffinity(0))) if seconds else 0.0,
        "client_thread_busy_share": client,
        "client_is_limit": busy >= CLIENT_BUSY or client >= CLIENT_BUSY,
        "bytes_by_path": {way: {path: count for path, count in of_way.items() if count} for way, of_way in paths.items()},
        "dropped": sum(run["dropped"] for run in runs),
        "failed": sum(run["failed"] for run in runs),
        "failure": next((run["failure"] for run in runs if run["failed"]), ""),
        "verified": _verified(plan, verified),
        "payload_gb_per_s": sum(one["payload_gb_per_s"] for one in about),
        "rounds": [{"gb_per_s": ours, "limit_gb_per_s": theirs} for ours, theirs in zip(rates, lowest, strict=True)],
    }
    if bursts:
        result["burst"] = {
            "requests": cell.in_flight,
            "request_extents": cell.request_extents,
            "bursts": len(bursts),
            "first_request_s": median(first for first, _ in bursts),
            "last_request_s": median(last for _, last in bursts),
        }
    return result


def _verified(plan: Plan, checks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "every": plan.verify_every,
        "extents": sum(check["extents"] for check in checks),
        "bytes": sum(check["bytes"] for check in checks),
        "wrong": sum(check["wrong"] for check in checks),
        "first_wrong": next((check["first_wrong"] for check in checks if check["wrong"]), ""),
    }
