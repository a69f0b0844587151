"""The connector in a real vLLM engine on the CPU: tokens equal those of an engine without a depot, whatever happens."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tiny_model import write_checkpoint

HERE = Path(__file__).parent
START_LIMIT_S = 600
_random = random.Random(7)
SHARED = [_random.randrange(3, 250) for _ in range(600)]
PROMPTS = [SHARED + [_random.randrange(3, 250) for _ in range(20 + 37 * n)] for n in range(3)]
PLENTY = {"num_gpu_blocks_override": 200}
SHORT = {"num_gpu_blocks_override": 33}  # 1,024 tokens: two requests with 200 tokens of text do not fit
ROUND = {"length": 16}


def run(model: str, extra: dict | None, rounds: list[dict], llm: dict, *, kill: bool = False) -> list[dict]:
    """The rounds' results. With `kill` the engine and all its processes are then killed (-9), else it ends in order."""
    order = dict(model=model, llm=llm, extra=extra, prompts=PROMPTS, rounds=rounds)
    process = subprocess.Popen(
        [sys.executable, str(HERE / "engine_driver.py"), json.dumps(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(START_LIMIT_S, lambda: os.killpg(process.pid, signal.SIGKILL))
    watchdog.start()
    results, log = [], []
    try:
        for line in process.stdout:
            log.append(line)
            if line.startswith("ROUND "):
                results.append(json.loads(line[6:]))
            if line.startswith("DONE"):
                if kill:
                    break
                process.stdin.close()
    finally:
        watchdog.cancel()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    assert len(results) == len(rounds), "".join(log[-60:])
    for result in results:
        result["log"] = "".join(log)
    return results


@pytest.fixture(scope="module")
def scratch():
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="tokendepot-engine-", dir=base))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def llama(scratch) -> str:
    return write_checkpoint(scratch / "llama", "llama")


@pytest.fixture(scope="module")
def expected(llama) -> list[list[int]]:
    return run(llama, None, [ROUND], PLENTY)[0]["tokens"]


def options(root: Path) -> dict:
    return {
        "roots": [f"{root}?capacity=512MiB"],
        "free_space_reserve": "16MiB",
        "slab": "32MiB",
        "min_load_tokens": 256,  # a chunk: hits are loaded, whatever this machine measures
    }


def metric(result: dict, name: str) -> float:
    return sum(value for key, value in result["metrics"].items() if key.startswith(f"tokendepot_{name}"))


def cached(result: dict, tokens: int) -> bool:
    """Whether so many tokens of the first prompt came from the depot. If not, pytest shows what was printed here."""
    if result["cached"][0] == tokens:
        return True
    kinds = ("queried", "hit", "missed", "not_worth", "dropped", "failures", "failed", "broken", "store_extents", "switched")
    counts = {
        key.removeprefix("tokendepot_"): value
        for key, value in result["metrics"].items()
        if value and key.removeprefix("tokendepot_").startswith(kinds) and "_created" not in key
    }
    print(f"cached {result['cached']}, the first should be {tokens}; counts of this engine up to this round: {counts}")
    print("".join(line for line in result["log"].splitlines(True) if "tokendepot: " in line))
    return False


@pytest.mark.xdist_group("the engine without a depot that they are compared with")
def test_one_group_cold_warm_killed_restarted_corrupted(llama, expected, scratch) -> None:
    root = scratch / "llama-root"
    cold, warm = run(llama, options(root), [{**ROUND, "settle": 2}, ROUND], PLENTY, kill=True)
    assert cold["tokens"] == expected and cached(cold, 0)
    assert warm["tokens"] == expected and cached(warm, 512)
    assert metric(warm, "load_bytes") > 0 and metric(warm, "store_bytes") > 0
    # The first engine was killed (-9). Now: restart, corrupt everything on disk, and again.
    restarted, corrupted, healed = run(
        llama, options(root), [ROUND, {**ROUND, "damage": True, "settle": 2}, ROUND], PLENTY
    )
    assert restarted["tokens"] == expected and cached(restarted, 512)
    assert corrupted["damaged"] > 0 and corrupted["tokens"] == expected
    assert metric(corrupted, "failures_total:load:corrupt") > 0
    assert "recomputed" in corrupted["log"]
    assert healed["tokens"] == expected and cached(healed, 512)
    assert metric(healed, "failures_total") == metric(corrupted, "failures_total")


@pytest.mark.xdist_group("the engine without a depot that they are compared with")
def test_one_group_with_a_pool_too_small_for_its_requests(llama, expected, scratch) -> None:
    root = scratch / "short-root"
    rounds = [{"length": 200}, {"length": 200, "damage": True}]
    cold, warm = run(llama, options(root), rounds, SHORT)
    assert cold["metrics"]["vllm:num_preemptions_total"] > 0
    assert [text[:16] for text in cold["tokens"]] == expected
    assert warm["tokens"] == cold["tokens"] and metric(warm, "failures_total:load:corrupt") > 0


def test_several_groups_cold_warm_killed_restarted_corrupted(scratch) -> None:
    model, root = write_checkpoint(scratch / "gemma", "gemma3"), scratch / "gemma-root"
    expected = run(model, None, [ROUND], PLENTY)[0]["tokens"]
    # Two chunks in three groups. Of a window only the end of the hit is loaded, and stored anew when it was damaged.
    cold, warm = run(model, options(root), [{**ROUND, "settle": 6}, ROUND], PLENTY, kill=True)
    assert cold["tokens"] == expected and cached(cold, 0)
    assert warm["tokens"] == expected and cached(warm, 512)
    restarted, corrupted, healed = run(
        model, options(root), [ROUND, {**ROUND, "damage": True, "settle": 4}, ROUND], PLENTY
    )
    assert restarted["tokens"] == expected and cached(restarted, 512)
    assert corrupted["damaged"] > 0 and corrupted["tokens"] == expected
    assert healed["tokens"] == expected and cached(healed, 512)
