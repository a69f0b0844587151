"""The connector's part of `kv_connector_extra_config`; the rest is handed to the engine as it is."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from tokendepot import _core


class RefusedError(ValueError):
    """The depot cannot serve this engine; the message is one sentence for the operator."""


CHOICES = {
    "layout": ("auto", "canonical", "opaque"),
    "on_error": ("disable", "fail"),
    "store": ("prompt", "all"),
}
DEFAULTS: dict[str, Any] = {
    "chunk_tokens": 256,
    "layout": "auto",
    "load_timeout": 30.0,
    "on_error": "disable",
    "store": "all",
    "model_digest": "auto",
    "min_load_tokens": None,
}


@dataclass(frozen=True)
class Settings:
    chunk_tokens: int
    layout: str
    load_timeout: float  # seconds
    on_error: str
    store: str
    model_digest: str
    min_load_tokens: int
    min_load_is_fixed: bool  # the operator's word counts, nothing is measured
    engine: dict[str, Any]  # the engine's options, checked by it
    root_paths: tuple[str, ...]

    def engine_options(self, device: str, **defaults: Any) -> str:
        """The engine's options as JSON for a process whose cache is on `device`; `defaults` are for keys not given."""
        if device == "host" and "device" not in self.engine:
            return json.dumps({**defaults, **self.engine})
        return json.dumps({**defaults, **self.engine, "device": device})


def on_error_choice(extra: dict[str, Any]) -> str:
    """Read first and apart, because it says what happens when the rest is refused."""
    return _choice(extra, "on_error")


def read_settings(extra: dict[str, Any]) -> Settings:
    """Checks every key and value; raises RefusedError that names key, value and what is allowed."""
    engine = {key: value for key, value in extra.items() if key not in DEFAULTS}
    root_paths = _check_engine_options(engine)
    chunk_tokens = _whole_number(extra, "chunk_tokens", 1, 1 << 20)
    min_load = extra.get("min_load_tokens")
    return Settings(
        chunk_tokens=chunk_tokens,
        layout=_choice(extra, "layout"),
        load_timeout=_seconds(extra, "load_timeout"),
        on_error=_choice(extra, "on_error"),
        store=_choice(extra, "store"),
        model_digest=_text(extra, "model_digest"),
        min_load_tokens=chunk_tokens
        if min_load is None
        else _whole_number(extra, "min_load_tokens", 1, 1 << 31),
        min_load_is_fixed=min_load is not None,
        engine=engine,
        root_paths=root_paths,
    )


def _check_engine_options(engine: dict[str, Any]) -> tuple[str, ...]:
    try:
        options = _core.parse_options(json.dumps(engine))
    except _core.DepotError as error:
        for key in engine:
            near = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0.8)
            if near and key in str(error):
                raise RefusedError(
                    f'unknown key "{key}" in kv_connector_extra_config: did you mean "{near[0]}"?'
                ) from error
        raise RefusedError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise RefusedError(f"kv_connector_extra_config cannot be written as JSON: {error}") from error
    return tuple(
        root["path"] if isinstance(root, dict) else str(root).split("?")[0]
        for root in options["roots"]
        if not (isinstance(root, dict) and root.get("read_only"))
    )


def _choice(extra: dict[str, Any], key: str) -> str:
    value = extra.get(key, DEFAULTS[key])
    if value not in CHOICES[key]:
        allowed = " or ".join(f'"{choice}"' for choice in CHOICES[key])
        raise RefusedError(f'"{key}" is {json.dumps(value, default=str)} but must be {allowed}')
    return str(value)


def _whole_number(extra: dict[str, Any], key: str, low: int, high: int) -> int:
    value = extra.get(key, DEFAULTS[key])
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RefusedError(
            f'"{key}" is {json.dumps(value, default=str)} but must be a whole number from {low} to {high}'
        )
    return value


def _seconds(extra: dict[str, Any], key: str) -> float:
    value = extra.get(key, DEFAULTS[key])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 86400:
        raise RefusedError(
            f'"{key}" is {json.dumps(value, default=str)} but must be a number of seconds above 0 and up to '
            "86400"
        )
    return float(value)


def _text(extra: dict[str, Any], key: str) -> str:
    value = extra.get(key, DEFAULTS[key])
    if not isinstance(value, str) or not value:
        raise RefusedError(f'"{key}" is {json.dumps(value, default=str)} but must be a non-empty string')
    return value
