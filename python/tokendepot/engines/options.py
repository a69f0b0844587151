"""What a depot's options came to and where each value is from, for the log of every engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokendepot import _core


def effective(given: Mapping[str, Any], defaults: Mapping[str, Any], engine_json: str) -> str:
    """One line: the options that were given, then those by default. None of them is a secret.

    given: as the operator wrote them, checked; defaults: of the keys that the engine does not know; engine_json: what it
    is opened with, whose keys beyond `given` are defaults, too.
    """
    options = _core.parse_options(engine_json)
    values = {**defaults, **{key: given[key] for key in defaults if key in given}}
    origins = {key: key in given for key in values}
    for key, value in options.items():
        if key != "roots":
            values[key], origins[key] = value, key in given
    for number, (root, written) in enumerate(zip(options["roots"], given["roots"], strict=True)):
        for key, value in root.items():
            name = f"roots[{number}].{key}"
            values[name], origins[name] = value, key == "path" or key in _keys_of(written)
    parts = [
        " ".join(f"{name}={json.dumps(value)}" for name, value in sorted(values.items()) if origins[name] is wanted)
        for wanted in (True, False)
    ]
    return f"options given: {parts[0]}; by default: {parts[1]}"


def _keys_of(root: Any) -> set[str]:
    """Of a root as it was written: an object, or text such as "/path?capacity=8GiB&read_only=true"."""
    if isinstance(root, Mapping):
        return set(root)
    return {part.partition("=")[0] for part in str(root).partition("?")[2].split("&")}
