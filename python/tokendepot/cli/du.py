"""`tokendepot du`: what takes the space of roots, by namespace, root, time since the last use, or KV-cache group."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from .. import _core
from . import damage, namespaces, show
from .arguments import Json, Roots, once_each, print_json

WAYS = ("namespace", "root", "age", "group")
# Segments are the unit of use and eviction: an extent is as old as its segment's last use.
AGES = (
    ("under 1 hour", 3600.0),
    ("1 hour to 1 day", 86400.0),
    ("1 to 7 days", 7 * 86400.0),
    ("7 to 30 days", 30 * 86400.0),
    ("over 30 days", float("inf")),
)
NEVER = "not recorded"


def du(
    roots: Roots,
    by: Annotated[str, typer.Option(metavar="WAY", help="namespace, root, age (of the last use) or group.")] = "namespace",
    as_json: Json = False,
) -> None:
    """What takes the space: extents and bytes; dead bytes are those of segment files that no extent uses."""
    if by not in WAYS:
        raise typer.BadParameter(f'"{by}"; expected one of {", ".join(WAYS)}', param_hint="'--by'")
    inspected = [_core.inspect_root(path) for path in once_each(roots)]
    total = {
        "extents": sum(root["extents"] for root in inspected),
        "live_bytes": sum(root["live_bytes"] for root in inspected),
        "file_bytes": sum(root["file_bytes"] for root in inspected),
    }
    total["dead_bytes"] = sum(_dead_bytes(root) for root in inspected)
    rows = {"namespace": _by_namespace, "root": _by_root, "age": _by_age, "group": _by_group}[by](inspected)
    damaged = [
        {"file": f"{root['path']}/{found['file']}", "reason": found["reason"]}
        for root in inspected
        for found in [*damage.files(root), *_cut_short(root)]
    ]
    if as_json:
        paths = [root["path"] for root in inspected]
        print_json({"roots": paths, "by": by, "rows": rows, "total": total, "damaged_files": damaged})
    else:
        _show(by, rows, total)
        if damaged:
            rows_of_damage = [(d["file"], d["reason"]) for d in damaged]
            show.table("Damaged, so that the figures are not exact", ("file", "what"), rows_of_damage, wide=(0, 1))
    if damaged:
        raise typer.Exit(1)


def _dead_bytes(root: dict[str, Any]) -> int:
    """Of each segment for itself: what one that was cut short lacks is not made up for by another."""
    return sum(max(0, segment["file_bytes"] - segment["live_bytes"]) for segment in root["segments"])


def _cut_short(root: dict[str, Any]) -> list[dict[str, str]]:
    """Segments that are certainly shorter than they were; whether all extents are there only `verify` knows."""
    return [
        {"file": f"segments/{segment['file']}", "reason": "shorter than the extents that it should hold"}
        for segment in root["segments"]
        if segment["live_bytes"] > segment["file_bytes"]
    ]


def _by_namespace(inspected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for root in inspected:
        for n in root["namespaces"]:
            # Where the manifest is missing only the first digits are known.
            row = rows.setdefault(
                n["digest"][: namespaces.PREFIX_DIGITS],
                {"namespace": n["digest"], "model": namespaces.model_of(n), "extents": 0, "live_bytes": 0},
            )
            if n["manifest"]:
                row.update(namespace=n["digest"], model=namespaces.model_of(n))
            row["extents"] += n["extents"]
            row["live_bytes"] += n["bytes"]
    return sorted(rows.values(), key=lambda row: (-row["live_bytes"], row["namespace"]))


def _by_root(inspected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "root": root["path"],
            "file_system": root["file_system"],
            "extents": root["extents"],
            "live_bytes": root["live_bytes"],
            "dead_bytes": _dead_bytes(root),
            "file_bytes": root["file_bytes"],
        }
        for root in inspected
    ]


def age_of(last_used: float, now: float) -> str:
    """The bucket of a time of last use (seconds since 1970); a time to come counts as now."""
    if last_used <= 0:
        return NEVER
    return next(name for name, end in AGES if now - last_used < end)


def _by_age(inspected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    now = time.time()
    names = [*(name for name, _ in AGES), NEVER]
    rows = {n: {"age": n, "segments": 0, "extents": 0, "live_bytes": 0, "dead_bytes": 0, "file_bytes": 0} for n in names}
    for root in inspected:
        for segment in root["segments"]:
            row = rows[age_of(segment["last_used"], now)]
            row["segments"] += 1
            row["extents"] += segment["extents"]
            row["live_bytes"] += segment["live_bytes"]
            row["dead_bytes"] += _dead_bytes({"segments": [segment]})
            row["file_bytes"] += segment["file_bytes"]
    return [row for row in rows.values() if row["segments"]]


def _by_group(inspected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reads the roots once more: beside an engine that stores or evicts, this may differ a little from the total."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    models = {row["namespace"][: namespaces.PREFIX_DIGITS]: row for row in _by_namespace(inspected)}
    for root in inspected:
        for extent in _core.list_extents(root["path"]):
            prefix = extent["namespace"]
            known = models.get(prefix, {"namespace": prefix, "model": "(stored meanwhile)"})
            row = rows.setdefault(
                (prefix, extent["group"]),
                {
                    "namespace": known["namespace"],
                    "model": known["model"],
                    "group": extent["group"],
                    "kind": extent["kind"],
                    "extents": 0,
                    "live_bytes": 0,
                },
            )
            row["extents"] += 1
            row["live_bytes"] += extent["bytes"]
    return [rows[key] for key in sorted(rows)]


def _show(by: str, rows: list[dict[str, Any]], total: dict[str, int]) -> None:
    titles = {"live_bytes": "live", "dead_bytes": "dead", "file_bytes": "files", "file_system": "on"}
    numbers = ("group", "segments", "extents", "live_bytes", "dead_bytes", "file_bytes")
    fields = list(rows[0]) if rows else []
    cells = []
    for row in rows:
        line = []
        for field in fields:
            value = row[field]
            if field.endswith("_bytes"):
                line.append(show.size(value))
            elif field == "namespace":
                line.append(value[: show.SHORT_DIGEST])
            else:
                line.append(f"{value:,}" if isinstance(value, int) else value)
        cells.append(line)
    columns = [(">" if field in numbers else "") + titles.get(field, field) for field in fields]
    if rows:
        wide = fields.index("model") if "model" in fields else 0
        show.table(f"By {'age of last use' if by == 'age' else by}", columns, cells, wide=wide)
    show.say(f"{show.number(total['extents'], 'extent')}, {show.size(total['live_bytes'])} live")
    show.say(f"{show.size(total['file_bytes'])} of files, {show.size(total['dead_bytes'])} of it dead or not filled yet")
