#!/usr/bin/env python3
"""Loads and stores of a depot next to fio's io_uring with O_DIRECT at the same size and depth, in turns.

fio runs twice: with its buffers as malloc gives them, and in transparent huge pages, as the depot's staging memory is
(glibc's malloc asks for them: GLIBC_TUNABLES=glibc.malloc.hugetlb=1). The ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from statistics import median

from tokendepot import DepotError
from tokendepot.bench.io import place, plan
from tokendepot.bench.io.fleet import Fleet

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
WANTED = 0.95


class Fio:
    """fio on one file of `volume` bytes, written before it is measured."""

    def __init__(self, directory: str, volume: int) -> None:
        self._file = os.path.join(directory, "fio")
        self._volume = volume
        self.rate("write", 4 << 20, 8, 0, {})

    def rate(self, pattern: str, size: int, depth: int, seconds: float, environment: dict[str, str]) -> float:
        """GB/s; 0 seconds = the file once."""
        # fio touches its buffers while it reads for the first time; ours are touched before the clock starts.
        timed = ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--ramp_time=300ms"] if seconds else []
        command = [
            "fio", "--name=control", f"--filename={self._file}", f"--size={self._volume}", f"--rw={pattern}",
            f"--bs={size}", f"--iodepth={depth}", "--ioengine=io_uring", "--direct=1", "--norandommap", "--randrepeat=0",
            "--eta=never", "--output-format=json", *timed,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
        if done.returncode:
            print(f"compare-fio: fio failed: {(done.stderr or done.stdout).strip()}", file=sys.stderr)
            sys.exit(2)  # 1 is a ratio below --least
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        return job["write" if "write" in pattern else "read"]["bw_bytes"] / 1e9


def compare(cell: plan.Cell, own: str, fio: Fio, rounds: int, seconds: float) -> float:
    """Prints the cell's RESULT lines; the ratio to fio with buffers like ours."""
    directory = os.path.join(own, "depot")
    os.mkdir(directory)
    pattern = f"rand{cell.operation}"
    size = cell.sizes[0]
    ours: list[float] = []
    theirs: dict[str, list[float]] = {"": [], "_huge": []}
    with Fleet(1) as fleet:
        fleet.call(
            "open",
            config=plan.config_of(cell, 0, directory, {}),
            kind=cell.operation,
            extent_bytes=cell.sizes,
            volume_bytes=cell.volume,
            in_flight=cell.in_flight,
        )
        fleet.call("fill")

        def our_turn() -> None:
            run = fleet.call("run", seconds=seconds)[0]
            ours.append(run["bytes"] / run["seconds"] / 1e9)

        turns = [
            our_turn,
            lambda: theirs[""].append(fio.rate(pattern, size, cell.in_flight, seconds, {})),
            lambda: theirs["_huge"].append(fio.rate(pattern, size, cell.in_flight, seconds, HUGE_PAGES)),
        ]
        for number in range(rounds):
            for turn in range(len(turns)):
                turns[(turn + number) % len(turns)]()
    subprocess.run(["rm", "-r", directory], check=True)
    ratios = {suffix: median(a / b for a, b in zip(ours, rates, strict=True)) for suffix, rates in theirs.items()}
    for suffix, rates in theirs.items():
        name = f"fio_{cell.operation}_{plan.size_text(size)}_{cell.in_flight}{suffix}"
        limit = median(rates)
        print(f"RESULT {name} {median(ours):.4g} GB/s limit {limit:.4g} ratio {ratios[suffix]:.3f}", flush=True)
    return ratios["_huge"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/compare-fio", description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="on the disk")
    parser.add_argument("--sizes", default="1MiB,10MiB", help="default: %(default)s")
    parser.add_argument("--in-flight", default="8,32", help="default: %(default)s")
    parser.add_argument("--op", default="read,write", help="default: %(default)s")
    parser.add_argument("--volume", default="", help="default: 512MiB or more")
    parser.add_argument("--rounds", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.4, help="of a turn; default: %(default)s")
    parser.add_argument("--least", type=ratio_of, metavar="RATIO", help="exit code 1 when a cell is below; default: 0 whatever they are")
    given = parser.parse_args()
    try:
        wanted = plan.plan_of(
            [given.directory],
            device="host",
            operation=given.op,
            sizes=plan.sizes_of(given.sizes, "", "1", 256, "bf16"),
            in_flight=given.in_flight,
            processes="1",
            request_extents=1,
            volume=given.volume,
            seconds=given.seconds,
            rounds=given.rounds,
            verify="off",
            keep_cache=False,
            engine="{}",
        )
        place.check_room(wanted.cells)
        with place.own_directory(wanted.cells[0].root.path) as own:
            fio = Fio(own, max(cell.volume for cell in wanted.cells))
            ratios = [compare(cell, own, fio, given.rounds, given.seconds) for cell in wanted.cells]
    except DepotError as error:
        print(f"compare-fio: {error}", file=sys.stderr)
        return 2
    print(summary(ratios, WANTED if given.least is None else given.least))
    return int(given.least is not None and min(ratios) < given.least)


def summary(ratios: list[float], least: float) -> str:
    return (
        f"{sum(ratio < least for ratio in ratios)} of {len(ratios)} cells below {least:g} of fio, "
        "buffers in huge pages on both sides"
    )


def ratio_of(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}': expected a ratio above 0, e.g. {WANTED}")
    return ratio


if __name__ == "__main__":
    sys.exit(main())
