"""What is damaged in an inspected root, in words."""

from __future__ import annotations

from typing import Any

from . import show


def files(root: dict[str, Any]) -> list[dict[str, str]]:
    """Journals and manifests that do not decode: file, reason."""
    damaged = [
        {"file": f"journals/{j['file']}", "reason": journal_state(j)} for j in root["journals"] if j["damaged"]
    ]
    for n in root["namespaces"]:
        if n["damaged"]:
            name = n["digest"] if len(n["digest"]) == 64 else n["digest"] + "*"
            damaged.append({"file": f"manifests/{name}.json", "reason": "missing or not what its name says"})
    return damaged


def journal_state(journal: dict[str, Any]) -> str:
    if journal["bad_records"]:
        return show.number(journal["bad_records"], "record") + " cannot be read"
    if journal["damaged"]:
        return "ends in bytes that are no record"
    return "live" if journal["in_use"] else "not live"
