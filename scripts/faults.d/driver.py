"""Runs the campaign of injected faults. Started by scripts/faults, which has the usage."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import flips
import kill_nine
import limits
import media
import simulation
import soak
import stops
import truncations
from campaign import Campaign
from rich.console import Console
from tally import Tally, as_json, print_table, summary

KINDS = {
    "kill": kill_nine,
    "stop": stops,
    "truncate": truncations,
    "media": media,
    "limits": limits,
    "flips": flips,
    "simulation": simulation,
    "soak": soak,
}
IN_LONG_ONLY = {"soak"}  # the tests have real engines of their own


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description="Injects faults into real depots and counts what they did."
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="at most 5 minutes on 2 cores (default)")
    length.add_argument(
        "--long", action="store_true", help="about an hour: a thousand kills and more, 100,000 flips and more"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the first series; default: the time")
    parser.add_argument("--only", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    parser.add_argument("--require-all", action="store_true", help="what could not be tried here is a failure")
    parser.add_argument("--json", metavar="FILE", type=Path, help="writes the table there, too")
    return parser.parse_args(argv)


def run_kind(name: str, campaign: Campaign, console: Console) -> Tally:
    began = time.monotonic()
    try:
        tally = KINDS[name].run(campaign)
    except Exception:
        # The campaign's own fault: counted, so that it cannot pass for a kind without faults.
        tally = Tally(KINDS[name].KIND)
        tally.fail("hangs", f"the campaign itself failed: {traceback.format_exc()}")
    tally.seconds = time.monotonic() - began
    for reason in tally.not_here:
        console.print(f"not here: {reason}", markup=False, highlight=False)
    for failure in tally.failures:
        console.print(f"{tally.kind}: {failure}", markup=False, highlight=False)
    if tally.failed:
        length = " --long" if campaign.long else ""
        console.print(
            f"replay (with the seed that a failure names): scripts/faults{length} --only {name} --seed {campaign.seed}"
        )
    return tally


def main(argv: list[str]) -> int:
    args = arguments(argv)
    seed = args.seed if args.seed is not None else int(time.time()) % 1_000_000
    console = Console(width=None if sys.stdout.isatty() else 110, soft_wrap=not sys.stdout.isatty())
    console.print(f"seed {seed}", highlight=False)
    campaign = Campaign(seed, long=args.long)
    try:
        tallies = []
        for name in [args.only] if args.only else [k for k in KINDS if args.long or k not in IN_LONG_ONLY]:
            console.print(f"{KINDS[name].KIND} ...", markup=False, highlight=False)
            tallies.append(run_kind(name, campaign, console))
    finally:
        campaign.close()
    print_table(tallies, console)
    if args.require_all:
        for tally in tallies:
            for reason in tally.not_here:
                print(f"faults: --require-all, but not here: {reason}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(as_json(tallies, seed, "long" if args.long else "short"), indent=1) + "\n")
    print(summary(tallies))
    untried = args.require_all and any(t.not_here for t in tallies)
    return 1 if untried or any(t.failed for t in tallies) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
