"""Namespaces as people see them: found by a prefix of their digest, told apart by the manifest fields that differ."""

from __future__ import annotations

import json
from typing import Any

PREFIX_DIGITS = 16  # what an extent carries of its namespace's digest


class NoSuchNamespace(Exception):
    pass


def select(root: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """The namespaces of an inspected root whose digest starts with `prefix`."""
    wanted = prefix.lower()
    if not wanted or len(wanted) > 64 or any(c not in "0123456789abcdef" for c in wanted):
        raise NoSuchNamespace(f'--namespace is "{prefix}"; allowed are the first hex digits of a namespace\'s digest')
    found = [n for n in root["namespaces"] if n["digest"].startswith(wanted[: len(n["digest"])])]
    if not found:
        known = ", ".join(n["digest"][:PREFIX_DIGITS] for n in root["namespaces"]) or "none"
        raise NoSuchNamespace(f'no namespace in {root["path"]} starts with "{prefix}"; there are: {known}')
    return found


def of_extents(extents: list[dict[str, Any]], namespaces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    prefixes = {n["digest"][:PREFIX_DIGITS] for n in namespaces}
    return [e for e in extents if e["namespace"] in prefixes]


def manifest_of(namespace: dict[str, Any]) -> dict[str, Any]:
    return json.loads(namespace["manifest"]) if namespace["manifest"] else {}


def model_of(namespace: dict[str, Any]) -> str:
    """What the manifest calls its model, whoever wrote it."""
    if not namespace["manifest"]:
        return "(manifest damaged or missing)"
    manifest = manifest_of(namespace)
    for field in ("model", "model_id", "model_name"):
        value = manifest.get(field)
        if isinstance(value, dict):
            value = value.get("name") or value.get("id") or value.get("path")
        if value:
            return str(value)
    return "(no model named)"


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """{"a": {"b": [1]}} -> {"a.b[0]": "1"}; an empty object or list is a value of its own."""
    if isinstance(value, dict) and value:
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    else:
        return {path: json.dumps(value, ensure_ascii=False)}
    return {name: text for key, item in items for name, text in flatten(item, key).items()}


def differences(namespaces: list[dict[str, Any]]) -> dict[str, dict[str, str | None]]:
    """Per manifest field that is not the same everywhere: digest -> value as JSON, None where there is no such field."""
    flat = {n["digest"]: flatten(manifest_of(n)) for n in namespaces if n["manifest"]}
    fields = sorted({field for values in flat.values() for field in values})
    return {
        field: {digest: values.get(field) for digest, values in flat.items()}
        for field in fields
        if len({values.get(field) for values in flat.values()}) > 1
    }
