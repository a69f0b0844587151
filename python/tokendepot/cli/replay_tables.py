"""What `tokendepot replay` and `tokendepot plan` print: tables of 80 columns, or the same as one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..bench.cache_models import SEGMENTS_AT_LEAST, Outcome
from ..bench.extents import Geometry
from ..bench.traces import Trace
from . import show

if TYPE_CHECKING:
    from ..bench.plan import Plan
    from ..bench.real_depot import RealOutcome

BROKEN_SHOWN = 3
UNITS = {"B": 1} | {f"{letter}iB": 1024**power for power, letter in enumerate("KMGTPE", 1)}
REAL = "depot (real)"
ROOT_FACTS = ("path", "transport", "reason", "read_bytes_per_second")


def _trace_as_dict(trace: Trace) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "format": trace.format,
        "block_tokens": trace.block_tokens,
        "requests": len(trace.requests),
        "block_references": trace.references,
        "unique_blocks": trace.unique_blocks,
        "input_tokens": trace.input_tokens,
        "span_s": trace.span_s,
        "broken_lines": trace.broken_count,
        "broken": [{"where": where, "why": why} for where, why in trace.broken],
    }


def _say_trace(trace: Trace) -> None:
    show.say(f"{show.clean(trace.name)}")
    show.say(
        f"  {trace.format}: {show.number(len(trace.requests), 'request')} in {trace.span_s:,.0f} s, "
        f"{trace.input_tokens:,} tokens"
    )
    show.say(
        f"  {trace.references:,} blocks of {show.number(trace.block_tokens, 'token')}, {trace.unique_blocks:,} different"
    )
    if trace.broken_count:
        show.say(f"  {show.number(trace.broken_count, 'broken line')} skipped:")
        for where, why in trace.broken[:BROKEN_SHOWN]:
            show.say(f"    {show.clean(where)}: {show.clean(why)}")
    show.say()


def _milliseconds(seconds: Sequence[float], percent: float) -> float:
    """The value that `percent` of the sorted values do not exceed (nearest rank)."""
    return sorted(seconds)[max(0, -int(-len(seconds) * percent // 100) - 1)] * 1e3


# --- replay ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlayReport:
    """What caches did with a trace, by their names; "no bound" is what the others are compared with."""

    trace: Trace
    outcomes: dict[str, Outcome]
    geometry: Geometry
    capacities: Sequence[int]
    interrupted: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            **_trace_as_dict(self.trace),
            "extent_bytes": self.geometry.extent_bytes,
            "capacity_bytes": list(self.capacities),
            "interrupted": self.interrupted,
            "caches": {name: self._outcome_as_dict(name, outcome) for name, outcome in self.outcomes.items()},
        }

    def _outcome_as_dict(self, name: str, outcome: Outcome) -> dict[str, Any]:
        size = self.geometry.extent_bytes
        found = {
            "requests": outcome.requests,
            "hit_rate": outcome.hit_rate,
            "token_hit_rate": outcome.token_hit_rate,
            "hit_blocks": outcome.hits,
            "hit_blocks_by_tier": outcome.hits_by_tier,
            "read_bytes": outcome.hits * size,
            "written_bytes": (outcome.stored + outcome.copied) * size,
            "writes_per_unique_byte": outcome.writes_per_unique,
            "evicted_bytes": outcome.evicted * size,
            "held_bytes": outcome.held * size,
            "unreachable_bytes": outcome.unreachable * size,
        }
        return found | _measured(outcome) if name == REAL else found

    def say(self, of_what: str) -> None:
        _say_trace(self.trace)
        capacities = " + ".join(show.size(capacity) for capacity in self.capacities)
        share = max(self.capacities) / max(1, self.trace.unique_blocks * self.geometry.extent_bytes)
        show.say(f"KV ({of_what}): {show.size(self.geometry.extent_bytes)} a block; capacity {capacities}, "
                 f"{share:.1%} of the different blocks")
        show.say()
        ideal = self.outcomes.get("no bound")
        rows = []
        for name, outcome in self.outcomes.items():
            size = self.geometry.extent_bytes
            complete = ideal is not None and ideal.requests == outcome.requests and ideal.hit_tokens > 0
            rows.append(
                (
                    name,
                    f"{outcome.token_hit_rate:.1%}",
                    f"{outcome.hit_rate:.1%}",
                    f"{outcome.hit_tokens / ideal.hit_tokens:.1%}" if complete and ideal else "",
                    show.size(outcome.hits * size),
                    show.size((outcome.stored + outcome.copied) * size),
                    f"{outcome.writes_per_unique:.2f}",
                    show.size(outcome.evicted * size),
                )
            )
        columns = ("cache", ">tokens", ">blocks", ">of ideal", ">read", ">written", ">per unique", ">evicted")
        show.table("Found", columns, rows, wide=0)
        if REAL in self.outcomes:
            _say_measured(self.outcomes[REAL])
        for name, outcome in self.outcomes.items():
            if len(outcome.hits_by_tier) > 1:
                tiers = ", ".join(f"{hits / max(1, outcome.references):.1%}" for hits in outcome.hits_by_tier)
                show.say(f"{name}: blocks from each tier: {tiers}")
            if outcome.unreachable:
                show.say(f"{name}: no look-up reaches {outcome.unreachable / outcome.held:.1%} of what is held at the end")
            if outcome.requests < len(self.trace.requests):
                show.say(f"{name}: interrupted after {outcome.requests:,} of {len(self.trace.requests):,} requests")


def _measured(outcome: RealOutcome) -> dict[str, Any]:
    load, store = outcome.stats["load"], outcome.stats["store"]
    load_s = sum(outcome.load_s)
    return {
        "read_bytes": load["bytes"],
        "written_bytes": store["bytes"],
        "write_amplification": outcome.write_amplification,
        "evicted_segments": sum(root["evicted_segments"] for root in outcome.stats["roots"]),
        "demoted_segments": sum(root["demoted_segments"] for root in outcome.stats["roots"]),
        "promoted_bytes": sum(root["promoted_bytes"] for root in outcome.stats["roots"]),
        "rewritten_bytes": sum(root["rewritten_bytes"] for root in outcome.stats["roots"]),
        "load_gb_per_s": load["bytes"] / load_s / 1e9 if load_s else None,
        "store_gb_per_s": store["bytes"] / outcome.store_s / 1e9 if outcome.store_s else None,
        "load_ms": {f"p{p}": _milliseconds(outcome.load_s, p) for p in (50, 99, 100)} if outcome.load_s else None,
        "lookup_ms": {f"p{p}": _milliseconds(outcome.lookup_s, p) for p in (50, 99, 100)} if outcome.lookup_s else None,
        "late_s": outcome.late_s,
        "failures": outcome.failures,
        "roots": [{key: root[key] for key in ROOT_FACTS} for root in outcome.stats["roots"]],
        "bytes_by_path": {"load": load["by_path"], "store": store["by_path"]},
    }


def _say_measured(outcome: RealOutcome) -> None:
    found = _measured(outcome)
    ways = ", ".join(f"{show.clean(root['path'])} ({root['transport']})" for root in found["roots"])
    show.say(f"real depot in {ways}; every loaded row was its block's own")
    for root in found["roots"]:
        if root["read_bytes_per_second"]:
            show.say(f"  {show.clean(root['path'])} read {root['read_bytes_per_second'] / 1e9:.2f} GB/s when it was opened")
    for what, each in (("load", found["load_ms"]), ("lookup", found["lookup_ms"])):
        if each is not None:
            rate = f", {found['load_gb_per_s']:.2f} GB/s" if what == "load" and found["load_gb_per_s"] else ""
            show.say(
                f"  {what} of a prompt: p50 {each['p50']:.3f} ms, p99 {each['p99']:.3f} ms, most {each['p100']:.3f} ms{rate}"
            )
    if found["store_gb_per_s"] is not None:
        show.say(
            f"  stores: {found['store_gb_per_s']:.2f} GB/s, {found['write_amplification']:.3f} bytes written for each byte stored"
        )
    show.say(
        f"  {show.number(found['evicted_segments'], 'segment')} evicted, {found['demoted_segments']:,} copied down, "
        f"{show.size(found['promoted_bytes'])} promoted, {show.size(found['rewritten_bytes'])} rewritten; "
        f"the latest prompt was served {found['late_s']:.1f} s after its time"
    )
    if found["failures"]:
        show.say("  failed: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(found["failures"].items())))


def _size_at_least(count: int) -> str:
    """Rounded up: a capacity that is copied from a table must be enough."""
    shown = show.size(count)
    value, unit = shown.split()
    if float(value) * UNITS[unit] >= count:
        return shown
    return f"{float(value) + 0.1:.1f} {unit}"


# --- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanReport:
    """A plan in words. What was not done before an interruption is left out."""

    trace: Trace
    plan: Plan
    interrupted: bool

    def as_dict(self) -> dict[str, Any]:
        return {**_trace_as_dict(self.trace), "interrupted": self.interrupted, **asdict(self.plan)}

    def say(self, assumptions: Sequence[str]) -> None:
        plan = self.plan
        _say_trace(self.trace)
        show.say(
            f"A cache without a bound finds {plan.ideal_tokens:.1%} of the tokens ({plan.ideal_blocks:.1%} of the blocks)"
        )
        show.say(
            f"and holds {show.size(plan.unique_bytes)}."
        )
        show.say()
        if not plan.targets:
            show.say("No prompt begins like an earlier one: nothing can be found.")
        else:
            self._say_targets()
        if plan.tiers:
            self._say_tiers()
        least = plan.depot_at_least_bytes
        if any(target.depot_bytes == least for target in plan.targets) or any(tiers.depot is None for tiers in plan.tiers):
            show.say(f"A depot's first tier has at least {SEGMENTS_AT_LEAST} segments, each with room for a block:")
            show.say(f"below {_size_at_least(least)} there is none.")
            show.say()
        if self.interrupted:
            show.say("interrupted: what is missing above was not worked out")
        show.say("Assumed:")
        for assumption in assumptions:
            show.say(f"  {assumption}")

    def _say_targets(self) -> None:
        plan = self.plan

        def of_all(size: int) -> str:
            return f"{show.size(size)} ({size / plan.unique_bytes:.0%})"

        def enough_of_all(size: int) -> str:
            return f"{_size_at_least(size)} ({-(-size * 100 // plan.unique_bytes)}%)"

        rows = [
            (
                f"{target.share:.0%}",
                f"{target.hit_rate:.1%}",
                of_all(target.lru_bytes),
                enough_of_all(target.depot_bytes) if target.depot_bytes is not None else "",
            )
            for target in plan.targets
        ]
        show.table("Capacity for a share of the ideal hits", (">share", ">tokens", ">LRU by block", ">depot"), rows, wide=0)
        rows = []
        for target in plan.targets:
            saved = target.saved_gpu_s_a_day
            dollars = f"{target.dollars:.4f}" if target.dollars is not None else ""
            money = () if plan.dollars_before is None else (dollars,)
            rows.append(
                (
                    f"{target.share:.0%}",
                    *(f"{rate:.2f}" for rate in (*target.read, *target.write)),
                    f"{target.saved_gpu_s:,.0f}",
                    f"{saved:,.0f}" if saved is not None else "",
                    *money,
                )
            )
        columns = (">share", ">read p99", ">most", ">write p99", ">most", ">GPU-s saved", ">a day")
        if plan.dollars_before is not None:
            columns += (">$/M tokens",)
        show.table("GB/s at peak, and what is saved of the prefill", columns, rows, wide=0)
        before = f", ${plan.dollars_before:.4f} a million tokens" if plan.dollars_before is not None else ""
        show.say(f"Without a depot the trace's prefill takes {plan.gpu_s:,.0f} GPU-seconds{before}.")
        show.say()

    def _say_tiers(self) -> None:
        rows = []
        for tiers in self.plan.tiers:
            sizes = tuple(show.size(size) if size else "none" for size in (tiers.memory_bytes, tiers.nvme_bytes))
            depot = ("", "") if tiers.depot is None else tuple(f"{hits:.1%}" for hits in tiers.depot)
            rows.append((*sizes, *(f"{hits:.1%}" for hits in tiers.lru), *depot))
        columns = (">memory", ">NVMe", ">LRU: memory", ">NVMe", ">depot: memory", ">NVMe")
        show.table("Blocks found in each tier", columns, rows, wide=0)
