"""What loads cost an engine that decodes: the time between two tokens alone, beside a GPU hit, and beside a load.

Some requests decode all the time. Into them come requests whose whole context is known, one behind the other: a context
from the depot, at once the same from the GPU's own prefix cache, which costs the engine the same steps without a load,
and then nobody for as many steps. The GPU's cache has room for fewer contexts than take turns, so every first visitor
finds its context gone. A round of three is over within a second: some hosts have half as much CPU for the next.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import workload

DECODERS, DECODER_PROMPT = 16, 256
CONTEXT, CONTEXTS = 64 * workload.CHUNK, 10  # tokens of a visitor's context; different contexts
ROUNDS = 32
DECODER_TOKENS = 4000  # then others take their place
KV_TOKENS = DECODERS * (DECODER_PROMPT + DECODER_TOKENS) + int(1.5 * CONTEXT)


class Decoding:
    def __init__(self, llm: Any, sampling_params: Callable[..., Any]) -> None:
        self._engine = llm.llm_engine
        self._params = sampling_params
        self._names = 0
        self._prompts = count(1000)  # of decoding requests, none of which is cached
        self._random = random.Random(5)
        self._tokens: dict[str, int] = {}  # of the decoding requests
        self.visitor = ""  # while it is there
        self.visitor_cached = 0  # of its tokens, or of the one before

    def start(self) -> None:
        for _ in range(DECODERS):
            ids = workload.prompt(DECODER_PROMPT, next(self._prompts))
            name = self._add(ids, DECODER_TOKENS)
            self._tokens[name] = 0
        while min(self._tokens.values()) < 32:
            self.step()

    def ready_for(self, tokens: int) -> None:
        """Where the requests that decode would end before so many more tokens, they end now and others take their place."""
        if max(self._tokens.values()) + tokens > DECODER_TOKENS:
            self._engine.abort_request(list(self._tokens))
            self._tokens = {}
            self.start()

    def visit(self, context: list[int], **params: Any) -> None:
        tail = self._random.choices(range(1000, 127_000), k=workload.TAIL)
        self.visitor = self._add(context + tail, 1, **params)

    def decoded(self) -> int:
        return sum(self._tokens.values())

    def clear(self, steps: int) -> bool:
        """Whether no decoding request fills a chunk in that many steps."""
        return all((DECODER_PROMPT + tokens) % workload.CHUNK + steps < workload.CHUNK for tokens in self._tokens.values())

    def beside(self, context: list[int] | None, steps: int = 1) -> dict[str, Any]:
        """So many steps, or more, until a visitor with `context` has come and gone."""
        tokens, done = self.decoded(), 0
        began = gone = now = time.perf_counter()
        if context is not None:
            self.visit(context)
        while self.visitor or done < steps:
            visitor = self.visitor
            self.step()
            done, now = done + 1, time.perf_counter()
            gone = now if visitor else gone
        return {
            "steps": done,
            "gap": (now - began) * DECODERS / (self.decoded() - tokens),
            "there_s": gone - began,
            "cached": self.visitor_cached if context is not None else 0,
        }

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
    rounds = []
    longest = 0  # steps of a load
    for turn in range(-1, ROUNDS):
        decoding.ready_for(4 * longest)
        context = workload.prompt(CONTEXT, turn % CONTEXTS)
        loads = decoding.beside(context)
        hits = decoding.beside(context, loads["steps"])
        alone = decoding.beside(None, loads["steps"])
        longest = max(longest, loads["steps"])
        if turn >= 0:  # the first may be slower, of whatever comes for the first time
            rounds.append({"loads": loads, "hits": hits, "alone": alone})
    Path(order["out"]).write_text(json.dumps({**order, "rounds": rounds}))
    show(rounds, order["token_bytes"])
    return decoding


def say(name: str, value: float, unit: str, limit: float) -> None:
    print(f"RESULT {name} {value:.4g} {unit} limit {limit:.4g} ratio {value / limit:.3g}", flush=True)


def show(rounds: list[dict[str, Any]], token_bytes: int) -> None:
    def gap(what: str) -> float:
        return median(entry[what]["gap"] for entry in rounds) * 1e3

    def there_ms(what: str) -> float:
        return median(entry[what]["there_s"] for entry in rounds) * 1e3

    rate = len(rounds) * CONTEXT * token_bytes / sum(entry["loads"]["there_s"] for entry in rounds) / 1e9
    found = sum(entry["loads"]["cached"] for entry in rounds) / (len(rounds) * CONTEXT)
    single = [(entry["loads"]["gap"] / entry["hits"]["gap"] - 1) * 100 for entry in rounds]
    print(
        f"# {DECODERS} requests decode; {len(rounds)} visitors of {CONTEXT} tokens were loaded at {rate:.1f} GB/s "
        f"({found:.3f} of their contexts found), in {there_ms('loads'):.0f} ms, {there_ms('hits'):.0f} where the GPU had them; "
        f"beside single ones decoding was {min(single):.1f} to {max(single):.1f} % slower",
        flush=True,
    )
    say("decode_token_alone", gap("alone"), "ms", gap("alone"))
    say("decode_token_beside_gpu_hits", gap("hits"), "ms", gap("alone"))
    say("decode_token_beside_loads", gap("loads"), "ms", gap("hits"))
    say("decode_slowdown_of_loads", median(single), "%", 5)
