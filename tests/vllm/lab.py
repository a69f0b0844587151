"""What the cases share: fresh roots and engines, expected texts, captured log lines, damage on the medium."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from tokendepot import _core

from harness import Engine, Options

_random = random.Random(3)
SHARED = [_random.randrange(3, 250) for _ in range(150)]
PROMPTS = [SHARED + [_random.randrange(3, 250) for _ in range(11 + 29 * n)] for n in range(3)] + [
    SHARED[:128]
]
LENGTH = 10


class Lab:
    """A fresh root for each case, and engines that are closed when it ends."""

    def __init__(self, model: str, scratch: Path) -> None:
        self.model, self.scratch = model, scratch
        self.engines: list[Engine] = []
        self.gold: dict = {}
        self.number = 0

    def begin(self) -> None:
        self.number += 1
        self.root = self.scratch / f"root{self.number}"
        lines.clear()

    def end(self) -> None:
        for engine in self.engines:
            engine.close()
        self.engines.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    def engine(self, model: str | None = None, **options) -> Engine:
        options.setdefault("root", str(self.root))
        Path(options["root"]).parent.mkdir(parents=True, exist_ok=True)
        engine = Engine(model or self.model, Options(**options))
        self.engines.append(engine)
        return engine

    def stop(self, engine: Engine) -> None:
        engine.close()
        self.engines.remove(engine)

    def expected(self, hybrid: bool = False, prompts=None, length: int = LENGTH, **options):
        """What an engine without a depot writes."""
        key = (hybrid, length, json.dumps(prompts), json.dumps(options))
        if key not in self.gold:
            engine = Engine(
                self.model,
                Options(root=str(self.scratch / "none"), hybrid=hybrid, extra={"nonsense": 1}, **options),
            )
            assert engine.half is None
            self.gold[key] = engine.run(prompts or PROMPTS, length)
            engine.close()
        return self.gold[key]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, str]] = []

    def emit(self, record) -> None:
        self.all.append((record.levelname, record.getMessage()))

    def clear(self) -> None:
        self.all.clear()

    def having(self, text: str, level: str | None = None) -> list[str]:
        return [line for name, line in self.all if text in line and level in (None, name)]


lines = Lines()
CASES = {}


class Skipped(Exception):
    """This machine does not allow what the case needs; the text says what that is."""


def case(function):
    CASES[function.__name__] = function
    return function


def same(got, expected) -> None:
    assert got == expected, (
        f"other text: {[(g, e) for g, e in zip(got, expected, strict=True) if g != e][:1]}"
    )


def damage(root, chosen=lambda extent: True, at: float = 0.6) -> int:
    """Flips one byte inside the payload of the chosen extents; returns how many."""
    count = 0
    for extent in _core.list_extents(str(root)):
        if chosen(extent):
            path = segment_path(root, extent)
            flip_byte(path, extent["offset"] + extent["bytes"] - int(extent["bytes"] * (1 - at)))
            count += 1
    assert count
    return count


def flip_byte(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x5A]))


@contextmanager
def engine_lines() -> Iterator[list[str]]:
    """The lines that the engine's native code writes to stderr meanwhile; filled at the end."""
    said: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said += file.read().splitlines()
            print("\n".join(said), file=sys.stderr)


@contextmanager
def small_file_system(path: Path, mebibytes: int) -> Iterator[None]:
    path.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def make_read_only(path: Path) -> None:
    _mount("-o", "remount,ro", str(path))


def _mount(*arguments: str) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise Skipped(f"file systems cannot be mounted here: {reason.strip()}") from error


def segment_path(root, extent) -> Path:
    return Path(root) / "segments" / f"{extent['segment']}.seg"


def keys_of(engine: Engine, prompt) -> list[bytes]:
    chain = _core.KeyChain(engine.half._namespace, engine.options.chunk)
    chain.append(prompt)
    joined = bytes(chain.keys())
    return [joined[at : at + 32] for at in range(0, len(joined), 32)]


def request(tokens, **fields) -> SimpleNamespace:
    """What the scheduler half reads of a request."""
    values = dict(
        request_id=f"q{time.monotonic_ns()}",
        num_tokens=len(tokens),
        num_prompt_tokens=len(tokens),
        all_token_ids=list(tokens),
        prompt_embeds=None,
        cache_salt=None,
        lora_request=None,
        mm_features=[],
        resumable=False,
        streaming_queue=None,
        skip_reading_prefix_cache=False,
    )
    return SimpleNamespace(**{**values, **fields})


def ask(engine: Engine, tokens, local: int = 0, **fields) -> int:
    one = request(tokens, **fields)
    first = engine.scheduler.connector.get_num_new_matched_tokens(one, local)
    assert first == engine.scheduler.connector.get_num_new_matched_tokens(one, local), (
        "asking twice must not matter"
    )
    assert first[1] == (first[0] != 0), "loads are asynchronous, and only if there is something to load"
    engine.half.finished(one)
    return first[0]


def run_one_by_one(engine: Engine, prompts) -> list[list[int]]:
    """So that no prompt finds, or waits for, another one's blocks."""
    return [text for prompt in prompts for text in engine.run([prompt], LENGTH)]


def store_prompts(lab: Lab, **options) -> None:
    engine = lab.engine(**options)
    for _ in range(3):  # a machine that stands still for a second drops stores, as it should
        dropped = engine.stats.get("failures:store:dropped", 0)
        same(engine.run(PROMPTS, LENGTH), lab.expected(options.get("hybrid", False)))
        if engine.stats.get("failures:store:dropped", 0) == dropped:
            break
    assert engine.stats.get("store_extents", 0) > 0, "nothing was stored"
    lab.stop(engine)
