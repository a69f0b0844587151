"""Segment files cut short under processes that have them mapped or open: a miss or exact bytes, never a dead engine."""

from __future__ import annotations

import os
import time
from pathlib import Path

from campaign import Campaign
from client import Client, Roots, one_root
from tally import Tally

KIND = "truncated under a mapping"
PROMPTS = range(120)
CUTS = 10


def load_until_told(roots: Roots, stop: Path):
    def body(tell) -> None:
        client = Client(roots, writer=False)
        for prompt in PROMPTS:  # everything is open or mapped before the first cut
            client.load(prompt)
        tell("ready")
        while not stop.exists():
            for prompt in PROMPTS:
                if wrong := client.load(prompt):
                    tell(wrong)
        client.close()

    return body


def store_until_told(roots: Roots, stop: Path):
    def body(tell) -> None:
        client = Client(roots)
        prompt = 10_000
        tell("ready")
        while not stop.exists():
            client.store(prompt)
            if wrong := client.load(prompt):
                tell(wrong)
            prompt += 1
            time.sleep(0.001)
        client.close()

    return body


def store_prompts(roots: Roots, prompts):
    def body(tell) -> None:
        client = Client(roots)
        for prompt in client.store_all(prompts):
            tell(prompt)
        client.close()

    return body


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    for seed, rng in campaign.series(120 if campaign.long else 12, tally):
        where = f"seed {seed}"
        with campaign.directory(disk=rng.random() < 0.3) as path:
            roots = one_root(path, capacity=64 << 20, segment=512 << 10)
            stored = campaign.run(store_prompts(roots, PROMPTS), tally, where)
            stop = campaign.memory / f"stop{seed}"
            children = [campaign.start(load_until_told(roots, stop)), campaign.start(store_until_told(roots, stop))]
            for child in children:
                if child.next(60) is None:
                    tally.fail("hangs", f"{where}: a process was not ready in 60 s")
            for _ in range(CUTS):
                segments = sorted((path / "segments").glob("*.seg"))
                victim = rng.choice(segments)
                try:
                    size = victim.stat().st_size
                    os.truncate(
                        victim, rng.choice([0, rng.randrange(size + 1), rng.randrange(size // 4096 + 1) * 4096])
                    )
                    tally.injected += 1
                except FileNotFoundError:
                    pass  # left and removed by its writer
                time.sleep(rng.uniform(0, 0.05))
            stop.touch()
            for child in children:
                for wrong in campaign.finish(child, tally, where):
                    if wrong != "ready":
                        tally.fail("wrong", f"{where}: {wrong}")
            stop.unlink()
            campaign.check(roots, [], stored, tally, where)
            # It heals: whatever is missed is stored anew and then there.
            again = campaign.run(store_prompts(roots, PROMPTS), tally, f"{where} again")
            campaign.check(roots, again, [], tally, f"{where} again")
    return tally
