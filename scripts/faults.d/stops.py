"""SIGSTOP of a writer at any moment, also while it holds a lock; the others go on, and so does it after SIGCONT."""

from __future__ import annotations

import signal
import time

from campaign import Campaign
from client import Client, Roots, one_root
from kill_nine import MILLION, write_until_killed
from tally import Tally

KIND = "SIGSTOP, SIGCONT"
STOPS_ON_A_ROOT = 6


def answer_beside_a_stopped_one(roots: Roots, prompts: range):
    """Every store is answered, be it by a refusal, and what is acknowledged is loaded back."""

    def body(tell) -> None:
        client = Client(roots)
        for prompt in prompts:
            if client.store(prompt):
                tell([prompt, client.load(prompt)])
        client.close()

    return body


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    for seed, rng in campaign.series(120 if campaign.long else 10, tally):
        with campaign.directory(disk=rng.random() < 0.5) as path:
            roots = one_root(path, capacity=256 << 20, segment=256 << 10)
            acknowledged: list[int] = []
            for number in range(STOPS_ON_A_ROOT):
                where = f"seed {seed} stop {number}"
                stopped = campaign.start(write_until_killed(roots, number * MILLION))
                if stopped.next(60) is not None:
                    time.sleep(rng.uniform(0, 0.1))
                else:
                    tally.fail("hangs", f"{where}: no store was acknowledged in 60 s")
                stopped.kill(signal.SIGSTOP)
                tally.injected += 1
                others = range(number * MILLION + MILLION // 2, number * MILLION + MILLION // 2 + 60)
                told = campaign.run(answer_beside_a_stopped_one(roots, others), tally, f"{where}, beside it")
                for prompt, found in told:
                    tally.checked += 1
                    acknowledged.append(prompt)
                    if found:
                        tally.fail("wrong", f"{where}: {found}")
                if rng.random() < 0.5:  # to find its locks and segments as they are now
                    stopped.kill(signal.SIGCONT)
                    time.sleep(rng.uniform(0, 0.1))
                stopped.kill()
                acknowledged += campaign.finish(stopped, tally, where, killed=True)
                campaign.check(roots, acknowledged, [], tally, where, writer=rng.random() < 0.5)
    return tally
