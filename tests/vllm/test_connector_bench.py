"""The connector's benchmark: what it prints comes from what it says, and it refuses to say what it did not measure."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import tokendepot
from engines import BenchError, Run, Switched
from hook_events import HOOKS, STEP, Event, Recorder, Switch, group_count, read_events, steps_of
from measure import Couple, Pair, cold_prefills, decodings, hook_shares, idle_steps

BENCH = Path(__file__).resolve().parents[2] / "bench" / "connector"
GROUPS, TOKENS = 3, 600
EXTENTS = 2 * GROUPS
LIMIT_S = 400
RESULT = re.compile(r"^RESULT (\w+) (\S+) (\S+) limit (\S+) ratio (\S+)$", re.MULTILINE)


class FakeDepot:
    def __init__(self) -> None:
        self.extents = 0

    def count(self) -> int:
        return self.extents

    def wait_kept(self, expected: int) -> int:
        return self.extents


class FakeEngine:
    """Takes `seconds` for a prompt and stores its chunks, `lost` of them not, in the prompts that `losing` names."""

    def __init__(self, name: str, seconds: float, depot: FakeDepot | None = None) -> None:
        self.name, self.seconds, self.depot = name, seconds, depot
        self.running, self.cached, self.losing, self.lost = True, 0, range(0), 1
        self.other: FakeEngine
        self.seen: list[list[int]] = []
        self.clock = 0

    def pause(self) -> None:
        self.running = False

    def resume(self) -> None:
        self.running = True

    def run(self, prompts: list[list[int]], length: int) -> Run:
        assert self.running and not self.other.running, "one engine at a time"
        begin, self.clock = self.clock, self.clock + round(self.seconds * 1e9)
        for prompt in prompts:
            chunks = len(prompt) // 256
            if chunks and prompt not in self.seen:
                if self.depot is not None:
                    self.depot.extents += chunks * GROUPS - (self.lost if len(self.seen) in self.losing else 0)
                self.seen.append(prompt)
        return Run(begin, self.clock, [self.cached] * len(prompts), [length] * len(prompts))


@pytest.fixture
def couple() -> Couple:
    depot = FakeDepot()
    with_depot, without = FakeEngine("with", 2.02, depot), FakeEngine("without", 2.0)
    with_depot.other, without.other = without, with_depot
    return Couple(with_depot, without, depot, GROUPS, random.Random(1))


def silent(text: str) -> None:
    pass


# --- with stand-ins for the engines ------------------------------------------------------------------------------


def test_each_cold_prompt_is_new_and_computed_alone_and_who_is_first_changes(couple: Couple) -> None:
    firsts = []
    couple.without.resume = lambda plain=couple.without.resume: (firsts.append(len(couple.with_depot.seen)), plain())
    pairs = cold_prefills(couple, 20, TOKENS, silent)
    prompts = [tuple(prompt) for prompt in couple.with_depot.seen + couple.without.seen]
    assert len(set(prompts)) == len(prompts) == 40 and {len(prompt) for prompt in prompts} == {TOKENS}
    assert [round(pair.ratio, 6) for pair in pairs] == [1.01] * 20
    behind = [seen - number for number, seen in enumerate(firsts)]
    assert set(behind) == {0, 1}, "sometimes before the engine with the depot, sometimes after it"


def test_a_cold_prompt_that_was_cached_is_refused(couple: Couple) -> None:
    couple.with_depot.cached = 32
    with pytest.raises(BenchError, match="had 32 tokens of a cold prompt cached"):
        cold_prefills(couple, 3, TOKENS, silent)


def test_a_prompt_that_was_not_stored_whole_does_not_count(couple: Couple) -> None:
    couple.with_depot.losing = range(1, 2)
    said: list[str] = []
    assert len(cold_prefills(couple, 3, TOKENS, said.append)) == 3
    assert len(couple.with_depot.seen) == 4
    assert f"left out: the depot kept {EXTENTS - 1} of the prompt's {EXTENTS} extents" in said


def test_a_depot_that_stores_nothing_has_no_figure(couple: Couple) -> None:
    couple.with_depot.losing, couple.with_depot.lost = range(100), EXTENTS
    with pytest.raises(BenchError, match="the depot kept 0 of 6 prompts whole"):
        cold_prefills(couple, 3, TOKENS, silent)


def test_decoding_in_which_something_was_stored_is_refused(couple: Couple) -> None:
    assert len(decodings(couple, 2, 3, silent)) == 3
    plain = couple.with_depot.run

    def storing(prompts: list[list[int]], length: int) -> Run:
        couple.depot.extents += length > 1
        return plain(prompts, length)

    couple.with_depot.run = storing
    with pytest.raises(BenchError, match="extents after decoding"):
        decodings(couple, 2, 3, silent)


def test_the_switch_is_seen_by_whoever_else_has_it(tmp_path: Path) -> None:
    mine, theirs = Switch(tmp_path), Switch(tmp_path)
    assert mine.on and theirs.on
    Switched("without", None, mine, False).resume()
    assert not theirs.on and not Switch(tmp_path).on
    Switched("with", None, mine, True).resume()
    assert theirs.on


# --- the hooks' times --------------------------------------------------------------------------------------------


def event(begin: int, hook: str, duration: int, busy: bool = False, requests: int = 0, tokens: int = 0) -> Event:
    return Event(begin, duration, HOOKS.index(hook), busy, requests, tokens)


def test_only_steps_in_which_all_decode_and_the_depot_has_no_work_are_idle() -> None:
    events = [
        event(5, "build_connector_meta", 1000, requests=2, tokens=2),  # before the run
        event(10, "build_connector_meta", 1000, requests=2, tokens=2),  # takes the requests up
        event(15, "build_connector_meta", 1000, requests=2, tokens=9),  # a prefill
        event(20, "build_connector_meta", 1000, busy=True, requests=2, tokens=2),  # stores
        event(30, "build_connector_meta", 1000, requests=2, tokens=2),
        event(35, "build_connector_worker_meta", 1000, busy=True),  # reports a store
        event(40, "build_connector_meta", 7, requests=2, tokens=2),
        event(45, "wait_for_save", 4),
        event(46, "update_connector_output", 2),
        event(50, "build_connector_meta", 1000, requests=1, tokens=1),  # one has ended
    ]
    run = Run(10, 60, [0, 0], [1, 1])
    found = idle_steps(events, [Pair(run, run)], 2)
    assert [step.total for step in found] == [13]
    shares = hook_shares(events, [run])
    assert shares[0].hook == "build_connector_meta"
    assert shares[0].seconds == pytest.approx([5007e-9]) and shares[1].seconds == pytest.approx([1000e-9])


def test_recorded_calls_are_read_back_and_a_call_within_a_call_is_part_of_it(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path), 5)
    nothing = lambda answer: (False, 0, 0)  # noqa: E731
    inner = lambda: recorder.timed(2, lambda: "inner", nothing)  # noqa: E731
    assert recorder.timed(STEP, inner, lambda answer: (answer == "inner", 64, 65)) == "inner"
    recorder.timed(1, lambda: None, nothing)
    outer, after = read_events(tmp_path)
    assert (outer.hook, outer.busy, outer.requests, outer.tokens) == (STEP, True, 64, 65)
    assert after.hook == 1 and not after.busy and after.begin >= outer.begin + outer.duration
    assert group_count(tmp_path) == 5 and len(steps_of([outer, after])) == 1


# --- with real engines -------------------------------------------------------------------------------------------


@pytest.fixture
def roots():
    path = Path(tempfile.mkdtemp(prefix="tokendepot-bench-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_at_toy_size_every_figure_has_its_control_and_all_that_was_to_be_stored_is(roots: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "run.py"), "--toy", "--root", str(roots), "--cache", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {name: (float(value), unit, float(limit)) for name, value, unit, limit, _ in RESULT.findall(done.stdout)}
    printed = re.findall(r'print_result\(\s*"(\w+)"', (BENCH / "run.py").read_text())
    assert list(results) == printed and len(printed) == 9
    assert all(value > 0 and limit > 0 for value, _, limit in results.values())

    pairs = re.findall(r"cold prefill \d of 3: (\S+) s with, (\S+) s without", done.stdout)
    assert len(pairs) == 3
    value, unit, limit = results["connector_cold_prefill"]
    assert unit == "s" and value == pytest.approx(sorted(float(pair[0]) for pair in pairs)[1], rel=0.01, abs=0.001)
    assert limit == pytest.approx(sorted(float(pair[1]) for pair in pairs)[1], rel=0.01, abs=0.001)
    assert results["connector_idle_step"][1:] == results["connector_idle_step_64_p99"][1:] == ("ms", 2.0)

    groups = int(re.findall(r"(\d+) KV-cache groups", done.stdout)[0])
    said = [int(count) for count in re.findall(r"the depot keeps (\d+) extents", done.stdout)]
    extents = tokendepot.list_extents(str(roots / "depot1"))
    assert said == [len(extents)]
    if "left out" not in done.stdout:
        # Four cold prompts of two chunks and five of one chunk that are decoded; nothing of what was computed without the depot.
        assert len(extents) == (4 * 2 + 1 + 4) * groups
    assert set(tokendepot.verify_extents(str(roots / "depot1"), extents)) == {"ok"}
