"""Going on with a run that was cut off: whether the server is the one it began with, and what has to be sent anew."""

from __future__ import annotations

from typing import Any

from .server import ServerFault


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


def warnings(result: dict[str, Any]) -> list[str]:
    """Why the parts of a resumed run may not be alike."""
    found = []
    for change in result.get("server_changes", ()):
        what = "; ".join(f"{name} {change[name][0]!r}, then {change[name][1]!r}" for name in change if name != "resume")
        found.append(f"the server is not the same since resume {change['resume']}: {what}")
    return found
