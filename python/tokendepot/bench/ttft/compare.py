"""Two runs side by side, and every reason not to believe the difference."""

from __future__ import annotations

from typing import Any

MIN_SAMPLES = 3
EXPLAINED_SHARE = 0.01  # of a cell's prompt tokens, found in the server's own prefix cache
_EQUAL = ("endpoint", "turns", "repeats", "concurrency", "rate", "answer_tokens", "cold_gpu")


def cells(result: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(cell["context"], cell["turn"]): cell for cell in result["summary"]}


def rows(on: dict[str, Any], off: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a context that both measured: TTFT of each turn in both runs, and how much less the last turn takes with `on`."""
    mine, base = cells(on), cells(off)
    turns = min(on["settings"]["turns"], off["settings"]["turns"])
    found = []
    for context in sorted({c for c, _ in mine} & {c for c, _ in base}):
        row: dict[str, Any] = {"context": context, "tokens": mine.get((context, 1), {}).get("prompt_tokens") or context}
        for name, table in (("on", mine), ("off", base)):
            row[name] = [table.get((context, turn), {}).get("ttft_s") for turn in range(1, turns + 1)]
        last_on, last_off = row["on"][-1], row["off"][-1]
        row["difference"] = last_on["median"] / last_off["median"] - 1 if last_on and last_off else None
        found.append(row)
    return found


def settings_differ(on: dict[str, Any], off: dict[str, Any]) -> list[str]:
    """The settings in which two runs that are to be compared must agree and do not. KeyError: one of them is missing."""
    found = [f"{name} differs: {on[name]} and {off[name]} in the base" for name in _EQUAL if on[name] != off[name]]
    # Each server has a command of its own to be restarted with.
    if bool(on["between"]) != bool(off["between"]):
        found.append(f"only {'this run' if on['between'] else 'the base'} ran a command between its turns")
    return found


def differences(on: dict[str, Any], off: dict[str, Any]) -> list[str]:
    """Why the two did not measure the same thing; empty when they did. `off` is the base."""
    found = []
    if on["run_id"] == off["run_id"]:
        found.append("both are the same run")
    found += settings_differ(on["settings"], off["settings"])
    if on["server"].get("model") != off["server"].get("model"):
        found.append(f"the model differs: {on['server'].get('model')!r} and {off['server'].get('model')!r} in the base")
    return found


def hopeless(asked: dict[str, Any], off: dict[str, Any]) -> list[str]:
    """Why no run with the settings `asked` can be validly compared with the base `off`, whatever it measures."""
    if asked["repeats"] < MIN_SAMPLES:
        return [f"--repeats is {asked['repeats']}, expected {MIN_SAMPLES} or more"]
    found = of_one("the base", off)
    measured = {context for context, _ in cells(off)}
    passed_over = {entry["context"] for entry in off["skipped"]}
    for context in sorted(measured ^ set(asked["contexts"])):
        if context in measured:
            found.append(f"the base has {context:,} tokens, expected in --contexts")
        elif context not in passed_over:  # what the base's server had no room for, another of the same limit has not either
            found.append(f"--contexts has {context:,} tokens, which the base has not")
    return found


def refusals(on: dict[str, Any], off: dict[str, Any]) -> list[str]:
    """Why the comparison is not valid: differences, and what makes one of the two unreliable. Empty when it is valid."""
    found = differences(on, off)
    return found + of_one("this run", on) + of_one("the base", off) + _in_both(on, off)


def of_one(name: str, result: dict[str, Any]) -> list[str]:
    """What makes a run unreliable, whatever it is compared with."""
    found = []
    if not result["complete"]:
        found.append(f"{name} is not complete")
    if result["client"].get("saturated"):
        found.append(f"{name}: client saturated")
    found += [f"{name}: {problem}" for problem in result["problems"]]
    known = cells(result)
    for (context, turn), cell in known.items():
        where = f"{name}, {context:,} tokens, turn {turn}"
        if cell["errors"]:
            found.append(f"{where}: {sum(cell['errors'].values())} of {cell['requests']} requests failed")
        if cell["complete"] < MIN_SAMPLES:
            found.append(f"{where}: {cell['complete']} samples, expected {MIN_SAMPLES} or more")
        if cell.get("buffered", 0) * 2 > cell["complete"]:  # results of earlier versions do not tell
            found.append(f"{where}: all tokens arrived at once in {cell['buffered']} of {cell['complete']} answers")
        if result["settings"]["cold_gpu"] and turn > 1:
            found += _explained(where, cell, known.get((context, 1)))
    return found


def _explained(where: str, cell: dict[str, Any], first: dict[str, Any] | None) -> list[str]:
    """Whether hits came from the server's own cache, beyond what it finds of any prompt (a template, say)."""
    own = cell["own_cache_tokens"]
    if own is None:
        return [f"{where}: --cold-gpu was asked for, but the server counts no hits of its own prefix cache in /metrics"]
    usual = (first["own_cache_tokens"] or 0) / first["requests"] * cell["requests"] if first else 0
    total = (cell["prompt_tokens"] or cell["context"]) * cell["requests"]
    if own - usual > EXPLAINED_SHARE * total:
        return [f"{where}: --cold-gpu was asked for, but {own:,.0f} tokens were in the server's own prefix cache"]
    return []


def _in_both(on: dict[str, Any], off: dict[str, Any]) -> list[str]:
    mine, base = cells(on), cells(off)
    found = []
    for name in ("counted_by", "sent_as"):  # N tokens by one tokenizer, or as text, are not N by another, or as ids
        one, other = on.get("tokens", {}).get(name), off.get("tokens", {}).get(name)
        if one != other:
            found.append(f"tokens {name.replace('_', ' ')} {one}, and {other} in the base")
    for context, turn in sorted(set(mine) | set(base)):
        where = f"{context:,} tokens, turn {turn}"
        if (context, turn) not in mine or (context, turn) not in base:
            found.append(f"{where}: only in {'this run' if (context, turn) in mine else 'the base'}")
            continue
        one, other = mine[context, turn], base[context, turn]
        if one["complete"] != other["complete"]:
            found.append(f"{where}: {one['complete']} samples and {other['complete']} in the base")
        counts = one["prompt_tokens"], other["prompt_tokens"]
        answers = (turn - 1) * on["settings"]["answer_tokens"]  # earlier answers are in the prompt, and may differ
        # Without a count on either side, prompts are as equal as what they were made to measure by.
        if counts.count(None) == 1:
            found.append(f"{where}: counts unknown, {'this run' if counts[0] is None else 'the base'} has no usage with its answers")
        elif None not in counts and abs(counts[0] - counts[1]) > answers:
            found.append(f"{where}: prompts of {counts[0]:,.0f} tokens and {counts[1]:,.0f} in the base")
    return found
