"""The deterministic simulation of store, keeper and several writers on faulty media and clocks (a C++ program)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from campaign import Campaign
from tally import Tally

KIND = "simulated media and power cuts"
PLACES = ("build/gcc/tests", "build/dev/tests", "build/gcc/tests/sim", "build/dev/tests/sim")
LAST_LINE = re.compile(
    r"SIM seeds \d+ operations (\d+) crashes (\d+) injected (\d+) wrong (\d+) lost (\d+) hangs (\d+)"
)


def program() -> Path | None:
    named = os.environ.get("TOKENDEPOT_SIM")
    places = [Path(named)] if named else [Path(place) / "tokendepot_sim" for place in PLACES]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    found = program()
    if found is None:
        tally.not_here.append(
            "simulation: no tokendepot_sim was built (cmake -D TOKENDEPOT_TESTS=ON, or TOKENDEPOT_SIM=FILE)"
        )
        return tally
    seconds = 300 if campaign.long else 40
    command = [str(found), "--first-seed", str(campaign.seed), "--seeds", "1000000", "--seconds", str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds * 3 + 60)
    except subprocess.TimeoutExpired:
        tally.fail("hangs", f"{' '.join(command)} did not end")
        return tally
    last = LAST_LINE.search(done.stdout)
    if last is None:
        tally.fail(
            "deaths", f"{' '.join(command)} ended with code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        )
        return tally
    operations, crashes, injected, wrong, lost, hangs = map(int, last.groups())
    tally.checked, tally.injected = operations, injected + crashes
    for what, count in (("wrong", wrong), ("lost", lost), ("hangs", hangs)):
        if count:
            tally.fail(what, done.stdout[-2000:], count)
    if done.returncode != 0 and not tally.failed:
        tally.fail("deaths", f"{' '.join(command)} ended with code {done.returncode}: {done.stderr[-2000:]}")
    return tally
