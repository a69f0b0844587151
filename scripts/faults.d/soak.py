"""A real vLLM with a pool too small for its requests, aborts, and a depot of two small roots whose files are damaged and
whose disk is full now and then, while segments are demoted, promoted and evicted.

Its answers equal those of a run without a depot, its memory and descriptors stay flat, and nothing that it wrote has a
salt or a prompt in clear.
"""

from __future__ import annotations

import array
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from campaign import Campaign
from media import NotHereError, mounted
from soak_engine import prompts_of
from tally import Tally

KIND = "soak of a real vLLM"
SECONDS = {"short": 60, "long": 600}
START_LIMIT_S = 600
SALT = "salt-of-a-tenant-3f9a"
# Over the last third against the third before: what is allowed to vary in an engine whose requests differ.
MOST_GROWTH, MOST_MORE_BYTES, MOST_MORE_DESCRIPTORS = 1.05, 32 << 20, 8
PROCESSES_WITH_SEGMENTS = 2  # scheduler and worker; each holds a segment open once
MEDIUM_MIB = 48
# Chunks of 64 tokens are 256 KiB: all prompts together do not fit into the upper root, and hardly into both.
CHUNK_TOKENS, UPPER, LOWER = 64, "capacity=6MiB&segment=1MiB", "capacity=12MiB&segment=1MiB"
TRIED_IN_LONG = ["vllm:num_preemptions_total", "tokendepot_root_evicted_bytes_total"]
HERE = Path(__file__).resolve().parent


def engine(order: dict, tally: Tally, where: str) -> tuple[list[dict], str]:
    """What it told, and everything that it logged."""
    command = [sys.executable, str(HERE / "soak_engine.py"), json.dumps(order)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=order["seconds"] * 2 + START_LIMIT_S)
    except subprocess.TimeoutExpired:
        tally.fail("hangs", f"{where}: the engine did not end")
        return [], ""
    if done.returncode != 0:
        tally.fail("deaths", f"{where}: the engine ended with code {done.returncode}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stdout + done.stderr


def flat(samples: list[dict], name: str) -> tuple[float, float]:
    """The largest of the third before the last, and of the last third."""
    third = max(1, len(samples) // 3)
    return max(s[name] for s in samples[-2 * third : -third]), max(s[name] for s in samples[-third:])


def secrets_in(root: Path, log: str, seed: int) -> list[str]:
    """Where a salt or a prompt stands in clear, as text or as numbers, in any name or content."""
    found = []
    tokens = [tokens[:8] for tokens, _ in prompts_of(seed)]
    shapes = {SALT.encode()}
    for some in tokens:
        shapes |= {array.array(code, some).tobytes() for code in "Iqi"}
        shapes.add(", ".join(map(str, some)).encode())
    for file in root.rglob("*"):
        if any(shape in str(file).encode() for shape in shapes):
            found.append(f"the name {file.name}")
        content = file.read_bytes() if file.is_file() else b""
        found += [f"{file.relative_to(root)} at {content.find(shape)}" for shape in shapes if shape in content]
    said = "\n".join(line for line in log.splitlines() if "tokendepot" in line).encode()
    return found + [f"a log line or metric: {shape!r}" for shape in shapes if shape in said]


@contextmanager
def lower_medium(place: Path, tally: Tally) -> Iterator[tuple[Path, bool]]:
    """A directory, and whether it is a file system of its own, which can be filled without harm to anybody else."""
    with ExitStack() as stack:
        try:
            stack.enter_context(mounted(place, "ext4", MEDIUM_MIB))
        except NotHereError as reason:
            tally.not_here.append(f"soak: a full disk: {reason}")
            place.mkdir(exist_ok=True)
            yield place, False
        else:
            yield place, True


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    if importlib.util.find_spec("vllm") is None:
        tally.not_here.append("soak: no vLLM in this Python (scripts/setup vllm)")
        return tally
    sys.path.insert(0, str(HERE.parents[1] / "tests/vllm"))
    from tiny_model import write_checkpoint

    seed, where = campaign.seed, f"seed {campaign.seed}"
    with (
        campaign.directory() as model,
        campaign.directory() as upper,
        campaign.directory(disk=True) as place,
        lower_medium(place, tally) as (medium, may_fill),
    ):
        lower = medium / "depot"
        order = {"model": write_checkpoint(model, "llama"), "extra": None, "seed": seed, "salt": SALT, "seconds": 0}
        told, _ = engine(order, tally, f"{where} without a depot")
        if tally.failed:
            return tally  # there is nothing to compare with
        expected = {t["answer"]: t["tokens"] for t in told if "answer" in t}
        extra = {"roots": [f"{upper}?{UPPER}", f"{lower}?{LOWER}"], "chunk_tokens": CHUNK_TOKENS, "free_space_reserve": 0}
        extra |= {"slab": "32MiB", "min_load_tokens": 1}
        order |= {"roots": [str(upper), str(lower)], "medium": str(medium) if may_fill else None, "extra": extra}
        order |= { "seconds": SECONDS["long" if campaign.long else "short"]}
        told, log = engine(order, tally, where)
        for answer in (t for t in told if "answer" in t):
            tally.checked += 1
            if answer["tokens"] != expected.get(answer["answer"]):
                tally.fail("wrong", f"{where}: prompt {answer['answer']} was answered otherwise than without a depot")
        end = next((t for t in told if "metrics" in t), {"injected": 0, "filled": 0, "metrics": []})
        tally.injected += end["injected"]
        tried = {"the disk was filled": end["filled"]} if may_fill else {}
        for name in ["tokendepot_load_bytes_total", *(TRIED_IN_LONG if campaign.long else [])]:
            of_name = [(labels, value) for sample, labels, value in end["metrics"] if sample == name]
            # What was evicted because it was damaged says nothing of pressure.
            tried[name] = sum(value for labels, value in of_name if labels.get("cause", "capacity") == "capacity")
        for name, count in tried.items():
            if count == 0:
                tally.fail("hangs", f"{where}: {name}: 0 times, so nothing was tried")
        for root in (upper, lower):
            for secret in secrets_in(root, log, seed):
                tally.fail("wrong", f"{where}: a secret in clear in {secret}")
        samples = [t for t in told if "resident" in t]
        if len(samples) >= 9:
            before, after = flat(samples, "resident")
            if after > before * MOST_GROWTH + MOST_MORE_BYTES:
                tally.fail("deaths", f"{where}: memory grew from {before:,} to {after:,} bytes")
            before, after = flat(samples, "descriptors")
            fewer, more = flat(samples, "segments")
            segments = max(0, more - fewer) * PROCESSES_WITH_SEGMENTS  # a root that still fills has more files
            if after > before + MOST_MORE_DESCRIPTORS + segments:
                tally.fail("deaths", f"{where}: descriptors grew from {before} to {after}, segments from {fewer} to {more}")
    return tally
