"""Engines in processes of their own, and what runs in turns: one engine with its depot switched on and off, or two."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokendepot

from hook_events import DIRECTORY_VARIABLE, Switch

HERE = Path(__file__).resolve().parent
START_LIMIT_S = 300.0
JOB_LIMIT_S = 120.0
END_LIMIT_S = 20.0
QUIET_S = 3.0  # no new extent for so long: no more will come
BLOCK_TOKENS = 32
CHUNK_TOKENS = 256


class BenchError(Exception):
    """The benchmark cannot say what it is to say; the message is one sentence for the operator."""


@dataclass(frozen=True)
class Run:
    begin: int  # ns of the monotonic clock
    end: int
    cached: list[int]
    lengths: list[int]

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) * 1e-9


def engine_arguments(model: Path, max_tokens: int, max_requests: int, root: str | None) -> dict[str, Any]:
    """Those of vllm.LLM; `root` is the depot's, None for the engine without one."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "seed": 0,
        "block_size": BLOCK_TOKENS,
        "max_model_len": max_tokens,
        "max_num_seqs": max_requests,
    }
    if root is not None:
        arguments["kv_transfer_config"] = {
            "kv_connector": "TimedConnector",
            "kv_connector_module_path": "timed_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"roots": [root], "chunk_tokens": CHUNK_TOKENS, "on_error": "fail"},
        }
    return arguments


class Engine:
    """One engine and its child processes, a process group of their own, which is all that is ever signalled."""

    def __init__(self, name: str, arguments: dict[str, Any], hooks: Path, log: Path, kv_cache_gib: int = 2) -> None:
        self.name = name
        self._log = log
        environment = dict(os.environ)
        environment.update(
            HF_HUB_OFFLINE="1",
            VLLM_NO_USAGE_STATS="1",
            DO_NOT_TRACK="1",
            VLLM_CPU_KVCACHE_SPACE=str(kv_cache_gib),
            VLLM_CPU_OMP_THREADS_BIND=",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))),
            PYTHONPATH=os.pathsep.join(filter(None, (str(HERE), environment.get("PYTHONPATH", "")))),
        )
        environment[DIRECTORY_VARIABLE] = str(hooks)
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "engine_process.py"), json.dumps(arguments)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        self._answer("READY", START_LIMIT_S)

    def run(self, prompts: Sequence[list[int]], length: int) -> Run:
        """Greedy, `length` tokens for each prompt, all prompts at once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": list(prompts), "length": length}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed(f"ended ({error})") from error
        run = Run(**json.loads(self._answer("RAN ", JOB_LIMIT_S)))
        if run.lengths != [length] * len(prompts):
            raise BenchError(f"the engine {self.name} wrote {run.lengths} tokens, expected {length} for each prompt")
        return run

    def _answer(self, prefix: str, limit_s: float) -> str:
        """The rest of the next line that begins so. An engine that takes too long is killed, which ends its lines."""
        watchdog = threading.Timer(limit_s, self._signal, (signal.SIGKILL,))
        watchdog.start()
        try:
            assert self._process.stdout is not None
            with open(self._log, "a", encoding="utf-8") as log:
                for line in self._process.stdout:
                    if line.startswith(prefix):
                        return line.removeprefix(prefix)
                    log.write(line)
        finally:
            watchdog.cancel()
        raise self._failed(f"ended, or was killed after {limit_s:.0f} s, before it said {prefix.strip()}")

    def _failed(self, what: str) -> BenchError:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
        return BenchError(f"the engine {self.name} {what}; the end of its log:\n{tail}")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def pause(self) -> None:
        """Stops all its processes: waiting for work, vLLM's processes spin, and the depot's keeper looks at journals."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Asks for an orderly end."""
        self.resume()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Waits for the orderly end; what does not come to it is killed (-9)."""
        self.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_LIMIT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Switched:
    """An engine while its connector's hooks reach the depot, or while they return at once. Two of them share an engine; to be
    resumed sets the switch."""

    def __init__(self, name: str, engine: Engine, switch: Switch, on: bool) -> None:
        self.name = name
        self._engine, self._switch, self._on = engine, switch, on

    def run(self, prompts: Sequence[list[int]], length: int) -> Run:
        return self._engine.run(prompts, length)

    def pause(self) -> None:
        """The other one of the two sets the switch."""

    def resume(self) -> None:
        self._switch.set(self._on)


class Depot:
    """The root that the engine with the depot keeps its chunks in, looked at from outside."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def count(self) -> int:
        return len(tokendepot.list_extents(str(self.path)))

    def wait_kept(self, expected: int) -> int:
        """Extents in the root, as soon as they are `expected`: nothing of a store is left to do then. Fewer when no more
        come for QUIET_S."""
        count, since = self.count(), time.monotonic()
        while count < expected and time.monotonic() - since < QUIET_S:
            time.sleep(0.02)
            now = self.count()
            if now != count:
                count, since = now, time.monotonic()
        return count
