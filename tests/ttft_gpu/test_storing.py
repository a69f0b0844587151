"""What stores cost a decoding engine, measured on a stand-in whose steps and stores take times that are known."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "ttft_gpu"
STEP_S, STORING_STEP_S, PREFILL_S, STORING_PREFILL_S = 0.010, 0.011, 0.500, 0.506
STORE_S = 0.0005  # for a chunk, so that the 60 of a visitor take two steps and most of a third
TOKEN_BYTES = 131_072


class Engine:
    """Decodes a token a step; a visitor's step is its prefill, and the stores of a fresh one go on beside the steps behind it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.llm_engine = self
        self.decoders: dict[str, list[int]] = {}
        self.prompts: dict[str, int] = {}
        self.ended: list[list[int]] = []  # tokens of those that were ended
        self.visitors: list[tuple[str, list[int], SimpleNamespace]] = []
        self.known: set[tuple[int, ...]] = set()
        self.chunks, self.ends = 0, []  # kept, and when those under way will be
        self.follower: Any = None
        self.losing = 0  # of each fresh visitor's chunks
        self.slow: set[int] = set()  # fresh visitors beside whose stores the host has half a CPU
        self.own_late_s = 0.0  # until a chunk that a decoding request has filled begins to be stored
        self.slow_turns = False  # the host has half a CPU from each fresh visitor to the next one
        self.cached = 0
        self.came: list[tuple[bool, int]] = []  # of each visitor whether it was fresh, and of decoding requests' positions

    def add_request(self, name: str, prompt: dict[str, list[int]], params: SimpleNamespace) -> None:
        ids = prompt["prompt_token_ids"]
        if params.max_tokens > 1:
            self.decoders[name], self.prompts[name] = [], len(ids)
        else:
            self.visitors.append((name, ids, params))

    def abort_request(self, names: list[str]) -> None:
        self.ended += [self.decoders.pop(name) for name in names]

    def kept(self) -> int:
        return self.chunks

    def step(self) -> list[SimpleNamespace]:
        outputs, seconds, fresh = [], STORING_STEP_S if self.ends else STEP_S, False
        if self.ends and sum(fresh for fresh, _ in self.came) in self.slow:
            seconds *= 2
        if self.slow_turns and self.came and self.came[-1][0]:
            seconds *= 2
        for name, ids, params in self.visitors:
            assert params.skip_reading_prefix_cache, "each visitor computes its prompt"
            fresh = tuple(ids[:256]) not in self.known
            self.known.add(tuple(ids[:256]))
            seconds = STORING_PREFILL_S if fresh else PREFILL_S
            outputs.append(SimpleNamespace(request_id=name, finished=True, num_cached_tokens=self.cached, outputs=[]))
            self.came.append((fresh, max(self.positions())))
        self._pass(seconds)
        if fresh:
            self._store((len(self.visitors[0][1]) // 256) - self.losing)
        self.visitors = []
        for name, tokens in self.decoders.items():
            tokens.append(1)
            answer = SimpleNamespace(token_ids=list(tokens))
            outputs.append(SimpleNamespace(request_id=name, finished=False, num_cached_tokens=0, outputs=[answer]))
        self._store(sum(position == 0 for position in self.positions()), self.own_late_s)
        return outputs

    def positions(self) -> list[int]:
        return [(self.prompts[name] + len(tokens)) % 256 for name, tokens in self.decoders.items()]

    def _store(self, chunks: int, late_s: float = 0.0) -> None:
        self.ends += [self.now + late_s + STORE_S * (number + 1) for number in range(chunks)]

    def _pass(self, seconds: float) -> None:
        until = self.now + seconds
        while self.ends and self.ends[0] <= until:
            self.now = self.ends.pop(0)
            self.chunks += 1
            if self.follower:
                self.follower.look()
        self.now = until


@pytest.fixture
def storing(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    import storing as module

    yield module
    for name in ("storing", "decoding", "workload", "engine"):
        sys.modules.pop(name, None)


@pytest.fixture
def engine(storing: Any, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A follower on its clock looks whenever a chunk is kept."""
    engine = Engine()

    class Follower(storing.Follower):
        def __enter__(self) -> Any:
            engine.follower = self
            return super().__enter__()

        def _follow(self) -> None:
            pass

    monkeypatch.setattr(storing, "Follower", Follower)
    monkeypatch.setattr(storing.time, "perf_counter", lambda: engine.now)
    return engine


def measured(storing: Any, engine: Engine, tmp_path: Path, in_depot: int = 10) -> list[dict[str, Any]]:
    out = tmp_path / "decode.json"
    out.write_text(json.dumps({"rounds": []}))
    for which in range(in_depot):
        engine.known.add(tuple(storing.workload.prompt(storing.decoding.CONTEXT, which)[:256]))
    decoder = storing.Decoding(engine, lambda **values: SimpleNamespace(**values))
    decoder.start()
    storing.run(decoder, {"out": str(out), "token_bytes": TOKEN_BYTES}, engine.kept)
    found = json.loads(out.read_text())
    assert found["rounds"] == [], "what was measured of loads is still there"
    return found["pairs"]


def results(said: str) -> dict[str, list[str]]:
    return {line.split()[1]: line.split() for line in said.splitlines() if line.startswith("RESULT")}


def test_the_slowdown_of_stores_is_told_against_equal_prefills_that_are_not_stored(
    storing: Any, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = measured(storing, engine, tmp_path)
    said = capsys.readouterr().out
    assert len(pairs) == storing.PAIRS
    assert {turn["kept"] for turn in (pair["stores"] for pair in pairs)} == {storing.CHUNKS}
    assert {turn["kept"] for turn in (pair["control"] for pair in pairs)} == {0}
    assert [fresh for fresh, _ in engine.came[2:6]] == [False, True, True, False], "who is first changes"
    assert max(position for _, position in engine.came) < 256 - storing.LEAST_CLEAR
    found = results(said)
    beside = found["decode_token_beside_stores"]
    assert float(beside[2]) == pytest.approx(11.0, abs=0.05) and float(beside[5]) == pytest.approx(10.0, abs=0.05)
    slowdown = found["decode_slowdown_of_stores"]
    assert float(slowdown[2]) == pytest.approx(10.0, abs=0.5) and slowdown[3] == "%" and float(slowdown[5]) == 5
    assert float(found["decode_slowdown_until_stored"][2]) == pytest.approx(10.0, abs=1.5)
    assert f"# {storing.PAIRS} pairs decoded for long enough behind their stores" in said
    whole = found["decode_token_of_storing_rounds"]
    control_s = PREFILL_S + storing.STEPS * STEP_S
    lost_s = STORING_PREFILL_S - PREFILL_S + 3 * (STORING_STEP_S - STEP_S)
    assert float(whole[5]) == pytest.approx(control_s / (storing.STEPS + 1) * 1e3, rel=0.001)
    assert float(found["decode_slowdown_of_storing_rounds"][2]) == pytest.approx(lost_s / control_s * 100, rel=0.01)
    rate = 256 * TOKEN_BYTES / STORE_S / 1e9
    assert f"stored at {rate:.1f} GB/s when the prefill was over, in 30 ms a visitor; beside single ones decoding was 10.0 to 10.0 % slower" in said
    assert not any(warning in said for warning in ("DROPPED", "NO CONTROL", "NOT COMPUTED"))


def test_a_pair_that_the_host_has_slowed_down_does_not_make_the_slowdown(
    storing: Any, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.slow = {4, 7}
    measured(storing, engine, tmp_path)
    said = capsys.readouterr().out
    assert "decoding was 10.0 to 120.0 % slower" in said
    found = results(said)
    assert float(found["decode_token_beside_stores"][2]) > 11.5
    assert float(found["decode_slowdown_of_stores"][2]) == pytest.approx(10.0, abs=0.5)
    control_s = PREFILL_S + storing.STEPS * STEP_S
    lost_s = STORING_PREFILL_S - PREFILL_S + 3 * (STORING_STEP_S - STEP_S)
    assert float(found["decode_slowdown_of_storing_rounds"][2]) == pytest.approx(lost_s / control_s * 100, rel=0.02)


def test_a_host_that_slows_whole_turns_down_does_not_make_what_is_told_next_to_the_steps_behind(
    storing: Any,
    engine: Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "STORE_S", 10 * STORE_S)
    engine.slow_turns = True
    measured(storing, engine, tmp_path)
    said = capsys.readouterr().out
    found = results(said)
    assert float(found["decode_slowdown_of_stores"][2]) == pytest.approx(120.0, abs=5)
    assert float(found["decode_slowdown_until_stored"][2]) == pytest.approx(10.0, abs=0.5)
    assert f"# {storing.PAIRS} pairs decoded for long enough" in said
    assert "slower than behind them, where nothing was stored 0.0 %; single pairs" in said


def test_turns_begin_so_far_from_the_end_of_a_chunk_that_stores_end_and_as_many_steps_follow(
    storing: Any, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "STORE_S", 18 * STORE_S)
    pairs = measured(storing, engine, tmp_path)
    for turn in (turn for pair in pairs for turn in pair.values()):
        assert turn["steps"][-1][0] >= 2 * 60 * STORE_S and turn["kept"] in (0, storing.CHUNKS)


def test_chunks_of_the_decoding_requests_that_are_kept_late_are_in_no_turn(
    storing: Any, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.own_late_s = 0.2
    pairs = measured(storing, engine, tmp_path)
    assert {turn["kept"] for turn in (pair["stores"] for pair in pairs)} == {storing.CHUNKS}
    assert {turn["kept"] for turn in (pair["control"] for pair in pairs)} == {0}
    assert "NO CONTROL" not in capsys.readouterr().out


def test_what_is_not_followed_for_long_enough_tells_nothing_of_the_steps_behind(storing: Any) -> None:
    steps = [(0.01 * number, 16 * number) for number in range(30)]
    assert storing.until_and_behind({"steps": steps}, 0.1) == pytest.approx(1.0)
    assert storing.until_and_behind({"steps": steps[:17]}, 0.1) == pytest.approx(1.0)
    assert storing.until_and_behind({"steps": steps[:14]}, 0.1) is None


def test_what_a_root_holds_is_read_again_only_when_a_journal_has_changed(
    storing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine
    from tokendepot import _core

    read: list[str] = []

    def inspect(folder: str) -> dict[str, int]:
        read.append(folder)
        return {"extents": 10 * len(read)}

    monkeypatch.setattr(_core, "inspect_root", inspect)
    order = {"system": "depot", "folder": str(tmp_path)}
    (tmp_path / "journals").mkdir()
    assert [engine.kept(order), engine.kept(order)] == [10, 10] and len(read) == 1
    journal = tmp_path / "journals" / "1.jnl"
    for size in (0, 64, 128):
        journal.write_bytes(bytes(size))
        assert engine.kept(order) == engine.kept(order) == 10 * len(read)
    assert len(read) == 4
    journal.unlink()
    (tmp_path / "journals").rmdir()
    assert [engine.kept(order), engine.kept(order)] == [50, 60], "as long as it cannot tell"


def test_figures_with_dropped_stores_say_so(
    storing: Any, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.losing = 7
    measured(storing, engine, tmp_path)
    said = capsys.readouterr().out
    assert f"# DROPPED: {7 * storing.PAIRS} of {storing.CHUNKS * storing.PAIRS} chunks were not kept" in said
    assert float(results(said)["decode_token_beside_stores"][2]) == pytest.approx(11.0, abs=0.05), "until the last one"


def test_what_the_host_kept_for_itself_is_told(
    storing: Any, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storing.stolen_s() >= 0
    monkeypatch.setattr(storing, "stolen_s", lambda: engine.now / 10)
    pairs = measured(storing, engine, tmp_path)
    taken = [sum(pair[which]["stolen_s"] for pair in pairs) for which in ("stores", "control")]
    assert min(taken) > 0
    said = capsys.readouterr().out
    assert f"# the host kept {taken[0]:.2f} CPU-seconds from those turns, and {taken[1]:.2f} from their controls" in said
    monkeypatch.setattr(storing, "stolen_s", lambda: 0.0)
    measured(storing, engine, tmp_path)
    assert "CPU-seconds" not in capsys.readouterr().out


def test_a_control_that_is_none_says_so(
    storing: Any, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.cached = 256
    measured(storing, engine, tmp_path, in_depot=8)
    said = capsys.readouterr().out
    assert f"# NO CONTROL: {2 * storing.CHUNKS} chunks" in said and f"# NOT COMPUTED: {2 * storing.PAIRS} visitors" in said


def test_nothing_is_told_of_decoding_beside_stores_where_none_is_left(
    storing: Any, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.losing = storing.CHUNKS
    measured(storing, engine, tmp_path)
    said = capsys.readouterr().out
    assert "# no store was left when a prefill was over" in said and "decode_slowdown_of_stores" not in said


def test_decoding_requests_are_replaced_before_they_end(
    storing: Any, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing.decoding, "DECODER_TOKENS", 1200)
    pairs = measured(storing, engine, tmp_path)
    assert len(pairs) == storing.PAIRS and engine.ended, "and all pairs are measured"
    assert max(map(len, [*engine.decoders.values(), *engine.ended])) < 1200
    assert len(engine.decoders) == storing.decoding.DECODERS
    assert {turn["kept"] for turn in (pair["control"] for pair in pairs)} == {0}


def test_chunks_are_followed_between_steps(storing: Any) -> None:
    chunks = 3
    with storing.Follower(lambda: chunks) as follower:
        for chunks in (4, 9):  # noqa: B007
            ends = time.monotonic() + 10
            while follower.seen[-1][1] != chunks and time.monotonic() < ends:
                time.sleep(0.001)
    assert [count for _, count in follower.seen] == [3, 4, 9]
    assert follower.seen == sorted(follower.seen)
