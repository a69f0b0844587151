"""One vLLM engine with one system: engine.py '<order as JSON>'. Rows go to order["out"] as they are measured.

A row is one prompt: "cold" (nothing known), "hit" (the prompt and a new tail, from the system), "gpu" (the prompt and
another tail, from the GPU's own prefix cache, the floor). In the phase "restart" there is no "cold"; short contexts
have "fresh" instead, another prompt of that length, computed by the same engine in the same state. The phase "decode"
has no rows, see decoding.py and storing.py. The engine without a connector has "whole" instead of "hit": a GPU hit of
whole chunks; started again it has nothing but "fresh". An answer depends on how many tokens were computed
together, so an answer is compared with that of a GPU hit of as many tokens, "gpu" or "whole".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import decoding
import storing
import workload

WARM_UP_LONG, WARM_UP_SHORT = 16_384, 2_500
FRESH_UP_TO = 8000  # tokens


class Engine:
    def __init__(self, order: dict[str, Any]) -> None:
        began = time.perf_counter()
        from vllm import LLM, SamplingParams

        self.import_s = time.perf_counter() - began
        arguments: dict[str, Any] = dict(
            model=order["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=131_072,
            gpu_memory_utilization=order["utilization"],
            enable_prefix_caching=True,
            max_num_seqs=64,
            seed=0,
            disable_log_stats=True,
            enforce_eager=order["eager"],
        )
        if not order["eager"]:
            arguments["compilation_config"] = workload.COMPILATION
        if order["phase"] == "decode":
            arguments["num_gpu_blocks_override"] = decoding.KV_TOKENS // 16
            arguments["max_model_len"] = decoding.CONTEXT + 1024
        if order["transfer"]:
            arguments["kv_transfer_config"] = order["transfer"]
        began = time.perf_counter()
        self.llm = LLM(**arguments)
        self.start_s = time.perf_counter() - began
        self.llm.apply_model(workload.spread_weights)
        self._sampling = SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, ignore_eos=True, logprobs=2
        )

    def ask(self, ids: list[int]) -> dict[str, Any]:
        began = time.perf_counter()
        answer = self.llm.generate([{"prompt_token_ids": ids}], self._sampling, use_tqdm=False)[0]
        seconds = time.perf_counter() - began
        first = answer.outputs[0]
        return {"s": seconds, "token": first.token_ids[0], "cached": answer.num_cached_tokens}

    def empty_gpu_cache(self) -> None:
        for _ in range(200):
            if self.llm.reset_prefix_cache():
                return
            time.sleep(0.05)
        raise RuntimeError("the engine's prefix cache cannot be emptied")


def wait_until_kept(order: dict[str, Any], tokens: int, seen: int) -> int:
    """Waits until the system has kept what it will keep of a prompt; returns what is there now (extents or bytes)."""
    if order["system"] == "base":
        return 0
    if not order["folder"]:
        time.sleep(0.3 + tokens * order["token_bytes"] / 6e9)
        return 0
    wanted = seen + tokens // workload.CHUNK if order["system"] == "depot" else None
    patience = 1.0 + tokens * order["token_bytes"] / 20e9
    began = changed = time.perf_counter()
    last = kept(order)
    while time.perf_counter() - began < 90 and time.perf_counter() - changed < patience:
        if wanted is not None and last >= wanted:
            break
        time.sleep(0.05)
        now = kept(order)
        if now != last:
            last, changed = now, time.perf_counter()
    time.sleep(0.3)  # until the scheduler has read the journal
    return last


def kept(order: dict[str, Any]) -> int:
    folder = order["folder"]
    if order["system"] in ("depot", "lmcache-depot"):  # files of a depot have their size before they are filled
        return extents(folder)
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return total


seen: dict[str, tuple[list[tuple[str, int, int]], int]] = {}  # of each root its journals, and the extents they tell of


def extents(folder: str) -> int:
    """Reads the root only when a journal has changed: whoever asks all the time takes a core from the engine otherwise."""
    from tokendepot import _core

    try:
        with os.scandir(os.path.join(folder, "journals")) as entries:
            journals = sorted((entry.name, (now := entry.stat()).st_size, now.st_mtime_ns) for entry in entries)
    except FileNotFoundError:  # one was rewritten under another name just now
        return int(_core.inspect_root(folder)["extents"])
    if folder not in seen or seen[folder][0] != journals:
        seen[folder] = journals, int(_core.inspect_root(folder)["extents"])
    return seen[folder][1]


def main() -> None:
    order = json.loads(sys.argv[1])
    out = Path(order["out"])
    engine = Engine(order)
    if order["phase"] == "decode":
        decode(engine, order)
    time.sleep(order["rest_s"])
    result = {**order, "import_s": engine.import_s, "start_s": engine.start_s, "rows": []}
    ends = time.monotonic() + order["budget_s"]
    engine.ask(workload.prompt(WARM_UP_LONG, 99))
    warm = workload.prompt(WARM_UP_SHORT, 98 if order["phase"] == "cold" else 97)
    engine.ask(warm)
    wait_until_kept(order, WARM_UP_SHORT, 0)
    engine.empty_gpu_cache()
    for which in range(3):
        engine.ask(warm + workload.tail(WARM_UP_SHORT, 99, which))
    for context in order["contexts"]:
        for repetition in range(workload.repetitions(context)):
            if time.monotonic() > ends:
                result["cut_at"] = context
                break
            measure(engine, order, context, repetition, result["rows"])
            out.write_text(json.dumps(result))
    out.write_text(json.dumps(result))
    leave()


def decode(engine: Engine, order: dict[str, Any]) -> NoReturn:
    from vllm import SamplingParams

    seen = 0

    def keep(tokens: int) -> None:
        nonlocal seen
        seen = wait_until_kept(order, tokens, seen)

    decoder = decoding.run(engine, order, SamplingParams, keep)
    if order["system"] == "depot":
        storing.run(decoder, order, lambda: kept(order))
    leave()


def leave() -> NoReturn:
    sys.stdout.flush()
    os._exit(0)  # as hard as a kill: what is found after the restart must have been kept by then


def measure(
    engine: Engine, order: dict[str, Any], context: int, repetition: int, rows: list[dict[str, Any]]
) -> None:
    ids = workload.prompt(context, repetition)
    row: dict[str, Any] = {"context": context, "repetition": repetition}
    base = order["system"] == "base"
    if order["phase"] == "cold":
        before = kept(order) if order["folder"] else 0
        row["cold"] = engine.ask(ids)
        if not base:
            began = time.perf_counter()
            row["kept"] = wait_until_kept(order, context, before) - before
            row["kept_s"] = time.perf_counter() - began
            engine.empty_gpu_cache()
    if base and order["phase"] == "cold":
        row["gpu"] = engine.ask(ids + workload.tail(context, repetition, 0))
        whole = context // workload.CHUNK * workload.CHUNK
        if 0 < whole < context:
            engine.empty_gpu_cache()
            engine.ask(ids[:whole])
            row["whole"] = engine.ask(ids + workload.tail(context, repetition, 0))
    elif not base:
        row["hit"] = engine.ask(ids + workload.tail(context, repetition, 0))
        row["gpu"] = engine.ask(ids + workload.tail(context, repetition, 1))
    if order["phase"] == "restart" and context <= FRESH_UP_TO:
        row["fresh"] = engine.ask(workload.prompt(context, 100 + repetition))
    rows.append(row)
    times = " ".join(
        f"{name} {row[name]['s'] * 1e3:.1f} ms ({row[name]['cached']} cached)"
        for name in ("cold", "hit", "gpu", "fresh")
        if name in row
    )
    print(f"ROW {order['name']} {context}.{repetition} {times} kept {row.get('kept', '')}", flush=True)
    engine.empty_gpu_cache()


if __name__ == "__main__":
    main()
