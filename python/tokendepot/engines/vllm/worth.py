"""Load or recompute: what either would cost the next request, learnt from what the last ones cost.

A load costs what loads of its size took, as the scheduler sees it: from the order to the step that reports it, queues
included. Computing costs what tokens at such a context took in steps that held many of them; but no step is faster than
the shortest, so that a few tokens more in it are free. Sizes and contexts are told apart by powers of two.

Loads of a size that was not seen yet are taken to be as fast as the root was when it was opened, so that the first hits
after a restart are loads where that can clearly pay; the very first load of a process, which also loads kernels, proves
little when it was slow. Other sizes are guessed from the one that promises most; loads that were slow are tried again
after a minute.

What a token costs grows with its context, by as much for each token of it, and at most in proportion: attention reads the
context, all else does not. So costs at shorter contexts tell what a longer one costs that was not seen, by the least
growth among them, and bound what one slow step, the first of a process that compiles, makes of a longer one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import combinations
from statistics import median_low
from typing import Any

from tokendepot.engines.vllm.groups import Group

LONG_STEP_TOKENS = 128  # steps of at least so many tokens tell what a token costs
SHORT_STEP_TOKENS = 64  # steps of at most so many tell what a step costs whatever is in it
SHORT_STEP_EVERY_S = 1.0
STEPS_UNDER_WAY = 64  # remembered; a step that nobody reports is forgotten
LOADS_COUNT_S = 60.0
KEPT = 5  # observations of one power of two
GROWTH_FROM = 3  # octaves of contexts, the longest: what a token costs at short ones is the step's floor
GROWTH_APART = 1.5  # times as long; between nearer ones it would be their noise
UNTOLD = 1024
LOAD_LATENCY_S = 2e-3
LATENCY_SHARE = 4  # of a load's time over that of its bytes, for guesses about larger ones
LONGEST_LATENCY_S = 0.25  # what of a load's time may be that at most
FIRST_LOAD_SURPLUS_S = 0.5  # what a process's first load may take longer than others
GUESS_MARGIN = 1.5  # a disk that others use is slower than it was alone when it was opened
START_MEMORY_RATE, START_DISK_RATE = 20e9, 3e9  # bytes a second, where nothing was measured
START_STEP_S = 0.025
# Up to about so many tokens a step is as long as the shortest: it waits for the weights, not for arithmetic.
GPU_FREE_TOKENS, CPU_FREE_TOKENS = 256, 16


def starting_values(groups: list[Group], stats: dict[str, Any]) -> tuple[float, int]:
    """(seconds to load a token, tokens that are free in a step), before anything was measured."""
    from vllm.platforms import current_platform

    token_bytes = sum(group.page_bytes * group.layers / group.block_tokens for group in groups)
    fastest = max(
        START_MEMORY_RATE if root["transport"] == "mapped" else root["read_bytes_per_second"] or START_DISK_RATE
        for root in stats["roots"]
    )
    return token_bytes / fastest, CPU_FREE_TOKENS if current_platform.is_cpu() else GPU_FREE_TOKENS


class Octaves:
    """The last observations (x, y), kept apart by the power of two below x."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[float, float, float]]] = {}  # octave -> (when, x, y)

    def observe(self, now: float, x: float, y: float) -> None:
        self._seen.setdefault(self.octave(x), deque(maxlen=KEPT)).append((now, x, y))

    def medians(self, since: float) -> dict[int, tuple[float, float]]:
        """octave -> (x, y), of what was seen since then."""
        found = {}
        for octave, kept in self._seen.items():
            seen = [(x, y) for when, x, y in kept if when >= since]
            if seen:
                found[octave] = median_low(x for x, _ in seen), median_low(y for _, y in seen)
        return found

    def near(self, x: float) -> tuple[float, float] | None:
        """(x, y) of the octave of x, else of the next one below, else of the next one above."""
        mine, found = self.octave(x), self.medians(0.0)
        order = sorted(found, key=lambda octave: (octave > mine, abs(octave - mine)))
        return found[order[0]] if order else None

    @staticmethod
    def octave(x: float) -> int:
        return int(x).bit_length()


class Worth:
    """The rule of one engine."""

    def __init__(
        self, load_token_s: float, free_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._load_token_s, self._free_tokens, self._clock = load_token_s, free_tokens, clock
        self._loads = Octaves()  # tokens -> seconds
        self._no_load_yet = True
        self._contexts = Octaves()  # mean context -> seconds a token
        self._step = START_STEP_S  # the shortest, about
        self._steps: dict[int, tuple[float, int, float]] = {}  # number -> (began, tokens, mean context)
        self._last_number = 0
        self._last_end = 0.0
        self._short_step_due = 0.0
        self._untold: deque[tuple[int, int, int, float]] = deque(maxlen=UNTOLD)  # loads before computing was measured

    # --- the rule ------------------------------------------------------------------------------------------------

    def of_load(self, local: int, hit: int, total: int) -> bool:
        """Whether loading tokens [local, hit) of a prompt of `total` is faster than computing them."""
        return self.load_seconds(hit - local) < self.spared_seconds(local, hit, total)

    def load_seconds(self, tokens: int) -> float:
        mine, known = Octaves.octave(tokens), self._loads.medians(self._clock() - LOADS_COUNT_S)
        if mine in known:
            return self._scaled(tokens, *known[mine])
        smaller = [known[octave] for octave in known if octave < mine]
        if smaller:  # how much of them was latency is not known: try
            return min(self._larger(tokens, size, seconds) for size, seconds in smaller)
        if known:
            return self._scaled(tokens, *known[min(known)])
        return GUESS_MARGIN * self._first_guess(tokens)

    def _larger(self, tokens: int, size: float, seconds: float) -> float:
        a_token = max(seconds / LATENCY_SHARE, seconds - LONGEST_LATENCY_S) / size
        return seconds + (tokens - size) * max(self._load_token_s, a_token)

    def _scaled(self, tokens: int, size: float, seconds: float) -> float:
        return max(LOAD_LATENCY_S, seconds * tokens / size)

    def _first_guess(self, tokens: int) -> float:
        return LOAD_LATENCY_S + tokens * self._load_token_s

    def spared_seconds(self, local: int, hit: int, total: int) -> float:
        """What computing tokens [local, hit) adds to computing the rest, which has to be done in any case.

        Costs at different contexts are measured apart: a prompt's cost taken at its own mean context, less the rest's at
        another, would be less than nothing after one slow step of the kind that the rest is."""
        rest = (total - hit) * self._token_seconds((hit + total) / 2)
        both = rest + (hit - local) * self._token_seconds((local + hit) / 2)
        return max(self._step, both) - max(self._step, rest)

    def _token_seconds(self, context: float) -> float:
        near = self._contexts.near(context)
        if near is None:
            return self._step / self._free_tokens
        x, y = near
        shorter = sorted(seen for seen in self._contexts.medians(0.0).values() if seen[0] <= context)
        if context > x:
            y += self._growth(shorter[-GROWTH_FROM:]) * (context - x)
        return min([y, *(y * context / x for x, y in shorter)])

    @staticmethod
    def _growth(seen: list[tuple[float, float]]) -> float:
        """Seconds a token costs more for each token of context, the least between any two: of three, one may be of a slow step.
        What two let expect is bounded by proportion only."""
        pairs = combinations(seen, 2)
        slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x2 >= GROWTH_APART * x1]
        return max(0.0, min(slopes, default=0.0))

    # --- what it learns from -------------------------------------------------------------------------------------

    def loaded(self, tokens: int, seconds: float) -> None:
        first, self._no_load_yet = self._no_load_yet, False
        if first and seconds > self._first_guess(tokens):
            seconds -= FIRST_LOAD_SURPLUS_S
            if seconds <= self._first_guess(tokens):
                return
        self._loads.observe(self._clock(), tokens, seconds)

    def saved(self, local: int, hit: int, total: int, seconds: float) -> float:
        """Seconds that were saved by a load of tokens [local, hit) of a prompt of `total`, which took `seconds`, and by
        those before it that could not be valued yet: 0 until a prefill was measured. A load that was slower than
        computing saved nothing."""
        self._untold.append((local, hit, total, seconds))
        if self._contexts.near(total) is None:
            return 0.0
        told, self._untold = self._untold, deque(maxlen=UNTOLD)
        return sum(max(0.0, self.spared_seconds(local, hit, total) - took) for local, hit, total, took in told)

    def step_begins(self, scheduled: list[tuple[int, int]]) -> int:
        """(computed before, tokens in this step) of every request -> a number to be reported when the step has ended,
        or 0 when it would tell nothing."""
        tokens = sum(count for _, count in scheduled)
        now = self._clock()
        short = 0 < tokens <= SHORT_STEP_TOKENS and now >= self._short_step_due
        if not short and tokens < LONG_STEP_TOKENS:
            return 0
        if short:
            self._short_step_due = now + SHORT_STEP_EVERY_S
        context = sum((before + count / 2) * count for before, count in scheduled) / tokens
        self._last_number += 1
        self._steps[self._last_number] = (now, tokens, context)
        self._steps.pop(self._last_number - STEPS_UNDER_WAY, None)
        return self._last_number

    def step_ended(self, number: int) -> None:
        """Steps may overlap: one begins to cost when the one before has ended."""
        step = self._steps.pop(number, None)
        now = self._clock()
        if step is not None:
            began, tokens, context = step
            seconds = now - max(began, self._last_end)
            if tokens >= LONG_STEP_TOKENS:
                if seconds > 2 * self._step:  # else most of it were free
                    self._contexts.observe(now, context, seconds / tokens)
            elif seconds < self._step:
                self._step += (seconds - self._step) / 2
            else:  # long contexts, steps before it that nobody timed and a machine that stood still make it seem longer
                self._step += min(seconds - self._step, self._step) / 16
        self._last_end = now
