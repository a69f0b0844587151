"""Results as tables, warnings, JSON and CSV."""

from __future__ import annotations

import csv
from typing import Any

from ...cli import show
from ...engines.metrics import PATHS
from . import measure
from .plan import size_text

CSV_COLUMNS = (
    "root device operation extent_bytes in_flight processes gb_per_s gb_per_s_min gb_per_s_max ops_per_s "
    "limit_gb_per_s ratio cpu_s_per_gb source transport device_read_share client_is_limit failed dropped interrupted"
).split()
PATH_COLUMNS = {f"{way}_{path}_bytes": (way, path) for way in ("loaded", "stored") for path in PATHS}
# Of a cell in which nothing came about these are unknown, not 0.
FIGURES = "gb_per_s gb_per_s_min gb_per_s_max ops_per_s ratio cpu_s_per_gb".split()
LATENCY_COLUMNS = "operation bytes count p50_ms p99_ms p99.9_ms max_ms".split()


def sizes_text(result: dict[str, Any]) -> str:
    return "+".join(size_text(one) for one in result["extent_bytes"])


def document(results: list[dict[str, Any]], interrupted: bool) -> dict[str, Any]:
    """All of it, with what the figures mean."""
    return {
        "about": {
            "gb_per_s": "payload, 10^9 bytes a second; median of the rounds",
            "limit_gb_per_s": "median of what the same machine gave without a depot, in turn with each round",
            "ratio": "median of the rounds' ratios",
            "latency_spans": measure.LATENCY_SPANS,
            "latency_relative_error": measure.RELATIVE_ERROR,
            "payload": measure.PAYLOAD,
            "source": "device: the kernel counted the bytes as read from storage; cached: it did not; "
            "memory: a memory file system",
        },
        "interrupted": interrupted,
        "cells": results,
        "warnings": warnings(results),
    }


def warnings(results: list[dict[str, Any]]) -> list[str]:
    """What a reader of the figures must know, each once."""
    found = []
    for result in results:
        where = f"{show.clean(result['root'])} {result['operation']} {sizes_text(result)}"
        if result["source"] == "memory":
            found.append(
                f"{show.clean(result['root'])} is a memory file system ({result['file_system']}): "
                "its figures are those of memory, not of a disk"
            )
        elif result["source"] == "cached":
            share = result["device_read_share"]
            known = "" if share is None else f": storage delivered {share:.0%} of the bytes that were loaded"
            found.append(f"{where}: through the page cache{known}; not the speed of the medium")
        if result["failed"]:
            found.append(f"{where}: {show.number(result['failed'], 'extent')} failed ({result['failure']})")
        if result["dropped"]:
            found.append(f"{where}: the depot dropped {show.number(result['dropped'], 'store')}")
        if result["verified"]["wrong"]:
            found.append(
                f"{where}: {show.number(result['verified']['wrong'], 'extent')} wrong; {result['verified']['first_wrong']}"
            )
    return [*dict.fromkeys(found), *_client_warnings(results)]


def _client_warnings(results: list[dict[str, Any]]) -> list[str]:
    limited = [r for r in results if r["client_is_limit"]]
    if not limited:
        return []
    own = sum(r["own_cpus_busy_share"] for r in limited) / len(limited)
    busy = sum(r["cpus_busy_share"] for r in limited) / len(limited)
    return [
        f"in {len(limited)} of {show.number(len(results), 'cell')} (*) this client's CPU is the limit, not the storage: "
        f"{busy:.0%} of {show.number(limited[0]['cpus'], 'CPU')} busy, {own:.0%} with this benchmark"
    ]


def damaged(results: list[dict[str, Any]]) -> bool:
    return any(result["failed"] or result["verified"]["wrong"] for result in results)


def print_tables(results: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["root"], result["device"]), []).append(result)
    for (root, device), of_group in groups.items():
        transport = "/".join(dict.fromkeys(result["transport"] for result in of_group))
        show.say(f"Root {show.clean(root)} ({of_group[0]['file_system']}), device {device}, {transport}")
        _print_throughput(of_group)
        _print_latency(of_group)
        _print_bursts(of_group)
    _print_notes(results)


def _axes(result: dict[str, Any]) -> tuple[str, str, str, str]:
    return result["operation"], sizes_text(result), str(result["in_flight"]), str(result["processes"])


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _paths(result: dict[str, Any]) -> str:
    total: dict[str, int] = {}
    for of_way in result["bytes_by_path"].values():
        for path, count in of_way.items():
            total[path] = total.get(path, 0) + count
    everything = sum(total.values())
    shares = {path: count / everything for path, count in total.items() if count >= 0.005 * everything}
    return ", ".join(shares) if len(shares) < 2 else ", ".join(f"{path} {share:.0%}" for path, share in shares.items())


def _print_throughput(results: list[dict[str, Any]]) -> None:
    rows = [
        (
            *_axes(r),
            f"{r['gb_per_s']:.2f}",
            f"{r['limit_gb_per_s']:.2f}",
            f"{r['ratio']:.2f}",
            f"{r['ops_per_s']:,.0f}",
            f"{r['cpu_s_per_gb']:.2f}{'*' if r['client_is_limit'] else ' '}",
            r["source"],
            _paths(r),
        )
        for r in results
    ]
    columns = ("op", "size", ">fl", ">pr", ">GB/s", ">limit", ">ratio", ">ops/s", ">CPU-s/GB", "from/to", "path")
    show.table("Throughput", columns, rows)


def _print_latency(results: list[dict[str, Any]]) -> None:
    rows = []
    for r in results:
        for counted in r["latency"]:
            tail = [_milliseconds(counted[key]) for key in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")]
            what = f"{counted['operation']} {size_text(counted['bytes'])}"
            rows.append((*_axes(r), what, f"{counted['count']:,}", *tail))
    columns = ("op", "size", ">fl", ">pr", "of", ">count", ">p50", ">p99", ">p99.9", ">max")
    show.table("Latency, ms", columns, rows)


def _print_bursts(results: list[dict[str, Any]]) -> None:
    rows = [
        (
            *_axes(r),
            str(r["burst"]["request_extents"]),
            str(r["burst"]["bursts"]),
            _milliseconds(r["burst"]["first_request_s"] * 1e3),
            _milliseconds(r["burst"]["last_request_s"] * 1e3),
        )
        for r in results
        if "burst" in r
    ]
    if rows:
        columns = ("op", "size", ">requests", ">pr", ">extents of one", ">bursts", ">first, ms", ">last, ms")
        show.table("Burst: idle, then all requests at once; last byte of the first and of the last", columns, rows)


def _print_notes(results: list[dict[str, Any]]) -> None:
    for what in dict.fromkeys(entry["what"] for r in results for entry in r["limits"]):
        show.say(f"limit: {what}")
    show.say("limits move pieces of the (largest) extent's size, in turn with ours; the ratio is the median of the rounds'")
    show.say(f"latency: {measure.LATENCY_SPANS}; at most {measure.RELATIVE_ERROR:.1%} too high")
    rate = min((r["payload_gb_per_s"] for r in results), default=0.0)
    show.say(f"payload: {measure.PAYLOAD}; made at {rate:.0f} GB/s or more")
    show.say("fl: extents in flight a process, with burst requests; pr: processes")
    checked = [r["verified"] for r in results if r["verified"]["every"]]
    if checked:
        which = "all" if checked[0]["every"] == 1 else f"one in {checked[0]['every']}"
        compared, wrong = sum(c["bytes"] for c in checked), sum(c["wrong"] for c in checked)
        show.say(f"verified: {show.size(compared)} compared byte by byte ({which} of the extents), {wrong} wrong")
    else:
        show.say("verified: nothing beyond the depot's own digests")
    for source in ("device", "cached", "memory"):
        best = max((r for r in results if r["source"] == source), key=lambda r: r["gb_per_s"], default=None)
        if best:
            show.say(
                f"fastest ({source}): {best['operation']} {sizes_text(best)}, {best['gb_per_s']:.2f} GB/s, "
                f"{best['ratio']:.2f} of the limit"
            )


def write_csv(path: str, results: list[dict[str, Any]]) -> None:
    """One line for each size class of each cell; one without figures for a cell in which everything failed."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        bursts = ("first_request_s", "last_request_s")
        out.writerow([*CSV_COLUMNS, *(f"latency_{name}" for name in LATENCY_COLUMNS), *bursts, *PATH_COLUMNS])
        for result in results:
            cells = {**result, "extent_bytes": sizes_text(result)}
            if not result["latency"]:
                cells.update(dict.fromkeys(FIGURES, ""))
            moved = [result["bytes_by_path"][way].get(path, 0) for way, path in PATH_COLUMNS.values()]
            burst = result.get("burst", {}) if result["latency"] else {}
            for counted in result["latency"] or [{}]:
                row = [*(cells[name] for name in CSV_COLUMNS), *(counted.get(name, "") for name in LATENCY_COLUMNS)]
                out.writerow([*row, *(burst.get(name, "") for name in bursts), *moved])
