"""What is measured: a cold prefill with and without the depot, and what the hooks add to a step that only decodes."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engines import BLOCK_TOKENS, CHUNK_TOKENS, BenchError, Run
from hook_events import HOOKS, Event, Step, steps_of

TOKEN_IDS = range(3, 500)  # in the vocabulary of every model, and none of its special tokens
WAKE_TOKENS = BLOCK_TOKENS // 2  # fills no block, so nothing of it is cached or stored


class AnEngine(Protocol):
    @property
    def name(self) -> str: ...
    def run(self, prompts: Sequence[list[int]], length: int) -> Run: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class ADepot(Protocol):
    def count(self) -> int: ...
    def wait_kept(self, expected: int) -> int: ...


@dataclass
class Couple:
    """An engine with the depot and one without. Exactly one runs at any time; the other one is paused."""

    with_depot: AnEngine
    without: AnEngine
    depot: ADepot
    groups: int  # extents that each chunk becomes
    rng: random.Random

    def in_random_order(self) -> list[AnEngine]:
        both = [self.with_depot, self.without]
        self.rng.shuffle(both)
        return both

    def alone(self, engine: AnEngine, prompts: Sequence[list[int]], length: int) -> Run:
        """One run while the other engine is paused; a short prompt before it wakes this one up."""
        (self.without if engine is self.with_depot else self.with_depot).pause()
        engine.resume()
        engine.run([self.prompt(WAKE_TOKENS)], 1)
        return engine.run(prompts, length)

    def prompt(self, tokens: int) -> list[int]:
        return self.rng.choices(TOKEN_IDS, k=tokens)


@dataclass(frozen=True)
class Pair:
    """The same work by both engines, one right after the other."""

    with_depot: Run
    without: Run

    @property
    def ratio(self) -> float:
        return self.with_depot.seconds / self.without.seconds


def cold_prefills(couple: Couple, pairs: int, tokens: int, say: Callable[[str], None]) -> list[Pair]:
    """Times to the first token of prompts that no engine has seen, two of one length a pair. A pair counts when the depot kept
    all of its prompt; a store that was dropped is work left undone. BenchError when too many were."""
    extents = tokens // CHUNK_TOKENS * couple.groups
    found: list[Pair] = []
    for _ in range(2 * pairs):
        runs, kept = {}, 0
        for engine in couple.in_random_order():
            before = couple.depot.count()
            runs[engine.name] = run = couple.alone(engine, [couple.prompt(tokens)], 1)
            if any(run.cached):
                raise BenchError(f"the engine {engine.name} had {run.cached[0]} tokens of a cold prompt cached, expected 0")
            if engine is couple.with_depot:
                kept = couple.depot.wait_kept(before + extents) - before
        pair = Pair(runs[couple.with_depot.name], runs[couple.without.name])
        if kept != extents:
            say(f"left out: the depot kept {kept} of the prompt's {extents} extents")
            continue
        found.append(pair)
        say(f"cold prefill {len(found)} of {pairs}: {pair.with_depot.seconds:.3f} s with, {pair.without.seconds:.3f} s without")
        if len(found) == pairs:
            return found
    raise BenchError(f"the depot kept {len(found)} of {2 * pairs} prompts whole, expected at least {pairs}")


def decodings(couple: Couple, requests: int, runs: int, say: Callable[[str], None]) -> list[Pair]:
    """Both engines write text for `requests` prompts that they have computed before. No chunk becomes full meanwhile, so the
    depot has nothing to load and nothing to store."""
    prompts = [couple.prompt(CHUNK_TOKENS + 1) for _ in range(requests)]
    length = CHUNK_TOKENS - 2
    before = couple.depot.count()
    for engine in couple.in_random_order():
        couple.alone(engine, prompts, 1)
        if engine is couple.with_depot:
            kept = couple.depot.wait_kept(before + requests * couple.groups)
    found = []
    for number in range(runs):
        timed = {engine.name: couple.alone(engine, prompts, length) for engine in couple.in_random_order()}
        found.append(Pair(timed[couple.with_depot.name], timed[couple.without.name]))
        say(
            f"decoding, {requests} requests, {number + 1} of {runs}: "
            f"{found[-1].with_depot.seconds:.2f} s with, {found[-1].without.seconds:.2f} s without"
        )
    if couple.depot.count() != kept:
        raise BenchError(f"the depot keeps {couple.depot.count()} extents after decoding, expected {kept} as before")
    return found


# --- what came out -----------------------------------------------------------------------------------------------


def idle_steps(events: Sequence[Event], pairs: Sequence[Pair], requests: int) -> list[Step]:
    """The steps within these pairs that decoded all requests, one token each, and in which the depot had no work. The first
    step of a run takes its requests up."""
    found: list[Step] = []
    for pair in pairs:
        run = pair.with_depot
        steps = steps_of(event for event in events if run.begin <= event.begin < run.end)
        found += [step for step in steps[1:] if step.requests == requests == step.tokens and not step.busy]
    return found


@dataclass
class HookShare:
    """Time of one hook in each of several runs."""

    hook: str
    seconds: list[float] = field(default_factory=list)


def hook_shares(events: Sequence[Event], runs: Sequence[Run]) -> list[HookShare]:
    """By hook, the longest first."""
    shares = [HookShare(name, [0.0] * len(runs)) for name in HOOKS]
    for place, run in enumerate(runs):
        for event in events:
            if run.begin <= event.begin < run.end:
                shares[event.hook].seconds[place] += event.duration * 1e-9
    return sorted(shares, key=lambda share: -statistics.median(share.seconds))


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def spread(values: Sequence[float]) -> str:
    """Quartiles, and the standard error of the median as their distance implies it."""
    low, high = percentile(values, 0.25), percentile(values, 0.75)
    error = 1.2533 * (high - low) / 1.349 / len(values) ** 0.5
    return f"median {statistics.median(values):.4f} +- {error:.4f}, quartiles {low:.4f} to {high:.4f}, n = {len(values)}"
