"""Signals that end a measurement which has something to clean up: each ends it like Ctrl-C, once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


class Interrupts:
    """While it is entered, the first signal of ENDING raises KeyboardInterrupt and those after it do nothing.

    What a process was started to ignore (`nohup`) stays ignored. Needs the main thread.
    """

    def __enter__(self) -> Interrupts:
        self._raised = self._held_off = self._came = False
        self._before = {n: signal.getsignal(n) for n in ENDING if signal.getsignal(n) is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._take)
        return self

    def hold_off(self) -> None:
        """From here on a signal waits for the end of the block: a clean-up must not be left half done."""
        self._held_off = True

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._came and kind is None:
            raise KeyboardInterrupt

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True
        if not self._raised and not self._held_off:
            self._raised = True
            raise KeyboardInterrupt
