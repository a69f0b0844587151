"""The pieces of the connector that need no scheduler: groups, placement, messages, metrics."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from tokendepot import _core
from tokendepot.engines import vllm_releases
from tokendepot.engines.metrics import BOUNDS_S, EVICTIONS
from tokendepot.engines.vllm import versions
from tokendepot.engines.vllm.fence import StoreFence
from tokendepot.engines.vllm.groups import Placement, describe_groups
from tokendepot.engines.vllm.messages import (
    GroupBlocks,
    LoadOrder,
    StepOrders,
    StepReport,
    StoreOrder,
)
from tokendepot.engines.vllm.repeats import PROOF, REMEMBERED, Repeats
from tokendepot.engines.vllm.scheduler import SchedulerHalf
from tokendepot.engines.vllm.settings import RefusedError, read_settings
from tokendepot.engines.vllm.stats import DepotPromMetrics, DepotStats, EngineCounters
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

ROOTS = {"roots": ["/dev/shm/unused?capacity=64MiB"]}


def configuration(tp: int = 1, pp: int = 1, heads: int = 8, layers: int = 4, **parallel):
    model = SimpleNamespace(
        get_total_num_kv_heads=lambda: heads, hf_text_config=SimpleNamespace(num_hidden_layers=layers)
    )
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=pp, **parallel),
        cache_config=SimpleNamespace(calculate_kv_scales=False),
        model_config=model,
    )


def groups_of(config, *specs, names=4, layout="canonical", chunk=256):
    cache = SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(kv_cache_spec=spec, layer_names=[f"model.layers.{n}.attn" for n in range(names)])
            for spec in specs
        ]
    )
    return describe_groups(config, cache, read_settings({**ROOTS, "layout": layout, "chunk_tokens": chunk}))


def full(heads: int = 8, block: int = 16, **fields) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=block, num_kv_heads=heads, head_size=64, dtype=torch.bfloat16, **fields
    )


def window(size: int, block: int = 16) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block, num_kv_heads=8, head_size=64, dtype=torch.bfloat16, sliding_window=size
    )


def test_ranks_tile_all_heads_once_and_one_replica_stores() -> None:
    for tp in (1, 2, 4, 8, 16, 32):
        group = groups_of(configuration(tp), full(heads=max(1, 8 // tp)))[0]
        places = [Placement(tp, 1, rank) for rank in range(tp)]
        storing = [group.part(place) for place in places if group.stores(place)]
        assert [head for part in storing for head in range(part[2], part[3])] == list(range(8)), tp
        assert {group.part(place) for place in places} == set(storing)


def test_pipeline_ranks_tile_all_layers_once() -> None:
    group = groups_of(configuration(2, 2, layers=8), full(heads=4), names=4)[0]
    parts = [group.part(Placement(2, 2, rank)) for rank in range(4)]
    assert parts == [(0, 4, 0, 4), (0, 4, 4, 8), (4, 8, 0, 4), (4, 8, 4, 8)]
    assert group.want().part == (0, 8, 0, 8)


def test_latent_attention_is_stored_by_one_rank(monkeypatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    spec = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    for layout in ("canonical", "opaque"):
        group = groups_of(configuration(4), spec, layout=layout)[0]
        assert [group.stores(Placement(4, 1, rank)) for rank in range(4)] == [True, False, False, False]
        assert {group.part(Placement(4, 1, rank)) for rank in range(4)} == {(0, 4, 0, 1)}
        if layout == "canonical":
            assert (group.planes, group.row_bytes) == (1, 1152)


def test_windows_keep_the_tail_that_a_boundary_needs() -> None:
    expected = {
        1: (16, 1),
        2: (16, 1),
        17: (16, 1),
        18: (32, 1),
        40: (48, 1),
        257: (256, 1),
        258: (256, 2),
        1024: (256, 4),
    }
    for size, (tokens, chunks) in expected.items():
        group = groups_of(configuration(), full(), window(size))[1]
        assert (group.stored_tokens, group.window_chunks) == (tokens, chunks), size


def test_what_is_not_understood_is_refused_in_one_sentence() -> None:
    mamba = MambaSpec(block_size=16, shapes=((1, 2),), dtypes=(torch.float32,))
    refused = (
        ("MambaSpec", lambda: groups_of(configuration(), full(), mamba)),
        ("block size 48", lambda: groups_of(configuration(), full(block=48))),
        (
            "decode_context_parallel_size",
            lambda: groups_of(configuration(decode_context_parallel_size=2), full()),
        ),
        ("several groups", lambda: groups_of(configuration(pp=2), full(), window(40))),
        ("no share of", lambda: groups_of(configuration(pp=2, layers=8), full(), names=5)),
        ("over 2 ranks", lambda: groups_of(configuration(2, heads=8), full(heads=3))),
        ("no KV-cache group", lambda: groups_of(configuration())),
    )
    for text, call in refused:
        with pytest.raises(RefusedError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_vllm_below_the_range_is_refused_and_one_above_is_only_warned_of(monkeypatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(versions.log, "warning", lambda text, *values: warnings.append(text % values))
    for version, refused, warned in (
        ("0.19.4", True, False),
        ("0.20.0", False, False),
        ("0.33.7+cpu", False, False),
        ("0.34.0", False, True),
        ("1.0.0rc1", False, True),
        ("dev", False, False),
    ):
        monkeypatch.setattr(versions.vllm, "__version__", version)
        monkeypatch.setattr(versions, "VLLM", versions.parse(version))
        warnings.clear()
        problem = vllm_releases.refusal(version)
        expected = f"vLLM {version} is not supported: tokendepot serves 0.20 to 0.33" if refused else None
        assert problem == expected, version
        versions.warn_if_untested()
        assert len(warnings) == warned, version
        said = f"vLLM {version} is newer than the newest tested release (0.33)"
        assert all(said in text for text in warnings)


MILLION = 1 << 20


def store_chunks(root: str, namespace: bytes, keys: bytes, first: int, last: int) -> None:
    """Chunks [first, last) of 256 tokens, small ones: opaque pages of 64 bytes."""
    memory = torch.zeros(17 * 64, dtype=torch.uint8)
    depot = _core.Depot.open(
        json.dumps({"roots": [f"{root}?capacity=256MiB"], "free_space_reserve": 0, "slab": "16MiB"}),
        catalog=False,
        writer=True,
    )
    layer = [(memory.data_ptr(), 64, 0, 0, 64)]
    depot.attach(
        group=0, kind="opaque", part=(0, 4, 0, 1), tokens=256, block_tokens=16, block_count=17, page_bytes=64,
        layers=[layer] * 4,
    )  # fmt: skip
    for begin in range(first, last, 256):
        chunks = range(begin, min(begin + 256, last))
        items = [(keys[32 * chunk : 32 * chunk + 32], chunk, 0, list(range(1, 17))) for chunk in chunks]
        depot.submit_store(1 + begin, _core.plan_store(namespace, items))
        assert depot.flush(60.0)
    assert not any(ended["failures"] for ended in depot.poll())
    depot.close()


def slowest_call(half: SchedulerHalf, ids: list[int]) -> tuple[int, float]:
    """(tokens of the answer, seconds that the slowest call worked) for a prompt, asked until there is an answer."""
    request = SimpleNamespace(
        request_id=f"r{half._next_job}",
        num_tokens=len(ids),
        all_token_ids=ids,
        mm_features=[],
        lora_request=None,
        cache_salt=None,
        skip_reading_prefix_cache=False,
    )
    slowest, answer = 0.0, None
    while answer is None:
        began = time.thread_time()
        answer = half.matched_tokens(request, 0)
        slowest = max(slowest, time.thread_time() - began)
    half.finished(request)
    return answer, slowest


def test_no_look_up_for_a_prompt_of_a_million_tokens_holds_up_the_scheduler(tmp_path) -> None:
    half = scheduler_half(tmp_path, None, layout="opaque", chunk_tokens=256)
    ids = [(17 * number) % 240 + 3 for number in range(MILLION + 1)]
    chain = _core.KeyChain(half._namespace, 256)
    chain.append(ids[:MILLION])
    keys, count, stored = chain.keys(), MILLION // 256, 0
    for until in (0, 1, count - 1, count):
        store_chunks(f"{tmp_path}/depot", half._namespace, keys, stored, until)
        stored = until
        half._depot.refresh()
        answers, seconds = zip(*(slowest_call(half, ids) for _ in range(5)), strict=True)  # others use the caches too
        assert set(answers) == {until * 256} and min(seconds) < 0.005, (until, answers, seconds)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    slowest_call(half, ids)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 4 * len(keys) + (2 << 20), "keys, and one call's token ids"
    assert after - before < 64 << 10, "nothing of it is kept"
    half.close()


def speculation(method: str, model: str, reads_target: bool) -> SimpleNamespace:
    return SimpleNamespace(method=method, model=model, use_eagle=lambda: reads_target)


def scheduler_half(tmp_path, speculative, **extra) -> SchedulerHalf:
    config = configuration()
    config.speculative_config = speculative
    config.kv_transfer_config = SimpleNamespace(
        is_kv_consumer=True, is_kv_producer=True, kv_load_failure_policy="recompute"
    )
    config.cache_config.cache_dtype, config.cache_config.enable_prefix_caching = "auto", True
    config.model_config.dtype = torch.bfloat16
    config.model_config.quantization = None
    names = [f"model.layers.{number}.attn" for number in range(4)]
    groups = [SimpleNamespace(kv_cache_spec=full(), layer_names=names)]
    settings = read_settings(
        {
            "roots": [f"{tmp_path}/depot?capacity=64MiB"],
            "free_space_reserve": 0,
            "slab": "16MiB",
            "chunk_tokens": 64,
            "layout": "canonical",
            "min_load_tokens": 64,
            "model_digest": "tests",
            **extra,
        }
    )
    return SchedulerHalf(settings, config, SimpleNamespace(kv_cache_groups=groups))


def hit_of(half: SchedulerHalf, chunks_held: int, tokens: int) -> int | None:
    """What is promised of a prompt of whose prefix the depot holds that many chunks."""
    depot = half._depot
    half._depot = SimpleNamespace(longest_prefix=lambda keys, wants: min(len(keys) // 32, chunks_held))
    try:
        ids = list(range(tokens))
        request = SimpleNamespace(
            request_id=f"r{chunks_held}-{tokens}",
            num_tokens=tokens,
            all_token_ids=ids,
            mm_features=[],
            lora_request=None,
            cache_salt=None,
            skip_reading_prefix_cache=False,
        )
        return half.matched_tokens(request, 0)
    finally:
        half._depot = depot


def test_where_a_draft_model_reads_the_cache_the_last_chunk_of_a_hit_is_computed(tmp_path) -> None:
    """A chunk's last cell then depends on the token behind the chunk, which its key does not hold."""
    assert not versions.chunk_drop_needed(None)
    assert not versions.chunk_drop_needed(SimpleNamespace(method="older, without the question"))
    for speculative, dropped in (
        (None, 0),
        (speculation("ngram", "", False), 0),
        (speculation("eagle", "draft", True), 1),
    ):
        half = scheduler_half(tmp_path, speculative)
        for held, tokens in ((0, 300), (1, 300), (3, 300), (9, 300), (9, 257), (9, 256)):
            hit = min(held, (tokens - 1) // 64)
            assert hit_of(half, held, tokens) == max(0, hit - dropped) * 64, (speculative, held, tokens)
        half.close()


def test_draft_models_have_namespaces_of_their_own(tmp_path) -> None:
    def namespace(speculative) -> bytes:
        half = scheduler_half(tmp_path, speculative)
        half.close()
        return bytes(half._namespace)

    plain = namespace(None)
    assert namespace(speculation("ngram", "", False)) == plain, "drafts that leave no trace in the cache"
    drafted = [
        namespace(speculation(method, model, True))
        for method, model in (("eagle", "one"), ("eagle", "two"), ("mtp", "one"))
    ]
    assert len({plain, *drafted}) == 4
    assert namespace(speculation("eagle", "one", True)) == drafted[0]


def test_reports_of_ranks_add_up() -> None:
    one = StepReport({(1, 2, 0)}, {7: 1}, {(7, 3)}, {5: 1}, {6})
    two = StepReport({(1, 4, 0)}, {7: 1, 8: 1}, ended_holds={5: 1}, disabled="why", steps={5})
    both = one.aggregate(two)
    assert both == StepReport(
        {(1, 2, 0), (1, 4, 0)}, {7: 2, 8: 1}, {(7, 3)}, {5: 2}, {6}, disabled="why", steps={5}
    )
    assert StepReport().is_empty() and not both.is_empty()


def step_output(new=(), cached=()) -> SimpleNamespace:
    """new: (tables, computed); cached: (new tables or None, computed, resumed)."""
    names = [f"c{number}" for number in range(len(cached))]
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=ids, num_computed_tokens=done) for ids, done in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=names,
            new_block_ids=[ids for ids, _, _ in cached],
            num_computed_tokens=[done for _, done, _ in cached],
            resumed_req_ids={name for name, (_, _, resumed) in zip(names, cached, strict=True) if resumed},
        ),
    )


def test_a_fence_stands_where_a_block_of_a_running_store_is_written() -> None:
    fence = StoreFence(groups_of(configuration(), full(), window(40)), ranks=2)
    assert not fence.needed_by(step_output(new=[(([5], [6]), 0)])), "nothing is being read"
    fence.begin(1, [5, 6])
    fence.begin(2, [7])
    assert fence.needed_by(step_output(new=[(([5], [9]), 0)]))
    assert fence.needed_by(step_output(new=[(([3, 5], [9, 8]), 16)]))
    assert not fence.needed_by(step_output(new=[(([5, 3], [9, 8]), 16)])), "a prefix hit is only read"
    assert fence.needed_by(step_output(cached=[(None, 16, False), (([], [7]), 48, False)]))
    assert not fence.needed_by(step_output(cached=[(([5, 3], [6, 4]), 16, True)])), "resumed with a prefix hit"
    assert fence.needed_by(step_output(cached=[(([5, 3], [6, 4]), 0, True)]))
    fence.allocated([[5, 3], [6, 4]], 16)
    assert not fence.needed_by(step_output())
    fence.allocated([[5, 7], [6, 4]], 16)
    assert fence.needed_by(step_output()) and not fence.needed_by(step_output()), "of one step"
    fence.ended(1, 1)
    assert fence.needed_by(step_output(new=[(([5], [9]), 0)])), "one rank may still read"
    fence.ended(1, 1)
    fence.ended(1, 1)
    assert not fence.needed_by(step_output(new=[(([5], [6]), 0)]))
    assert fence.needed_by(step_output(new=[(([7], [9]), 0)]))


def test_the_device_is_given_to_workers_and_kept_from_the_scheduler() -> None:
    roots = {"roots": ["/dev/shm/never-made?capacity=1GiB"]}
    plain, chosen = read_settings(roots), read_settings({**roots, "device": "cuda:1", "store_queue": "1GiB"})
    for settings in (plain, chosen):
        assert _core.parse_options(settings.engine_options("host"))["device"] == "host"
        assert _core.parse_options(settings.engine_options("cuda:0"))["device"] == "cuda:0"
    assert _core.parse_options(plain.engine_options("host", store_queue=7 << 30))["store_queue"] == 7 << 30
    assert _core.parse_options(chosen.engine_options("host", store_queue=7 << 30))["store_queue"] == 1 << 30


def test_only_prompts_that_were_stored_before_can_be_missed() -> None:
    repeats = Repeats()
    repeats.stored(b"a", 10.0)
    assert not repeats.looked_up(b"b", False, 11.0), "never stored"
    assert not repeats.looked_up(b"a", False, 9.0), "not to be seen yet"
    for _ in range(PROOF - 1):
        assert repeats.looked_up(b"a", False, 11.0)
    assert repeats.complaint() == ""
    assert repeats.looked_up(b"a", False, 11.0)
    assert str(PROOF) in repeats.complaint()
    assert not repeats.looked_up(b"a", True, 11.0)
    assert repeats.complaint() == "", "one that is found clears stores and look-ups of the suspicion"
    for number in range(REMEMBERED):
        repeats.stored(number.to_bytes(4, "big"), 0.0)
    assert not repeats.looked_up(b"a", False, 11.0), "the oldest are forgotten"


def test_orders_stay_small_and_survive_pickling() -> None:
    ids = list(range(8192))
    orders = StepOrders(
        [LoadOrder(1, "r", b"plan", [GroupBlocks.pack(0, 3, 16, ids)])], [StoreOrder(2, 0, b"plan")]
    )
    packed = pickle.dumps(orders)
    assert len(packed) < 4 * len(ids) + 1000
    places = pickle.loads(packed).loads[0].groups[0]
    assert places.ids() == ids and places.of_chunk(4) == set(range(16, 32)) and places.of_chunk(2) == set()
    assert GroupBlocks.pack(0, 0, 2, [5, -1]).wanted() == {5}


def evictions(each: int) -> dict:
    return dict.fromkeys((*EVICTIONS, "manual"), each)


def engine_stats(load: int = 0, corrupt: int = 0, gds_errors: int = 0) -> dict:
    failures = dict.fromkeys(
        ("absent", "mismatch", "corrupt", "io_error", "timed_out", "cancelled", "dropped", "pinned"), 0
    )
    paths = dict.fromkeys(("mapped", "direct", "buffered", "gds_p2p", "gds_compat"), 0)
    quiet = dict(counts=[0] * 11, nanoseconds=0)
    way = dict(
        latency=dict(counts=[0, load, *[0] * 9], nanoseconds=load * 10**6),
        queue=quiet,
        extents=load,
        bytes=load * 100,
        nanoseconds=load * 10**9,
        failures={**failures, "corrupt": corrupt},
        by_path={**paths, "direct": load, "gds_p2p": load * 99},
        tokens_by_path={**paths, "gds_p2p": load * 256.0},
    )
    idle = dict(extents=0, bytes=0, nanoseconds=0, failures=failures, latency=quiet, queue=quiet)
    idle |= dict(by_path=paths, tokens_by_path=paths)
    nothing = dict(bytes=0, tokens=0)
    roots = [
        dict(id=f"{n}" * 32, loaded=nothing, stored=nothing, journal_lag=quiet, evicted_bytes=evictions(0))
        | dict.fromkeys(("gds_errors", "written_bytes", "timed_out_loads", "scrubbed_bytes", "scrub_errors"), 0)
        | dict(demotion_lag_bytes=0, demotion_lag_ns=0, suspended=bool(load))
        for n in range(6)
    ]
    roots[0] |= dict(gds_errors=gds_errors, loaded=dict(bytes=load * 100, tokens=load * 256.0))
    roots[4]["evicted_bytes"] = roots[5]["evicted_bytes"] = {**evictions(0), "capacity": load}
    drops = dict(no_root=0, queue_full=load, no_space=0, late=0, next_root=0)
    return dict(load=way, store=idle, roots=roots, drops=drops, device=dict(mapped_bytes=10 - load, registered_bytes=0))


def test_metrics_are_deltas_and_counters_go_on_in_a_second_engine() -> None:
    counters = EngineCounters(rank=0)
    carried = {"bytes_by:load:direct": 2, "bytes_by:load:gds_p2p": 198, "tokens_by:load:gds_p2p": 512}
    first = counters.delta(engine_stats(2))
    of_roots = {key for key, value in first.items() if not value}
    of_a_root = ("root:", "root_gauge:")
    assert len(of_roots) == 5 * 12 - 3 and all(key.startswith(of_a_root) for key in of_roots), "they begin with 0"
    assert {key: value for key, value in first.items() if value} == {
        **dict(load_extents=2, load_bytes=200, load_seconds=2.0),
        **carried,
        "drops:queue_full": 2,
        "gauge:mapped_bytes": 8,
        "gauge:suspended_roots": 6,
        "bucket:load_latency:1": 2,
        "bucket:load_latency:sum": 0.002,
        "root:moved_bytes:00000000:load": 200,
        "root:moved_tokens:00000000:load": 512,
        "root:evicted_bytes:other:capacity": 4,
    }
    of_another_rank = EngineCounters(rank=1).delta(engine_stats(2))
    assert not {"root:moved_tokens:00000000:load", "tokens_by:load:gds_p2p"} & of_another_rank.keys()
    assert counters.delta(engine_stats(2, 1, 3)) == {"failures:load:corrupt": 1, "gds_errors": 3}
    assert counters.delta(engine_stats(2, 1, 3)) == {}
    assert counters.delta(engine_stats(3, 1, 3))["gauge:mapped_bytes"] == -1
    lagging = engine_stats(3, 1, 3)
    lagging["roots"][0] |= dict(demotion_lag_bytes=7, demotion_lag_ns=5 * 10**8)
    late = {"root_gauge:demotion_lag_bytes:00000000": 7, "root_gauge:demotion_lag_seconds:00000000": 0.5}
    assert counters.delta(lagging) == late
    assert counters.delta(engine_stats(3, 1, 3)) == {key: -value for key, value in late.items()}
    merged = DepotStats(data={"load_bytes": 200, "load_seconds": 1e-6}).aggregate(
        DepotStats(data={"load_bytes": 1})
    )
    assert merged.reduce()["tokendepot_load_bytes"] == 201 and not merged.is_empty()
    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    config = SimpleNamespace(kv_transfer_config=None)
    for _ in range(2):
        metrics = DepotPromMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
        metrics.observe(
            {"load_bytes": 5, "failures:load:corrupt": 2, "bytes_by:store:gds_compat": 7, "unknown": 1}, 1
        )
    labels = dict(model_name="m", engine="1")
    assert REGISTRY.get_sample_value("tokendepot_load_bytes_total", labels) == 10
    failed = dict(labels, operation="load", reason="corrupt")
    assert REGISTRY.get_sample_value("tokendepot_failures_total", failed) == 4
    carried = dict(labels, operation="store", path="gds_compat")
    assert REGISTRY.get_sample_value("tokendepot_carried_bytes_total", carried) == 14


def test_an_engine_has_at_most_200_series_and_histograms_add_up() -> None:
    registry = CollectorRegistry()
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    metrics = DepotPromMetrics(SimpleNamespace(kv_transfer_config=None), types, ["engine"], {0: ["0"]})
    bounds = [bound * 1e9 for bound in BOUNDS_S]
    depot = engine_stats(2)
    depot["roots"] = [
        {**root, "id": f"{n:032x}"[::-1], "written_bytes": 1, "evicted_bytes": evictions(1), "demotion_lag_ns": 1}
        | {way: {"bytes": 1, "tokens": 1} for way in ("loaded", "stored")}
        for n, root in enumerate([depot["roots"][0]] * 8)
    ]
    metrics.observe({**EngineCounters(0).delta(depot), "bucket:unheard of:1": 3, "gauge:unheard of": 1, "root:x:y": 1})
    samples = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    assert 100 < len(samples) <= 200
    found = {sample.labels["le"]: sample.value for sample in samples if sample.name == "tokendepot_load_latency_seconds_bucket"}
    assert [found[key] for key in list(found)[:3]] == [0, 2, 2] and found["+Inf"] == 2 and len(found) == len(bounds) + 1
    assert registry.get_sample_value("tokendepot_load_latency_seconds_sum", {"engine": "0"}) == 0.002


def test_keys_do_not_depend_on_the_process(tmp_path) -> None:
    script = (
        "import sys; sys.path.reverse(); from tokendepot import _core; c = _core.KeyChain(bytes(32), 16, "
        "'salt', b'lora');"
        "c.append(list(range(64)), [('image', 3, 20)]); print(bytes(c.keys()).hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            env=dict(os.environ, PYTHONHASHSEED=seed),
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop().strip()) == 4 * 64


@pytest.mark.parametrize("name", ["memory", "local-nvme", "shared"])
def test_vllm_takes_the_arguments_of_the_kubernetes_manifests(name: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    manifest = Path(__file__).parents[2] / f"deploy/kubernetes/{name}.yaml"
    *_, deployment = yaml.safe_load_all(manifest.read_text(encoding="utf-8"))
    engine = deployment["spec"]["template"]["spec"]["containers"][0]
    assert engine["command"] == ["vllm", "serve"]
    parsed, servers = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(engine["args"])
    (port,) = (port["containerPort"] for port in engine["ports"])
    assert servers == [engine["args"][0], f"--port={port}"]  # options of the server, not of the engine
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert parsed.shutdown_timeout + 20 < grace  # the depot's own patience at the end
    assert parsed.kv_transfer_config.kv_connector_module_path == "tokendepot.engines.vllm"
    assert read_settings(parsed.kv_transfer_config.kv_connector_extra_config).root_paths
