"""Whether the client itself was late: a timer that says how long the event loop was busy with something else."""

from __future__ import annotations

import asyncio
import time

TICK_S = 0.005
NOTED_S = 0.001  # what a timer of the loop is late by anyway
# A request counts as disturbed when the loop was late by more than this between its sending and its first token.
ALLOWED_S, ALLOWED_SHARE = 0.005, 0.01
SATURATED_SHARE = 0.01  # of requests disturbed: then the 99th percentile is the client's


class LagMonitor:
    """Runs between start() and stop() in one event loop."""

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []  # (when, seconds late), of those worth noting
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._expect(asyncio.get_running_loop())

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _expect(self, loop: asyncio.AbstractEventLoop) -> None:
        due = time.perf_counter() + TICK_S
        self._timer = loop.call_later(TICK_S, self._tick, loop, due)

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = time.perf_counter()
        if now - due > NOTED_S:
            self._late.append((now, now - due))
        self._expect(loop)

    def worst(self, begin: float, end: float) -> float:
        """Seconds late at most, of lags that touch [begin, end] (time.perf_counter); what is below 1 ms counts as 0."""
        return max((late for when, late in self._late if when >= begin and when - late <= end), default=0.0)


def disturbed(lag_s: float, ttft_s: float) -> bool:
    return lag_s > ALLOWED_S + ALLOWED_SHARE * ttft_s
