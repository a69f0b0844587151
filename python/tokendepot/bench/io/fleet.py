"""The client processes of a cell, ordered around in step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from ... import _core

PATIENCE_S = 30.0  # for a process to close its depot


class Fleet:
    """`count` processes that each own one Workload. A context manager: at its end all of them are gone."""

    def __init__(self, count: int) -> None:
        self._words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # A session of their own: an interrupt from the terminal reaches this process, which then ends them.
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tokendepot.bench.io.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                text=True,
                env=environment,
                start_new_session=True,
            )
            for _ in range(count)
        ]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.interrupt()
        for worker in self._workers:
            try:
                worker.stdin.close()
            except BrokenPipeError:
                pass
        for worker in self._workers:
            try:
                worker.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            worker.stdout.close()
        self._words.close()

    def interrupt(self) -> None:
        """Ends what the processes are doing, and them; call() does not work any more."""
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGINT)

    def call(self, what: str, each: list[dict[str, Any]] | None = None, **arguments: Any) -> list[Any]:
        """Every process does `what` at the same time; the answers of all. Raises the first one's DepotError."""
        for i, worker in enumerate(self._workers):
            order = {"call": what, "arguments": {**arguments, **(each[i] if each else {})}}
            try:
                worker.stdin.write(json.dumps(order) + "\n")
                worker.stdin.flush()
            except BrokenPipeError:
                raise self._died(worker) from None
        answers = [self._answer(worker) for worker in self._workers]
        for answer in answers:
            if "error" in answer:
                error = _core.DepotError(answer["error"])
                error.kind = answer["kind"]
                raise error
        return [answer["result"] for answer in answers]

    def _answer(self, worker: subprocess.Popen[str]) -> dict[str, Any]:
        line = worker.stdout.readline()
        if not line:
            raise self._died(worker)
        return json.loads(line)

    def _died(self, worker: subprocess.Popen[str]) -> _core.DepotError:
        code = worker.wait(PATIENCE_S)
        self._words.seek(0)
        words = self._words.read().strip().splitlines()
        said = f"; its last words: {words[-1]}" if words else ""
        error = _core.DepotError(f"a process of the benchmark ended with code {code}{said}")
        error.kind = "io"
        return error
