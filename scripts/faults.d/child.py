"""Child processes that run a function, tell what they did line by line, and may be killed at any moment."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


class Child:
    """`body(tell)` runs in a forked process; what it tells arrives in order. Its stderr goes to `log`.

    The driver itself never opens a depot, so that a fork copies none."""

    def __init__(self, body: Callable[[Callable[[Any], None]], None], log: Path) -> None:
        self.log = log
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(reader)
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody outlives an interrupted driver
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(sink, 2)
                os.dup2(sink, 1)

                def tell(message: Any) -> None:
                    os.write(writer, json.dumps(message).encode() + b"\n")

                body(tell)
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(writer)
        self._pipe = reader
        self._pending = b""
        self.status: int | None = None

    def _read(self, limit_s: float) -> bool:
        """False: the pipe's end, or nothing within the limit."""
        if not select.select([self._pipe], [], [], max(0.0, limit_s))[0]:
            return False
        data = os.read(self._pipe, 1 << 16)
        self._pending += data
        return bool(data)

    def _take(self) -> list[Any]:
        *lines, self._pending = self._pending.split(b"\n")
        return [json.loads(line) for line in lines]

    def next(self, limit_s: float) -> Any | None:
        """The next message; None at the child's end or when nothing came within the limit."""
        end = time.monotonic() + limit_s
        while b"\n" not in self._pending:
            if not self._read(end - time.monotonic()):
                return None
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def rest(self, limit_s: float) -> tuple[list[Any], bool]:
        """All that it still tells until its end, and whether that end came within the limit; it is killed if not."""
        end = time.monotonic() + limit_s
        while self._read(end - time.monotonic()):
            pass
        in_time = time.monotonic() < end
        if not in_time:
            self.kill()
        _, self.status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        return self._take(), in_time

    def death(self, *, killed: bool) -> str | None:
        """None where it ended as it should have (after rest()); else how, with the end of its log."""
        assert self.status is not None
        if killed and os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL:
            return None
        if os.WIFEXITED(self.status) and os.WEXITSTATUS(self.status) == 0:
            return None
        if os.WIFSIGNALED(self.status):
            how = f"signal {signal.Signals(os.WTERMSIG(self.status)).name}"
        else:
            how = f"exit code {os.WEXITSTATUS(self.status)}"
        try:
            tail = self.log.read_text(errors="replace").splitlines()[-12:]
        except OSError:
            tail = []
        return f"a process ended by itself with {how}; its log ends:\n    " + "\n    ".join(tail)
