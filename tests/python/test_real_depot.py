"""A trace played against a real depot: the engine finds, stores and evicts what its model says, and brings right bytes."""

import pathlib
import time

import pytest

from tokendepot.bench import real_depot
from tokendepot.bench.cache_models import Outcome, SegmentCache, play
from tokendepot.bench.extents import Geometry
from tokendepot.bench.real_depot import RealDepot, RealOutcome, RootError, WrongBytesError
from tokendepot.bench.shapes import shape_of
from tokendepot.bench.traces import Request, Trace, read_trace

TRACES = pathlib.Path(__file__).resolve().parents[1] / "traces"
SMALL = Geometry.of_bytes(4096)


def both(trace, roots, geometry=SMALL, segment=None, speed=None, in_step=False):
    model = Outcome()
    play(trace, SegmentCache([capacity for _, capacity in roots], geometry.extent_bytes, segment), model)
    real = RealOutcome()
    depot = RealDepot([(str(path), capacity) for path, capacity in roots], segment, geometry, keep=False)
    try:
        step = in_step_with_its_model(depot, trace, roots) if in_step else lambda requests: None
        depot.play(trace, real, speed, step)
    finally:
        depot.close()
    return model, real


def in_step_with_its_model(depot, trace, roots):
    """Returns what holds a depot back after each prompt until it has evicted what its model has by then: the keeper
    evicts on a thread of its own, and on a busy machine the next prompt would find, and so warm, what was to go."""
    model = SegmentCache([capacity for _, capacity in roots], SMALL.extent_bytes)
    prompts = iter(trace.requests)

    def step(requests):
        for _ in range(requests):
            model.serve(next(prompts).blocks)
        end = time.monotonic() + 30
        while depot._depot.stats()["entries"] > model.stored - model.evicted and time.monotonic() < end:
            time.sleep(0.001)

    return step


def test_a_real_depot_finds_stores_and_evicts_what_its_model_says(root):
    trace = read_trace([str(TRACES / "synthetic_trace.jsonl.gz")], limit=500)
    capacity = int(trace.unique_blocks * 0.3) * SMALL.extent_bytes
    model, real = both(trace, [(root, capacity)], in_step=True)
    assert model.hits > 200
    assert model.evicted > 5000
    assert (real.hits, real.stored, real.evicted) == (model.hits, model.stored, model.evicted)
    assert (real.held, real.unreachable) == (model.held, model.unreachable)
    assert real.unreachable < 0.1 * real.held
    assert real.failures == {}
    assert real.stats["load"]["bytes"] == real.hits * SMALL.extent_bytes
    assert len(real.load_s) > 0
    assert min(real.load_s) > 0
    assert not root.exists()


def test_with_room_for_everything_the_hits_are_exactly_those_of_the_model(memory_root):
    trace = read_trace([str(TRACES / "conversation_trace.jsonl.gz")], limit=300)
    model, real = both(trace, [(memory_root, 64 << 20)])
    assert (real.hits, real.hit_tokens, real.stored, real.evicted) == (model.hits, model.hit_tokens, model.stored, 0)
    assert real.hits > 500


def test_two_roots_keep_what_the_first_one_loses(memory_root, tmp_path):
    trace = read_trace([str(TRACES / "synthetic_trace.jsonl.gz")], limit=300)
    model, real = both(trace, [(memory_root, 4 << 20), (tmp_path / "below", 64 << 20)])
    assert real.hits == model.hits
    assert sum(root["demoted_segments"] for root in real.stats["roots"]) > 10
    assert [root["evicted_segments"] > 0 for root in real.stats["roots"]] == [True, False]


def test_a_model_s_layers_heads_and_rows_are_moved_as_they_are(memory_root):
    prompts = [(0, 1, 2), (0, 1, 3), (0, 1, 2)]
    trace = Trace("made up", "mooncake", 48, [Request(0.0, 144, 1, blocks) for blocks in prompts], 4)
    for name in ("llama-3.1-8b", "deepseek-v3"):
        geometry = Geometry.of_model(shape_of(name), "bf16", 48, 2)
        _, real = both(trace, [(memory_root, 128 << 20)], geometry)
        assert (real.hits, real.stored, real.failures) == (5, 4, {})


def test_prompts_that_do_not_fit_the_paged_cache_move_in_parts(memory_root, monkeypatch):
    monkeypatch.setattr(real_depot, "PAGED_CACHE_BYTES", 6 * SMALL.extent_bytes)
    trace = Trace("made up", "mooncake", 16, [Request(0.0, 16 * n, 1, tuple(range(n))) for n in (20, 25, 25)], 25)
    _, real = both(trace, [(memory_root, 16 << 20)])
    assert (real.hits, real.stored) == (45, 25)
    assert len(real.load_s) == 2


def test_a_trace_is_played_at_its_own_times(memory_root):
    trace = Trace("made up", "mooncake", 16, [Request(t, 16, 1, (0,)) for t in (5.0, 5.2, 5.4)], 1)
    _, real = both(trace, [(memory_root, 16 << 20)], speed=1.0)
    assert real.hits == 2
    assert 0 <= real.late_s < 60


def test_bytes_of_another_block_are_an_error(memory_root, monkeypatch):
    trace = Trace("made up", "mooncake", 16, [Request(0.0, 16, 1, (0,)), Request(0.0, 16, 1, (1,))], 2)
    monkeypatch.setattr(RealDepot, "_key_of", lambda self, block: b"k" * 32)
    with pytest.raises(WrongBytesError, match="block 1: expected its own bytes"):
        both(trace, [(memory_root, 16 << 20)])


def test_directories_are_left_as_they_were_found(memory_root):
    memory_root.mkdir()
    trace = Trace("made up", "mooncake", 16, [Request(0.0, 16, 1, (0,))], 1)
    both(trace, [(memory_root, 16 << 20)])
    assert list(memory_root.iterdir()) == []
    (memory_root / "mine").write_text("x")
    with pytest.raises(RootError, match="expected a directory that is empty or not there yet"):
        both(trace, [(memory_root, 16 << 20)])
    assert (memory_root / "mine").read_text() == "x"


def test_roots_without_room_are_refused_in_words(tmp_path):
    trace = Trace("made up", "mooncake", 16, [Request(0.0, 16, 1, (0,))], 1)
    with pytest.raises(RootError, match=r"bytes free for this capacity, found [\d,]+; fewer --requests"):
        both(trace, [(tmp_path / "root", 1 << 60)])
    with pytest.raises(RootError, match="expected a directory that can be made: No such file or directory"):
        both(trace, [(tmp_path / "a/b/c", 16 << 20)])
    assert list(tmp_path.iterdir()) == []


# The bound of the project's brief for what a depot writes beyond what stores bring, on the two traces.
@pytest.mark.parametrize(("name", "requests"), [("synthetic", 400), ("conversation", 1200)])
@pytest.mark.parametrize("rewrite_percent", [0, 10])
def test_a_depot_writes_a_tenth_more_than_stores_bring_at_most(memory_root, name, requests, rewrite_percent):
    trace = read_trace([str(TRACES / f"{name}_trace.jsonl.gz")], limit=requests)
    geometry = Geometry.of_bytes(64 << 10)
    capacity = int(trace.unique_blocks * 0.1) * geometry.extent_bytes
    depot = RealDepot([(str(memory_root), capacity)], None, geometry, False, rewrite_percent)
    played = RealOutcome()
    try:
        depot.play(trace, played, None, lambda requests: None)
    finally:
        depot.close()
    root = played.stats["roots"][0]
    assert root["evicted_segments"] > 10
    assert (root["rewritten_bytes"] > 0) == (rewrite_percent > 0)
    assert 1.0 < played.write_amplification <= 1.1
    assert root["written_bytes"] >= played.stats["store"]["bytes"] + root["rewritten_bytes"]
