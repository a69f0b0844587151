"""A real vLLM on the CPU that answers the same few prompts over and over, in any mixture, and tells what it answered.

usage: soak_engine.py JSON with: model, extra (kv_connector_extra_config or null), seed, seconds, salt, roots (directories),
medium (the directory of a file system that may be filled, or null). Without a depot each prompt is answered once. With
one, for `seconds`, while requests are aborted, files of its roots are damaged and the medium is full now and then.
Prints one JSON object a line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

from media import BALLAST, fill

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

BLOCK, PROMPTS, IN_FLIGHT = 32, 12, 4
POOL_BLOCKS = 33  # 1,024 tokens: four requests do not fit, so that some are preempted
RESET_EVERY = 6  # questions, after which the engine forgets and has to ask the depot
FAULT_EVERY_S, REPORT_EVERY_S = 1.0, 2.0


def prompts_of(seed: int) -> list[tuple[list[int], int]]:
    """(token ids, tokens to answer): long and short ones, some of which share a beginning."""
    rng = random.Random(seed)
    shared = [[rng.randrange(3, 250) for _ in range(520)] for _ in range(2)]
    made = []
    for number in range(PROMPTS):
        own = [rng.randrange(3, 250) for _ in range(rng.choice([20, 90, 260]))]
        made.append(((shared[number % 2] if number % 3 else []) + own, rng.choice([16, 48, 120])))
    return made


class Faults:
    """Damages files of the roots and fills their medium: for some seconds one thing after the other, for some nothing."""

    def __init__(self, roots: list[Path], medium: Path | None, rng: random.Random) -> None:
        self._roots = roots
        self._medium = medium
        self._rng = rng
        self._full = False
        self.injected = 0
        self.filled = 0

    def one(self) -> None:
        kinds = ["flip", "flip", "cut", "remove", "journal"]
        if self._medium is not None and not self._full:
            kinds += ["full"] * 2
        kind = self._rng.choice(kinds)
        if kind == "full":
            fill(self._medium, leave=64 << 10)
            self._full = True
            self.filled += 1
            self.injected += 1
            return
        root = self._rng.choice(self._roots)
        files = sorted((root / ("journals" if kind == "journal" else "segments")).glob("*.*"))
        if not files:
            return
        file = self._rng.choice(files)
        try:
            size = file.stat().st_size
            if kind == "remove":
                file.unlink()
            elif kind == "cut":
                os.truncate(file, self._rng.randrange(size))
            else:
                with open(file, "r+b") as opened:
                    for _ in range(1 if kind == "journal" else 64):
                        opened.seek(self._rng.randrange(size))
                        opened.write(self._rng.randbytes(1))
            self.injected += 1
        except (FileNotFoundError, ValueError):
            pass  # the depot was faster, or the file is empty

    def none(self) -> None:
        if self._full:
            (self._medium / BALLAST).unlink()
            self._full = False


def processes() -> tuple[int, int]:
    """Resident bytes and open descriptors of this process and all below it."""
    import psutil

    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    return sum(p.memory_info().rss for p in family), sum(p.num_fds() for p in family)


def say(**what) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    order = json.loads(sys.argv[1])
    from prometheus_client import REGISTRY
    from vllm import LLM, SamplingParams

    transfer = None
    if order["extra"] is not None:
        transfer = dict(
            kv_connector="TokendepotConnector",
            kv_connector_module_path="tokendepot.engines.vllm",
            kv_role="kv_both",
            kv_connector_extra_config=order["extra"],
        )
    llm = LLM(
        model=order["model"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        dtype="float32",
        seed=0,
        block_size=BLOCK,
        max_model_len=1024,
        num_gpu_blocks_override=POOL_BLOCKS,
        kv_transfer_config=transfer,
        disable_log_stats=False,
    )
    engine = llm.llm_engine
    prompts = prompts_of(order["seed"])
    rng = random.Random(order["seed"])
    running: dict[str, int] = {}
    names = 0

    def ask(number: int) -> None:
        nonlocal names
        names += 1
        tokens, length = prompts[number]
        prompt = {"prompt_token_ids": tokens}
        if number % 4 == 3:
            prompt["cache_salt"] = order["salt"]
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        engine.add_request(str(names), prompt, sampling)
        running[str(names)] = number

    def step() -> None:
        for output in engine.step():
            if output.finished and (number := running.pop(output.request_id, None)) is not None:
                say(answer=number, tokens=list(output.outputs[0].token_ids))

    if order["extra"] is None:
        for number in range(PROMPTS):
            ask(number)
            while running:
                step()
        return
    roots = [Path(root) for root in order["roots"]]
    faults = Faults(roots, Path(order["medium"]) if order["medium"] else None, rng)
    began = time.monotonic()
    next_fault, next_report, asked = began + 5, began, 0
    while (now := time.monotonic()) < began + order["seconds"] or running:
        if now < began + order["seconds"] and len(running) < IN_FLIGHT:
            if asked % RESET_EVERY == RESET_EVERY - 1 and not running:
                llm.reset_prefix_cache()  # what is asked again has to come from the depot
                asked += 1
            elif asked % RESET_EVERY != RESET_EVERY - 1:
                ask(rng.randrange(PROMPTS))
                asked += 1
        if running and rng.random() < 0.01:
            victim = rng.choice(list(running))
            engine.abort_request([victim])
            del running[victim]
        if running:  # without a request it waits for ever
            step()
        if int(now - began) // 10 % 2 == 0:  # ten seconds of peace, ten of faults
            faults.none()
        elif now >= next_fault:
            faults.one()
            next_fault = now + FAULT_EVERY_S
        if now >= next_report:
            resident, descriptors = processes()
            segments = sum(1 for root in roots for _ in (root / "segments").iterdir())
            say(at=now - began, resident=resident, descriptors=descriptors, segments=segments)
            next_report = now + REPORT_EVERY_S
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    shown = [s for s in samples if s.name.startswith("tokendepot_") or s.name == "vllm:num_preemptions_total"]
    # With their labels, in which a salt could stand as well.
    say(injected=faults.injected, filled=faults.filled, metrics=[[s.name, s.labels, s.value] for s in shown])


if __name__ == "__main__":
    main()
