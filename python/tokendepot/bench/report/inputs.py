"""What a report is made of: results of bench ttft, checked field by field, and an engine's metrics."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from ..ttft import compare, results
from ..ttft.settings import BadSetting

NUMBER = (int, float)
# Field -> type, of what every result has. Other fields may be missing: they are "not reported".
_TOP = {
    "run_id": str, "started": str, "complete": bool, "client": dict, "settings": dict, "server": dict, "cells": list,
    "requests": list, "summary": list, "problems": list, "warnings": list,
}  # fmt: skip
_SETTINGS = {"endpoint": str, "turns": int, "repeats": int, "concurrency": int, "answer_tokens": int, "cold_gpu": bool}
_SUMMARY = {"context": int, "turn": int, "requests": int, "complete": int, "errors": dict}
_CELL = {"context": int, "turn": int, "wall_s": NUMBER}
_RECORD = {"context": int, "turn": int}
_ANSWER = {"sent_s": NUMBER, "ttft_s": NUMBER, "output_tokens": int}
# Numbers that may be null or missing.
_OPTIONAL = ("prompt_tokens", "cached_tokens", "hit_ratio", "own_cache_tokens", "external_cache_tokens")


def load(file: pathlib.Path, name: str) -> dict[str, Any]:
    """A result of bench ttft whose fields are of the types that a report reads. BadSetting that names `name` and the field."""
    result = results.load(file, name)
    try:
        _check(result)
    except _Wrong as wrong:
        raise BadSetting(f"{name} is {str(file)!r}, in which {wrong}") from None
    if not result["summary"]:
        raise BadSetting(f"{name} is {str(file)!r}, in which nothing was measured")
    return result


class _Wrong(Exception):
    pass


def _check(result: dict[str, Any]) -> None:
    _fields(result, _TOP, "")
    _fields(result["settings"], _SETTINGS, "settings.")
    _may_be(result["settings"], "rate", "settings.")
    result["settings"].setdefault("rate", None)
    _fields(result.setdefault("tokens", {}), {}, "tokens.")
    for text in (*result["problems"], *result["warnings"]):
        if not isinstance(text, str):
            raise _Wrong("problems and warnings are not sentences")
    for place, cell in enumerate(result["summary"]):
        where = f"summary[{place}]."
        _fields(cell, _SUMMARY, where)
        _optional(cell, where)
        _fields(cell["errors"], dict.fromkeys(cell["errors"], int), where + "errors.")
        times = cell.setdefault("ttft_s", None)
        if times is not None:
            _fields(times, dict.fromkeys(("median", "min", "max"), NUMBER), where + "ttft_s.")
            _may_be(times, "p99", where + "ttft_s.")
    for place, cell in enumerate(result["cells"]):
        _fields(cell, _CELL, f"cells[{place}].")
    for place, record in enumerate(result["requests"]):
        where = f"requests[{place}]."
        _fields(record, _RECORD, where)
        if "error" in record:
            _fields(record, {"error": str}, where)
            continue
        _fields(record, _ANSWER, where)
        _optional(record, where)


def _fields(found: Any, types: dict[str, Any], where: str) -> None:
    if not isinstance(found, dict):
        raise _Wrong(f"{where.rstrip('.')} is no object")
    for name, kind in types.items():
        value = found.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _Wrong(f"the field {where}{name} is {'missing' if name not in found else 'of another type'}")
        if isinstance(value, float) and not math.isfinite(value):
            raise _Wrong(f"the field {where}{name} is {value}")


def _may_be(found: dict[str, Any], name: str, where: str) -> None:
    if found.get(name) is not None:
        _fields(found, {name: NUMBER}, where)


def _optional(found: dict[str, Any], where: str) -> None:
    for name in _OPTIONAL:
        found.setdefault(name, None)
        _may_be(found, name, where)


def check_same(before: dict[str, Any], after: dict[str, Any], name: str) -> None:
    """BadSetting unless both measured the same thing on the same model."""
    found = compare.differences(after, before)
    if not found and not set(compare.cells(before)) & set(compare.cells(after)):
        found = ["no context is in both"]
    if found:
        raise BadSetting(f"{name} cannot be compared with BEFORE: {'; '.join(found)}")


def engine_metrics(file: pathlib.Path) -> dict[str, Any]:
    """Sums over engines of a depot's counters in the text of vLLM's /metrics: by name, those with labels by label.

    BadSetting where the file is no such text or has none of a depot's.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = list(text_string_to_metric_families(file.read_text()))
    except OSError as error:
        raise BadSetting(f"--metrics is {str(file)!r}, which cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, UnicodeDecodeError):
        raise BadSetting(f"--metrics is {str(file)!r}, expected the text of vLLM's /metrics") from None
    found: dict[str, Any] = {}
    for family in families:
        if not family.name.startswith("tokendepot_") or family.type != "counter":
            continue
        for sample in family.samples:
            if not sample.name.endswith("_total"):
                continue
            label = sample.labels.get("path") or sample.labels.get("cause") or sample.labels.get("reason")
            if label is None:
                found[family.name] = found.get(family.name, 0.0) + sample.value
            elif isinstance(by := found.setdefault(family.name, {}), dict):
                by[label] = by.get(label, 0.0) + sample.value
    if not found:
        raise BadSetting(f"--metrics is {str(file)!r}, which has no counter of a depot, expected the text of vLLM's /metrics")
    return found
