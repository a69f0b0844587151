"""What loads cost an engine that decodes: the time between two tokens alone, beside GPU hits, and beside loads.

Some requests decode all the time. Into them come requests whose whole context is known: first as fast as the depot
loads them, then as often from the GPU's own prefix cache, which costs the engine the same steps without a load. The
GPU's cache has room for fewer contexts than take turns, so every visitor of the loads finds its context gone.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import workload

DECODERS, DECODER_PROMPT = 16, 256
CONTEXT, CONTEXTS = 64 * workload.CHUNK, 10  # tokens of a visitor's context; different contexts
ROUNDS, ROUND_S = 3, 1.5
DECODER_TOKENS = 4000  # more than are decoded while this runs
KV_TOKENS = DECODERS * (DECODER_PROMPT + DECODER_TOKENS) + int(1.5 * CONTEXT)


class Decoding:
    def __init__(self, llm: Any, sampling_params: Callable[..., Any]) -> None:
        self._engine = llm.llm_engine
        self._params = sampling_params
        self._names = 0
        self._random = random.Random(5)
        self._tokens: dict[str, int] = {}  # of the decoding requests
        self.visitor = ""  # while it is there
        self.visitor_cached = 0  # of its tokens, or of the one before

    def start(self) -> None:
        for which in range(DECODERS):
            ids = workload.prompt(DECODER_PROMPT, 1000 + which)
            name = self._add(ids, DECODER_TOKENS)
            self._tokens[name] = 0
        while min(self._tokens.values()) < 32:
            self.step()

    def visit(self, context: list[int], **params: Any) -> None:
        tail = self._random.choices(range(1000, 127_000), k=workload.TAIL)
        self.visitor = self._add(context + tail, 1, **params)

    def decoded(self) -> int:
        return sum(self._tokens.values())

    def longest(self) -> int:
        return max(self._tokens.values())

    def clear(self, steps: int) -> bool:
        """Whether no decoding request fills a chunk in that many steps."""
        return all((DECODER_PROMPT + tokens) % workload.CHUNK + steps < workload.CHUNK for tokens in self._tokens.values())

    def measure(self, next_context: Callable[[], int] | None, interval_s: float) -> dict[str, Any]:
        """Decodes for ROUND_S; a visitor comes `interval_s` after the one before and never before that has gone."""
        served: list[float] = []
        cached = 0
        tokens = self.decoded()
        began = now = time.perf_counter()
        came = began - interval_s
        while now - began < ROUND_S:
            if not self.visitor and next_context is not None and now - came >= interval_s:
                came = now
                self.visit(workload.prompt(CONTEXT, next_context()))
            visitor = self.visitor
            self.step()
            now = time.perf_counter()
            if visitor and not self.visitor:
                served.append(now - came)
                cached += self.visitor_cached
        gap = (now - began) * DECODERS / (self.decoded() - tokens)
        while self.visitor:
            self.step()
        return {"gap": gap, "served": served, "cached": cached, "s": now - began}

    def _add(self, ids: list[int], tokens: int, **params: Any) -> str:
        self._names += 1
        name = f"request-{self._names}"
        sampling = self._params(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True, **params)
        self._engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        return name

    def step(self) -> None:
        for output in self._engine.step():
            if output.request_id in self._tokens:
                self._tokens[output.request_id] = len(output.outputs[0].token_ids)
            elif output.request_id == self.visitor and output.finished:
                self.visitor, self.visitor_cached = "", int(output.num_cached_tokens or 0)


def run(engine: Any, order: dict[str, Any], sampling_params: Callable[..., Any], keep: Callable[[int], None]) -> Decoding:
    """`engine` as in engine.py; `keep(tokens)` waits until the depot has kept that many more. Its requests go on decoding."""
    for which in range(CONTEXTS):
        engine.ask(workload.prompt(CONTEXT, which))
        keep(CONTEXT)
        engine.empty_gpu_cache()
    decoding = Decoding(engine.llm, sampling_params)
    decoding.start()
    turn = 0

    def another() -> int:
        nonlocal turn
        turn += 1
        return turn % CONTEXTS

    rounds = []
    for _ in range(ROUNDS):
        loads = decoding.measure(another, 0.0)
        interval = loads["s"] / max(1, len(loads["served"]))
        same = turn % CONTEXTS
        decoding.measure(lambda: same, ROUND_S)  # brings the context of the hits
        hits = decoding.measure(lambda: same, interval)
        rounds.append({"alone": decoding.measure(None, 0.0), "hits": hits, "loads": loads})
    Path(order["out"]).write_text(json.dumps({**order, "rounds": rounds}))
    show(rounds, order["token_bytes"])
    return decoding


def say(name: str, value: float, unit: str, limit: float) -> None:
    print(f"RESULT {name} {value:.4g} {unit} limit {limit:.4g} ratio {value / limit:.3g}", flush=True)


def show(rounds: list[dict[str, Any]], token_bytes: int) -> None:
    def ratio(what: str, to: str) -> float:
        return median(entry[what]["gap"] / entry[to]["gap"] for entry in rounds)

    def gap(what: str) -> float:
        return median(entry[what]["gap"] for entry in rounds) * 1e3

    seconds = sum(entry["loads"]["s"] for entry in rounds)
    served = [s for entry in rounds for s in entry["loads"]["served"]]
    rate = len(served) * CONTEXT * token_bytes / seconds / 1e9
    found = sum(entry["loads"]["cached"] for entry in rounds) / max(1, len(served) * CONTEXT)
    print(
        f"# {DECODERS} requests decode; {len(served)} visitors of {CONTEXT} tokens were loaded at {rate:.1f} GB/s "
        f"({found:.3f} of their contexts found), a hit took {median(served) * 1e3:.0f} ms",
        flush=True,
    )
    say("decode_token_alone", gap("alone"), "ms", gap("alone"))
    say("decode_token_beside_gpu_hits", gap("hits"), "ms", gap("alone"))
    say("decode_token_beside_loads", gap("loads"), "ms", gap("hits"))
    say("decode_slowdown_of_loads", (ratio("loads", "hits") - 1) * 100, "%", 5)
