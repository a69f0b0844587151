"""kill -9 of writers, readers and keepers, two to four processes on one root or on two tiers."""

from __future__ import annotations

import random
import time
from pathlib import Path

from campaign import Campaign
from child import Child
from client import Client, Roots, one_root
from tally import Tally

KIND = "kill -9"
KILLS_IN_LONG = 1_000
ROUNDS_ON_A_ROOT = 12
TIDYING_LIMIT_S = 60  # a depot looks after what the dead left every ten seconds
PAUSE_S = 0.004  # between two stores of a writer: a round's prompts fit beside those of all others
MILLION = 1_000_000


def write_until_killed(roots: Roots, first: int):
    def body(tell) -> None:
        client = Client(roots)
        prompt = first
        while True:
            if client.store(prompt):
                tell(prompt)
            prompt += 1
            time.sleep(PAUSE_S)

    return body


def read_until_killed(roots: Roots, prompts: list[int], seed: int):
    def body(tell) -> None:
        rng = random.Random(seed)
        client = Client(roots, writer=False)
        while True:
            wrong = client.load(rng.choice(prompts)) if prompts else None
            if wrong:
                tell(wrong)
            time.sleep(PAUSE_S / 4)

    return body


def keep_until_killed(roots: Roots):
    """Stores nothing: adopts, seals, demotes and tidies what others left."""

    def body(tell) -> None:
        client = Client(roots)
        tell("open")
        while True:
            client.depot.poll()
            time.sleep(0.05)

    return body


def tidy_up(roots: Roots):
    """A start and a stop without a fault: nothing temporary is left. Tells what is, in the end."""

    def body(tell) -> None:
        client = Client(roots)
        end = time.monotonic() + TIDYING_LIMIT_S
        while (left := _temporary(roots)) and time.monotonic() < end:
            client.depot.poll()
            time.sleep(0.1)
        client.close()
        tell(left or _temporary(roots))

    return body


def _temporary(roots: Roots) -> list[str]:
    return [str(file) for path, _, _ in roots.roots for file in Path(path).rglob(".tmp-*")]


def _check_capacity(roots: Roots, tally: Tally, where: str) -> None:
    """Whatever the dead left counts, copies that they had begun included."""
    for path, capacity, _ in roots.roots:
        held = sum(file.stat().st_size for file in Path(path, "segments").glob("*"))
        if held > capacity:
            tally.fail("deaths", f"{where}: {path} holds {held} bytes, more than its capacity of {capacity}")


def _roots(rng: random.Random, upper: Path, lower: Path) -> tuple[Roots, bool]:
    """Roots of a series, and whether they are two tiers, the upper one too small for all."""
    if rng.random() < 0.4:
        return Roots(((str(upper), 64 << 20, 256 << 10), (str(lower), 256 << 20, 1 << 20))), True
    return one_root(rng.choice([upper, lower]), segment=rng.choice([256 << 10, 1 << 20])), False


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    for seed, rng in campaign.series(900 if campaign.long else 50, tally, at_least=KILLS_IN_LONG if campaign.long else 0):
        with campaign.directory() as upper, campaign.directory(disk=True) as lower:
            _series(campaign, tally, seed, rng, upper, lower)
    return tally


def _series(campaign: Campaign, tally: Tally, seed: int, rng: random.Random, upper: Path, lower: Path) -> None:
    roots, tiers = _roots(rng, upper, lower)
    acknowledged: list[int] = []
    for round_ in range(ROUNDS_ON_A_ROOT):
        where = f"seed {seed} round {round_}"
        children: list[tuple[str, Child]] = []
        for number in range(rng.choice([2, 2, 4])):
            first = (round_ * 8 + number) * MILLION // 8
            role = rng.choice(["writer", "writer", "reader", "keeper"]) if number else "writer"
            if role == "writer":
                body = write_until_killed(roots, first)
            elif role == "reader":
                body = read_until_killed(roots, acknowledged[-200:], rng.getrandbits(32))
            else:
                body = keep_until_killed(roots)
            children.append((role, campaign.start(body)))
        # From within opening to well into the background work, which starts after a second.
        delay = rng.choice([rng.uniform(0, 0.06), rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.4)])
        if tiers and rng.random() < 0.3:
            delay = rng.uniform(1.0, 2.2)
        time.sleep(delay)
        rng.shuffle(children)
        for role, child in children:
            child.kill()
            tally.injected += 1
            told = campaign.finish(child, tally, f"{where} {role}", killed=True)
            if role == "writer":
                acknowledged += told
            elif role == "reader":
                for wrong in told:
                    tally.fail("wrong", f"{where}: {wrong}")
            time.sleep(rng.choice([0, 0, 0.03]))
        _check_capacity(roots, tally, where)
        recent, older = acknowledged[-400:], acknowledged[:-400]
        campaign.check(roots, recent, [], tally, where, writer=rng.random() < 0.5)
        if round_ == ROUNDS_ON_A_ROOT - 1:
            campaign.check(roots, older, [], tally, f"{where} (all older ones)")
    for left in campaign.run(tidy_up(roots), tally, f"seed {seed}, a clean start"):
        if left:
            tally.fail("hangs", f"seed {seed}: a clean start left {len(left)} temporary files, such as {left[0]}")
