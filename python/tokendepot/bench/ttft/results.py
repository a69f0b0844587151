"""The result of a run: a JSON document that describes itself, and what in it makes a run worthless."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import platform
import secrets
import statistics
import time
from typing import Any

from . import resume
from .lag import SATURATED_SHARE, disturbed
from .settings import BadSetting, Settings

FORMAT, VERSION = "tokendepot bench ttft", 1
DRIFT = 0.02  # of the server's count from what was planned
# Of a prompt's tokens. Below it, a hit is the server's template, which all prompts share, or a block's rounding.
COLD_SHARE, WARM_SHARE = 0.02, 0.98
AT_ONCE_FROM = 8  # tokens of an answer: an engine that speculates may send fewer in one event


def new(settings: Settings, version: str) -> dict[str, Any]:
    clock = time.get_clock_info("perf_counter")
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "tokendepot": version,
        "run_id": secrets.token_hex(8),
        "resumes": 0,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "complete": False,
        "units": "seconds (fields that end in _s), tokens as the server counts them",
        "clock": {"name": "perf_counter", "implementation": clock.implementation, "resolution_s": clock.resolution},
        "client": {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0))},
        "settings": settings.as_json(),
        "server": {},
        "server_changes": [],
        "begun": None,
        "replaced": [],
        "tokens": {},
        "skipped": [],
        "overlap": {},
        "cells": [],
        "requests": [],
        "summary": [],
        "problems": [],
        "warnings": [],
    }


class NotWritten(Exception):
    """A result that could not be saved: one sentence that names the file and why."""


def load(file: pathlib.Path, name: str) -> dict[str, Any]:
    """BadSetting, naming the option `name`, unless the file holds a result of this version."""
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise BadSetting(f"{name} is {str(file)!r}, which cannot be read ({error.strerror})") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadSetting(f"{name} is {str(file)!r}, expected a result of bench ttft")
    if content.get("format_version") != VERSION:
        raise BadSetting(f"{name} is {str(file)!r} of version {content.get('format_version')}, expected {VERSION}")
    return content


def save(result: dict[str, Any], file: pathlib.Path) -> None:
    """All or nothing: what ends a run leaves the file of the last cell. NotWritten when it cannot be written."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise NotWritten(f"{str(file)!r} cannot be written ({error.strerror})") from None


def of_conversation(result: dict[str, Any], context: int, repeat: int) -> list[dict[str, Any]]:
    found = [r for r in result["requests"] if r["context"] == context and r["repeat"] == repeat]
    return sorted(found, key=lambda record: record["turn"])


def allowed_overlap(as_ids: bool, tokens: dict[str, Any]) -> int:
    """What two cold prompts may share at their start: the server's own tokens, one word of ours and part of the next."""
    return tokens["added_by_server"] + 2 * tokens["most_of_a_word"] if as_ids else 16


# --- summary ----------------------------------------------------------------------------------------------------------


def percentile(values: list[float], share: float) -> float:
    """Nearest rank: a value that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    named = {name: percentile(values, share) for name, share in (("p10", 0.1), ("p90", 0.9), ("p99", 0.99))}
    return {"median": statistics.median(values), "min": min(values), "max": max(values), **named}


def at_once(record: dict[str, Any]) -> bool:
    """Whether all tokens came in one read of the socket, which has one time: then that of the first is not known."""
    return record["output_tokens"] > 1 and record["token_s"][0] == record["token_s"][-1]


def buffered(records: list[dict[str, Any]]) -> tuple[int, int]:
    """How many of the answers that are long enough to tell came at once, and how many those are."""
    long = [record for record in records if record["output_tokens"] >= AT_ONCE_FROM]
    return sum(at_once(record) for record in long), len(long)


def time_per_output_token(record: dict[str, Any]) -> float | None:
    """Of the tokens after the first: servers may send several in one event. None: one token, or all at once."""
    count = record["output_tokens"]
    return (record["token_s"][-1] - record["ttft_s"]) / (count - 1) if count > 1 and not at_once(record) else None


def summarize(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each cell in which anything was sent, in the order of turns and contexts."""
    cells: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in result["requests"]:
        cells.setdefault((record["turn"], record["context"]), []).append(record)
    return [_summary(result, turn, context, cells[turn, context]) for turn, context in sorted(cells)]


def _summary(result: dict[str, Any], turn: int, context: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    good = [record for record in records if "error" not in record]
    errors: dict[str, int] = {}
    for record in records:
        if "error" in record:
            errors[record["error"]] = errors.get(record["error"], 0) + 1
    parts = [cell for cell in result["cells"] if (cell["turn"], cell["context"]) == (turn, context)]
    wall = sum(cell["wall_s"] for cell in parts)
    prompt = [r["prompt_tokens"] for r in good if r["prompt_tokens"] is not None]
    cached = [(r["cached_tokens"], r["prompt_tokens"]) for r in good if r["cached_tokens"] is not None and r["prompt_tokens"]]
    gaps = [b - a for r in good if not at_once(r) for a, b in zip(r["token_s"], r["token_s"][1:])]
    per_token = [value for r in good if (value := time_per_output_token(r)) is not None]
    return {
        "context": context,
        "turn": turn,
        "requests": len(records),
        "complete": len(good),
        "errors": errors,
        "in_flight": max((cell["in_flight"] for cell in parts if "in_flight" in cell), default=None),
        "prompt_tokens": statistics.median(prompt) if prompt else None,
        "ttft_s": spread([r["ttft_s"] for r in good]),
        "ttft_from_schedule_s": spread([r["ttft_from_schedule_s"] for r in good]),
        "first_byte_s": spread([r["first_byte_s"] for r in good]),
        "first_content_s": spread([r["first_content_s"] for r in good if r["first_content_s"] is not None]),
        "service_s": spread([r["end_s"] for r in good]),
        "latency_from_schedule_s": spread([r["end_from_schedule_s"] for r in good]),
        "time_per_output_token_s": spread(per_token),
        "time_between_events_s": spread(gaps),
        "output_tokens": sum(r["output_tokens"] for r in good),
        "output_estimated": any(r["output_estimated"] for r in good),
        "output_tokens_per_s": sum(r["output_tokens"] for r in good) / wall if wall else None,
        "prompt_tokens_per_s": sum(prompt) / wall if wall and prompt else None,
        "requests_per_s": len(good) / wall if wall else None,
        "cached_tokens": statistics.median(c for c, _ in cached) if cached else None,
        "hit_ratio": sum(c for c, _ in cached) / sum(p for _, p in cached) if cached else None,
        "own_cache_tokens": _sum(cell["own_cache_tokens"] for cell in parts),
        "external_cache_tokens": _sum(cell["external_cache_tokens"] for cell in parts),
        "buffered": buffered(good)[0],
        "disturbed": sum(disturbed(r["client_lag_s"], r["ttft_s"]) for r in good),
    }


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


# --- judgement --------------------------------------------------------------------------------------------------------


def judge(result: dict[str, Any], stopped: str | None) -> None:
    """Fills in summary, problems (the run is not what it says) and warnings."""
    result["summary"] = summarize(result)
    records = result["requests"]
    good = [record for record in records if "error" not in record]
    settings = result["settings"]
    problems, warnings = [], []
    failed = len(records) - len(good)
    if stopped:
        problems.append(f"stopped early: {stopped}")
    if failed > settings["max_error_rate"] * len(records):
        problems.append(f"{failed} of {len(records)} requests failed, expected {settings['max_error_rate']:.0%} at most")
    if not good and not failed:
        problems.append("nothing was measured")
    problems += _not_cold(result, good) + _not_warm(result, good)
    result["client"]["disturbed"] = late = sum(disturbed(r["client_lag_s"], r["ttft_s"]) for r in good)
    result["client"]["worst_lag_s"] = max((r["client_lag_s"] for r in good), default=0.0)
    result["client"]["saturated"] = saturated = late > SATURATED_SHARE * len(good)
    if saturated:
        warnings.append(
            f"client saturated: in {late} of {len(good)} requests this client was late, by up to "
            f"{result['client']['worst_lag_s'] * 1e3:.0f} ms; TTFT includes that"
        )
    if too_few := out_of_reach(settings):
        warnings.append(too_few)
    warnings += resume.warnings(result)
    together, long = buffered(good)
    if together * 2 > long:
        warnings.append(
            f"all tokens arrived at once in {together} of {long} answers: something between buffers the stream, or the server "
            "does not stream; TTFT has the whole answer in it"
        )
    warnings += _drift(good)
    if good and all(record["prompt_tokens"] is None for record in good):
        warnings.append("the server counts no prompt tokens: contexts are by " + result["tokens"]["counted_by"])
    if any(record["output_estimated"] for record in good):
        warnings.append("the server counts no output tokens: one an event is assumed")
    result["problems"], result["warnings"] = problems, warnings


def out_of_reach(settings: dict[str, Any]) -> str | None:
    """A concurrency that no cell can reach: its conversations have one request each in flight."""
    if settings["concurrency"] <= settings["repeats"]:
        return None
    return (
        f"--concurrency is {settings['concurrency']}, but each context has --repeats {settings['repeats']} conversations: at "
        f"most {settings['repeats']} requests are in flight"
    )


def _not_cold(result: dict[str, Any], good: list[dict[str, Any]]) -> list[str]:
    added = result["tokens"].get("added_by_server", 0)
    warm = [
        record
        for record in good
        if record["turn"] == 1 and (record["cached_tokens"] or 0) > added + COLD_SHARE * (record["prompt_tokens"] or 0)
    ]
    if not warm:
        return []
    worst = max(warm, key=lambda record: record["cached_tokens"])
    return [
        f"turn 1 was not cold: of {worst['prompt_tokens']:,} tokens the server had {worst['cached_tokens']:,} in a cache "
        f"({len(warm)} requests)"
    ]


def _not_warm(result: dict[str, Any], good: list[dict[str, Any]]) -> list[str]:
    """Later turns whose prompt, as the model sees it, does not go on from that of the turn before."""
    added = result["tokens"].get("added_by_server", 0)
    apart = [
        record
        for record in good
        if record["common_prefix"] is not None
        and record["common_prefix"] < min(WARM_SHARE * record["common_prefix_of"], record["common_prefix_of"] - added)
    ]
    if not apart:
        return []
    worst = min(apart, key=lambda record: record["common_prefix"])
    return [
        f"turn {worst['turn']} shares only {worst['common_prefix']:,} of the {worst['common_prefix_of']:,} tokens of the turn "
        f"before, as the server's template writes them ({len(apart)} requests): no cache can find the rest"
    ]


def _drift(good: list[dict[str, Any]]) -> list[str]:
    off = [
        record
        for record in good
        if record["planned_tokens"] and record["prompt_tokens"] is not None
        and abs(record["prompt_tokens"] - record["planned_tokens"]) > DRIFT * record["planned_tokens"]
    ]  # fmt: skip
    if not off:
        return []
    worst = max(off, key=lambda record: abs(record["prompt_tokens"] / record["planned_tokens"] - 1))
    return [
        f"drift: a prompt of {worst['planned_tokens']:,} tokens as planned is {worst['prompt_tokens']:,} as the server counts "
        f"({len(off)} of {len(good)} requests are off by more than {DRIFT:.0%}); the server's counts are reported"
    ]
