"""Plans: capacity, bandwidth, savings and costs of traces whose answers can be worked out by hand."""

import pathlib

import pytest

from tokendepot.bench.cache_models import BlockCache, Outcome, SegmentCache, least_capacity_bytes, play
from tokendepot.bench.extents import SizeError, extent_bytes
from tokendepot.bench.plan import SEARCH_PRECISION, Planner, Prefill, Prices
from tokendepot.bench.shapes import Shape, ShapeError, bytes_per_token, prefill_flops, shape_of
from tokendepot.bench.traces import Request, Trace, read_trace

TRACES = pathlib.Path(__file__).resolve().parents[1] / "traces"
SHAPE = shape_of("llama-3.1-8b")
BLOCK_BYTES = 512 * bytes_per_token(SHAPE)


def by_flops(shape=SHAPE):
    return Prefill(shape, None, 8192, 989.0, 0.4)


def trace_of(*prompts, every_s=1.0, block_tokens=512):
    requests = [Request(i * every_s, len(p) * block_tokens, 1, tuple(p)) for i, p in enumerate(prompts)]
    return Trace("made up", "mooncake", block_tokens, requests, len({block for p in prompts for block in p}))


def planner_of(trace, prefill=None, prices=Prices(), window_s=1.0, tp=1):
    return Planner(trace, "bf16", tp, prefill or by_flops(), prices, window_s)


def count(advanced):
    return lambda number: advanced.append(number)


@pytest.fixture(scope="module")
def synthetic():
    trace = read_trace([str(TRACES / "synthetic_trace.jsonl.gz")])
    planner = planner_of(trace, window_s=10.0, tp=8)
    advanced = []
    planner.follow_depot(count(advanced))
    assert 0 < len(advanced) <= planner.runs
    return trace, planner


# --- capacity --------------------------------------------------------------------------------------------------------


def test_the_ideal_is_what_an_unbounded_cache_finds(synthetic):
    trace, planner = synthetic
    outcome = Outcome()
    play(trace, BlockCache(None), outcome)
    assert planner.plan.ideal_tokens == outcome.token_hit_rate
    assert planner.plan.ideal_blocks == outcome.hit_rate == pytest.approx(0.640, abs=0.0005)


@pytest.mark.parametrize("number, share", [(0, 0.90), (1, 0.95), (2, 0.99), (3, 1.0)])
def test_the_capacity_of_a_share_is_the_smallest_that_reaches_it(synthetic, number, share):
    trace, planner = synthetic
    target = planner.plan.targets[number]
    assert target.share == share
    rates = []
    for blocks in (target.lru_bytes // BLOCK_BYTES, target.lru_bytes // BLOCK_BYTES - 1):
        outcome = Outcome()
        play(trace, BlockCache(blocks), outcome)
        rates.append(outcome.token_hit_rate)
    assert rates[0] >= share * planner.plan.ideal_tokens > rates[1]
    assert rates[0] == target.hit_rate


def test_the_depot_s_capacity_reaches_the_share_and_little_less_does_not(synthetic):
    trace, planner = synthetic
    for target in planner.plan.targets[:3]:
        rates = []
        for capacity in (target.depot_bytes, target.depot_bytes * (1 - 2 * SEARCH_PRECISION)):
            outcome = Outcome()
            play(trace, SegmentCache([int(capacity) // 8], extent_bytes(BLOCK_BYTES // 8, 1)), outcome)
            rates.append(outcome.token_hit_rate)
        assert rates[0] >= target.share * planner.plan.ideal_tokens > rates[1]
        assert target.depot_bytes > target.lru_bytes


@pytest.mark.parametrize("extent", [8192, 1 << 20, (1 << 20) + 4096, 5 << 20, 64 << 20, 300 << 20])
def test_the_least_capacity_is_a_depot_and_a_byte_less_is_none(extent):
    SegmentCache([least_capacity_bytes(extent)], extent)
    with pytest.raises(SizeError, match="room for 3 segments"):
        SegmentCache([least_capacity_bytes(extent) - 1], extent)


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("block_tokens", [1, 16, 512])
@pytest.mark.parametrize("prompts", [([1], [1]), ([1, 2, 3], [1, 2, 4], [1, 2, 3], [5]), ([1, 2],) * 3 + ([3, 4],) * 2])
def test_a_depot_of_the_planned_capacity_can_be_and_finds_what_was_planned(prompts, block_tokens, tp):
    trace = trace_of(*prompts, block_tokens=block_tokens)
    planner = planner_of(trace, tp=tp)
    planner.follow_depot(lambda _: None)
    for target in planner.plan.targets:
        assert target.depot_bytes >= planner.plan.depot_at_least_bytes
        outcome = Outcome()
        extent = extent_bytes(block_tokens * bytes_per_token(SHAPE) // 8, 8 // tp)
        play(trace, SegmentCache([target.depot_bytes // tp], extent), outcome)
        assert outcome.token_hit_rate >= target.share * planner.plan.ideal_tokens


def test_the_curve_rises_to_the_ideal(synthetic):
    curve = synthetic[1].plan.curve
    assert [point.lru for point in curve] == sorted(point.lru for point in curve)
    assert curve[-1].lru == synthetic[1].plan.ideal_tokens
    assert all(point.depot is None or point.depot <= synthetic[1].plan.ideal_tokens for point in curve)


def test_tiers_of_one_size_add_up_to_the_cache_of_the_larger_one(synthetic):
    trace, planner = synthetic
    unique = planner.plan.unique_bytes
    planner.try_tiers([0, unique // 20], [0, unique // 4], lambda _: None)
    nvme_only, memory_only, both = planner.plan.tiers
    assert nvme_only.lru[0] == memory_only.lru[1] == nvme_only.depot[0] == memory_only.depot[1] == 0.0
    assert both.lru == pytest.approx((memory_only.lru[0], nvme_only.lru[1] - memory_only.lru[0]))
    assert sum(both.depot) == pytest.approx(sum(nvme_only.depot), abs=0.02)
    planner.plan.tiers.clear()


def test_a_trace_without_repeats_has_nothing_to_find():
    planner = planner_of(trace_of([1, 2], [3, 4]))
    planner.follow_depot(lambda _: None)
    assert planner.plan.targets == []
    assert planner.plan.ideal_tokens == 0.0


# --- bandwidth -------------------------------------------------------------------------------------------------------


def test_peak_bandwidth_is_that_of_the_busiest_window():
    trace = trace_of([1, 2, 3], [1, 2, 3], [1, 2, 3], [4], every_s=1.0)
    target = planner_of(trace, window_s=2.0).plan.targets[-1]
    gigabyte = BLOCK_BYTES / 1e9
    assert target.read[1] == pytest.approx(3 * gigabyte / 2)
    assert target.write[1] == pytest.approx(3 * gigabyte / 2)
    wider = planner_of(trace, window_s=4.0).plan.targets[-1]
    assert wider.read == pytest.approx((6 * gigabyte / 4,) * 2)
    assert wider.write == pytest.approx((4 * gigabyte / 4,) * 2)


def test_a_window_much_shorter_than_the_trace_is_refused_in_words():
    with pytest.raises(SizeError, match=r"window of 1 s: expected at least 1e\+03 s for a trace of 1e\+10 s"):
        planner_of(trace_of([1], [1], every_s=1e10))


# --- prefill ---------------------------------------------------------------------------------------------------------


def test_prefill_by_operations_costs_more_at_the_end_of_a_long_prompt():
    prefill = by_flops()
    assert prefill.seconds(0, 1000) == pytest.approx(prefill_flops(SHAPE, 0, 1000) / (989e12 * 0.4))
    assert prefill.seconds(100_000, 101_000) > 1.5 * prefill.seconds(0, 1000)


def test_a_measured_rate_holds_at_its_length_and_is_scaled_elsewhere():
    prefill = Prefill(SHAPE, 10_000.0, 4096, 989.0, 0.4)
    assert prefill.seconds(0, 4096) == pytest.approx(0.4096)
    assert prefill.seconds(0, 40_960) > 4.096
    unknown = Shape("x", 2, 2, 64, 2, None)
    assert Prefill(unknown, 10_000.0, 4096, 989.0, 0.4).seconds(5000, 6000) == pytest.approx(0.1)


def test_a_model_of_unknown_size_needs_a_rate():
    with pytest.raises(ShapeError, match="expected --prefill-rate"):
        planner_of(trace_of([1]), by_flops(Shape("x", 2, 2, 64, 2, None)))


def test_what_is_saved_is_the_beginning_of_each_prompt_and_one_token_is_always_computed():
    planner = planner_of(trace_of([1, 2], [1, 2, 3], [1, 2], every_s=43_200.0))
    target = planner.plan.targets[-1]
    prefill = by_flops()
    saved = prefill.seconds(0, 1024) + prefill.seconds(0, 1023)
    assert target.saved_gpu_s == pytest.approx(saved)
    assert target.saved_gpu_s_a_day == pytest.approx(saved)
    assert planner.plan.gpu_s == pytest.approx(2 * prefill.seconds(0, 1024) + prefill.seconds(0, 1536))


def test_a_trace_of_one_moment_saves_nothing_a_day():
    target = planner_of(trace_of([1], [1], every_s=0.0)).plan.targets[-1]
    assert target.saved_gpu_s > 0
    assert target.saved_gpu_s_a_day is None


def test_costs_are_gpu_time_and_storage_over_prompt_tokens():
    trace = trace_of([1, 2], [1, 2], every_s=86_400.0)
    planner = planner_of(trace, prices=Prices(gpu_hour=3.6, gib_month=30.0))
    planner.follow_depot(lambda _: None)
    plan, target = planner.plan, planner.plan.targets[-1]
    tokens = 2048
    assert plan.dollars_before == pytest.approx(plan.gpu_s * 0.001 / tokens * 1e6)
    storage = target.depot_bytes / 2**30 * 30.0 / 30
    assert target.dollars == pytest.approx(((plan.gpu_s - target.saved_gpu_s) * 0.001 + storage) / tokens * 1e6)
    assert planner_of(trace).plan.dollars_before is None


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares_of_the_range", [(0.5, 0.5, 0.5), (0.8, 0.82, 0.95), (0.01, 0.011, 0.012), (0.008, 0.1, 1.2)])
def test_labels_of_capacities_never_overlap_and_lie_in_the_picture(shares_of_the_range):
    plots = pytest.importorskip("tokendepot.bench.plots")
    planner = planner_of(trace_of([1, 2, 3], [1, 2, 4], [1, 2, 3], *([i] for i in range(5, 400))))
    plan = planner.plan
    for target, share in zip(plan.targets, shares_of_the_range, strict=False):
        target.depot_bytes = int(share * plan.unique_bytes)
    figure, (axes, _) = plots.pyplot.subplots(1, 2, figsize=(13, 5.2), width_ratios=(3, 2), layout="constrained")
    plots._hits_by_capacity(axes, plan)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.texts]
    plots.pyplot.close(figure)
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1 for box in boxes)
