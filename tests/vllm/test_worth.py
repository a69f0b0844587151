"""The load-or-recompute rule: decisions from measurements, with a clock of its own. Nothing here is timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokendepot.engines.vllm.worth import LOADS_COUNT_S, LONG_STEP_TOKENS, Octaves, Worth, starting_values

TOKEN_BYTES = 131072
STEP_S = 0.010  # the shortest step of the engine below
PREFILL_TOKENS_S = 37_000


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Machine:
    """An engine with a known prefill rate and a root with a known rate, which do what the rule says."""

    def __init__(self, root_rate: float, latency: float = 0.004, started_at_rate: float = 20e9) -> None:
        self.clock = Clock()
        self.rule = Worth(TOKEN_BYTES / started_at_rate, 256, self.clock)
        self.root_rate, self.latency = root_rate, latency

    def compute_s(self, done: int, total: int) -> float:
        return max(STEP_S, (total - done) / PREFILL_TOKENS_S * (1 + (total + done) / 2 / 60_000))

    def load_s(self, tokens: int) -> float:
        return self.latency + tokens * TOKEN_BYTES / self.root_rate

    def compute(self, done: int, total: int) -> None:
        while done < total:
            count = min(8192, total - done)
            self.step([(done, count)], self.compute_s(done, done + count))
            done += count

    def step(self, scheduled: list[tuple[int, int]], seconds: float) -> None:
        number = self.rule.step_begins(scheduled)
        self.clock.now += seconds
        if number:
            self.rule.step_ended(number)

    def load(self, tokens: int) -> None:
        self.clock.now += self.load_s(tokens)
        self.rule.loaded(tokens, self.load_s(tokens))

    def ask(self, hit: int, total: int) -> bool:
        """A request whose first `hit` of `total` tokens are stored; true when they were loaded."""
        loads = self.rule.of_load(0, hit, total)
        if loads:
            self.load(hit)
        self.compute(hit if loads else 0, total)
        return loads

    def live(self) -> None:
        """Some traffic of all lengths, and decoding."""
        for total in (2000, 500, 8000, 300, 32_000, 1000, 16_000):
            self.ask(total // 256 * 256 - (256 if total % 256 == 0 else 0), total)
            for _ in range(20):
                self.clock.now += 0.2
                self.step([(total, 1)], STEP_S)


def test_the_first_hit_of_a_long_prompt_is_loaded_whatever_the_root() -> None:
    for rate in (20e9, 3e9):
        assert Worth(TOKEN_BYTES / rate, 256).of_load(0, 127_744, 128_000)


@pytest.mark.parametrize("root_rate", [50e9, 12e9, 5e9, 2e9, 0.5e9, 0.1e9])
def test_after_some_traffic_the_faster_way_is_taken(root_rate: float) -> None:
    machine = Machine(root_rate)
    machine.live()
    for total in (300, 500, 1000, 2000, 8000, 32_000, 128_000):
        hit = (total - 1) // 256 * 256
        loading = machine.load_s(hit) + machine.compute_s(hit, total)
        computing = machine.compute_s(0, total)
        if not 0.5 < loading / computing < 2:  # close calls may go either way
            assert machine.rule.of_load(0, hit, total) == (loading < computing), (total, loading, computing)


def test_what_a_step_holds_anyway_is_not_loaded() -> None:
    machine = Machine(50e9)
    machine.live()
    assert not machine.rule.of_load(0, 256, 300)
    assert machine.rule.of_load(0, 7936, 8000)


def test_only_what_is_beyond_the_engines_own_hit_counts() -> None:
    machine = Machine(50e9)
    machine.live()
    assert machine.rule.of_load(0, 7936, 8000) and not machine.rule.of_load(7680, 7936, 7990)


def test_a_slow_root_is_tried_again_after_some_time() -> None:
    machine = Machine(0.1e9)
    machine.live()
    assert not machine.rule.of_load(0, 7936, 8000)
    machine.clock.now += 2 * LOADS_COUNT_S
    assert machine.rule.of_load(0, 7936, 8000)


def test_one_odd_measurement_does_not_turn_the_rule() -> None:
    machine = Machine(50e9)
    machine.live()
    machine.compute(0, 16_000)
    machine.compute(0, 16_000)
    machine.rule.loaded(7936, 30.0)
    machine.step([(0, 8192)], 22.0)
    machine.live()
    assert machine.rule.of_load(0, 31_744, 32_000) and not machine.rule.of_load(0, 256, 300)


def test_a_slow_rest_of_a_prompt_does_not_speak_for_its_beginning() -> None:
    """One prompt, then the ends of two others that share its beginning, while the machine was busy with something else."""
    machine = Machine(50e9)
    machine.step([(0, 620)], 0.2)
    machine.step([(512, 145)], 0.8)
    assert machine.rule.of_load(0, 512, 620), "the rest is computed either way"
    assert machine.rule.spared_seconds(0, 512, 620) == pytest.approx(0.2 * 512 / 620)


def test_one_short_step_on_a_machine_that_stood_still_does_not_make_prefill_free() -> None:
    machine = Machine(50e9)
    machine.live()
    machine.compute(0, 2000)
    machine.clock.now += 2  # one short step a second is timed
    machine.step([(1000, 1)], 30.0)
    assert machine.rule.of_load(0, 1792, 2000)


def test_a_slow_first_load_of_a_process_proves_nothing() -> None:
    machine = Machine(50e9)
    machine.compute(0, 16_000)
    machine.rule.loaded(2304, 0.4)
    for hit, total in ((1792, 2000), (7936, 8000), (15_872, 16_000)):
        assert machine.rule.of_load(0, hit, total)
    machine.rule.loaded(2304, 0.4)
    assert not machine.rule.of_load(0, 2304, 2500), "a second one does"


def test_a_first_load_that_took_seconds_too_long_does() -> None:
    """A disk that gave 3 GB/s when it was opened and gives 1 GB/s now."""
    machine = Machine(1e9, started_at_rate=3e9)
    machine.compute(0, 64_000)
    machine.load(64_000)
    assert not machine.rule.of_load(0, 63_744, 64_000)
    assert not machine.rule.of_load(0, 127_744, 128_000), "twice as large: hardly any of it was latency"


def test_a_guess_must_promise_more_than_a_little() -> None:
    """What was seen of a root when it was opened is its best."""
    machine = Machine(1e9, started_at_rate=4.5e9)
    machine.compute(0, 128_000)
    assert machine.compute_s(0, 32_000) > 31_744 * TOKEN_BYTES / 4.5e9
    assert not machine.rule.of_load(0, 31_744, 32_000)
    assert machine.rule.of_load(0, 127_744, 128_000), "there the same root clearly pays"


def test_a_longer_prompt_than_any_before_costs_what_shorter_ones_let_expect() -> None:
    """From the root 96,000 tokens come in 2.8 s, by the guess in 4.2, and computing takes 4.7; at the price of a token of the
    24,000 it would take 3.5."""
    machine = Machine(4.5e9, started_at_rate=4.5e9)
    machine.compute(0, 24_000)
    assert not machine.rule.of_load(0, 23_808, 24_000)
    assert machine.rule.of_load(0, 95_744, 96_000)
    assert machine.rule.spared_seconds(0, 95_744, 96_000) == pytest.approx(machine.compute_s(0, 95_744), rel=0.01)


def test_a_prompt_of_the_same_power_of_two_does_not_make_a_longer_one_cheaper() -> None:
    """The mean context of 36,000 tokens is in the octave of that of 96,000, at its other end."""
    machine = Machine(4.5e9, started_at_rate=4.5e9)
    machine.compute(0, 24_000)
    machine.compute(0, 36_000)
    for total in (96_000, 128_000):
        assert machine.rule.of_load(0, total - 256, total)
        longer = machine.rule.spared_seconds(0, total - 256, total)
        assert longer == pytest.approx(machine.compute_s(0, total - 256), rel=0.05)


def test_steps_at_the_floor_do_not_hide_how_cost_grows() -> None:
    """Short prompts, whose tokens cost what a step costs at least, however many they are."""
    machine = Machine(4.5e9, started_at_rate=4.5e9)
    for tokens in (256, 520):
        machine.step([(0, tokens)], 2.1 * STEP_S)
    machine.compute(0, 24_000)
    assert machine.rule.spared_seconds(0, 95_744, 96_000) == pytest.approx(machine.compute_s(0, 95_744), rel=0.01)


def test_of_two_contexts_one_slow_step_makes_a_longer_prompt_dearer_in_proportion_at_most() -> None:
    machine = Machine(4.5e9)
    machine.step([(0, 16_384)], machine.compute_s(0, 16_384))
    machine.step([(16_384, 7616)], 100 * machine.compute_s(16_384, 24_000))
    in_proportion = machine.compute_s(0, 16_384) / 16_384 * 48_000 / 8192 * 95_744
    assert machine.rule.spared_seconds(0, 95_744, 96_000) == pytest.approx(in_proportion, rel=0.01)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_what_a_longer_prompt_costs_is_not_told_by_one_slow_step(slow: int) -> None:
    machine = Machine(4.5e9)
    for at, (done, total) in enumerate(((0, 8192), (8192, 16_384), (16_384, 24_000))):
        machine.step([(done, total - done)], machine.compute_s(done, total) * (1.5 if at == slow else 1))
    at_its_price = machine.compute_s(16_384, 24_000) / 7616 * (1.5 if slow == 2 else 1)
    longer = machine.rule.spared_seconds(0, 95_744, 96_000)
    assert 95_744 * at_its_price * 0.99 < longer < 1.5 * machine.compute_s(0, 95_744)


def test_two_contexts_nearly_as_long_do_not_tell_how_cost_grows() -> None:
    machine = Machine(4.5e9)
    machine.step([(4050, 8192)], 0.25)
    machine.step([(4150, 8192)], 0.26)
    assert machine.rule.spared_seconds(0, 95_744, 96_000) == pytest.approx(95_744 * 0.26 / 8192, rel=0.01)


def test_a_first_step_that_compiled_does_not_make_prefill_dear() -> None:
    """It held 16,384 tokens, so that no later step is of its power of two until a longer prompt comes."""
    machine = Machine(1.5e9, started_at_rate=1.5e9)
    machine.step([(0, 16_384)], 20.0)
    for _ in range(3):
        machine.step([(0, 16_000)], 0.47)
    assert not machine.rule.of_load(0, 32_000, 32_020), "2.8 s of loading for 1.2 s of computing"


def test_one_short_tail_of_a_long_prompt_does_not_make_prefill_dear() -> None:
    machine = Machine(50e9)
    for _ in range(3):
        machine.step([(0, 2000)], 0.08)
    machine.step([(1792, 228)], 0.06)
    assert machine.rule.spared_seconds(1792, 2800, 3000) < 1008 * 0.08 / 2000 * 3, "at most three times as dear"


def test_a_slow_size_does_not_speak_for_larger_ones_where_another_was_fast() -> None:
    machine = Machine(50e9)
    machine.compute(0, 16_000)
    for tokens, seconds in ((1792, 0.01), (1792, 0.01), (2304, 0.4)):
        machine.rule.loaded(tokens, seconds)
    assert machine.rule.of_load(0, 7936, 8000) and not machine.rule.of_load(0, 2304, 2500)


def test_the_first_guess_of_a_disk_is_what_was_measured_when_it_was_opened() -> None:
    group = SimpleNamespace(page_bytes=16 * 4096, layers=32, block_tokens=16)
    root = dict(transport="direct-threads", read_bytes_per_second=1_500_000_000)
    assert starting_values([group], {"roots": [root]})[0] == pytest.approx(TOKEN_BYTES / 1.5e9)
    unmeasured = dict(root, read_bytes_per_second=0)
    assert starting_values([group], {"roots": [unmeasured]})[0] == pytest.approx(TOKEN_BYTES / 3e9)
    memory = dict(transport="mapped", read_bytes_per_second=0)
    assert starting_values([group], {"roots": [root, memory]})[0] == pytest.approx(TOKEN_BYTES / 20e9)


def test_overlapping_steps_cost_from_the_end_of_the_one_before() -> None:
    clock = Clock()
    rule = Worth(1e-6, 256, clock)
    first, second = rule.step_begins([(0, 1000)]), rule.step_begins([(1000, 1000)])
    for number in (first, second):
        clock.now += 0.1
        rule.step_ended(number)
    assert rule.spared_seconds(0, 500, 1000) == pytest.approx(0.05, rel=0.25)


def test_steps_that_tell_nothing_are_not_timed() -> None:
    rule = Worth(1e-6, 256, Clock())
    assert rule.step_begins([]) == 0
    assert rule.step_begins([(0, LONG_STEP_TOKENS - 1)]) == 0
    assert rule.step_begins([(0, LONG_STEP_TOKENS)]) > 0
    assert rule.step_begins([(9, 1)]) > 0 and rule.step_begins([(10, 1)]) == 0, "one short step a second"
    for _ in range(1000):
        rule.step_begins([(0, 1000)])
    assert len(rule._steps) <= 64, "steps that nobody reports are forgotten"


def test_what_was_not_seen_is_taken_from_its_neighbours() -> None:
    seen = Octaves()
    assert seen.near(100) is None
    for when, x, y in ((1.0, 300, 3.0), (2.0, 310, 30.0), (3.0, 320, 4.0), (4.0, 5000, 50.0)):
        seen.observe(when, x, y)
    assert seen.near(400) == (310, 4.0), "the median of its own power of two"
    assert seen.near(1000) == (310, 4.0), "else the next below"
    assert seen.near(20) == (310, 4.0), "else the next above"
    assert seen.medians(3.5) == {13: (5000, 50.0)} and seen.medians(9.0) == {}, "old ones do not count"
