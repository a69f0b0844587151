"""What all kinds of faults share: where they work, how long, from which seed, and how what they found is counted."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from child import Child
from client import Client, Roots
from tally import Tally
from tokendepot import DepotError

CHILD_LIMIT_S = 120.0
PATIENCE = 4


class Campaign:
    """`series()` hands out seeds: each is a series of faults on roots of its own that `--seed` can start with again."""

    def __init__(self, seed: int, *, long: bool) -> None:
        self.seed = seed
        self.long = long
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.memory = Path(tempfile.mkdtemp(prefix="tokendepot-faults-", dir=shm))
        self.disk = Path(tempfile.mkdtemp(prefix="tokendepot-faults-", dir="/var/tmp"))
        for directory in (self.memory, self.disk):
            directory.chmod(0o711)  # children without privileges pass through
        self._numbers = 0

    def close(self) -> None:
        shutil.rmtree(self.memory, ignore_errors=True)
        shutil.rmtree(self.disk, ignore_errors=True)

    def series(self, seconds: float, tally: Tally, *, at_least: int = 0) -> Iterator[tuple[int, random.Random]]:
        """At least one, until the time is up and `tally` has so many faults; not reaching these in PATIENCE times the
        seconds, as on a very slow machine, is a failure."""
        began = time.monotonic()
        number = 0
        while number == 0 or time.monotonic() < began + seconds or tally.injected < at_least:
            if number > 0 and time.monotonic() > began + PATIENCE * seconds:
                tally.fail("hangs", f"{tally.injected} of {at_least} faults were injected in {PATIENCE * seconds:.0f} s")
                return
            yield self.seed + number, random.Random(self.seed + number)
            number += 1

    @contextmanager
    def directory(self, *, disk: bool = False) -> Iterator[Path]:
        """A fresh name for a root, removed afterwards."""
        self._numbers += 1
        path = (self.disk if disk else self.memory) / f"root{self._numbers}"
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def start(self, body: Callable[[Callable[[Any], None]], None]) -> Child:
        self._numbers += 1
        return Child(body, self.memory / f"log{self._numbers}")

    def finish(
        self, child: Child, tally: Tally, where: str, *, killed: bool = False, limit_s: float = CHILD_LIMIT_S
    ) -> list[Any]:
        """Its last messages; how it ended is counted."""
        told, in_time = child.rest(limit_s)
        if not in_time:
            tally.fail("hangs", f"{where}: a process did not end in {limit_s:.0f} s")
        elif death := child.death(killed=killed):
            tally.fail("hangs" if "NoAnswerError" in death else "deaths", f"{where}: {death}")
        child.log.unlink(missing_ok=True)
        return told

    def run(
        self, body: Callable[[Callable[[Any], None]], None], tally: Tally, where: str, limit_s: float = CHILD_LIMIT_S
    ) -> list[Any]:
        """Runs a child to its end and returns all that it told."""
        return self.finish(self.start(body), tally, where, limit_s=limit_s)

    def check(
        self,
        roots: Roots,
        must: Iterable[int],
        may: Iterable[int],
        tally: Tally,
        where: str,
        *,
        writer: bool = False,
        spared_oldest: bool = False,
    ) -> None:
        """A new process loads all prompts. `must` were acknowledged and have to be there, in the order of storing;
        with `spared_oldest` the first ones of them may have been evicted. `may` may be misses, never wrong."""
        must, may = list(must), list(may)

        def body(tell: Callable[[Any], None]) -> None:
            client = Client(roots, writer=writer)
            for prompt in must + may:
                tell([prompt, client.load(prompt)])
            client.close()

        results = dict(self.run(body, tally, where))
        tally.checked += len(results)
        for wrong in (found for found in results.values() if found):
            tally.fail("wrong", f"{where}: {wrong}")
        missed = [prompt for prompt in must if prompt in results and results[prompt] is None]
        if spared_oldest and missed:
            served = [place for place, prompt in enumerate(must) if results.get(prompt) == ""]
            oldest = served[0] if served else len(must)
            missed = [prompt for prompt in missed if must.index(prompt) > oldest]
        if missed:
            shown = ", ".join(map(str, missed[:5]))
            tally.fail("lost", f"{where}: {len(missed)} acknowledged prompts are gone, such as {shown}", len(missed))


def open_or_none(roots: Roots, **how: bool) -> Client | None:
    """None: refused with a reason, which goes to the child's log."""
    try:
        return Client(roots, **how)
    except DepotError as error:
        print(f"refused: {error}", flush=True)
        return None
