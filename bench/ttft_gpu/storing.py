"""What stores cost an engine that decodes: the time between two tokens beside stores, and after as much computing without.

Visitors come into the engine of decoding.py one at a time, and all compute their whole prompt, whatever is cached. In turn
the depot has a visitor's context, so that nothing of it is stored, or nobody has seen it, and it is stored while the others
go on decoding. Chunks that the decoding requests fill themselves are kept out of what is measured. A host that is shared gives
one turn half of the CPU that the next one gets, so the time beside stores is also told next to the time right behind them, and
that next to the control's. What is registered later than it is stored is in both.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import decoding
import workload
from decoding import DECODERS, Decoding, say

# With its tail and the decoding requests one step of 16,384 tokens, so that no store is over before the prefill is.
CONTEXT = decoding.CONTEXT - 4 * workload.CHUNK
CHUNKS = CONTEXT // workload.CHUNK
PAIRS = 16
STEPS = 16  # at least, behind each visitor; what a whole round is made of
LOOK_S = 0.005  # more often takes CPU from the engine, more seldom makes the ends of stores uncertain
PATIENCE_S = 1.0  # without another chunk, then the rest was dropped
# That the decoding requests are away from the end of a chunk: before a turn (as many as it will want), and after it.
LEAST_CLEAR, MOST_CLEAR, LAST_STEPS = 64, workload.CHUNK // 2, 4
QUIET_S = 0.3  # until chunks that the decoding requests have filled are kept
PAIR_TOKENS = 6 * workload.CHUNK  # at most, of each decoding request


def stolen_s() -> float:
    """Seconds that CPUs of this machine, a virtual one, wanted to work and did not get to since it started; 0 where the host
    does not tell."""
    return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]) / os.sysconf("SC_CLK_TCK")


class Follower:
    """Sees chunks being kept more finely than the engine steps: a visitor's stores take as long as a few steps."""

    def __init__(self, kept: Callable[[], int]) -> None:
        self._kept = kept
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.seen: list[tuple[float, int]] = []  # when there were how many for the first time

    def __enter__(self) -> Follower:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()

    def look(self) -> None:
        count = self._kept()
        if not self.seen or count != self.seen[-1][1]:
            self.seen.append((time.perf_counter(), count))

    def _follow(self) -> None:
        while not self._ends.wait(LOOK_S):
            self.look()


class Storing:
    def __init__(self, decoder: Decoding, kept: Callable[[], int]) -> None:
        self._decoder = decoder
        self._kept = kept
        self._longest_s = 0.0  # that stores took behind a prefill so far
        self._clear = LEAST_CLEAR

    def turn(self, which: int, fresh: bool) -> dict[str, Any]:
        """One visitor, and twice as long behind it as its stores take or any before took, at least STEPS steps."""
        context = f"fresh {which}" if fresh else which % decoding.CONTEXTS
        prompt = workload.prompt(decoding.CONTEXT, context)[:CONTEXT]
        decoder, before = self._decoder, self._settled()
        stolen = stolen_s()
        with Follower(self._kept) as chunks:
            began, tokens = time.perf_counter(), decoder.decoded()
            decoder.visit(prompt, skip_reading_prefix_cache=True)
            while decoder.visitor:
                decoder.step()
            gone, at_gone = time.perf_counter(), decoder.decoded()
            steps = [(0.0, 0)]
            while len(steps) <= STEPS or (
                decoder.clear(LAST_STEPS)
                and (
                    steps[-1][0] < 2 * max(self._longest_s, chunks.seen[-1][0] - gone)
                    or (fresh and self._storing(chunks, before + CHUNKS, gone))
                )
            ):
                decoder.step()
                steps.append((time.perf_counter() - gone, decoder.decoded() - at_gone))
        ended, count = chunks.seen[-1]
        early = max(then for at, then in chunks.seen if at <= gone)
        late_s = max(0.0, ended - gone)
        self._longest_s = max(self._longest_s, late_s)
        step_s = steps[-1][0] / (len(steps) - 1)
        self._clear = min(max(math.ceil(2 * self._longest_s / step_s) + LAST_STEPS, LEAST_CLEAR), MOST_CLEAR)
        return {
            "prefill_s": gone - began,
            "prefill_tokens": at_gone - tokens,  # that were decoded meanwhile
            "cached": decoder.visitor_cached,
            "steps": steps,
            "kept": count - before,
            "late": count - early,
            "late_s": late_s,
            "stolen_s": stolen_s() - stolen,
        }

    def _settled(self) -> int:
        """Chunks that are kept, when no store is under way and none of a decoding request is near."""
        count, since = self._kept(), time.perf_counter()
        for _ in range(2 * workload.CHUNK):
            self._decoder.step()
            now, chunks = time.perf_counter(), self._kept()
            if chunks != count or not self._decoder.clear(LAST_STEPS):
                count, since = chunks, now
            elif now - since >= QUIET_S and self._decoder.clear(self._clear):
                break
        return count

    def _storing(self, chunks: Follower, wanted: int, gone: float) -> bool:
        changed, count = chunks.seen[-1]
        return count < wanted and time.perf_counter() - max(changed, gone) < PATIENCE_S


def run(decoder: Decoding, order: dict[str, Any], kept: Callable[[], int]) -> None:
    """`decoder` as decoding.run() leaves it, with its contexts in the depot; `kept` says how many chunks there are."""
    storing = Storing(decoder, kept)
    decoder.ready_for(PAIR_TOKENS)
    # One of each is left out, for whatever the first prompt of this length is slower by.
    for fresh in (True, False):
        storing.turn(PAIRS, fresh)
    pairs: list[dict[str, Any]] = []
    while len(pairs) < PAIRS:
        decoder.ready_for(PAIR_TOKENS)
        pair = {}
        for fresh in (True, False) if len(pairs) % 2 else (False, True):
            pair["stores" if fresh else "control"] = storing.turn(len(pairs), fresh)
        pairs.append(pair)
    out = Path(order["out"])
    out.write_text(json.dumps({**json.loads(out.read_text()), "pairs": pairs}))
    show(pairs, order["token_bytes"])


def within(turn: dict[str, Any], seconds: float) -> float:
    """Tokens decoded in the first `seconds` behind the visitor, of a step that ends later its share."""
    for (began, before), (ended, after) in pairwise(turn["steps"]):
        if ended >= seconds:
            return before + (after - before) * (seconds - began) / (ended - began)
    return turn["steps"][-1][1]


def until_and_behind(turn: dict[str, Any], seconds: float) -> float | None:
    """How many times as long a token took in the first `seconds` behind the visitor as in as many behind those; None where
    less than half as many follow."""
    behind, first = min(seconds, turn["steps"][-1][0] - seconds), within(turn, seconds)
    if behind < seconds / 2 or not first:
        return None
    return (within(turn, seconds + behind) - first) / behind / (first / seconds)


def show(pairs: list[dict[str, Any]], token_bytes: int) -> None:
    chunk_bytes = workload.CHUNK * token_bytes
    stores, controls = [pair["stores"] for pair in pairs], [pair["control"] for pair in pairs]
    spans = [min(pair["stores"]["late_s"], pair["control"]["steps"][-1][0]) for pair in pairs]

    def beside(turns: list[dict[str, Any]]) -> float:
        return sum(spans) * DECODERS / sum(map(within, turns, spans)) * 1e3

    def whole(turns: list[dict[str, Any]]) -> float:
        seconds = sum(turn["prefill_s"] + turn["steps"][STEPS][0] for turn in turns)
        return seconds * DECODERS / sum(turn["prefill_tokens"] + turn["steps"][STEPS][1] for turn in turns) * 1e3

    def slower(ratios: list[float]) -> float:
        """Of a pair: some hosts give a turn half of the CPU that the next one gets."""
        return (median(ratios) - 1) * 100

    def from_to(ratios: list[float]) -> str:
        return f"{(min(ratios) - 1) * 100:.1f} to {(max(ratios) - 1) * 100:.1f} % slower"

    missing = CHUNKS * len(pairs) - sum(turn["kept"] for turn in stores)
    late, late_s = sum(turn["late"] for turn in stores), sum(turn["late_s"] for turn in stores)
    print(f"# {len(pairs)} visitors of {CONTEXT} fresh tokens were stored, and as many were not", flush=True)
    if missing > 0:
        print(f"# DROPPED: {missing} of {CHUNKS * len(pairs)} chunks were not kept, were evicted or came too late: fewer stores than meant", flush=True)
    changed = sum(abs(turn["kept"]) for turn in controls)
    if changed:
        print(f"# NO CONTROL: {changed} chunks came or went beside what is not stored; is the root too small?", flush=True)
    stolen, of_control = (sum(turn["stolen_s"] for turn in turns) for turns in (stores, controls))
    if stolen or of_control:
        print(f"# the host kept {stolen:.2f} CPU-seconds from those turns, and {of_control:.2f} from their controls", flush=True)
    cached = sum(turn["cached"] > 0 for turn in stores + controls)
    if cached:
        print(f"# NOT COMPUTED: {cached} visitors found tokens in a cache", flush=True)
    if sum(spans) > 0:
        single = [
            within(pair["control"], span) / within(pair["stores"], span)
            for pair, span in zip(pairs, spans, strict=True)
            if span > 0
        ]
        print(
            f"# {late} of their chunks were stored at {late * chunk_bytes / late_s / 1e9:.1f} GB/s when the prefill was over, "
            f"in {late_s / len(pairs) * 1e3:.0f} ms a visitor; beside single ones decoding was {from_to(single)}",
            flush=True,
        )
        say("decode_token_beside_stores", beside(stores), "ms", beside(controls))
        say("decode_slowdown_of_stores", slower(single), "%", 5)
        followed = [
            (until, alike)
            for pair, span in zip(pairs, spans, strict=True)
            if span > 0
            and (until := until_and_behind(pair["stores"], span))
            and (alike := until_and_behind(pair["control"], span))
        ]
        if followed:
            against = [until / alike for until, alike in followed]
            print(
                f"# {len(followed)} pairs decoded for long enough behind their stores, too: until those ended "
                f"{slower([until for until, _ in followed]):.1f} % slower than behind them, where nothing was stored "
                f"{slower([alike for _, alike in followed]):.1f} %; single pairs {from_to(against)} than their control",
                flush=True,
            )
            say("decode_slowdown_until_stored", slower(against), "%", 5)
    else:
        print("# no store was left when a prefill was over: nothing to tell of decoding beside stores", flush=True)
    say("decode_token_of_storing_rounds", whole(stores), "ms", whole(controls))
    rounds = [whole([pair["stores"]]) / whole([pair["control"]]) for pair in pairs]
    say("decode_slowdown_of_storing_rounds", slower(rounds), "%", 5)
