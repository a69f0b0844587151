"""The numbers of a report. Nothing is estimated: what a result does not say is None, never 0."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..ttft import compare

SECONDS_A_HOUR = 3600.0
LEAST_FOR_DRIFT = 4  # requests of a cell: two in each half


@dataclass(frozen=True)
class Prices:
    """What the operator states."""

    gpus: int  # of the server
    gpu_hour: float | None  # dollars of one GPU for an hour


@dataclass(frozen=True)
class Cell:
    """One context in one turn, before and after. Times in seconds, ratios as shares of 1."""

    context: int
    turn: int
    tokens: float | None  # of the prompt, as the server counts
    samples: tuple[int, int]
    p50_seconds: tuple[float | None, float | None]
    p99_seconds: tuple[float | None, float | None]
    faster: float | None  # median before over median after
    hit_ratio: tuple[float | None, float | None]
    found_tokens_per_second: float | None  # prompt tokens found in a cache, over TTFT (medians, after)


@dataclass(frozen=True)
class Usage:
    """What the requests of one turn (None: of all) kept the server's GPUs busy with, before and after."""

    turn: int | None
    requests: tuple[int, int]
    gpu_s: tuple[float, float] | None
    saved_gpu_s: float | None
    dollars_per_million: tuple[float | None, float | None]  # tokens, prompts and answers


@dataclass(frozen=True)
class Stability:
    """How steady one run was."""

    name: str
    started: str
    ended: str | None
    requests: int
    failed: int
    kinds: dict[str, int]  # of failures
    drift: float | None  # TTFT of the later half of each cell's requests over that of the earlier half, less 1
    last_turn_p50_seconds: dict[int, float]  # context -> seconds


def _percentile(cell: dict[str, Any] | None, name: str) -> float | None:
    times = cell["ttft_s"] if cell else None
    return times.get(name) if times else None


def cells(before: dict[str, Any], after: dict[str, Any]) -> list[Cell]:
    """Those of either run, by turn and context."""
    old, new = compare.cells(before), compare.cells(after)
    found = []
    for context, turn in sorted(set(old) | set(new), key=lambda place: (place[1], place[0])):
        both = old.get((context, turn)), new.get((context, turn))
        p50 = tuple(_percentile(cell, "median") for cell in both)
        last = both[1] or {}
        cached = last.get("cached_tokens")
        found.append(
            Cell(
                context=context,
                turn=turn,
                tokens=next((c["prompt_tokens"] for c in reversed(both) if c and c.get("prompt_tokens")), None),
                samples=tuple(cell["complete"] if cell else 0 for cell in both),
                p50_seconds=p50,
                p99_seconds=tuple(_percentile(cell, "p99") for cell in both),
                faster=p50[0] / p50[1] if p50[0] and p50[1] else None,
                hit_ratio=tuple(cell.get("hit_ratio") if cell else None for cell in both),
                found_tokens_per_second=cached / p50[1] if cached is not None and p50[1] else None,
            )
        )
    return found


def usages(before: dict[str, Any], after: dict[str, Any], prices: Prices) -> list[Usage]:
    """Of each turn that both have, and of all of them. Without GPU-seconds where a schedule decided how long it took."""
    turns = sorted({c["turn"] for c in before["cells"]} & {c["turn"] for c in after["cells"]})
    return [_usage(before, after, prices, [turn], turn) for turn in turns] + [_usage(before, after, prices, turns, None)]


def _usage(before: dict[str, Any], after: dict[str, Any], prices: Prices, turns: list[int], turn: int | None) -> Usage:
    good = [[r for r in run["requests"] if r["turn"] in turns and "error" not in r] for run in (before, after)]
    requests = tuple(len(records) for records in good)
    if before["settings"]["rate"] is not None or after["settings"]["rate"] is not None:
        return Usage(turn, requests, None, None, (None, None))
    walls = [sum(cell["wall_s"] for cell in run["cells"] if cell["turn"] in turns) for run in (before, after)]
    busy = tuple(wall * prices.gpus for wall in walls)
    dollars = tuple(_per_million(seconds, records, prices) for seconds, records in zip(busy, good, strict=True))
    return Usage(turn, requests, busy, busy[0] - busy[1], dollars)


def _per_million(gpu_s: float, good: list[dict[str, Any]], prices: Prices) -> float | None:
    counts = [(r["prompt_tokens"], r["output_tokens"]) for r in good]
    if prices.gpu_hour is None or not counts or any(prompt is None for prompt, _ in counts):
        return None
    tokens = sum(prompt + output for prompt, output in counts)
    return gpu_s / SECONDS_A_HOUR * prices.gpu_hour / tokens * 1e6 if tokens else None


def relative(run: dict[str, Any]) -> list[tuple[float, float]]:
    """(seconds since the run began, TTFT over the median of its cell) of each answered request, in the order of sending.

    A run that was resumed has several clocks; its times go on where the part before ended.
    """
    medians = {place: cell["ttft_s"]["median"] for place, cell in compare.cells(run).items() if cell["ttft_s"]}
    found, offset, last = [], 0.0, 0.0
    for record in run["requests"]:
        if "error" in record:
            continue
        if record["sent_s"] < last - offset:
            offset = last
        last = max(last, offset + record["sent_s"])
        middle = medians.get((record["context"], record["turn"]))
        if middle:
            found.append((offset + record["sent_s"], record["ttft_s"] / middle))
    return found


def drift(run: dict[str, Any]) -> float | None:
    """None where no cell has LEAST_FOR_DRIFT answers."""
    by_cell: dict[tuple[int, int], list[float]] = {}
    for record in run["requests"]:
        if "error" not in record:
            by_cell.setdefault((record["context"], record["turn"]), []).append(record["ttft_s"])
    early, late = [], []
    for times in by_cell.values():
        if len(times) < LEAST_FOR_DRIFT:
            continue
        half, middle = len(times) // 2, statistics.median(times)
        early += [t / middle for t in times[:half]]
        late += [t / middle for t in times[-half:]]
    return statistics.median(late) / statistics.median(early) - 1 if early else None


def stability(name: str, run: dict[str, Any]) -> Stability:
    kinds: dict[str, int] = {}
    for record in run["requests"]:
        if "error" in record:
            kinds[record["error"]] = kinds.get(record["error"], 0) + 1
    last = {
        context: cell["ttft_s"]["median"]
        for (context, turn), cell in compare.cells(run).items()
        if turn == run["settings"]["turns"] and cell["ttft_s"]
    }
    return Stability(
        name, run["started"], run.get("ended"), len(run["requests"]), sum(kinds.values()), kinds, drift(run), last
    )


def spread_of_runs(runs: Iterable[Stability]) -> float | None:
    """Largest over smallest median TTFT of the last turn among runs, at the context where that is worst; less 1."""
    known: dict[int, list[float]] = {}
    for run in runs:
        for context, seconds in run.last_turn_p50_seconds.items():
            known.setdefault(context, []).append(seconds)
    ratios = [max(times) / min(times) - 1 for times in known.values() if len(times) > 1 and min(times) > 0]
    return max(ratios, default=None)
