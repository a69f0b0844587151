"""What loads cost a decoding engine, measured on a stand-in whose steps take a time that is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "ttft_gpu"
STEP_S, LOADING_STEP_S, TAIL_STEP_S, LOAD_STEPS = 0.010, 0.011, 0.030, 4
ROOM = 5  # contexts in the GPU's cache


class Engine:
    """Decodes a token a step; a visitor has a step of its own, after four slower ones where its context is not in the GPU."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.llm = SimpleNamespace(llm_engine=self)
        self.decoders: dict[str, list[int]] = {}
        self.ended: list[list[int]] = []  # tokens of those that were ended
        self.visitors: list[tuple[str, int, int]] = []  # name, which context, steps until it is there
        self.in_gpu: list[int] = []
        self.visits: list[bool] = []  # whether it was loaded
        self.slow: range = range(0)  # of those visits the steps take twice as long

    def ask(self, ids: list[int]) -> None:
        pass

    def empty_gpu_cache(self) -> None:
        self.in_gpu = []

    def add_request(self, name: str, prompt: dict[str, list[int]], params: SimpleNamespace) -> None:
        if params.max_tokens > 1:
            self.decoders[name] = []
            return
        context = hash(tuple(prompt["prompt_token_ids"][:-20]))
        self.visits.append(context not in self.in_gpu)
        self.visitors.append((name, context, LOAD_STEPS if self.visits[-1] else 0))

    def abort_request(self, names: list[str]) -> None:
        self.ended += [self.decoders.pop(name) for name in names]

    def step(self) -> list[SimpleNamespace]:
        outputs, seconds, waiting = [], STEP_S, []
        for name, context, steps in self.visitors:
            seconds = LOADING_STEP_S if steps else TAIL_STEP_S
            if steps:
                waiting.append((name, context, steps - 1))
            else:
                self.in_gpu = [*self.in_gpu, context][-ROOM:]
                outputs.append(SimpleNamespace(request_id=name, finished=True, num_cached_tokens=1000, outputs=[]))
        self.visitors = waiting
        self.clock[0] += seconds * (2 if len(self.visits) in self.slow else 1)
        for name, tokens in self.decoders.items():
            tokens.append(1)
            answer = SimpleNamespace(token_ids=list(tokens))
            outputs.append(SimpleNamespace(request_id=name, finished=False, num_cached_tokens=0, outputs=[answer]))
        return outputs


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import decoding as module

    yield module
    for name in ("decoding", "workload"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("slow", [range(0), range(21, 24)])
def test_the_slowdown_of_loads_is_told_against_gpu_hits_with_its_limit(
    slow: range, decoding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the host has half as much CPU for a while."""
    clock = [0.0]
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: clock[0])
    kept: list[int] = []
    order = {"out": str(tmp_path / "decode.json"), "token_bytes": 131072}
    engine = Engine(clock)
    engine.slow = slow
    decoding.run(engine, order, lambda **values: SimpleNamespace(**values), kept.append)
    assert kept == [decoding.CONTEXT] * decoding.CONTEXTS, "every context is in the depot before anything is measured"
    assert engine.visits == [True, False] * (decoding.ROUNDS + 1), "from the depot, then from the GPU"
    rounds = json.loads((tmp_path / "decode.json").read_text())["rounds"]
    assert len(rounds) == decoding.ROUNDS
    assert {entry[what]["steps"] for entry in rounds for what in ("loads", "hits", "alone")} == {LOAD_STEPS + 1}
    said = capsys.readouterr().out
    found = {line.split()[1]: line.split() for line in said.splitlines() if line.startswith("RESULT")}
    hit = (LOAD_STEPS * STEP_S + TAIL_STEP_S) / (LOAD_STEPS + 1)
    load = (LOAD_STEPS * LOADING_STEP_S + TAIL_STEP_S) / (LOAD_STEPS + 1)
    assert float(found["decode_token_alone"][2]) == pytest.approx(STEP_S * 1e3)
    assert float(found["decode_token_beside_gpu_hits"][2]) == pytest.approx(hit * 1e3)
    assert float(found["decode_token_beside_loads"][2]) == pytest.approx(load * 1e3, rel=0.001)
    slowdown = found["decode_slowdown_of_loads"]
    assert float(slowdown[2]) == pytest.approx((load / hit - 1) * 100, rel=0.001) and slowdown[3] == "%" and float(slowdown[5]) == 5
    assert ", in 74 ms, 30 where the GPU had them; " in said
    if not slow:
        rate = decoding.CONTEXT * 131072 / (LOAD_STEPS * LOADING_STEP_S + TAIL_STEP_S) / 1e9
        assert f"were loaded at {rate:.1f} GB/s (" in said


def test_decoding_requests_are_replaced_before_they_end(
    decoding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a slow disk a load takes hundreds of steps."""
    clock = [0.0]
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(decoding, "DECODER_TOKENS", 100)
    engine = Engine(clock)
    order = {"out": str(tmp_path / "decode.json"), "token_bytes": 131072}
    decoding.run(engine, order, lambda **values: SimpleNamespace(**values), lambda tokens: None)
    assert engine.visits == [True, False] * (decoding.ROUNDS + 1)
    assert engine.ended and len(engine.decoders) == decoding.DECODERS
    assert max(map(len, [*engine.decoders.values(), *engine.ended])) < 100
