"""What loads cost a decoding engine, measured on a stand-in whose steps take a time that is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "ttft_gpu"
STEP_S, LOADED_STEP_S = 0.010, 0.011


class Engine:
    """Decodes a token a step; a visitor ends with the step after it came, at once slower when it was loaded."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.llm = SimpleNamespace(llm_engine=self)
        self.decoders: dict[str, list[int]] = {}
        self.visitors: list[tuple[str, int]] = []  # name, which context
        self.in_gpu = -1

    def ask(self, ids: list[int]) -> None:
        pass

    def empty_gpu_cache(self) -> None:
        self.in_gpu = -1

    def add_request(self, name: str, prompt: dict[str, list[int]], params: SimpleNamespace) -> None:
        if params.max_tokens > 1:
            self.decoders[name] = []
        else:
            self.visitors.append((name, hash(tuple(prompt["prompt_token_ids"][:-20]))))

    def step(self) -> list[SimpleNamespace]:
        outputs, seconds = [], STEP_S
        for name, context in self.visitors:
            seconds = seconds if context == self.in_gpu else LOADED_STEP_S
            self.in_gpu = context
            outputs.append(SimpleNamespace(request_id=name, finished=True, num_cached_tokens=1000, outputs=[]))
        self.visitors = []
        self.clock[0] += seconds
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


def test_the_slowdown_of_loads_is_told_against_gpu_hits_with_its_limit(
    decoding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: clock[0])
    kept: list[int] = []
    order = {"out": str(tmp_path / "decode.json"), "token_bytes": 131072}
    decoding.run(Engine(clock), order, lambda **values: SimpleNamespace(**values), kept.append)
    assert kept == [decoding.CONTEXT] * decoding.CONTEXTS, "every context is in the depot before anything is measured"
    rounds = json.loads((tmp_path / "decode.json").read_text())["rounds"]
    assert len(rounds) == decoding.ROUNDS
    for entry in rounds:
        assert entry["alone"]["gap"] == pytest.approx(STEP_S) and not entry["alone"]["served"]
        assert entry["loads"]["gap"] == pytest.approx(LOADED_STEP_S)
        assert len(entry["loads"]["served"]) >= decoding.ROUND_S / LOADED_STEP_S - 1
    said = {line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT")}
    assert float(said["decode_token_alone"][2]) == pytest.approx(10.0)
    assert float(said["decode_token_beside_loads"][2]) == pytest.approx(11.0)
    slowdown = said["decode_slowdown_of_loads"]
    assert float(slowdown[2]) == pytest.approx(10.0, abs=0.5) and slowdown[3] == "%" and float(slowdown[5]) == 5
