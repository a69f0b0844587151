"""Models of caches: the known answers of public traces, the depot's own policy step by step, hits at every capacity."""

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendepot.bench.cache_models import BlockCache, Outcome, SegmentCache, play
from tokendepot.bench.extents import Geometry, SizeError, automatic_segment_bytes
from tokendepot.bench.shapes import shape_of
from tokendepot.bench.stack_distance import NEVER, needed_capacities, stack_distances
from tokendepot.bench.traces import Request, Trace, read_trace

TRACES = pathlib.Path(__file__).resolve().parents[1] / "traces"
MIB = 1 << 20


@pytest.fixture(scope="module")
def traces():
    return {name: read_trace([str(TRACES / f"{name}_trace.jsonl.gz")]) for name in ("conversation", "synthetic")}


def trace_of(*prompts, block_tokens=10):
    requests = [Request(float(i), len(p) * block_tokens, 1, tuple(p)) for i, p in enumerate(prompts)]
    return Trace("made up", "mooncake", block_tokens, requests, len({block for p in prompts for block in p}))


def played(trace, cache):
    outcome = Outcome()
    play(trace, cache, outcome)
    return outcome


# --- known answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, share, rate",
    [
        ("conversation", None, 0.366),
        ("conversation", 0.01, 0.052),
        ("conversation", 0.03, 0.125),
        ("conversation", 0.10, 0.278),
        ("conversation", 0.30, 0.358),
        ("synthetic", None, 0.640),
        ("synthetic", 0.03, 0.101),
        ("synthetic", 0.10, 0.260),
        ("synthetic", 0.30, 0.488),
    ],
)
def test_hits_of_the_mooncake_traces_are_the_known_ones(traces, name, share, rate):
    trace = traces[name]
    capacity = share and int(trace.unique_blocks * share)
    assert played(trace, BlockCache(capacity)).hit_rate == pytest.approx(rate, abs=0.0005)


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_one_pass_of_stack_distances_gives_the_hits_of_every_capacity(traces, name):
    trace = traces[name]
    needed = needed_capacities(trace)
    for share in (0.001, 0.02, 0.2, 1.0):
        capacity = int(trace.unique_blocks * share)
        assert (needed <= capacity).sum() == played(trace, BlockCache(capacity)).hits
    assert (needed < NEVER).sum() == played(trace, BlockCache(None)).hits


prompts = st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=30)


@given(prompts, st.integers(1, 15))
def test_stack_distances_agree_with_a_played_lru(made, capacity):
    trace = trace_of(*made)
    assert (needed_capacities(trace) <= capacity).sum() == played(trace, BlockCache(capacity)).hits


def test_stack_distances_are_those_of_the_definition():
    assert stack_distances(np.array([1, 2, 3, 1, 1, 3, 4, 2])).tolist() == [NEVER, NEVER, NEVER, 3, 1, 2, NEVER, 4]
    assert stack_distances(np.array([], np.int64)).tolist() == []


# --- single blocks ---------------------------------------------------------------------------------------------------


def test_only_what_leads_a_prompt_is_a_hit():
    outcome = played(trace_of([1, 2, 3], [1, 9, 3]), BlockCache(None))
    assert (outcome.hits, outcome.references, outcome.stored, outcome.unique_stored) == (1, 6, 4, 4)


def test_lru_keeps_what_was_used_and_fifo_what_came_last():
    trace = trace_of([1], [2], [1], [3], [1])
    assert played(trace, BlockCache(2)).hits == 2
    assert played(trace, BlockCache(2, fifo=True)).hits == 1


def test_tokens_of_a_short_last_block_are_counted_as_they_are():
    trace = trace_of([1, 2], [1, 2])
    trace.requests[1] = Request(1.0, 13, 1, (1, 2))
    outcome = played(trace, BlockCache(None))
    assert (outcome.hit_tokens, outcome.input_tokens) == (13, 33)
    assert outcome.token_hit_rate == pytest.approx(13 / 33)


# --- the depot's segments --------------------------------------------------------------------------------------------

BLOCK = 1000


def depot(*segments, per_segment=2):
    return SegmentCache([count * per_segment * BLOCK for count in segments], BLOCK, per_segment * BLOCK)


def test_two_segments_of_a_root_are_never_full():
    # Of four segments one is being filled and one is ready: two sealed ones stay.
    outcome = played(trace_of([1, 2], [3, 4], [5, 6], [7, 8], [1, 2], [3, 4]), depot(4))
    assert (outcome.hits, outcome.evicted) == (0, 6)
    assert played(trace_of([1, 2], [3, 4], [5, 6], [7, 8], [3, 4]), depot(4)).hits == 2


def test_a_load_keeps_its_whole_segment_warm():
    cache = depot(4)
    outcome = played(trace_of([1, 2], [3, 4], [5, 6], [1], [7, 8]), cache)
    assert outcome.hits == 1
    assert list(cache.serve([2])) == [1]
    assert list(cache.serve([3])) == [0]


def test_what_no_look_up_reaches_is_counted():
    # Two sealed segments stay, and the one that is being filled: blocks 5 to 10 of ten, but not the first four.
    outcome = played(trace_of(list(range(1, 11))), depot(4))
    assert (outcome.held, outcome.unreachable) == (6, 6)
    outcome = played(trace_of([1, 2, 3, 4], [5, 6]), depot(4))
    assert (outcome.held, outcome.unreachable) == (6, 0)


def test_a_shared_beginning_outlives_four_times_the_capacity_and_little_is_kept_that_no_look_up_reaches():
    longer_than_the_root = list(range(128))
    head = list(range(1000, 1016))
    prompts = [head + list(range(2000 + 8 * i, 2008 + 8 * i)) for i in range(50)]
    cache = depot(25, per_segment=4)
    outcome = played(trace_of(longer_than_the_root, *prompts), cache)
    assert all(cache.holds(head))
    assert outcome.unreachable < 0.05 * 100


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_real_traces_leave_less_than_a_twentieth_that_no_look_up_reaches(traces, name):
    trace = traces[name]
    outcome = played(trace, SegmentCache([trace.unique_blocks // 10 * BLOCK], BLOCK))
    assert 0 < outcome.unreachable < 0.05 * outcome.held


def test_what_is_stored_behind_a_miss_is_not_stored_again():
    outcome = played(trace_of([1, 2, 3], [9, 2, 3]), depot(9))
    assert (outcome.hits, outcome.stored) == (0, 4)


def test_a_block_that_was_evicted_is_written_again():
    prompts_of_two = [[i, i + 100] for i in range(8)]
    outcome = played(trace_of(*prompts_of_two, *prompts_of_two), depot(4))
    assert (outcome.hits, outcome.stored, outcome.unique_stored) == (0, 32, 16)
    assert outcome.writes_per_unique == 2.0


def test_sealed_segments_are_copied_down_and_served_from_there_when_the_first_tier_lost_them():
    prompts_of_two = [[i, i + 100] for i in range(8)]
    outcome = played(trace_of(*prompts_of_two, *prompts_of_two), depot(4, 20))
    assert outcome.hits == 16
    assert outcome.hits_by_tier == [6, 10]
    assert outcome.copied == 14  # all but the one that is not full yet
    assert outcome.evicted == 0
    assert outcome.writes_per_unique == (16 + 14) / 16


def test_what_comes_back_soon_is_copied_upwards_and_what_is_colder_than_the_first_root_is_not():
    prompts_of_two = [[i, i + 100] for i in range(8)]
    cache = depot(4, 20)
    played(trace_of(*prompts_of_two), cache)
    assert [list(cache.serve([0, 100])) for _ in range(3)] == [[0, 2], [0, 2], [2, 0]]
    assert (cache.promoted, cache.copied, cache.evicted) == (2, 14, 0)
    assert list(cache.serve([1, 101])) == [0, 2]
    assert cache.promoted == 2


def test_an_evicted_copy_costs_no_hit():
    cache = depot(4, 40)
    played(trace_of(*[[i, i + 100] for i in range(8)]), cache)
    for block in (0, 0, 1, 1):
        cache.serve([block, block + 100])
    assert cache.promoted == 4
    for block in range(20, 28):
        cache.serve([block, block + 100])
    assert list(cache.serve([0, 100])) == [0, 2]
    assert cache.evicted == 0


def test_with_room_for_everything_a_depot_finds_what_an_unbounded_cache_finds(traces):
    trace = traces["synthetic"]
    roomy = SegmentCache([trace.unique_blocks * BLOCK * 2], BLOCK, 64 * BLOCK)
    assert played(trace, roomy).hits == played(trace, BlockCache(None)).hits


@pytest.mark.parametrize(
    "capacities, block, segment, words",
    [
        ([2 * MIB], 4096, None, "expected at least 3145728, room for 3 segments of 1048576 bytes"),
        ([-5], 4096, None, "capacity of -5 bytes"),
        ([64 * MIB, 1024], 4096, None, "room for 1 segment of 1048576 bytes"),
        ([64 * MIB], 8192, 4096, "segments of 4096 bytes: expected room for a block of 8192 bytes"),
    ],
)
def test_capacities_that_hold_no_depot_are_refused_in_words(capacities, block, segment, words):
    with pytest.raises(SizeError, match=words):
        SegmentCache(capacities, block, segment)


def test_a_block_cache_needs_room_for_a_block():
    with pytest.raises(SizeError, match="capacity of 0 blocks: expected 1 or more"):
        BlockCache(0)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_automatic_segments_are_a_256th_of_the_root_within_bounds_and_hold_whole_extents():
    assert automatic_segment_bytes(800 * MIB, 4096) == 3 * MIB
    assert automatic_segment_bytes(4096, 4096) == MIB
    assert automatic_segment_bytes(1 << 50, 4096) == 256 * MIB
    assert automatic_segment_bytes(100 * MIB, 9 * MIB) == 9 * MIB
    assert automatic_segment_bytes(1 << 50, 32 * MIB + 4096) == 8 * (32 * MIB + 4096)
    assert automatic_segment_bytes(100 * MIB, 32 * MIB + 4096) == 32 * MIB + 4096


def test_an_extent_is_a_header_page_and_heads_in_whole_pages():
    assert Geometry.of_model(shape_of("llama-3.1-70b"), "bf16", 256, 80).extent_bytes == 80 * MIB + 4096
    assert Geometry.of_model(shape_of("llama-3.1-8b"), "fp8", 16, 1).extent_bytes == 4096 + 8 * 4096
    assert Geometry.of_bytes(16384).extent_bytes == 20480
    with pytest.raises(SizeError, match="block of 5000 bytes: expected a multiple of 4096"):
        Geometry.of_bytes(5000)
