"""A run on the terminal: its cells, and the table of two runs."""

from __future__ import annotations

from typing import Any

from ...cli import show


def milliseconds(times: dict[str, float] | None) -> str:
    """Median, and least to most where there are several."""
    if times is None:
        return "-"
    low, middle, high = (_number(times[name] * 1e3) for name in ("min", "median", "max"))
    return middle if low == high else f"{middle} [{low}-{high}]"


def _compact(times: dict[str, float] | None) -> str:
    """Median, and half the way from least to most in percent of it: four of them fit a line."""
    if times is None:
        return "-"
    half = (times["max"] - times["min"]) / 2 / times["median"]
    return f"{_number(times['median'] * 1e3)} ±{half:.0%}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _one(times: dict[str, float] | None, name: str = "median") -> str:
    return _number(times[name] * 1e3) if times else "-"


def cells(result: dict[str, Any]) -> None:
    several = result["settings"]["concurrency"] > 1  # else the column says 1 everywhere
    for turn in range(1, result["settings"]["turns"] + 1):
        rows = []
        for cell in (cell for cell in result["summary"] if cell["turn"] == turn):
            counted = cell["prompt_tokens"]
            hit = cell["hit_ratio"]
            rows.append(
                (
                    f"{counted:,.0f}" if counted is not None else f"~{cell['context']:,}",
                    f"{cell['complete']}/{cell['requests']}",
                    *((str(cell.get("in_flight") or "-"),) if several else ()),
                    milliseconds(cell["ttft_s"]),
                    _one(cell["ttft_s"], "p99"),
                    _one(cell["time_per_output_token_s"]),
                    f"{cell['output_tokens_per_s'] or 0:.1f}" + ("~" if cell["output_estimated"] else ""),
                    "not reported" if hit is None else f"{hit:.1%}",
                )
            )
        if rows:
            columns = (">tokens", ">complete", *((">in flight",) if several else ()), ">TTFT ms", ">p99", ">TPOT ms", ">tok/s", ">cached")
            show.table(f"Turn {turn}{' (cold)' if turn == 1 else ''}", columns, rows)
    if result["settings"]["rate"] is not None:
        _schedule(result)
    _failures(result)


def _schedule(result: dict[str, Any]) -> None:
    rows = []
    for cell in result["summary"]:
        place = (f"{cell['context']:,}", str(cell["turn"]))
        times = (_one(cell["service_s"]), _one(cell["latency_from_schedule_s"]), _one(cell["ttft_from_schedule_s"]))
        rows.append((*place, *times, f"{cell['requests_per_s'] or 0:.1f} of {result['settings']['rate']:g}"))
    columns = (">context", ">turn", ">service ms", ">from schedule", ">TTFT from schedule", ">requests/s")
    show.table("Latency of the request, and since it was due (medians)", columns, rows)


def _failures(result: dict[str, Any]) -> None:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in result["requests"]:
        if "error" in record:
            kinds.setdefault(record["error"], []).append(record)
    if kinds:
        total = len(result["requests"])
        rows = [(kind, f"{len(found)} of {total}", found[0]["message"]) for kind, found in sorted(kinds.items())]
        show.table("Failed requests, left out of all times", ("kind", ">requests", "the first one"), rows, wide=2)


def comparison(rows: list[dict[str, Any]]) -> None:
    if not rows:
        show.say("no context is in both runs")
        return
    turns = len(rows[0]["on"])
    columns = [">tokens", *(f">{name} t{turn + 1}" for name in ("ON", "OFF") for turn in range(turns)), ">difference"]
    cells_of = [
        (
            f"{row['tokens']:,.0f}",
            *map(_compact, row["on"]),
            *map(_compact, row["off"]),
            "-" if row["difference"] is None else f"{row['difference']:+.1%}",
        )
        for row in rows
    ]
    show.say("TTFT in ms: median, and half of the range from least to most.")
    show.table("ON is this run, OFF the base; the difference is that of the last turn", columns, cells_of)


def closing(result: dict[str, Any], refused: list[str] | None) -> None:
    for entry in result["skipped"]:
        show.say(f"skipped {entry['context']:,} tokens: {show.clean(entry['reason'])}")
    tokens = result["tokens"]
    if tokens:
        show.say(f"Prompts are sent as {tokens['sent_as']}, made to measure by {tokens['counted_by']}.")
    if replaced := result.get("replaced"):
        told = show.number(len(replaced), "conversation")
        show.say(f"Cut off and begun anew: {told}; what was cut off is no failure and in no latency.")
    for warning in result["warnings"]:
        show.say(f"WARNING: {show.clean(warning)}")
    for problem in result["problems"]:
        show.say(f"PROBLEM: {show.clean(problem)}")
    for reason in refused or ():
        show.say(f"NOT A VALID COMPARISON: {show.clean(reason)}")
