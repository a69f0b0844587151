"""A depot as an engine uses it: stores and loads of numbered prompts whose bytes are known. Runs in a child process."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import stamps
from tokendepot import Depot, DepotError, plan_store

ANSWER_LIMIT_S = 30.0  # no answer by then is a hang
GATHER_SLICE_S = 0.25


class NoAnswerError(Exception):
    """The depot did not report a job within ANSWER_LIMIT_S."""


@dataclass(frozen=True)
class Roots:
    """Roots of a campaign, fastest first: (directory, capacity, segment bytes); `options` are engine keys."""

    roots: tuple[tuple[str, int, int], ...]
    options: tuple[tuple[str, object], ...] = ()
    keys: tuple[tuple[str, object], ...] = ()  # of every root

    def config(self) -> str:
        roots = [{"path": p, "capacity": c, "segment": s, **dict(self.keys)} for p, c, s in self.roots]
        engine = {"slab": "8MiB", "free_space_reserve": 0, "poll_ms": 20}
        return json.dumps({"roots": roots, **engine, **dict(self.options)})

    def having(self, **options: object) -> Roots:
        return Roots(self.roots, self.options + tuple(options.items()), self.keys)

    def with_root_keys(self, **keys: object) -> Roots:
        return Roots(self.roots, self.options, self.keys + tuple(keys.items()))


def one_root(path: Path | str, capacity: int = 256 << 20, segment: int = 1 << 20) -> Roots:
    return Roots(((str(path), capacity, segment),))


class Client:
    """One open depot with one prompt's cache. Raises NoAnswerError; DepotError of opening is the caller's."""

    def __init__(self, roots: Roots, *, writer: bool = True) -> None:
        self.depot = Depot.open(roots.config(), writer=writer)
        self.namespace = self.depot.register_namespace(stamps.MANIFEST)
        self.cache = stamps.Cache()
        self.cache.lend_to(self.depot)
        self._job = 0

    def close(self) -> None:
        self.depot.close()

    def _wait(self, job: int) -> dict:
        end = time.monotonic() + ANSWER_LIMIT_S
        while time.monotonic() < end:
            for done in self.depot.poll():
                if done["job"] == job:
                    return done
            time.sleep(0.0002)
        raise NoAnswerError(f"job {job} was not reported in {ANSWER_LIMIT_S:.0f} s")

    def store(self, prompt: int) -> bool:
        """True: all chunks of the prompt are acknowledged."""
        self.cache.fill(prompt)
        keys = stamps.keys_of(self.namespace, prompt)
        per = stamps.BLOCKS_PER_CHUNK
        items = [(keys[32 * c : 32 * c + 32], c, 0, list(range(c * per, (c + 1) * per))) for c in range(stamps.CHUNKS)]
        self._job += 1
        self.depot.submit_store(self._job, plan_store(self.namespace, items))
        end = time.monotonic() + ANSWER_LIMIT_S
        while not self.depot.wait_gathered(GATHER_SLICE_S):  # which drops a store that waits for space too long
            if time.monotonic() > end:
                raise NoAnswerError(f"the cache was not let go of in {ANSWER_LIMIT_S:.0f} s")
        return self._wait(self._job)["items_ok"] == stamps.CHUNKS

    def store_all(self, prompts) -> list[int]:
        """The prompts that could be stored, each tried for a while: the next segment may still be in the making."""
        stored = []
        for prompt in prompts:
            for _ in range(100):
                if self.store(prompt):
                    stored.append(prompt)
                    break
                time.sleep(0.01)
        return stored

    def load(self, prompt: int) -> str | None:
        """None: a miss (of at least one chunk). "": all chunks exact. Else what is wrong with what was served."""
        keys = stamps.keys_of(self.namespace, prompt)
        found = self.depot.longest_prefix(keys, [stamps.WANT])
        if found == 0:
            return None
        self.cache.clear()
        blocks = list(range(found * stamps.BLOCKS_PER_CHUNK))
        try:
            groups = [(stamps.WANT, 0, stamps.BLOCKS_PER_CHUNK, blocks)]
            plan = self.depot.plan_load(self.namespace, keys[: 32 * found], groups, ANSWER_LIMIT_S / 2)
        except DepotError as error:
            if error.kind != "not_found":
                raise
            return None
        self._job += 1
        self.depot.submit_load(self._job, plan)
        failed = {chunk for _, chunk, _, _ in self._wait(self._job)["failures"]}
        for chunk in range(found):
            if chunk in failed:
                continue
            if wrong := stamps.first_difference(self.cache.data, prompt, range(chunk, chunk + 1)):
                return wrong
        return "" if found == stamps.CHUNKS and not failed else None
