"""Tables and RESULT lines from the engines' files."""

from __future__ import annotations

from statistics import median
from typing import Any


def rows_of(results: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        for row in result["rows"]:
            found.setdefault((result["name"], row["context"]), []).append(row)
    return found


def milliseconds(rows: list[dict[str, Any]], what: str) -> float | None:
    values = [row[what]["s"] * 1e3 for row in rows if what in row]
    return median(values) if values else None


def summary(results: list[dict[str, Any]], link_gb_s: float) -> list[dict[str, Any]]:
    """One entry for each system, phase and context; the limit is bytes / link + the GPU hit of the base engine."""
    rows = rows_of(results)
    token_bytes = {result["name"]: result["token_bytes"] for result in results}
    entries = []
    for name, context in rows:
        mine, base = rows[(name, context)], rows.get(("base", context), [])
        floor = milliseconds(base, "gpu")
        reference = {
            (row["repetition"], row[what]["cached"]): row[what]["token"]
            for row in base
            for what in ("gpu", "whole")
            if what in row
        }
        hits = [row for row in mine if "hit" in row]
        loaded = [row["hit"] for row in hits if row["hit"]["cached"]]
        compared = [
            (row["hit"]["token"], reference[key])
            for row in hits
            if row["hit"]["cached"] and (key := (row["repetition"], row["hit"]["cached"])) in reference
        ]
        entry: dict[str, Any] = {
            "name": name,
            "context": context,
            "cold_ms": milliseconds(mine, "cold"),
            "hit_ms": milliseconds(hits, "hit"),
            "gpu_ms": milliseconds(mine, "gpu"),
            "fresh_ms": milliseconds(mine, "fresh"),
            "cached": median([row["hit"]["cached"] or 0 for row in hits]) if hits else None,
            "loaded": len(loaded),
            "same": sum(token == expected for token, expected in compared),
            "compared": len(compared),
            "recompute_ms": milliseconds(base, "cold"),
        }
        if floor is not None:
            entry["limit_ms"] = context * token_bytes[name] / link_gb_s / 1e6 + floor
        entries.append(entry)
    return entries


def show(results: list[dict[str, Any]], link_gb_s: float) -> None:
    entries = summary(results, link_gb_s)
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    print(f"\nlink {link_gb_s:.1f} GB/s (pinned memory to the GPU, 64 MiB pieces)")
    for result in results:
        mode = "eager" if result["eager"] else "compiled"
        print(f"{result['name']}: {mode}, import {result['import_s']:.1f} s, start {result['start_s']:.1f} s")
    cells = {(entry["name"], entry["context"]): entry for entry in entries}
    columns = [name for name in names if name != "base"]
    print("\n| context | recompute | GPU hit | limit | " + " | ".join(columns) + " |")
    print("|--:" * (4 + len(columns)) + "|")
    for context in sorted({entry["context"] for entry in entries}):
        base = cells.get(("base", context), {})
        line = [str(context), text(base.get("cold_ms")), text(base.get("gpu_ms")), text(base.get("limit_ms"))]
        line += [cell(cells.get((name, context))) for name in columns]
        print("| " + " | ".join(line) + " |")
    print("\n(ms to one token; in brackets tokens from a cache, and answers equal to those of a GPU hit of as many; base.restart: recomputed)\n")
    for entry in entries:
        if entry["hit_ms"] is None or entry.get("limit_ms") is None:
            continue
        print(
            f"RESULT ttft_{entry['name'].replace('.', '_')}_{entry['context']} {entry['hit_ms']:.4g} ms "
            f"limit {entry['limit_ms']:.4g} ratio {entry['hit_ms'] / entry['limit_ms']:.3f}"
        )
        if entry["fresh_ms"] is not None:
            print(f"# {entry['name']} {entry['context']}: {entry['fresh_ms']:.1f} ms recomputed by the same engine")
        recompute = computing_beside(entry, cells)
        if recompute is not None and entry["hit_ms"] > recompute * 1.05:
            print(f"# slower than recomputing ({recompute:.1f} ms): {entry['name']} {entry['context']}")
        if entry["compared"] != entry["loaded"]:
            missing = entry["loaded"] - entry["compared"]
            print(f"# NOT COMPARED: {entry['name']} {entry['context']}: {missing} of {entry['loaded']} hits")
        if entry["same"] != entry["compared"]:
            print(f"# OTHER ANSWERS: {entry['name']} {entry['context']}: {entry['same']} of {entry['compared']}")


def computing_beside(entry: dict[str, Any], cells: dict[tuple[str, int], dict[str, Any]]) -> float | None:
    """What recomputing takes an engine in the same state: that was started again and has no depot, or itself."""
    again = cells.get(("base.restart", entry["context"]), {}) if entry["name"].endswith(".restart") else {}
    known = (again.get("fresh_ms"), entry["fresh_ms"], entry["recompute_ms"])
    return next((value for value in known if value is not None), None)


def text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["hit_ms"] is None:
        return text(entry and entry["fresh_ms"])
    return f"{entry['hit_ms']:.1f} ({int(entry['cached'])}, {entry['same']}/{entry['compared']})"
