"""Random byte flips, overwritten sectors and truncations of segments, journals, markers and manifests.

Each is either detected or harmless: no wrong byte is served, and no extent is missed but those that the damage lies in
or whose record it hit. Done in bulk: a small root is damaged in several places, opened, everything in it loaded, and put
back as it was.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import stamps
import tokendepot
from campaign import Campaign
from client import Client, Roots, one_root
from tally import Tally
from tokendepot import DepotError

KIND = "flips and truncations"
PROMPTS = range(24)
FLIPS_IN_LONG = 100_000
DAMAGES = 12  # of one opening
MARKER_SHARE = 0.02  # of the openings: a root without a sound marker is refused as a whole, whatever else was damaged
OPENINGS = 100  # of one process
RECORD_BYTES = 128
MARKER = "DEPOT"


@dataclass
class Sound:
    """An undamaged root: its files, and which keys lie in or depend on which of their bytes."""

    path: Path
    files: dict[Path, bytes]
    extents: list[dict]
    records: dict[Path, list[bytes]] = field(default_factory=dict)  # journal -> key of each record, or b""

    @classmethod
    def read(cls, path: Path) -> Sound:
        files = {f: f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file() and f.suffix != ".lock"}
        sound = cls(path, files, tokendepot.list_extents(str(path)))
        known = {e["key"] for e in sound.extents}
        for file, content in files.items():
            if file.suffix == ".log":
                records = [content[at : at + RECORD_BYTES] for at in range(0, len(content), RECORD_BYTES)]
                sound.records[file] = [next((k for k in known if k in record), b"") for record in records]
        return sound

    def put_back(self, damaged: set[Path]) -> None:
        for file in damaged:
            file.write_bytes(self.files[file])

    def keys_at(self, file: Path, begin: int, end: int) -> set[bytes]:
        """Keys that may be missed when these bytes of the file are damaged or gone."""
        if file.suffix == ".seg":
            here = (e for e in self.extents if e["segment"] == file.stem)
            return {e["key"] for e in here if e["offset"] < end and begin < e["offset"] + e["bytes"]}
        if file.suffix == ".log":
            return set(self.records[file][begin // RECORD_BYTES : -(-end // RECORD_BYTES)])
        return set()

    def damage(self, rng: random.Random, may_miss: set[bytes]) -> tuple[Path, str]:
        """Does one damage (not to the marker), adds what may be missed after it, and tells what it was."""
        files = [f for f in self.files if f.name != MARKER]
        kinds = {".seg": 10, ".log": 6}
        file = rng.choices(files, [kinds.get(f.suffix, 1) for f in files])[0]
        return self._damage(file, rng, may_miss)

    def damage_marker(self, rng: random.Random, may_miss: set[bytes]) -> tuple[Path, str]:
        return self._damage(self.path / MARKER, rng, may_miss)

    def _damage(self, file: Path, rng: random.Random, may_miss: set[bytes]) -> tuple[Path, str]:
        size = len(self.files[file])
        used = size
        if file.suffix == ".seg":  # its unused end would be a waste of damage
            used = max((e["offset"] + e["bytes"] for e in self.extents if e["segment"] == file.stem), default=size)
        at = rng.randrange(used)
        how = rng.choices(["bit", "byte", "sector", "cut"], [4, 4, 1, 1])[0]
        if how == "cut":
            with open(file, "r+b") as opened:
                opened.truncate(at)
            may_miss |= self.keys_at(file, at, size)
            return file, f"{file.name} cut to {at} bytes"
        length = 512 if how == "sector" else 1
        with open(file, "r+b") as opened:
            opened.seek(at)
            old = opened.read(length)
            new = (
                rng.randbytes(len(old))
                if how == "sector"
                else bytes([old[0] ^ (1 << rng.randrange(8) if how == "bit" else rng.randrange(1, 256))])
                if old
                else b""
            )
            opened.seek(at)
            opened.write(new)
        may_miss |= self.keys_at(file, at, at + length)
        return file, f"{file.name} {how} at {at}"


def load_damaged(roots: Roots, sound: Sound, seed: int, openings: int):
    """Tells per opening [damages, loads], and [what went wrong] where something did."""

    def body(tell) -> None:
        rng = random.Random(seed)
        for _ in range(openings):
            may_miss: set[bytes] = set()
            if rng.random() < MARKER_SHARE:
                done = [sound.damage_marker(rng, may_miss)]
            else:
                done = [sound.damage(rng, may_miss) for _ in range(DAMAGES)]
            tell([len(done), _look(roots, may_miss, [what for _, what in done], tell)])
            sound.put_back({file for file, _ in done})

    return body


def _look(roots: Roots, may_miss: set[bytes], damages: list[str], tell) -> int:
    try:
        client = Client(roots, writer=False)
    except DepotError:
        if not any(MARKER in damage for damage in damages):
            raise
        return 0
    for prompt in PROMPTS:
        found = client.load(prompt)
        keys = stamps.keys_of(client.namespace, prompt)
        if found:
            tell(["wrong", f"{found}; damages: {damages}"])
        elif found is None and not may_miss & {keys[at : at + 32] for at in range(0, len(keys), 32)}:
            tell(["lost", f"prompt {prompt} was missed, in which nothing was damaged; damages: {damages}"])
    client.close()
    return len(PROMPTS)


def heal_damaged(roots: Roots):
    """A process that stores opens the damaged root (adopts, recovers, seals), stores what is missed and loads all."""

    def body(tell) -> None:
        try:
            client = Client(roots)
        except DepotError:
            return
        for prompt in PROMPTS:
            found = client.load(prompt)
            if found is None and client.store_all([prompt]):
                found = client.load(prompt)
            if found is None:
                tell(["lost", f"prompt {prompt} was stored anew and is still missed"])
            elif found:
                tell(["wrong", found])
        client.close()

    return body


def fill(roots: Roots):
    def body(tell) -> None:
        client = Client(roots)
        tell(client.store_all(PROMPTS))
        client.close()

    return body


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    for seed, rng in campaign.series(500 if campaign.long else 45, tally, at_least=FLIPS_IN_LONG if campaign.long else 0):
        where = f"seed {seed}"
        with campaign.directory(disk=rng.random() < 0.1) as path:
            roots = one_root(path, capacity=8 << 20, segment=512 << 10)
            campaign.run(fill(roots), tally, where)
            sound = Sound.read(path)
            for message in campaign.run(load_damaged(roots, sound, seed, OPENINGS), tally, where, limit_s=600):
                if message[0] in ("wrong", "lost"):
                    tally.fail(message[0], f"{where}: {message[1]}")
                else:
                    tally.injected += message[0]
                    tally.checked += message[1]
            sound.put_back(set(sound.files))
            for number in range(4):
                with campaign.directory() as copy:
                    shutil.copytree(path, copy)
                    hurt = Sound(copy, {copy / f.relative_to(path): c for f, c in sound.files.items()}, [], {})
                    hurt.records = {copy / f.relative_to(path): r for f, r in sound.records.items()}
                    damages = [hurt.damage(rng, set())[1] for _ in range(DAMAGES)]
                    tally.injected += DAMAGES
                    told = campaign.run(
                        heal_damaged(one_root(copy, 8 << 20, 512 << 10)), tally, f"{where} healing {number}"
                    )
                    for what, message in told:
                        tally.fail(what, f"{where} healing {number}: {message}; damages: {damages}")
    return tally
