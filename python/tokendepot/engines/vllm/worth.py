"""Load or recompute: what either would cost the next request, learnt from what the last ones cost.

A load costs a latency and a time for each token, as the scheduler sees it: from the order to the step that reports it,
queues included. Computing costs a time for each token that grows with the context before it, and no step is faster
than the fastest: a few tokens more in a step are free. Both start from values at which long prefixes are loaded, so that the first
hits after a restart are loads and are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tokendepot.engines.vllm.groups import Group

LONG_STEP_TOKENS = 512  # steps of at least so many tokens tell what a token costs
SHORT_STEP_TOKENS = 64  # steps of at most so many tell what a step costs whatever is in it
SHORT_STEP_EVERY_S = 1.0
STEPS_UNDER_WAY = 64  # remembered; a step that nobody reports is forgotten
LOADS_FADE_S = 120.0  # half-life: a root that was slow once is tried again
STEPS_FADE = 0.95  # of the weight of all earlier steps, with each new one
SURPRISE = 8.0  # one observation moves the estimate as if it were at most so many times off
START_WEIGHT = 0.5  # of the starting values, in observations
START_LOAD_LATENCY_S = 2e-3
START_STEP_S = 1e-3
START_MEMORY_RATE, START_DISK_RATE = 20e9, 3e9  # bytes a second
START_GPU_TOKENS_S, START_CPU_TOKENS_S = 1e4, 1e3  # tokens a second


def starting_values(groups: list[Group], stats: dict[str, Any]) -> tuple[float, float]:
    """(seconds to load a token, seconds to compute one), before anything was measured."""
    from vllm.platforms import current_platform

    token_bytes = sum(group.page_bytes * group.layers / group.block_tokens for group in groups)
    in_memory = any(root["transport"] == "mapped" for root in stats["roots"])
    rate = START_MEMORY_RATE if in_memory else START_DISK_RATE
    return token_bytes / rate, 1 / (START_CPU_TOKENS_S if current_platform.is_cpu() else START_GPU_TOKENS_S)


class Line:
    """y = start + slope * x by least squares, neither negative, over observations that fade. An error counts the less the
    larger y is, so that short and long prefixes are both met."""

    def __init__(self, start: float, slope: float, reach: float) -> None:
        self._sums = [0.0] * 5  # w, wx, wy, wxx, wxy
        self._own = [0.0] * 5
        for x in (0.0, reach):
            self._add(self._own, x, start + slope * x, START_WEIGHT)

    def at(self, x: float) -> float:
        start, slope = self._fit()
        return start + slope * x

    def observe(self, x: float, y: float) -> None:
        expected = self.at(x)
        self._add(self._sums, x, min(max(y, expected / SURPRISE), expected * SURPRISE), 1.0)

    def fade(self, factor: float) -> None:
        self._sums = [value * factor for value in self._sums]

    @staticmethod
    def _add(sums: list[float], x: float, y: float, weight: float) -> None:
        weight /= max(y, 1e-9)
        for place, value in enumerate((1.0, x, y, x * x, x * y)):
            sums[place] += weight * value

    def _fit(self) -> tuple[float, float]:
        w, x, y, xx, xy = (own + seen for own, seen in zip(self._own, self._sums, strict=True))
        spread = w * xx - x * x
        slope = (w * xy - x * y) / spread if spread > 0 else 0.0
        if slope < 0:
            return y / w, 0.0
        start = (y - slope * x) / w
        return (start, slope) if start >= 0 else (0.0, xy / xx)


class Worth:
    """The rule of one engine. `load_token_s` and `compute_token_s` are the starting values for one token."""

    def __init__(
        self, load_token_s: float, compute_token_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._load = Line(START_LOAD_LATENCY_S, load_token_s, 1 << 16)
        self._token = Line(compute_token_s, 0.0, 1 << 16)  # over the context before it
        self._step = START_STEP_S
        self._steps: dict[int, tuple[float, int, float]] = {}  # number -> (began, tokens, mean context)
        self._last_number = 0
        self._last_end = 0.0
        self._short_step_due = 0.0
        self._last_load = clock()

    # --- the rule ------------------------------------------------------------------------------------------------

    def of_load(self, local: int, hit: int, total: int) -> bool:
        """Whether loading tokens [local, hit) of a prompt of `total` is faster than computing them."""
        return self.load_seconds(hit - local) < self.compute_seconds(local, total) - self.compute_seconds(hit, total)

    def load_seconds(self, tokens: int) -> float:
        self._fade_loads()
        return self._load.at(tokens)

    def compute_seconds(self, done: int, total: int) -> float:
        return max(self._step, (total - done) * self._token.at((done + total) / 2))

    # --- what it learns from -------------------------------------------------------------------------------------

    def loaded(self, tokens: int, seconds: float) -> None:
        self._fade_loads()
        self._load.observe(tokens, seconds)

    def _fade_loads(self) -> None:
        now = self._clock()
        self._load.fade(0.5 ** ((now - self._last_load) / LOADS_FADE_S))
        self._last_load = now

    def step_begins(self, scheduled: list[tuple[int, int]]) -> int:
        """(computed before, tokens in this step) of every request -> a number to be reported when the step has ended, or 0 when
        it would tell nothing."""
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
                self._token.fade(STEPS_FADE)
                self._token.observe(context, seconds / tokens)
            else:
                change = min(seconds, SURPRISE * self._step) - self._step
                self._step += change / (2 if change < 0 else 16)  # what overlaps only makes it seem longer
        self._last_end = now
