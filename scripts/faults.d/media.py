"""Media that run full, run out of inodes or turn read-only under a running depot. Needs the right to mount."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from campaign import Campaign
from client import Client, Roots, one_root
from tally import Tally

KIND = "full and read-only media"
MIB = 1 << 20
BALLAST = "ballast"


class NotHereError(Exception):
    """The machine does not allow it; the message says what."""


def command(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotHereError(f"there is no {words[0]}") from error
    if done.returncode != 0:
        raise NotHereError(f"{' '.join(words[:3])}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


@contextmanager
def mounted(directory: Path, kind: str, mebibytes: int, inodes: int | None = None) -> Iterator[Path]:
    directory.mkdir()
    image = directory.with_suffix(".img")
    try:
        if kind == "tmpfs":
            command(
                "mount",
                "-t",
                "tmpfs",
                "-o",
                f"size={mebibytes}m" + (f",nr_inodes={inodes}" if inodes else ""),
                "tmpfs",
                str(directory),
            )
        else:
            with open(image, "wb") as file:
                file.truncate(mebibytes * MIB)
            command("mkfs.ext4", "-q", "-F", *(["-N", str(inodes)] if inodes else []), str(image))
            command("mount", "-o", "loop", str(image), str(directory))
        try:
            yield directory
        finally:
            subprocess.run(["umount", "-l", str(directory)], capture_output=True)
    finally:
        image.unlink(missing_ok=True)


def store_while_it_lasts(roots: Roots, prompts: range, at_half: Path):
    """Tells what was acknowledged; touches `at_half` half-way. Refusals are expected, dying is not."""

    def body(tell) -> None:
        client = Client(roots)
        for prompt in prompts:
            if prompt == prompts[len(prompts) // 2]:
                tell("half")
                end = time.monotonic() + 30
                while not at_half.exists() and time.monotonic() < end:
                    time.sleep(0.01)
            if client.store(prompt):
                tell(prompt)
            else:
                time.sleep(0.002)
        client.close()

    return body


def fill(directory: Path, leave: int) -> None:
    """Takes all space but `leave` bytes."""
    system = os.statvfs(directory)
    take = system.f_bavail * system.f_frsize - leave
    with open(directory / BALLAST, "wb") as file:
        piece = bytes(64 << 10)
        try:
            while take > 0:
                take -= file.write(piece)
            file.flush()
        except OSError:
            pass


def take_inodes(directory: Path) -> None:
    (directory / "inodes").mkdir()
    for number in range(1_000_000):
        try:
            (directory / "inodes" / str(number)).touch()
        except OSError:
            return


def turn_read_only(directory: Path) -> None:
    """As a kernel does after an error on the medium; an ordinary remount is refused while files are open to be written."""
    command("mount", "-o", "remount,abort", str(directory))


TRIALS = [
    # name, file system, MiB, inodes, capacity, what happens half-way
    ("a full ext4", "ext4", 24, None, 16 * MIB, lambda d: fill(d, 64 << 10)),
    ("a full tmpfs", "tmpfs", 24, None, 16 * MIB, lambda d: fill(d, 64 << 10)),
    ("a tmpfs smaller than its files", "tmpfs", 24, None, 23 * MIB, lambda d: fill(d, 0)),
    ("no inode left on ext4", "ext4", 24, 64, 16 * MIB, take_inodes),
    ("no inode left on tmpfs", "tmpfs", 24, 64, 16 * MIB, take_inodes),
    ("ext4 turned read-only", "ext4", 24, None, 16 * MIB, turn_read_only),
]


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    if os.geteuid() != 0:
        tally.not_here.append("full and read-only media: only root may mount")
        return tally
    for seed, rng in campaign.series(180 if campaign.long else 0, tally):
        for name, kind, size, inodes, capacity, fault in TRIALS:
            try:
                with campaign.directory(disk=True) as place, mounted(place, kind, size, inodes) as medium:
                    _trial(
                        campaign,
                        tally,
                        f"seed {seed}, {name}",
                        medium,
                        capacity,
                        fault,
                        rng.choice([256 << 10, 1 << 20]),
                    )
            except NotHereError as reason:
                tally.not_here.append(f"{name}: {reason}")
        if tally.not_here:
            break
    return tally


def _trial(campaign: Campaign, tally: Tally, where: str, medium: Path, capacity: int, fault, segment: int) -> None:
    roots = one_root(medium / "depot", capacity, segment)
    at_half = campaign.memory / "half"
    child = campaign.start(store_while_it_lasts(roots, range(240), at_half))
    acknowledged = []
    while (told := child.next(60)) not in (None, "half"):
        acknowledged.append(told)
    try:
        fault(medium)
        tally.injected += 1
    finally:
        at_half.touch()
        acknowledged += campaign.finish(child, tally, where)
        at_half.unlink()
    # A full medium gives up its oldest segments first; what was acknowledged after the oldest that is left must be there.
    campaign.check(roots, acknowledged, [], tally, where, spared_oldest=True)
