"""Going on with a run that was cut off: whether the server is the one it began with, and what has to be sent anew."""

from __future__ import annotations

from typing import Any

from .server import ServerFault

# Failures that a server which goes away leaves behind, besides statuses 5xx of a proxy before it.
_LOST = ("refused", "unreachable", "reset", "truncated", "timeout", "stalled", "error_event")


def check_model(result: dict[str, Any], url: str, model: str) -> None:
    """ServerFault when the run began with another model: one result cannot be of two."""
    began = result["server"].get("model")
    if began is not None and began != model:
        raise ServerFault(f"{url} serves {model!r}, but the run began with {began!r}, expected the same model")


def take_server(result: dict[str, Any], server: dict[str, Any]) -> None:
    """Notes who answers now, and in which way that is not the server of before."""
    before, now = _identity(result["server"]), _identity(server)
    if result["server"] and before != now:
        changed = {name: [before[name], now[name]] for name in now if before[name] != now[name]}
        result.setdefault("server_changes", []).append({"resume": result["resumes"], **changed})
    result["server"] = server


def _identity(server: dict[str, Any]) -> dict[str, Any]:
    """What of a server stays the same when it is restarted: entries of models also have times and random names."""
    entries = [entry for entry in server.get("models", ()) if entry.get("id") == server.get("model")]
    entry = entries[0] if entries else {}
    return {"version": server.get("version"), "root": entry.get("root"), "max_model_len": entry.get("max_model_len")}


def perhaps_lost(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests that failed as they do when the server goes away; whether it has, it must be asked."""
    return [r for r in records if r.get("error") in _LOST or str(r.get("error")).startswith("http_5")]


def lose(result: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """The server has gone: what of the last cell's `records` failed by that is no finding about it."""
    result["server_lost"] = True
    for record in perhaps_lost(records):
        record["cut_off"] = True


def begin_anew(result: dict[str, Any]) -> None:
    """Takes the conversations of which a request was cut off out of the requests, and notes them: the server may know
    their prompts by now, so they begin again with contexts of their own. Of a cell that was begun and never
    ended (the client was killed) nobody knows which were sent: all that have no answer were.
    """
    begun = result.get("begun") or {"repeats": ()}
    conversations: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in result["requests"]:
        conversations.setdefault((record["context"], record["repeat"]), []).append(record)
    replaced: dict[tuple[int, int], dict[str, Any]] = {}
    for (context, repeat), records in conversations.items():
        why = [r["error"] for r in records if r.get("cut_off") or r.get("error") == "interrupted"]
        if not why and repeat in begun["repeats"] and context == begun["context"] and len(records) < begun["turn"]:
            why = ["killed"]
        if why:
            asked = {"generation": records[0]["generation"], "requests": len(records), "why": why[0]}
            replaced[context, repeat] = {"context": context, "repeat": repeat, **asked, "resume": result["resumes"]}
    result["requests"] = [r for r in result["requests"] if (r["context"], r["repeat"]) not in replaced]
    result.setdefault("replaced", []).extend(replaced.values())
    result["begun"] = None
    if result.pop("server_lost", False) and not result["settings"]["between"]:  # else it is restarted anyway
        turns = result["settings"]["turns"]
        half = sum(len(records) < turns for place, records in conversations.items() if place not in replaced)
        if half:
            result.setdefault("server_changes", []).append({"resume": result["resumes"], "half_done": half})


def warnings(result: dict[str, Any]) -> list[str]:
    """Why the parts of a resumed run may not be alike."""
    found = []
    for change in result.get("server_changes", ()):
        if "half_done" in change:
            found.append(
                f"the server had gone away before resume {change['resume']}: later turns of {change['half_done']} conversations "
                "find only what it kept"
            )
            continue
        what = "; ".join(f"{name} {change[name][0]!r}, then {change[name][1]!r}" for name in change if name != "resume")
        found.append(f"the server is not the same since resume {change['resume']}: {what}")
    return found
