"""What `adapter_params` of LMCache's adapter may hold; what is not listed here are the engine's own options."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from typing import Any

from tokendepot import _core

DEFAULTS: dict[str, Any] = {"namespace": {}, "load_timeout": 30.0, "on_error": "disable"}
ON_ERROR = ("disable", "fail")
MOST_DEVICE_THREADS = 16


class RefusedError(ValueError):
    """The depot cannot serve this LMCache; the message is one sentence for the operator."""


@dataclass(frozen=True)
class Settings:
    namespace_json: str
    load_timeout: float  # seconds
    engine_json: str  # options of the engine, checked by it


def on_error_choice(params: dict[str, Any]) -> str:
    """Read first and apart, because it says what happens when the rest is refused."""
    value = params.get("on_error", DEFAULTS["on_error"])
    if value not in ON_ERROR:
        raise RefusedError(f'"on_error" is {json.dumps(value, default=str)} but must be "disable" or "fail"')
    return str(value)


def read_settings(params: dict[str, Any]) -> Settings:
    """Checks every key and value; raises RefusedError that names key, value and what is allowed."""
    namespace = params.get("namespace", DEFAULTS["namespace"])
    if not isinstance(namespace, dict):
        raise RefusedError(
            f'"namespace" is {json.dumps(namespace, default=str)} but must be an object of what else must be equal'
        )
    timeout = params.get("load_timeout", DEFAULTS["load_timeout"])
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= 86400:
        raise RefusedError(
            f'"load_timeout" is {json.dumps(timeout, default=str)} but must be a number of seconds above 0 and up to '
            "86400"
        )
    engine = {key: value for key, value in params.items() if key not in DEFAULTS}
    if engine.get("device", "host") != "host":
        raise RefusedError(
            f'"device" is {json.dumps(engine["device"], default=str)} but must be "host": LMCache lends host memory'
        )
    # LMCache holds the memory of what waits to be stored, and its L1 bounds that; a store that is dropped is not
    # offered again. Each thread copies one chunk at a time.
    defaults = {
        "store_queue": "1TiB",
        "device_threads": max(2, min(MOST_DEVICE_THREADS, os.cpu_count() or 2)),
    }
    try:
        engine_json = json.dumps({**defaults, **engine})
        _core.parse_options(engine_json)
    except _core.DepotError as error:
        for key in engine:
            near = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0.8)
            if near and key in str(error):
                raise RefusedError(f'unknown key "{key}" in adapter_params: did you mean "{near[0]}"?') from error
        raise RefusedError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise RefusedError(f"adapter_params cannot be written as JSON: {error}") from error
    return Settings(json.dumps(namespace), float(timeout), engine_json)
